"""What holds for every learner, every rule and every execution. Adding one is a row here.

Everything in float64 against references that share no code with the package. What is computed again and again, the
gradients of a learner at the same parameters on the same tasks, is computed once (`remembered`).
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import nn

from metaheed.engine.executions.processes import AVAILABLE, Workers
from metaheed.learners import ANIL, BOIL, MAML, Conv4, Learner, MetaLSTM, MetaSGD, ProtoNet, Reptile
from metaheed.outer import (
    Execution,
    OuterOptimizer,
    OuterState,
    Rule,
    TaskAttention,
    Tools,
    adam,
    attended,
    clipped,
    evaluate_adapted,
    evaluate_initial,
    initial_gradient,
    looped,
    loss_softmax,
    map_im2col,
    map_looped,
    replayed,
    sequential,
    sgd,
    task_gradient,
    threaded,
    uniform,
    uniform_2b,
    vectorized,
    weighted_sum,
    worst_case,
)
from metaheed.rules.equity import equity
from metaheed.running.checkpoint import Checkpoint, RunProgress
from metaheed.running.folder import RunFolder
from metaheed.types import Episode, Params, TaskInfo
from tests.conftest import make_batch, task
from tests.networks import Tiny
from tests.reference import (
    assert_close,
    gradient,
    index_of_inequality,
    maml_query_loss,
    meta_lstm_query_loss,
    meta_sgd_query_loss,
    part_query_loss,
    protonet_query_loss,
    reptile_query_loss,
    with_grad,
)

T = TypeVar("T")
WAYS, SHAPE, TASKS = 3, (1, 16, 16), 3


class LearnerRow(NamedTuple):
    build: Callable[[nn.Module], Learner]
    query_loss: Callable[[nn.Module, Params, Episode], tuple[torch.Tensor, Params]]
    """The reference: query loss after adaptation and the adapted parameters."""
    exact: bool
    """Whether the meta-gradient is the loss's true gradient, so that finite differences agree."""


def head_of(network: nn.Module) -> str:
    return "head" if isinstance(network, Conv4) else "6"


def _head_only(network: nn.Module, body: bool = False) -> list[str]:
    return [n for n, _ in network.named_parameters() if n.startswith(head_of(network)) != body]


LEARNERS = {
    "maml": LearnerRow(
        lambda net: MAML(net, adaptation_steps=2, fast_lr=0.3),
        lambda net, meta, episode: maml_query_loss(net, meta, episode, 2, 0.3),
        exact=True,
    ),
    "fomaml": LearnerRow(
        lambda net: MAML(net, adaptation_steps=2, fast_lr=0.3, first_order=True),
        lambda net, meta, episode: maml_query_loss(net, meta, episode, 2, 0.3, first_order=True),
        exact=False,
    ),
    "maml, recomputed": LearnerRow(
        lambda net: MAML(net, adaptation_steps=2, fast_lr=0.3, recompute=True),
        lambda net, meta, episode: maml_query_loss(net, meta, episode, 2, 0.3),
        exact=True,
    ),
    "metasgd": LearnerRow(
        lambda net: MetaSGD(net, adaptation_steps=2, fast_lr=0.3),
        lambda net, meta, episode: meta_sgd_query_loss(net, meta, episode, 2),
        exact=True,
    ),
    "metalstm": LearnerRow(
        lambda net: MetaLSTM(net, adaptation_steps=2, hidden_size=5, forget_bias=(1, 2), input_bias=(-2, -1)),
        lambda net, meta, episode: meta_lstm_query_loss(net, meta, episode, 2),
        exact=False,
    ),
    "anil": LearnerRow(
        lambda net: ANIL(net, adaptation_steps=2, fast_lr=0.3),
        lambda net, meta, episode: part_query_loss(net, meta, episode, 2, 0.3, _head_only(net)),
        exact=True,
    ),
    "boil": LearnerRow(
        lambda net: BOIL(net, adaptation_steps=2, fast_lr=0.3),
        lambda net, meta, episode: part_query_loss(net, meta, episode, 2, 0.3, _head_only(net, body=True)),
        exact=True,
    ),
    "protonet": LearnerRow(
        lambda net: ProtoNet(net),
        lambda net, meta, episode: protonet_query_loss(net, meta, episode, head_of(net)),
        exact=True,
    ),
    "reptile": LearnerRow(
        lambda net: Reptile(net, adaptation_steps=2, fast_lr=0.3),
        lambda net, meta, episode: reptile_query_loss(net, meta, episode, 2, 0.3),
        exact=False,
    ),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tiny": lambda: Tiny(WAYS, SHAPE),
    "conv4": lambda: Conv4(WAYS, SHAPE, hidden=4),
    "conv4-strided": lambda: Conv4(WAYS, SHAPE, hidden=4, downsample="stride"),
}
EXECUTIONS: dict[str, Callable[[Learner], Execution[tuple[Params, TaskInfo]]]] = {
    "looped": looped,
    "vectorized": vectorized,
    "threaded": lambda learner: threaded(learner, workers=2),
    "vectorized by 2": lambda learner: vectorized(learner, chunk_size=2),
    "im2col": lambda learner: map_im2col(partial(task_gradient, learner)),
}
if AVAILABLE:
    EXECUTIONS["processes"] = lambda learner: partial(Workers(learner, 2).map, task_gradient)
RULES: dict[str, Callable[[], Rule]] = {
    "uniform": uniform,
    "sequential": sequential,
    "equity": lambda: equity(0.3, losses="adapted"),
    "uniform 2B": uniform_2b,
    "softmax of loss": lambda: loss_softmax(0.5),
    "worst case": lambda: worst_case(0.2),
    "replayed": lambda: replayed(torch.linspace(1, 15, 15, dtype=torch.float64).reshape(5, 3) / 30, seed=3),
    "as released": lambda: attended(_attention(), adam(0.05), 0.01, release_leak=True),
    "attended with probe reuse": lambda: attended(_attention(), adam(0.05), 0.01, reuse_probe=True),
    "attended without loss": lambda: attended(_attention(omit="query_loss"), adam(0.05), 0.01),
    "attended": lambda: attended(_attention(), adam(0.05), 0.01),
    "attended through optimizer": lambda: attended(_attention(), adam(0.05), 0.01, "optimizer"),
    "attended equivariant": lambda: attended(_attention("equivariant", standardize=True), adam(0.05), 0.01),
}


ATTENDED = [name for name in sorted(RULES) if name.startswith("attended")]
WEIGHTED = ["uniform", "softmax of loss", "worst case", *ATTENDED]
"""Rules whose step is that on the sum of the gradients with the weights of their record."""


def _attention(architecture: str = "paper", standardize: bool = False, omit: str | None = None) -> TaskAttention:
    generator = torch.Generator().manual_seed(2)
    return TaskAttention(TASKS, architecture, standardize, generator=generator, omit=omit).double()


@pytest.fixture(params=sorted(LEARNERS))
def row(request: pytest.FixtureRequest) -> LearnerRow:
    return LEARNERS[request.param]


_ONCE: dict[Any, Any] = {}


def _once(key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What was made for a key before, or what is made now."""
    if key not in _ONCE:
        _ONCE[key] = make()
    made: T = _ONCE[key]
    return made


def _network(name: str) -> nn.Module:
    torch.manual_seed(3)
    return NETWORKS[name]().double()


def _meta(learner: Learner) -> Params:
    return {name: p.double() for name, p in learner.init(torch.Generator().manual_seed(0)).items()}


@pytest.fixture(params=sorted(NETWORKS))
def network(request: pytest.FixtureRequest) -> nn.Module:
    return _once(("network", request.param), lambda: _network(request.param))


@pytest.fixture
def learner(row: LearnerRow, network: nn.Module) -> Learner:
    return _once(("learner", row, network), lambda: row.build(network))


@pytest.fixture
def meta(learner: Learner) -> Params:
    return _meta(learner)


@pytest.fixture
def batch() -> Episode:
    return make_batch(TASKS, WAYS, 2, 3, SHAPE)


@pytest.fixture
def probe() -> Episode:
    first = make_batch(2 * TASKS, WAYS, 2, 3, SHAPE)
    return Episode(*(part[TASKS:] for part in first))


def _contents(tree: Params | Episode) -> bytes:
    """A digest of every bit of the tensors, of their names, types and shapes."""
    digest = hashlib.sha256()
    for name, leaf in (tree if isinstance(tree, dict) else tree._asdict()).items():
        digest.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(leaf.detach().contiguous().numpy().tobytes())
    return digest.digest()


def _remember(execution: Execution[Any]) -> Execution[Any]:
    """The execution, which computes once what it is asked for at the very same parameters on the very same tasks."""
    found: dict[tuple[bytes, bytes], tuple[Params, Any]] = {}

    def run(meta: Params, tasks: Episode) -> tuple[Params, Any]:
        key = (_contents(meta), _contents(tasks))
        if key not in found:
            found[key] = execution(meta, tasks)
        grads, info = found[key]
        copied = info.clone() if isinstance(info, torch.Tensor) else TaskInfo(*(part.clone() for part in info))
        return {name: g.clone() for name, g in grads.items()}, copied

    return run


def remembered(learner: Learner) -> Execution[tuple[Params, TaskInfo]]:
    """`looped`, each gradient computed once for all tests of the learner."""
    return _once(("gradients", learner), lambda: _remember(looped(learner)))


def _remembered_initial(learner: Learner) -> Execution[tuple[Params, torch.Tensor]]:
    make = lambda: _remember(map_looped(lambda m, e: initial_gradient(learner, m, e)))  # noqa: E731
    return _once(("initial", learner), make)


def _executed(execution: str, learner: Learner, meta: Params, batch: Episode) -> tuple[Params, TaskInfo]:
    """What an execution makes of the fixtures' batch at the initial parameters."""
    return _once(("executed", execution, learner), lambda: EXECUTIONS[execution](learner)(meta, batch))


def _one_by_one(learner: Learner, meta: Params, batch: Episode) -> list[tuple[Params, TaskInfo]]:
    """The same, each task alone."""
    tasks = [task(batch, index) for index in range(TASKS)]
    return _once(("one by one", learner), lambda: [task_gradient(learner, meta, one) for one in tasks])


def test_meta_gradient_is_the_reference(
    row: LearnerRow, network: nn.Module, learner: Learner, meta: Params, batch: Episode
) -> None:
    for index in range(2):
        episode = task(batch, index)
        start = with_grad(meta)
        loss, phi = row.query_loss(network, start, episode)
        g, info = task_gradient(learner, meta, episode)
        assert_close(g, gradient(loss, start))
        torch.testing.assert_close(info.query_loss, loss.detach(), rtol=1e-12, atol=0)
        norm = torch.stack([v.square().sum() for v in gradient(loss, phi).values()]).sum().sqrt()
        torch.testing.assert_close(info.grad_norm, norm, rtol=1e-10, atol=0)
        assert all(g[name].dtype == torch.float64 and g[name].shape == meta[name].shape for name in meta)
        assert all(value.dtype == torch.float64 and value.shape == () for value in info)


@pytest.mark.parametrize("row", [name for name, row in LEARNERS.items() if row.exact], indirect=True)
@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # a smooth one
def test_meta_gradient_is_the_finite_difference(learner: Learner, meta: Params, batch: Episode) -> None:
    episode = task(batch, 0)
    g, _ = task_gradient(learner, meta, episode)
    generator = torch.Generator().manual_seed(9)
    for _ in range(4):
        direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in meta.items()}
        h = 1e-5

        def at(step: float, direction: Params = direction) -> float:
            moved = {n: p + step * direction[n] for n, p in meta.items()}
            loss, _ = evaluate_adapted(learner, moved, episode)
            return float(loss)

        difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        product = sum(float((g[n] * direction[n]).sum()) for n in g)
        assert difference == pytest.approx(product, rel=1e-7, abs=1e-9)


def test_infos_are_what_they_say(learner: Learner, meta: Params, batch: Episode) -> None:
    episode = task(batch, 1)
    _, info = task_gradient(learner, meta, episode)
    logits = learner.predict(learner.adapt(meta, episode.support_x, episode.support_y), episode.query_x)
    assert float(info.query_accuracy) == pytest.approx(float((logits.argmax(1) == episode.query_y).double().mean()))
    before = learner.predict(learner.initial(meta), episode.query_x)
    torch.testing.assert_close(info.initial_loss, nn.functional.cross_entropy(before, episode.query_y))


def test_initial_gradient_is_the_reference(network: nn.Module, learner: Learner, meta: Params, batch: Episode) -> None:
    episode = task(batch, 0)
    start = with_grad(meta)
    loss = nn.functional.cross_entropy(learner.predict(learner.initial(start), episode.query_x), episode.query_y)
    g, value = initial_gradient(learner, meta, episode)
    assert_close(g, gradient(loss, start))
    torch.testing.assert_close(value, loss.detach())


@pytest.mark.parametrize("execution", sorted(EXECUTIONS))
def test_executions_agree(execution: str, learner: Learner, meta: Params, batch: Episode) -> None:
    grads, info = _executed(execution, learner, meta, batch)
    for index, (g, one) in enumerate(_one_by_one(learner, meta, batch)):
        assert_close({name: leaf[index] for name, leaf in grads.items()}, g)
        torch.testing.assert_close(torch.stack([*one]), torch.stack([part[index] for part in info]))


@pytest.mark.slow
@pytest.mark.parametrize("execution", sorted(EXECUTIONS))
def test_tasks_do_not_touch_each_other(execution: str, learner: Learner, meta: Params, batch: Episode) -> None:
    grads, info = _executed(execution, learner, meta, batch)
    others = Episode(*(torch.cat([part[:1], part[1:].flip(0)]) for part in batch))
    others = others._replace(query_x=torch.cat([others.query_x[:1], 3 * others.query_x[1:]]))
    grads2, info2 = EXECUTIONS[execution](learner)(meta, others)
    assert_close({n: g[0] for n, g in grads.items()}, {n: g[0] for n, g in grads2.items()})
    torch.testing.assert_close(info.query_loss[0], info2.query_loss[0])


def test_training_and_test_adapt_identically(learner: Learner, meta: Params, batch: Episode) -> None:
    """The loss of the training step and that of evaluation are the same bits."""
    _, info = looped(learner)(meta, batch)
    losses, accuracies = map_looped(lambda m, e: evaluate_adapted(learner, m, e))(meta, batch)
    before, _ = map_looped(lambda m, e: evaluate_initial(learner, m, e))(meta, batch)
    assert torch.equal(info.query_loss, losses)
    assert torch.equal(info.query_accuracy, accuracies)
    assert torch.equal(info.initial_loss, before)


def test_float32_follows_float64(learner: Learner, meta: Params, batch: Episode) -> None:
    single = {name: p.float() for name, p in meta.items()}
    g, info = task_gradient(learner, single, task(batch, 0))
    assert all(leaf.dtype == torch.float32 for leaf in [*g.values(), *info])
    exact, _ = task_gradient(learner, meta, task(batch, 0))
    scale = max(float(leaf.abs().max()) for leaf in exact.values())
    assert max(float((g[n] - exact[n]).abs().max()) for n in g) < 1e-3 * scale


def _tools(learner: Learner, optimizer: OuterOptimizer, train: Episode, probe: Episode) -> Tools:
    # Under probe reuse training batch 1 is what step 0 probes.
    gradients, initial = remembered(learner), _remembered_initial(learner)
    return Tools(gradients, initial, optimizer, lambda t: train if t == 0 else probe, lambda t: probe)


def _start(rule: Rule, optimizer: OuterOptimizer, meta: Params) -> OuterState:
    return OuterState(meta, optimizer.init(meta), rule.init(meta))


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
@pytest.mark.parametrize("rule", WEIGHTED)
def test_rule_steps_on_the_weighted_gradients(
    rule: str, learner: Learner, meta: Params, batch: Episode, probe: Episode
) -> None:
    chosen, optimizer = RULES[rule](), adam(0.01)
    state = _start(chosen, optimizer, meta)
    after, record = chosen.step(state, 0, _tools(learner, optimizer, batch, probe))
    grads, _ = remembered(learner)(meta, batch)
    assert float(record.weights.sum()) == pytest.approx(1)
    by_hand = {n: sum(record.weights[i] * g[i] for i in range(TASKS)) for n, g in grads.items()}
    expected, _ = optimizer.step(meta, optimizer.init(meta), by_hand)  # type: ignore[arg-type]  # sum of tensors
    # A gradient that is zero but for rounding (a bias before a norm) moves by its sign under Adam's first step.
    real = [n for n, g in by_hand.items() if float(g.abs().max()) > 1e-9]  # type: ignore[union-attr]
    assert_close({n: after.meta[n] for n in real}, {n: expected[n] for n in real}, rtol=1e-6)


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
@pytest.mark.parametrize("rule", sorted(set(RULES) - {"uniform 2B", "as released"}))
def test_nothing_of_the_probe_batch_reaches_theta(
    rule: str, learner: Learner, meta: Params, batch: Episode, probe: Episode
) -> None:
    chosen, optimizer = RULES[rule](), adam(0.01)
    state = _start(chosen, optimizer, meta)
    one, _ = chosen.step(state, 0, _tools(learner, optimizer, batch, probe))
    other_probe = probe._replace(query_x=-2 * probe.query_x)
    two, _ = chosen.step(state, 0, _tools(learner, optimizer, batch, other_probe))
    assert all(torch.equal(one.meta[n], two.meta[n]) for n in meta)
    assert all(torch.equal(one.optimizer[n], two.optimizer[n]) for n in one.optimizer)


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
def test_as_released_the_probe_batch_reaches_theta(
    learner: Learner, meta: Params, batch: Episode, probe: Episode
) -> None:
    chosen, optimizer = RULES["as released"](), sgd(0.1)
    state = _start(chosen, optimizer, meta)
    after, record = chosen.step(state, 0, _tools(learner, optimizer, batch, probe))
    grads, _ = remembered(learner)(meta, batch)
    by_hand = {n: torch.einsum("b,b...->...", record.weights, g) for n, g in grads.items()}
    ahead = {n: p - 0.01 * by_hand[n] for n, p in meta.items()}
    leaked, _ = remembered(learner)(ahead, probe)
    expected = {n: p - 0.1 * (by_hand[n] + leaked[n].sum(0)) for n, p in meta.items()}
    assert_close(after.meta, expected, rtol=1e-6)


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
@pytest.mark.parametrize("optimizer", [sgd(0.1), adam(0.01), clipped(adam(0.01), 0.1)], ids=["sgd", "adam", "clipped"])
@pytest.mark.parametrize("jacobian", ["sgd", "optimizer"])
def test_frozen_attention_is_uniform_bit_for_bit(
    jacobian: str, optimizer: OuterOptimizer, learner: Learner, meta: Params, batch: Episode, probe: Episode
) -> None:
    attention = _attention()
    with torch.no_grad():
        for p in attention.layers[-1].parameters():
            p.zero_()
    still = OuterOptimizer(lambda params: {}, lambda params, state, gradient: (params, state))
    frozen, plain = attended(attention, still, 0.01, jacobian), uniform()
    tools = _tools(learner, optimizer, batch, probe)
    a, b = _start(frozen, optimizer, meta), _start(plain, optimizer, meta)
    for t in range(2):
        a, record = frozen.step(a, t, tools)
        b, _ = plain.step(b, t, tools)
        assert torch.equal(record.weights, torch.full((TASKS,), 1 / TASKS, dtype=torch.float64))
    assert all(torch.equal(a.meta[n], b.meta[n]) for n in meta)
    assert all(torch.equal(a.optimizer[n], b.optimizer[n]) for n in a.optimizer)


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
@pytest.mark.parametrize("rule", ATTENDED)
def test_delta_changes_when_trained(rule: str, learner: Learner, meta: Params, batch: Episode, probe: Episode) -> None:
    chosen, optimizer = RULES[rule](), adam(0.01)
    state = _start(chosen, optimizer, meta)
    after, _ = chosen.step(state, 0, _tools(learner, optimizer, batch, probe))
    delta = [name for name in state.rule if name.startswith("attention.")]
    assert delta
    moved = [name for name in delta if not torch.equal(state.rule[name], after.rule[name])]
    assert any("layers.4.weight" in name for name in moved)
    assert all(bool(torch.isfinite(leaf).all()) for leaf in after.rule.values())


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
@pytest.mark.parametrize("clip", [None, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_delta_gradient_is_full_autograd(
    kind: str,
    clip: float | None,
    row: LearnerRow,
    network: nn.Module,
    learner: Learner,
    meta: Params,
    batch: Episode,
    probe: Episode,
) -> None:
    """∂L/∂δ of the rule against one autograd graph: δ -> weights -> clipping -> step -> θ' -> probe adaptation -> L.

    At the first step, the second and a later one, which differ in what the optimizer remembers.
    """
    base = sgd(0.1) if kind == "sgd" else adam(0.01)
    optimizer = base if clip is None else clipped(base, clip)
    attention = _attention()
    seen: list[Params] = []

    def note(params: Params, state: Params, g: Params) -> tuple[Params, Params]:
        seen.append(g)
        return params, state

    rule = attended(attention, OuterOptimizer(lambda params: {}, note), 0.01, "optimizer")
    tools = _tools(learner, optimizer, batch, probe)._replace(train=lambda t: batch)
    delta = dict(attention.named_parameters())
    state = _start(rule, optimizer, meta)
    for steps_before in range(4):
        before = state
        seen.clear()
        state, _ = rule.step(before, steps_before, tools)
        if steps_before not in (0, 1, 3):
            continue

        # The graph, written out with torch.optim's formulas.
        grads, info = remembered(learner)(before.meta, batch)
        weights = attention(info)
        combined = {n: torch.tensordot(weights, g, dims=1) for n, g in grads.items()}
        if clip is not None:
            norm = torch.cat([g.flatten() for g in combined.values()]).norm()
            combined = {n: g * torch.clamp(clip / norm, max=1.0) for n, g in combined.items()}
        if kind == "sgd":
            theta = {n: p - 0.1 * combined[n] for n, p in before.meta.items()}
        else:
            count = steps_before + 1
            assert int(before.optimizer["count"]) == steps_before
            theta = {}
            for n, p in before.meta.items():
                m = 0.9 * before.optimizer[f"mean.{n}"] + 0.1 * combined[n]
                v = 0.999 * before.optimizer[f"square.{n}"] + 0.001 * combined[n] ** 2
                # A root has no derivative at zero, where some learners' gradients are exactly; there it counts as zero.
                root = torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0) / (1 - 0.999**count) ** 0.5
                theta[n] = p - 0.01 * (m / (1 - 0.9**count)) / (root + 1e-8)
        # First-order learners: their G is not the loss's gradient, so it is entered where the rule enters it.
        if row.exact:
            losses = [row.query_loss(network, theta, task(probe, j))[0] for j in range(TASKS)]
            objective = torch.stack(losses).mean()
        else:
            probe_grads, _ = looped(learner)({n: p.detach() for n, p in theta.items()}, probe)
            G = weighted_sum(torch.full((TASKS,), 1 / TASKS, dtype=torch.float64), probe_grads)
            objective = torch.stack([(G[n] * theta[n]).sum() for n in theta]).sum()
        expected = torch.autograd.grad(objective, list(delta.values()))
        found = {n: seen[0][n] for n in delta}
        size = max(float(g.abs().max()) for g in expected)
        assert size > 1e-9, "the comparison would be empty"
        assert_close(found, dict(zip(delta, expected, strict=True)), rtol=1e-6, atol=1e-8 * size)


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
def test_lookahead_jacobian_is_minus_beta(learner: Learner, meta: Params, batch: Episode, probe: Episode) -> None:
    """With J = "sgd", δ's gradient is that of a plain SGD look-ahead whatever the real optimiser, G being at θ'."""
    attention, beta, seen = _attention(), 0.37, []

    def note(params: Params, state: Params, g: Params) -> tuple[Params, Params]:
        seen.append(g)
        return params, state

    optimizer = adam(0.01)
    rule = attended(attention, OuterOptimizer(lambda params: {}, note), beta, "sgd")
    state = _start(rule, optimizer, meta)
    after, _ = rule.step(state, 0, _tools(learner, optimizer, batch, probe))
    probe_grads, _ = remembered(learner)(after.meta, probe)
    grads, info = remembered(learner)(meta, batch)
    weights = attention(info)
    lookahead = {n: meta[n] - beta * torch.tensordot(weights, g, dims=1) for n, g in grads.items()}
    objective = torch.stack([(probe_grads[n].mean(0) * lookahead[n]).sum() for n in meta]).sum()
    delta = dict(attention.named_parameters())
    expected = dict(zip(delta, torch.autograd.grad(objective, list(delta.values())), strict=True))
    assert_close({n: seen[0][n] for n in delta}, expected, rtol=1e-7, atol=1e-13)


INDICES: list[tuple[str, float | None]] = [
    *(("theil", None), ("gini", None), ("log-variance", None)),
    *(("generalized-entropy", a) for a in (None, 0.0, 0.4, 1.0, -1.5)),
    *(("atkinson", e) for e in (None, 1.0, 0.9, 2.5)),
]


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
@pytest.mark.parametrize("losses", ["query", "support", "adapted"])
def test_equity_is_autograd_of_the_joint_objective(
    losses: str,
    row: LearnerRow,
    network: nn.Module,
    learner: Learner,
    meta: Params,
    batch: Episode,
    probe: Episode,
) -> None:
    """(1/B) Σ L_i*ᵀ + λ I({ℓ_i}) by autograd, where the meta-gradient is the loss's own; else with it put in."""
    strength = 0.7
    start = with_grad(meta)
    tasks = [task(batch, i) for i in range(TASKS)]
    grads, info = remembered(learner)(meta, batch)
    adapted = [row.query_loss(network, start, one)[0] for one in tasks]
    if not row.exact:  # a loss of the same value whose gradient is g_i
        adapted = [
            info.query_loss[i] + sum(((start[n] - meta[n]) * g[i]).sum() for n, g in grads.items())
            for i in range(TASKS)
        ]
    values = adapted
    if losses != "adapted":
        sets = [(e.query_x, e.query_y) if losses == "query" else (e.support_x, e.support_y) for e in tasks]
        values = [nn.functional.cross_entropy(learner.predict(learner.initial(start), x), y) for x, y in sets]
    slopes = [gradient(loss, start) for loss in adapted]
    value_slopes = slopes if values is adapted else [gradient(value, start) for value in values]
    ends = [torch.stack(losses_).detach().requires_grad_() for losses_ in (adapted, values)]
    tools = _tools(learner, sgd(1.0), batch, probe)
    for index, parameter in INDICES:
        rule = equity(strength, index, parameter, losses)  # type: ignore[arg-type]  # the three that there are
        after, _ = rule.step(_start(rule, sgd(1.0), meta), 0, tools)
        found = {n: meta[n] - after.meta[n] for n in meta}
        objective = ends[0].mean() + strength * index_of_inequality(ends[1], index, parameter)
        by_adapted, by_values = torch.autograd.grad(objective, ends)
        expected = {
            n: sum(a * g[n] for a, g in zip(by_adapted, slopes, strict=True))
            + sum(a * g[n] for a, g in zip(by_values, value_slopes, strict=True))
            for n in meta
        }
        assert_close(found, expected, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
def test_equity_without_strength_is_uniform(learner: Learner, meta: Params, batch: Episode, probe: Episode) -> None:
    optimizer = adam(0.01)
    tools = _tools(learner, optimizer, batch, probe)
    a, b = _start(equity(0.0), optimizer, meta), _start(uniform(), optimizer, meta)
    for t in range(2):
        a, _ = equity(0.0).step(a, t, tools)
        b, _ = uniform().step(b, t, tools)
    assert all(torch.equal(a.meta[n], b.meta[n]) for n in meta)


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
def test_sequential_is_single_task_steps(learner: Learner, meta: Params, batch: Episode, probe: Episode) -> None:
    optimizer = adam(0.01)
    after, record = sequential().step(
        _start(sequential(), optimizer, meta), 0, _tools(learner, optimizer, batch, probe)
    )
    theta, state = meta, optimizer.init(meta)
    losses = []
    for index in range(TASKS):
        g, info = task_gradient(learner, theta, task(batch, index))
        theta, state = optimizer.step(theta, state, g)
        losses.append(info.query_loss)
    assert_close(after.meta, theta)
    torch.testing.assert_close(record.info.query_loss, torch.stack(losses))


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
def test_uniform_over_2b_tasks(learner: Learner, meta: Params, batch: Episode, probe: Episode) -> None:
    after, record = uniform_2b().step(_start(uniform_2b(), sgd(0.1), meta), 0, _tools(learner, sgd(0.1), batch, probe))
    grads, _ = remembered(learner)(meta, Episode(*(torch.cat(parts) for parts in zip(batch, probe, strict=True))))
    assert_close(after.meta, {n: p - 0.1 * grads[n].mean(0) for n, p in meta.items()})
    assert record.weights.tolist() == [1 / (2 * TASKS)] * 2 * TASKS


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
def test_probe_reuse_trains_on_the_kept_gradients(
    learner: Learner, meta: Params, batch: Episode, probe: Episode
) -> None:
    """Two steps with reuse: the second asks for the gradients of its own probe batch only, and what it steps on is what
    it would have computed itself.
    """
    optimizer, asked = adam(0.01), []
    tools = _tools(learner, optimizer, batch, probe)

    def counted(theta: Params, tasks: Episode) -> tuple[Params, TaskInfo]:
        asked.append(tasks is probe)
        return tools.gradients(theta, tasks)

    rule = attended(_attention(), adam(0.05), 0.01, reuse_probe=True)
    one, _ = rule.step(_start(rule, optimizer, meta), 0, tools._replace(gradients=counted))
    two, record = rule.step(one, 1, tools._replace(gradients=counted))
    assert asked == [False, True, True]
    grads, info = remembered(learner)(one.meta, probe)
    torch.testing.assert_close(record.info.query_loss, info.query_loss)
    expected, _ = optimizer.step(one.meta, one.optimizer, weighted_sum(record.weights, grads))
    assert all(torch.equal(two.meta[n], expected[n]) for n in meta)
    # A state kept for another batch is not used.
    asked.clear()
    rule.step(one, 5, tools._replace(gradients=counted))
    assert len(asked) == 2


@pytest.mark.parametrize("network", ["tiny"], indirect=True)  # the network changes nothing here
@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_checkpoint_changes_no_bit(
    rule: str, learner: Learner, meta: Params, batch: Episode, probe: Episode, tmp_path: Path
) -> None:
    """Two steps, written, read, one more: the same bits as three."""
    chosen, optimizer = RULES[rule](), clipped(adam(0.01), 0.3)
    tools = _tools(learner, optimizer, batch, probe)
    state = _start(chosen, optimizer, meta)
    folder = RunFolder(tmp_path)
    read: OuterState | None = None
    for t in range(3):
        if t == 2:
            folder.write_checkpoint(Checkpoint(RunProgress(iteration=2), state, state.meta, SHAPE))
            checkpoint, notices = folder.read_checkpoint()
            assert checkpoint is not None
            assert not notices
            read = checkpoint.state
        state, _ = chosen.step(state, t, tools)
        if read is not None:
            read, _ = chosen.step(read, t, tools)
    assert read is not None
    for part, other in zip(state, read, strict=True):
        assert list(part) == list(other)
        assert all(torch.equal(part[n], other[n]) for n in part)
    assert any(not torch.equal(meta[n], state.meta[n]) for n in meta)
