"""What is special to one learner; what all have in common is in test_contract."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from metaheed.errors import ConfigError
from metaheed.learners import ANIL, BOIL, MAML, Conv4, Learner, MetaLSTM, MetaSGD, ProtoNet
from metaheed.learners.meta_lstm_update import preprocess
from metaheed.outer import evaluate_initial, initial_gradient, looped, task_gradient, vectorized
from tests.conftest import make_batch, task
from tests.networks import Tiny

WAYS, SHAPE = 3, (1, 16, 16)


def test_meta_lstm_names_and_shapes(rng: torch.Generator) -> None:
    network = Tiny(WAYS, SHAPE)
    theta = MetaLSTM(network, hidden_size=7).init(rng)
    shapes = {n: tuple(p.shape) for n, p in theta.items()}
    assert shapes == {f"initial.{n}": tuple(p.shape) for n, p in network.named_parameters()} | {
        "lstm.weight_ih": (28, 4),
        "lstm.weight_hh": (28, 7),
        "lstm.bias_ih": (28,),
        "lstm.bias_hh": (28,),
        "forget_gate.weight": (1, 9),
        "forget_gate.bias": (1,),
        "input_gate.weight": (1, 9),
        "input_gate.bias": (1,),
    }
    assert 4 <= float(theta["forget_gate.bias"]) <= 5
    assert -5 <= float(theta["input_gate.bias"]) <= -4
    for name in ("lstm.weight_ih", "lstm.weight_hh", "forget_gate.weight", "input_gate.weight", "lstm.bias_ih"):
        assert 0.004 < float(theta[name].abs().max()) <= 0.01
    other = MetaLSTM(network, forget_bias=(1, 1), input_bias=(-2, -2)).init(rng)
    assert float(other["forget_gate.bias"]) == 1
    assert float(other["input_gate.bias"]) == -2


def test_meta_lstm_preprocessing() -> None:
    x = torch.tensor([[1.0, -math.exp(5), 0.0, math.exp(-11), -math.exp(-9.999)]], dtype=torch.float64)
    expected = [[0, 0.5, -1, -1, -0.9999], [1, -1, 0, math.exp(-1), -1]]
    torch.testing.assert_close(preprocess(x), torch.tensor(expected, dtype=torch.float64))


def test_meta_lstm_starts_as_small_gradient_steps(rng: torch.Generator) -> None:
    """With gates at their start, one step is about σ(b_F) c_0 − σ(b_I) g."""
    network = Tiny(WAYS, SHAPE).double()
    learner = MetaLSTM(network, adaptation_steps=1, forget_bias=(30, 30), input_bias=(-2, -2))
    theta = {n: p.double() for n, p in learner.init(rng).items()}
    episode = task(make_batch(1, WAYS, 2, 2, SHAPE), 0)
    plain = MAML(network, adaptation_steps=1, fast_lr=1 / (1 + math.exp(2)))
    step = plain.adapt(learner.initial(theta), episode.support_x, episode.support_y)
    adapted = learner.adapt(theta, episode.support_x, episode.support_y)
    start = learner.initial(theta)
    for name in step:
        torch.testing.assert_close(adapted[name] - start[name], step[name] - start[name], rtol=0.05, atol=1e-4)


def test_every_gate_learns(rng: torch.Generator) -> None:
    learner = MetaLSTM(Tiny(WAYS, SHAPE), adaptation_steps=3)
    g, _ = task_gradient(learner, learner.init(rng), task(make_batch(1, WAYS, 2, 2, SHAPE), 0))
    assert all(float(leaf.abs().max()) > 0 for name, leaf in g.items() if not name.endswith("1.bias"))


def test_meta_sgd_starts_as_maml(rng: torch.Generator) -> None:
    network = Conv4(WAYS, SHAPE, hidden=4)
    learner = MetaSGD(network, adaptation_steps=2, fast_lr=0.05)
    theta = learner.init(torch.Generator().manual_seed(1))
    assert set(theta) == {f"{part}.{n}" for part in ("initial", "fast_lr") for n, _ in network.named_parameters()}
    plain = MAML(network, adaptation_steps=2, fast_lr=0.05)
    start = plain.init(torch.Generator().manual_seed(1))
    episode = task(make_batch(1, WAYS, 2, 2, SHAPE, torch.float32), 0)
    a = learner.adapt(theta, episode.support_x, episode.support_y)
    b = plain.adapt(start, episode.support_x, episode.support_y)
    assert all(torch.equal(a[n], b[n]) for n in b)
    # A rate of the other sign climbs.
    theta["fast_lr.head.bias"] = -theta["fast_lr.head.bias"]
    c = learner.adapt(theta, episode.support_x, episode.support_y)
    assert not torch.equal(c["head.bias"], a["head.bias"])


@pytest.mark.parametrize(("kind", "moves"), [(ANIL, True), (BOIL, False)])
def test_only_its_part_moves(kind: type[ANIL] | type[BOIL], moves: bool, rng: torch.Generator) -> None:
    learner = kind(Conv4(WAYS, SHAPE, hidden=4), adaptation_steps=2, fast_lr=0.3)
    theta = learner.init(rng)
    episode = task(make_batch(1, WAYS, 2, 2, SHAPE, torch.float32), 0)
    adapted = learner.adapt(theta, episode.support_x, episode.support_y)
    assert list(adapted) == list(theta)
    for name in theta:
        still = torch.equal(theta[name], adapted[name])
        if name.startswith("head.") == moves:
            # A bias before batch norm has no gradient but rounding.
            assert not still or name.endswith("conv.bias")
        else:
            assert still
    g, _ = task_gradient(learner, theta, episode)
    assert all(float(g[n].abs().max()) > 0 for n in theta if not n.endswith("conv.bias"))


def test_a_head_is_named(rng: torch.Generator) -> None:
    network = Tiny(WAYS, SHAPE)
    assert ANIL(network).moving == ("6.weight", "6.bias")
    assert ANIL(network, head="1").moving == ("1.weight", "1.bias")
    assert set(BOIL(network, head="1").moving) == {"2.weight", "2.bias", "6.weight", "6.bias"}
    with pytest.raises(ConfigError, match=r"unknown head '7'"):
        ANIL(network, head="7")
    with pytest.raises(ConfigError, match=r"head '5' has no parameters"):
        ANIL(network, head="5")
    network[6].requires_grad_(False)
    assert set(BOIL(network).moving) == {"1.weight", "1.bias", "2.weight", "2.bias"}, "a frozen head is a head"
    assert ProtoNet(network).head == "6"
    with pytest.raises(ConfigError, match=r"nothing for ANIL to adapt"):
        ANIL(network)
    with pytest.raises(ConfigError, match=r"no body for BOIL"):
        BOIL(nn.Linear(4, 3))


class HeadFirst(nn.Module):
    """Registers its head before its body."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WAYS, WAYS)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(256, WAYS), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(x))
        return logits


@pytest.mark.parametrize("kind", [ANIL, BOIL, ProtoNet])
def test_a_wrong_guess_of_the_head_is_noticed(
    kind: type[ANIL] | type[BOIL] | type[ProtoNet], rng: torch.Generator
) -> None:
    batch = make_batch(2, WAYS, 2, 2, SHAPE, torch.float32)
    guessing, told = kind(HeadFirst()), kind(HeadFirst(), head="head")
    for run in (looped, vectorized):
        with pytest.raises(ConfigError, match=r"module 'body.1'.*not its head.*head"):
            run(guessing)(guessing.init(rng), batch)
        run(told)(told.init(rng), batch)


class Scaled(HeadFirst):
    """Changes its head's output in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mul_(10)


def test_a_head_in_unusual_clothes(rng: torch.Generator) -> None:
    normed = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Tanh(), weight_norm(nn.Linear(8, WAYS)))
    episode = task(make_batch(1, WAYS, 2, 2, SHAPE, torch.float32), 0)
    for kind in (ANIL, BOIL, ProtoNet):
        learner = kind(normed)
        assert learner.head == "3"
        task_gradient(learner, learner.init(rng), episode)
    scaled = ProtoNet(Scaled(), head="head")
    with pytest.raises(ConfigError, match=r"return that module's output unchanged"):
        scaled.adapt(scaled.init(rng), episode.support_x, episode.support_y)


def test_protonet_before_adaptation_finds_all_classes_alike(rng: torch.Generator) -> None:
    learner = ProtoNet(Conv4(WAYS, SHAPE, hidden=4))
    theta = learner.init(rng)
    assert set(theta) == {n for n, _ in Conv4(WAYS, SHAPE, hidden=4).named_parameters() if not n.startswith("head")}
    episode = task(make_batch(1, WAYS, 2, 2, SHAPE, torch.float32), 0)
    loss, _ = evaluate_initial(learner, theta, episode)
    assert float(loss) == pytest.approx(math.log(WAYS))
    g, _ = initial_gradient(learner, theta, episode)
    assert all(not leaf.any() for leaf in g.values())


def test_protonet_of_fewer_ways_than_its_head(rng: torch.Generator) -> None:
    """A class without support images gets no query, and the others are classified as by a head of their own."""
    torch.manual_seed(0)
    network = Tiny(5, SHAPE).double()
    wide, narrow = ProtoNet(network), ProtoNet(nn.Sequential(*list(network)[:-1], nn.Linear(16, WAYS)))
    theta = {n: p.double() for n, p in wide.init(rng).items()}
    batch = make_batch(3, WAYS, 2, 2, SHAPE)
    episode = task(batch, 0)
    a = wide.predict(wide.adapt(theta, episode.support_x, episode.support_y), episode.query_x)
    b = narrow.predict(narrow.adapt(theta, episode.support_x, episode.support_y), episode.query_x)
    torch.testing.assert_close(a.softmax(1)[:, :WAYS], b.softmax(1))
    assert float(a.softmax(1)[:, WAYS:].max()) == 0
    grads, _ = vectorized(wide)(theta, batch)
    other, _ = vectorized(narrow)(theta, batch)
    assert all(torch.allclose(grads[n], other[n], rtol=1e-9, atol=1e-12) for n in grads)


def test_protonet_takes_a_head_without_bias_and_refuses_none(rng: torch.Generator) -> None:
    bare = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, WAYS, bias=False))
    learner = ProtoNet(bare)
    episode = task(make_batch(1, WAYS, 2, 2, SHAPE, torch.float32), 0)
    adapted = learner.adapt(learner.init(rng), episode.support_x, episode.support_y)
    assert adapted["3.bias"].shape == (WAYS,)
    assert list(bare) == list(bare.children()), "the caller's network is untouched"
    assert isinstance(bare[3], nn.Linear)
    with pytest.raises(ConfigError, match=r"linear head, but '0' is Conv2d"):
        ProtoNet(nn.Sequential(nn.Conv2d(1, WAYS, 16), nn.Flatten()))
    with pytest.raises(ConfigError, match=r"nothing to learn besides its head"):
        ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(256, WAYS)))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ProtoNet(bare)
    assert torch.equal(before, torch.get_rng_state()), "nothing is drawn from the global generator"
    spatial = nn.Sequential(nn.Linear(16, 4), nn.Flatten(1, 2))
    uneven = ProtoNet(nn.Sequential(spatial, nn.Linear(4, WAYS)))
    with pytest.raises(ConfigError, match=r"output of shape \(6, 2, 3\)"):
        uneven.adapt(uneven.init(rng), torch.rand(6, 1, 2, 16), torch.arange(3).repeat(2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MetaSGD(Tiny(WAYS, SHAPE), fast_lr=0), r"fast_lr is 0"),
        (lambda: MetaSGD(Tiny(WAYS, SHAPE), adaptation_steps=0), r"adaptation_steps is 0"),
        (lambda: MetaLSTM(Tiny(WAYS, SHAPE), hidden_size=0), r"hidden_size is 0"),
        (lambda: MetaLSTM(Tiny(WAYS, SHAPE), input_bias=(0.0, math.inf)), r"input_bias"),
        (lambda: ANIL(Tiny(WAYS, SHAPE), fast_lr=-1), r"fast_lr is -1"),
        (lambda: BOIL(Tiny(WAYS, SHAPE), adaptation_steps=-1), r"adaptation_steps is -1"),
    ],
)
def test_bad_settings_are_refused(build: Callable[[], Learner], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
