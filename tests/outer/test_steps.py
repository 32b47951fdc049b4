"""Steps over static buffers: the bits of steps one by one, and nothing in them that a CUDA graph could not hold.

The meta device stands in for CUDA where there is none: its tensors have no values, so whatever reads one on the host
fails, and a tensor that is made on the CPU and copied over can be seen.
"""

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metaheed.config import TrainingConfig
from metaheed.data import Episodes
from metaheed.data.images import Dataset
from metaheed.engine import captured as module
from metaheed.errors import NonFiniteError
from metaheed.learners import ANIL, BOIL, MAML, Conv4, Learner, MetaLSTM, MetaSGD, ProtoNet
from metaheed.outer import (
    Buffered,
    Execution,
    OneByOne,
    OuterState,
    Rule,
    StepRecord,
    Steps,
    Streams,
    TaskAttention,
    Tools,
    adam,
    attended,
    build_steps,
    clipped,
    initial_gradient,
    loss_softmax,
    map_im2col,
    map_looped,
    map_vectorized,
    replayed,
    sequential,
    sgd,
    task_gradient,
    uniform,
    uniform_2b,
)
from metaheed.rules.equity import equity
from metaheed.types import Episode, Params, TaskInfo
from tests.networks import Tiny

pytestmark = pytest.mark.slow

WAYS, TASKS, SHAPE = 3, 2, (1, 16, 16)
LEARNERS: dict[str, Callable[[nn.Module], Learner]] = {
    "maml": lambda net: MAML(net, adaptation_steps=1, fast_lr=0.3),
    "fomaml": lambda net: MAML(net, adaptation_steps=2, fast_lr=0.3, first_order=True),
    "metasgd": lambda net: MetaSGD(net, adaptation_steps=1, fast_lr=0.3),
    "metalstm": lambda net: MetaLSTM(net, adaptation_steps=2, hidden_size=4),
    "anil": lambda net: ANIL(net, adaptation_steps=2, fast_lr=0.3),
    "boil": lambda net: BOIL(net, adaptation_steps=1, fast_lr=0.3),
    "protonet": lambda net: ProtoNet(net),
}


def _attention(architecture: str = "paper", standardize: bool = False, omit: str | None = None) -> TaskAttention:
    generator = torch.Generator().manual_seed(2)
    return TaskAttention(TASKS, architecture, standardize, generator=generator, omit=omit)


RULES: dict[str, Callable[[], Rule]] = {
    "uniform": uniform,
    "sequential": sequential,
    "equity": lambda: equity(0.3),
    "equity of support losses": lambda: equity(0.3, "atkinson", 0.9, "support"),
    "equity of adapted losses": lambda: equity(0.3, "atkinson", 3.0, "adapted"),
    "uniform 2B": uniform_2b,
    "softmax of loss": lambda: loss_softmax(0.5),
    "replayed": lambda: replayed(torch.rand(9, TASKS, generator=torch.Generator().manual_seed(1)), seed=3),
    "attended": lambda: attended(_attention(), adam(0.05), 0.01),
    "as released": lambda: attended(_attention(), adam(0.05), 0.01, release_leak=True),
    "attended with probe reuse": lambda: attended(_attention(), adam(0.05), 0.01, reuse_probe=True),
    "attended through optimizer": lambda: attended(_attention(omit="query_loss"), adam(0.05), 0.01, "optimizer"),
    "attended equivariant": lambda: attended(_attention("equivariant", standardize=True), adam(0.05), 0.01),
}


def streams_of(dataset: Dataset) -> Streams:
    train, probe = (Episodes(dataset, "train", WAYS, 1, 2, 7, stream=name) for name in ("train", "probe"))
    return Streams(train, probe, TASKS)


def looped_over(learner: Learner, function: Callable[..., Any]) -> Execution[Any]:
    return map_looped(partial(function, learner))


class Training:
    """A learner under a rule, to be begun and continued in either form."""

    def __init__(self, dataset: Dataset, learner: Learner, rule: Rule, per_batch: Callable[..., Any] = looped_over):
        self.rule, self.streams = rule, streams_of(dataset)
        self.tools = Tools(
            gradients=per_batch(learner, task_gradient),
            initial_gradients=per_batch(learner, initial_gradient),
            optimizer=clipped(adam(0.01), 0.5),
            train=lambda t: self.streams.batch("training", t),
            probe=lambda t: self.streams.batch("probe", t),
        )
        meta = learner.init(torch.Generator().manual_seed(0))
        self.start = OuterState(meta, self.tools.optimizer.init(meta), rule.init(meta))

    def one_by_one(self, state: OuterState | None = None) -> OneByOne:
        return OneByOne(self.rule, self.tools, self.streams, state or self.start)

    def buffered(self, block: int, state: OuterState | None = None, **options: Any) -> Buffered:
        options = {"capture": False, "notice": pytest.fail, **options}
        return Buffered(self.rule, self.tools, self.streams, state or self.start, block, **options)


def advance(steps: Steps, t: int, until: int) -> list[list[list[float]]]:
    """Make steps t … until−1; what they recorded."""
    seen: list[list[list[float]]] = []
    while t + len(seen) < until:
        first = t + len(seen)
        seen += [_values(record) for record in steps.advance(first, until - first, lambda: False)]
    return seen


def _values(record: StepRecord) -> list[list[float]]:
    return [part.tolist() for part in (*record.info, record.weights)]


def same_bits(a: OuterState, b: OuterState) -> bool:
    return all(
        list(one) == list(other) and all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)
        for one, other in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("learner", sorted(LEARNERS))
def test_blocks_give_the_bits_of_single_steps(learner: str, rule: str, small_dataset: Dataset) -> None:
    torch.manual_seed(3)
    training = Training(small_dataset, LEARNERS[learner](Tiny(WAYS, SHAPE)), RULES[rule]())
    plain, blocks = training.one_by_one(), training.buffered(2)
    assert advance(blocks, 0, 3) == advance(plain, 0, 3)
    assert same_bits(blocks.state, plain.state)
    assert any(not torch.equal(plain.state.meta[n], training.start.meta[n]) for n in plain.state.meta)
    blocks.close()


@pytest.mark.parametrize("rule", ["attended", "attended with probe reuse", "replayed", "sequential"])
def test_wherever_blocks_end_and_runs_are_cut(rule: str, small_dataset: Dataset) -> None:
    torch.manual_seed(3)
    training = Training(small_dataset, LEARNERS["maml"](Tiny(WAYS, SHAPE)), RULES[rule]())
    plain = training.one_by_one()
    records = advance(plain, 0, 9)
    for block, cut in ((1, 2), (3, 1), (3, 5), (100, 4)):
        before = training.buffered(block)
        found = advance(before, 0, cut)
        kept = before.state
        advance(before, cut, cut + 2)  # lost, as in a run that is killed; and the state that was kept is a copy
        before.close()
        after = training.buffered(block, kept)
        assert found + advance(after, cut, 9) == records, (block, cut)
        assert same_bits(after.state, plain.state)
        after.close()


def test_stopped_within_a_block(small_dataset: Dataset) -> None:
    training = Training(small_dataset, LEARNERS["maml"](Tiny(WAYS, SHAPE)), uniform())
    plain, blocks = training.one_by_one(), training.buffered(50)
    records = advance(plain, 0, 4)
    advance(blocks, 0, 1)
    asked = itertools.count()
    seen = [_values(record) for record in blocks.advance(1, 50, lambda: next(asked) == 3)]
    assert seen == records[1:]
    assert same_bits(blocks.state, plain.state)
    assert [*blocks.advance(4, 50, lambda: True)] == []
    assert advance(blocks, 4, 7) == advance(plain, 4, 7)
    blocks.close()


def test_a_state_that_changes_places_is_kept_right(small_dataset: Dataset) -> None:
    """A rule may hand on what it was given under another name; it then moves by one place a step."""
    names = ["a", "b", "c"]

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        _, info = tools.gradients(state.meta, tools.train(t))
        moved = dict(zip(names, [state.rule["c"], *(state.rule[n] for n in names[:2])], strict=True))
        return state._replace(rule=moved), StepRecord(info, info.query_loss)

    rule = Rule(lambda meta: {n: torch.tensor(float(k)) for k, n in enumerate(names)}, step)
    training = Training(small_dataset, LEARNERS["maml"](Tiny(WAYS, SHAPE)), rule)
    plain, blocks = training.one_by_one(), training.buffered(3)
    assert advance(plain, 0, 5) == advance(blocks, 0, 5)
    assert same_bits(plain.state, blocks.state)
    blocks.close()


@pytest.mark.parametrize("capture", ["auto", "on", "off"])
def test_images_on_the_host_are_trained_on_step_by_step(
    capture: Literal["auto", "on", "off"], small_dataset: Dataset
) -> None:
    """A data set too large for the device stays on the host, where no graph can gather its batches."""
    training = Training(small_dataset, LEARNERS["maml"](Tiny(WAYS, SHAPE)), uniform())
    config, cuda, notices = TrainingConfig(execution="vectorized", capture=capture), torch.device("cuda"), list[str]()
    steps = build_steps(config, cuda, training.rule, training.tools, training.streams, training.start, notices.append)
    assert isinstance(steps, OneByOne)
    assert ["stay on the host" in notice for notice in notices] == [True] * (capture != "off")
    assert advance(steps, 0, 2) == advance(training.one_by_one(), 0, 2)
    steps.close()


class RefusingHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses a tensor of the CPU among those of the device: the host would wait for its copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if {t.device.type for t in tensors} - {"meta"}:
            raise AssertionError(f"{func} meets the host: {[(t.device.type, tuple(t.shape)) for t in tensors]}")
        return result


class RefusingValues(TorchFunctionMode):
    """Refuses tensors made from Python's values, and indices that become such, which dispatch does not show."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            assert isinstance(args[0], Tensor), f"{func.__name__} is made from {args[0]!r}"
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            for index in args[1] if isinstance(args[1], tuple) else (args[1],):
                assert isinstance(index, int | slice | type(None) | type(...)), f"an index is made from {index!r}"
        return func(*args, **(kwargs or {}))


def on_meta(small_dataset: Dataset, training: Training) -> "module._Buffers":
    """The buffers of a training on the meta device, as they are after the first step."""
    first = training.one_by_one()
    advance(first, 0, 1)
    away = torch.device("meta")
    state = OuterState(*({n: leaf.to(away) for n, leaf in tree.items()} for tree in first.state))
    streams = streams_of(small_dataset.to(away))
    buffers = module._Buffers(training.rule, training.tools, streams, 4, state, first.asked)
    buffers.begin(1, {s: streams.rows(s, 1, 4 + len(span) - 1) for s, span in buffers.spans.items()})
    buffers.step()  # what is kept from the first call on, is
    return buffers


PER_BATCH: dict[str, Callable[..., Any]] = {
    "looped": looped_over,
    "vectorized": lambda learner, function: map_vectorized(partial(function, learner)),
    "im2col": lambda learner, function: map_im2col(partial(function, learner)),
}


@pytest.mark.parametrize(
    ("learner", "rule", "execution"),
    [
        *((learner, "attended with probe reuse", "looped") for learner in sorted(LEARNERS)),
        *(("maml", rule, "looped") for rule in sorted(RULES)),
        *(("conv4", "attended", execution) for execution in sorted(PER_BATCH)),
    ],
)
def test_nothing_in_a_step_meets_the_host(learner: str, rule: str, execution: str, small_dataset: Dataset) -> None:
    network = Conv4(WAYS, SHAPE, hidden=4) if learner == "conv4" else Tiny(WAYS, SHAPE)
    made = LEARNERS["maml" if learner == "conv4" else learner](network)
    buffers = on_meta(small_dataset, Training(small_dataset, made, RULES[rule](), PER_BATCH[execution]))
    with RefusingHost(), RefusingValues():  # type: ignore[no-untyped-call]
        buffers.step()


class Looking(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) < 1e9 else -x)  # type: ignore[no-any-return, no-untyped-call]


class Indexing(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, [2, 1, 0]]  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("network", [Looking, Indexing])
def test_what_meets_the_host_is_noticed(network: type[nn.Module], small_dataset: Dataset) -> None:
    """The test above has teeth."""
    training = Training(small_dataset, LEARNERS["maml"](network(WAYS, SHAPE)), uniform())

    def step() -> None:
        buffers = on_meta(small_dataset, training)
        with RefusingHost(), RefusingValues():  # type: ignore[no-untyped-call]
            buffers.step()

    with pytest.raises((AssertionError, RuntimeError), match=r"meta tensors|is made from"):
        step()
    with RefusingValues(), pytest.raises(AssertionError, match=r"is made from"):
        torch.tensor([1.0, 2.0], device="meta")
    host = torch.ones(2)
    with RefusingHost(), pytest.raises(AssertionError, match=r"meets the host"):  # type: ignore[no-untyped-call]
        host.to("meta")


class Poison:
    """Gradients g_i = θ whose numbers are finite but for one call: the losses or gradient of one task of it."""

    def __init__(self, at_call: int, task: int, what: str) -> None:
        self.at_call, self.task, self.what, self.calls = at_call, task, what, 0

    def __call__(self, meta: Params, batch: Episode) -> tuple[Params, TaskInfo]:
        tasks = len(batch.support_y)
        ones = torch.ones(tasks)
        bad = torch.zeros(tasks)
        if self.calls == self.at_call:
            bad[min(self.task, tasks - 1)] = float("inf")
        self.calls += 1
        loss, slope = (bad, 0 * ones) if self.what == "loss" else (0 * ones, bad)
        grads = {n: p + slope.reshape(-1, *[1] * p.dim()) for n, p in meta.items()}
        return grads, TaskInfo(ones, ones, ones + loss, ones)


@pytest.mark.parametrize("rule", ["uniform", "uniform 2B", "sequential", "attended", "attended with probe reuse"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_first_number_not_finite_is_named_alike(rule: str, what: str, small_dataset: Dataset) -> None:
    learner = LEARNERS["maml"](Tiny(WAYS, SHAPE))
    for at_call, task in itertools.product((4, 5), range(TASKS)):
        found = []
        for buffered in (False, True):
            training = Training(small_dataset, learner, RULES[rule]())
            training.tools = training.tools._replace(gradients=Poison(at_call, task, what))
            steps = training.buffered(20) if buffered else training.one_by_one()
            seen: list[Any] = []

            def go(steps: Steps = steps, seen: list[Any] = seen) -> None:
                for first, count in ((0, 1), (1, 8)):  # the first by itself
                    seen.extend(map(_values, steps.advance(first, count, lambda: False)))  # as far as it gets

            with pytest.raises(NonFiniteError) as error:
                go()
            found.append((str(error.value), seen))
            steps.close()
        assert found[0] == found[1]
        assert f"the {what} of task " in found[0][0]


def test_a_leaf_not_finite_is_named_alike(small_dataset: Dataset) -> None:
    learner = LEARNERS["maml"](Tiny(WAYS, SHAPE))
    training = Training(small_dataset, learner, uniform())

    def explode(meta: Params, state: Params, gradient: Params) -> tuple[Params, Params]:
        count = state["count"] + 1
        return {n: torch.where(count == 3, p / 0, p) if n == "6.bias" else p for n, p in meta.items()}, {"count": count}

    optimizer = sgd(0.1)._replace(init=lambda meta: {"count": torch.zeros((), dtype=torch.int64)}, step=explode)
    training.tools = training.tools._replace(optimizer=optimizer)
    training.start = training.start._replace(optimizer=optimizer.init(training.start.meta))
    training.start.meta["6.bias"].fill_(1.0)
    for steps in (training.one_by_one(), training.buffered(20)):
        advance(steps, 0, 2)
        with pytest.raises(NonFiniteError, match=r"^'6.bias' of the parameters is not finite after the outer step$"):
            advance(steps, 2, 5)
        steps.close()


def test_memory_stays_flat(small_dataset: Dataset) -> None:
    """No tensor is left behind in two hundred steps."""
    learner = LEARNERS["maml"](Tiny(WAYS, SHAPE))
    training = Training(small_dataset, learner, RULES["attended with probe reuse"]())
    training.tools = training.tools._replace(gradients=Poison(-1, 0, "loss"))
    for steps, more in ((training.one_by_one(), 100), (training.buffered(20), 200)):
        counts = []
        for first, until in ((0, 41), (41, 41 + more)):
            advance(steps, first, until)
            gc.collect()
            counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
        assert counts[0] == counts[1]
        steps.close()


class FakeCuda:
    """What `captured` uses of torch.cuda, on the CPU: a capture computes nothing, a replay makes the step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "", frozen: bool = False) -> None:
        self.replays, self.resets = 0, 0
        outer, made = self, list[Any]()
        original = module.capture_step

        class Graph:
            def replay(self) -> None:
                outer.replays += 1
                if not frozen or outer.replays < 2:
                    made[0].step()

            def reset(self) -> None:
                outer.resets += 1

        @contextlib.contextmanager
        def capture(graph: Graph, stream: object, capture_error_mode: str) -> Iterator[None]:
            buffers = made[0]
            held = [buffers._t, buffers._records, *(leaf for tree in buffers.state for leaf in tree.values())]
            before = [tensor.clone() for tensor in held]
            yield
            for tensor, old in zip(held, before, strict=True):
                tensor.copy_(old)
            if fails:
                raise RuntimeError(fails)

        def noted(buffers: Any, *rest: Any) -> Any:
            made[:] = [buffers]
            return original(buffers, *rest)

        stream = SimpleNamespace(wait_stream=lambda other: None)
        modes = [0]
        fake = {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda it: contextlib.nullcontext(),
            "device": lambda it: contextlib.nullcontext(),
            "CUDAGraph": Graph,
            "graph": capture,
            "get_sync_debug_mode": lambda: modes[-1],
            "set_sync_debug_mode": modes.append,
        }
        for name, value in fake.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(module, "capture_step", noted)
        self.modes = modes


@pytest.mark.parametrize("rule", ["attended", "attended with probe reuse"])
def test_a_captured_run_is_the_same_run(rule: str, small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither warm-up, capture nor trial replays move the state."""
    training = Training(small_dataset, LEARNERS["maml"](Tiny(WAYS, SHAPE)), RULES[rule]())
    plain = training.one_by_one()
    records = advance(plain, 0, 8)
    cuda = FakeCuda(monkeypatch)
    blocks = training.buffered(3, capture=True)
    assert advance(blocks, 0, 8) == records
    assert same_bits(blocks.state, plain.state)
    assert cuda.replays == 2 + 7
    assert cuda.modes == [0, "error", 0]
    blocks.close()
    assert cuda.resets == 1


@pytest.mark.parametrize("trouble", [{"fails": "operation not permitted when stream is capturing"}, {"frozen": True}])
def test_what_cannot_be_captured_goes_on_step_by_step(
    trouble: dict[str, Any], small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(small_dataset, LEARNERS["maml"](Tiny(WAYS, SHAPE)), RULES["attended with probe reuse"]())
    plain = training.one_by_one()
    FakeCuda(monkeypatch, **trouble)
    notices: list[str] = []
    blocks = training.buffered(3, capture=True, notice=notices.append)
    assert advance(blocks, 0, 6) == advance(plain, 0, 6)
    assert same_bits(blocks.state, plain.state)
    reason = trouble.get("fails", "a replay gives other numbers than a call")
    assert len(notices) == 1
    assert reason in notices[0]
    assert "the steps are made one by one" in notices[0]
    blocks.close()
