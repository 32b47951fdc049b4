"""Networks of a user's own: what could make their gradients or logits wrong without a word."""

import copy
import multiprocessing
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from metaheed.errors import ConfigError
from metaheed.learners import ANIL, BOIL, MAML, Conv4, MetaLSTM, MetaSGD, NetworkLearner, ProtoNet
from metaheed.outer import check_gradient, initial_gradient, looped, task_gradient, threaded, vectorized
from metaheed.types import Episode, Params
from tests.conftest import make_batch, task
from tests.networks import Tiny

pytestmark = pytest.mark.slow
WAYS, SHAPE = 3, (1, 16, 16)
LEARNERS: dict[str, Callable[[nn.Module], NetworkLearner]] = {
    "maml": lambda net: MAML(net, adaptation_steps=2, fast_lr=0.3),
    "first-order": lambda net: MAML(net, adaptation_steps=2, fast_lr=0.3, first_order=True),
    "recomputed": lambda net: MAML(net, adaptation_steps=2, fast_lr=0.3, recompute=True),
    "metasgd": lambda net: MetaSGD(net, adaptation_steps=2, fast_lr=0.3),
    "anil": lambda net: ANIL(net, adaptation_steps=2, fast_lr=0.3),
    "boil": lambda net: BOIL(net, adaptation_steps=2, fast_lr=0.3),
    "metalstm": lambda net: MetaLSTM(net, adaptation_steps=2),
    "protonet": ProtoNet,
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "own": lambda: Tiny(WAYS, SHAPE),
    "conv4": lambda: Conv4(WAYS, SHAPE, hidden=4),
    "strided": lambda: Conv4(WAYS, SHAPE, hidden=4, downsample="stride"),
}


@pytest.fixture
def episode() -> Episode:
    return task(make_batch(1, WAYS, 2, 3, SHAPE), 0)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small(*layers: nn.Module) -> nn.Sequential:
    """Features (n, 8) between a body and a head."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 8), *layers, nn.Linear(8, WAYS))


def theta(learner: NetworkLearner) -> Params:
    return {n: p.double() for n, p in learner.init(torch.Generator().manual_seed(0)).items()}


def difference(learner: NetworkLearner, meta: Params, episode: Episode) -> tuple[float, float]:
    """The directional derivative by finite differences of losses, and the meta-gradient's."""
    d = {n: torch.randn_like(p) for n, p in meta.items()}
    g, _ = task_gradient(learner, meta, episode)
    h = 1e-5
    ends = [{n: p + side * h * d[n] for n, p in meta.items()} for side in (1, -1)]
    ahead, behind = (float(task_gradient(learner, end, episode)[1].query_loss) for end in ends)
    return (ahead - behind) / (2 * h), float(sum((g[n] * d[n]).sum() for n in d))


OLD, NEW = nn.utils.weight_norm, parametrizations.weight_norm


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("spelling", [OLD, NEW], ids=["hook", "parametrisation"])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("layer", ["linear", "convolution"])
def test_weight_norm_has_right_meta_gradients(
    spelling: Callable[..., nn.Module], dim: int | None, layer: str, episode: Episode
) -> None:
    if layer == "linear":
        network = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Tanh(), spelling(nn.Linear(8, WAYS), dim=dim))
    else:
        network = nn.Sequential(
            spelling(nn.Conv2d(1, 4, 3, stride=4), dim=dim), nn.Tanh(), nn.Flatten(), nn.Linear(64, WAYS)
        )
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        expected = network(episode.query_x.float())
    with pytest.warns(UserWarning, match=r"weight norm of [03] is computed by plain operations"):
        learner = MAML(network, adaptation_steps=2, fast_lr=0.5)
    meta = learner.init(torch.Generator())
    assert list(meta) == [name for name, _ in network.named_parameters()]
    torch.testing.assert_close(learner.predict(meta, episode.query_x.float()), expected)
    found, mine = difference(learner, theta(learner), episode)
    assert mine == pytest.approx(found, rel=1e-5)
    after = network.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before), "the caller's network is untouched"


def test_pytorchs_fused_weight_norm_is_what_the_check_is_for(episode: Episode) -> None:
    """A network that calls it itself cannot be converted; the check names the parameters."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(256, 8)
            self.g, self.v = nn.Parameter(torch.rand(WAYS, 1) + 0.5), nn.Parameter(torch.randn(WAYS, 8))

        def forward(self, x: Tensor) -> Tensor:
            features = torch.tanh(self.body(x.flatten(1)))
            logits: Tensor = nn.functional.linear(features, torch._weight_norm(self.v, self.g, 0))
            return logits

    learner = MAML(Fused(), adaptation_steps=2, fast_lr=0.5)
    with pytest.raises(
        ConfigError, match=r"meta-gradient of the network is wrong.*off for .*v.*second deriv.*first_order=True"
    ):
        check_gradient(learner, learner.init(torch.Generator()), episode)
    assert check_gradient(MAML(Fused(), first_order=True), learner.init(torch.Generator()), episode) is None


class _WrongSlope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = gradient * x.cos() * 1.01
        return slope


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("kind", ["maml", "first-order", "metalstm", "protonet", "metasgd"])
def test_a_slightly_wrong_derivative_is_found(kind: str, episode: Episode) -> None:
    learner = LEARNERS[kind](small(Applied(_WrongSlope.apply)))
    with pytest.raises(
        ConfigError, match=r"gradient of the network is wrong: along a random direction.*check_gradient=False"
    ):
        check_gradient(learner, learner.init(torch.Generator()), episode)


LAYERS: dict[str, nn.Module] = {
    **{
        kind.__name__: kind()
        for kind in (
            *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
            *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardswish, nn.Hardtanh, nn.ReLU6, nn.PReLU, nn.Tanhshrink),
        )
    },
    "LayerNorm": nn.LayerNorm(8),
    "GroupNorm": nn.GroupNorm(2, 8),
    "RMSNorm": nn.RMSNorm(8),
    "BatchNorm1d": nn.BatchNorm1d(8, track_running_stats=False),
    "spectral_norm": parametrizations.spectral_norm(nn.Linear(8, 8)),
    "orthogonal": parametrizations.orthogonal(nn.Linear(8, 8)),
    "Bilinear": Applied(lambda x: nn.functional.bilinear(x, x, torch.ones(8, 8, 8).to(x))),
    "Softmax": nn.Softmax(1),
    "normalize": Applied(nn.functional.normalize),
    "cosine": Applied(lambda x: nn.functional.cosine_similarity(x[:, None], x[None], dim=2)[:, :1].expand(-1, 8)),
    "attention": Applied(lambda x: (x[:, :, None] * x[:, None]).softmax(-1).mean(-1) + x),
    "svd": Applied(lambda x: torch.linalg.norm(x, dim=1, keepdim=True) * x),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_check_passes_what_is_right(name: str, episode: Episode) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the singular vectors")
        learner = MAML(small(LAYERS[name]), adaptation_steps=2, fast_lr=0.3)
    assert check_gradient(learner, learner.init(torch.Generator()), episode) is None


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_check_passes_every_learner(kind: str, network: str, episode: Episode) -> None:
    learner = LEARNERS[kind](NETWORKS[network]())
    assert check_gradient(learner, learner.init(torch.Generator().manual_seed(0)), episode) is None


class Steep(nn.Module):
    """Adaptation is chaos: the meta-gradient explodes, and finite differences agree with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(256, 16), nn.Linear(16, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.b((1000 * self.a(x.flatten(1))).sin())
        return logits


def test_a_gradient_that_explodes_is_not_called_wrong(episode: Episode) -> None:
    learner = MAML(Steep(), adaptation_steps=2, fast_lr=0.5)
    notice = check_gradient(learner, learner.init(torch.Generator()), episode)
    assert notice is not None
    assert "do not converge" in notice


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda z: z.half().to(z.dtype), "float16"),
        (lambda z: z.bfloat16(), "bfloat16"),
        (lambda z: z.float(), "float32"),
    ],
)
def test_rounding_is_not_called_a_wrong_derivative(
    function: Callable[[Tensor], Tensor], dtype: str, episode: Episode
) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, WAYS), Applied(function))
    last = network[3]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(1e-3)
    learner = MAML(network, fast_lr=0.01)
    notice = check_gradient(learner, learner.init(torch.Generator()), episode)
    assert notice is not None
    assert f"computes in {dtype} even if it is given float64" in notice


def test_many_kinks_hide_no_wrong_second_derivative(episode: Episode) -> None:
    """The loss after adaptation jumps at kinks of the slope, of which a deep network has one nearly everywhere."""

    def network(last: nn.Module) -> nn.Module:
        layers = [part for _ in range(4) for part in (nn.LazyLinear(256), nn.LeakyReLU(0.1))]
        made = nn.Sequential(nn.Flatten(), *layers, last)
        made(torch.zeros(1, 256))
        return made

    right = MAML(network(nn.Linear(256, WAYS)), fast_lr=0.5)
    assert check_gradient(right, right.init(torch.Generator()), episode) is None
    wrong = MAML(network(nn.Sequential(nn.Linear(256, WAYS), Applied(_WrongSlope.apply))), fast_lr=0.5)
    with pytest.raises(ConfigError, match=r"gradient of the network is wrong"):
        check_gradient(wrong, wrong.init(torch.Generator()), episode)


def test_the_check_takes_no_query_images_of_classes_without_support(episode: Episode) -> None:
    order = torch.tensor([2, 0, 1, 0, 2, 1])
    shuffled = Episode(episode.support_x[:3], torch.tensor([0, 0, 2]), episode.query_x[order], episode.query_y[order])
    learner = ProtoNet(Tiny(WAYS, SHAPE))
    assert check_gradient(learner, learner.init(torch.Generator()), shuffled) is None


def test_what_does_not_compute_in_float64_is_said(episode: Episode) -> None:
    learner = MAML(small(Applied(lambda x: x @ torch.eye(8))))
    notice = check_gradient(learner, learner.init(torch.Generator()), episode)
    assert notice is not None
    assert "does not compute in float64" in notice


@pytest.mark.parametrize("spelling", [nn.utils.spectral_norm, parametrizations.spectral_norm], ids=["hook", "param"])
@pytest.mark.parametrize("layer", ["linear", "convolution"])
def test_spectral_norm_gives_a_task_the_same_logits_every_time(
    spelling: Callable[..., nn.Module], layer: str, episode: Episode
) -> None:
    if layer == "linear":
        network = small(nn.Tanh(), spelling(nn.Linear(8, 8)))
    else:
        network = nn.Sequential(spelling(nn.Conv2d(1, 4, 3, stride=4)), nn.Tanh(), nn.Flatten(), nn.Linear(64, WAYS))
    with pytest.warns(UserWarning, match=r"singular vectors of the spectral norm of \d are kept"):
        learner = MAML(network, adaptation_steps=3, fast_lr=0.5)
    meta = theta(learner)

    def logits() -> Tensor:
        return learner.predict(learner.adapt(meta, episode.support_x, episode.support_y), episode.query_x)

    first = logits()
    for _ in range(5):
        learner.adapt({n: 2 * p for n, p in meta.items()}, episode.support_x + 1, episode.support_y)
    assert torch.equal(first, logits())
    found, mine = difference(learner, meta, episode)
    assert mine == pytest.approx(found, rel=1e-4)


class Counting(nn.Module):
    """Its forward pass moves a buffer that the next one uses."""

    seen: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(256, WAYS)
        self.register_buffer("seen", torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.seen += 0.01
        elif self.how == "assigned":
            self.seen = self.seen + 0.01
        elif self.how == "frozen":
            self.frozen.data += 0.01
        logits: Tensor = self.layer(x.flatten(1)) * self.seen.to(x.dtype) * self.frozen.to(x.dtype)
        return logits


@pytest.mark.parametrize("how", ["in place", "assigned", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_that_move_begin_every_pass_alike(how: str, dtype: torch.dtype, episode: Episode) -> None:
    learner = MAML(Counting(how), adaptation_steps=2, fast_lr=0.01)
    meta = {n: p.to(dtype) for n, p in learner.init(torch.Generator()).items()}
    x = episode.query_x.to(dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first = learner.predict(meta, x)
        assert torch.equal(first, learner.predict(meta, x))
    assert how == "assigned" or "writes into" in str(said[0].message)


class Clamping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.clamp_(-0.01, 0.01)
        logits: Tensor = self.layer(x.flatten(1))
        return logits


def test_a_network_that_writes_into_its_parameters_is_refused(episode: Episode) -> None:
    learner = MAML(Clamping())
    meta = learner.init(torch.Generator())
    kept = {n: p.clone() for n, p in meta.items()}
    with pytest.raises(ConfigError, match=r"writes into its parameters layer.weight"):
        learner.adapt(meta, episode.support_x, episode.support_y)
    assert all(torch.equal(meta[n], kept[n]) for n in meta)


class Remembering(nn.Module):
    """Adds to its logits what it has seen before, which is in no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.memory = nn.Linear(256, WAYS), 0.0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1)) * (1 + self.memory)
        self.memory += 1e-7
        return logits


def test_a_slow_memory_is_found(episode: Episode) -> None:
    learner = MAML(Remembering())
    with pytest.raises(
        ConfigError, match=r"different logits after a call with other images: it keeps something of a call in memory"
    ):
        check_gradient(learner, learner.init(torch.Generator()), episode)


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("network", ["own", "conv4"])
def test_threads_may_share_a_learner(kind: str, network: str) -> None:
    learner = LEARNERS[kind](NETWORKS[network]())
    meta = theta(learner)
    batch = make_batch(8, WAYS, 1, 2, SHAPE)
    episodes = [task(batch, k) for k in range(8)] * 2

    def one(episode: Episode) -> tuple[Tensor, Params]:
        adapted = learner.adapt(meta, episode.support_x, episode.support_y)
        return learner.predict(adapted, episode.query_x), task_gradient(learner, meta, episode)[0]

    expected = [one(episode) for episode in episodes[:8]] * 2
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(one, episodes)]
    for (logits, gradient), (right, slope) in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, right)
        assert all(torch.allclose(gradient[n], slope[n], rtol=1e-7, atol=1e-10) for n in slope)


@pytest.mark.parametrize("kind", ["maml", "protonet"])
@pytest.mark.parametrize("network", ["own", "conv4"])
def test_a_learner_is_copied_while_others_use_it(kind: str, network: str) -> None:
    learner = LEARNERS[kind](NETWORKS[network]())
    meta, episode = theta(learner), task(make_batch(1, WAYS, 1, 2, SHAPE), 0)
    expected = _adapted(learner, meta, episode)

    def use(turn: int) -> None:
        task_gradient(learner, meta, episode)

    def copies(turn: int) -> None:
        for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
            assert other.backbone.names == learner.backbone.names
            torch.testing.assert_close(_adapted(other, meta, episode), expected)
        assert {p.dtype for p in learner.module(meta).parameters()} == {torch.float64}

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, turn) for turn in range(10) for work in (use, use, copies)]:
            done.result()


class Keeping(nn.Module):
    """Keeps something of its first call in a plain attribute."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(256, WAYS), what
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        if self.kept is None:
            values = {"mean": logits.detach().mean(0), "weight": self.layer.weight.mean(1), "grid": torch.ones(WAYS)}
            self.kept = values[self.what]
        return logits - self.kept.to(logits)


@pytest.mark.parametrize("what", ["mean", "weight", "grid"])
def test_what_a_network_keeps_of_its_first_call_is_found(what: str, episode: Episode) -> None:
    learner = MAML(Keeping(what))
    meta = learner.init(torch.Generator())
    if what == "grid":  # a constant is no harm
        assert check_gradient(learner, meta, episode) is None
        return
    with pytest.raises(ConfigError, match=r"keeps something of a call in kept and uses it in the next"):
        learner.adapt(meta, episode.support_x, episode.support_y)


class Hidden(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(256, 8), nn.Linear(8, WAYS)
        self.how = how
        if how == "list":
            self.held: Any = [self.a.weight]
        elif how == "dict":
            self.held = {"weight": self.a.weight}
        elif how == "lambda":
            self.held = lambda x: nn.functional.linear(x, self.a.weight, self.a.bias)
        elif how == "method":
            self.held = self.a.forward
        else:
            self.held = [nn.Linear(256, 8)]

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.how in ("list", "dict"):
            weight = self.held[0] if self.how == "list" else self.held["weight"]
            x = nn.functional.linear(x, weight.to(x.dtype), self.a.bias)
        else:
            x = (self.held[0] if self.how == "module" else self.held)(x)
        logits: Tensor = self.b(torch.tanh(x))
        return logits


@pytest.mark.parametrize("how", ["list", "dict", "lambda", "method", "module"])
def test_parameters_that_pytorch_does_not_see_are_named_once(how: str, episode: Episode) -> None:
    learner = MAML(Hidden(how))
    meta, seen = learner.init(torch.Generator()), Episode(*(p.float() if p.dim() > 1 else p for p in episode))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            task_gradient(learner, meta, seen)
    found = [str(w.message) for w in said]
    if how == "method":  # copied with the network, so that it finds the parameters that are put into the copy
        g, _ = task_gradient(learner, meta, seen)
        assert found == []
        assert g["a.weight"].any()
        return
    assert len(found) == 1
    assert ("a parameter of shape (8, 256)" if how == "module" else "a.weight") in found[0]
    assert "ParameterList" in found[0]


class Logits(Tensor):
    pass


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: (z, z), r"returns a tuple of 2 values: return the one"),
        (lambda z: {"logits": z}, r"returns a dict: return the tensor of logits"),
        (lambda z: z.as_subclass(Logits), r"returns a Logits, a subclass of Tensor: return logits.as_subclass"),
        (lambda z: z.mean(0), r"output of shape \(3,\)"),
        (lambda z: z[:, None], r"output of shape \(\d+, 1, 3\)"),
        (lambda z: z[:2], r"output of shape \(2, 3\)"),
        (lambda z: z.argmax(1, keepdim=True).expand(-1, 3), r"type torch.int64"),
        (lambda z: None, r"returns a NoneType"),
        (lambda z: z.to_sparse(), r"returns a sparse or nested tensor"),
        (lambda z: z.to("meta"), r"lie on cpu, but its output on meta"),
    ],
)
@pytest.mark.parametrize("kind", ["maml", "metalstm", "protonet"])
def test_what_is_no_logits_is_refused(
    function: Callable[[Tensor], Any], message: str, kind: str, episode: Episode
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(256, 8), nn.Linear(8, WAYS)

        def forward(self, x: Tensor) -> Any:
            return function(self.head(self.body(x.flatten(1))))

    learner = LEARNERS[kind](Net())
    meta = theta(learner)
    with pytest.raises(ConfigError, match=message):
        learner.adapt(meta, episode.support_x, episode.support_y)
    with pytest.raises(ConfigError, match=message):
        vectorized(LEARNERS[kind](Net()))(meta, make_batch(2, WAYS, 2, 3, SHAPE))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y + 1, r"labels outside 0\.\.2 such as 3, but the network has 3 logits"),
        (lambda y: y - 1, r"labels outside 0\.\.2 such as -1"),
        (lambda y: y - 100, r"labels outside 0\.\.2 such as -100"),
        (lambda y: y.float(), r"type torch.float32, but they must be int64"),
        (lambda y: nn.functional.one_hot(y), r"6, 3\) and type"),
        (lambda y: y[:4], r"4,?\) and type"),
    ],
)
def test_labels_that_are_no_classes_are_named(
    network: str, change: Callable[[Tensor], Tensor], message: str, episode: Episode
) -> None:
    learner = MAML(NETWORKS[network](), adaptation_steps=1)
    meta, x = learner.init(torch.Generator().manual_seed(0)), episode.support_x.float()
    with pytest.raises(ConfigError, match=message):
        learner.adapt(meta, x, change(episode.support_y))
    wrong = Episode(x, episode.support_y, x, change(episode.support_y))
    for gradient in (task_gradient, initial_gradient):
        with pytest.raises(ConfigError, match=message):
            gradient(learner, meta, wrong)


def test_labels_that_protonet_and_lists_give_are_named(episode: Episode) -> None:
    learner = ProtoNet(Tiny(WAYS, SHAPE))
    meta = learner.init(torch.Generator())
    for change in (1, -1):
        with pytest.raises(ConfigError, match=r"labels outside 0\.\.2 such as (3|-1), but the network has 3 ways"):
            learner.adapt(meta, episode.support_x, episode.support_y + change)
    maml = MAML(Tiny(WAYS, SHAPE))
    with pytest.raises(ConfigError, match=r"the labels are a list, but they must be an int64 tensor"):
        maml.adapt(maml.init(torch.Generator()), episode.support_x, episode.support_y.tolist())  # type: ignore[arg-type]


def _adapted(learner: NetworkLearner, meta: Params, episode: Episode) -> Tensor:
    return learner.predict(learner.adapt(meta, episode.support_x, episode.support_y), episode.query_x)


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_learners_pickle_and_copy(kind: str, network: str, used: bool) -> None:
    learner = LEARNERS[kind](NETWORKS[network]())
    meta = learner.init(torch.Generator().manual_seed(0))
    episode = task(make_batch(1, WAYS, 2, 3, SHAPE, torch.float32), 0)
    expected = _adapted(learner, meta, episode) if used else None
    others = pickle.loads(pickle.dumps(learner)), copy.deepcopy(learner)
    if expected is None:
        expected = _adapted(learner, meta, episode)
    for other in others:
        assert torch.equal(_adapted(other, meta, episode), expected)
        assert (other.backbone.closed_form_on_cpu is None) == (learner.backbone.closed_form_on_cpu is None)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated", "ignore:weight norm", "ignore:the singular vectors")
@pytest.mark.parametrize("spelling", [OLD, NEW, nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_normed_layers_pickle_and_copy_after_use(spelling: Callable[..., nn.Module], episode: Episode) -> None:
    learner = MAML(small(spelling(nn.Linear(8, 8))))
    meta = theta(learner)
    expected = _adapted(learner, meta, episode)
    task_gradient(learner, meta, episode)
    for other in (pickle.loads(pickle.dumps(learner)), copy.deepcopy(learner), MAML(learner.backbone.module)):
        torch.testing.assert_close(_adapted(other, meta, episode), expected)
    batch = make_batch(2, WAYS, 2, 3, SHAPE)
    for one, other in zip(looped(learner)(meta, batch)[1], threaded(learner, 2)(meta, batch)[1], strict=True):
        torch.testing.assert_close(one, other)


def test_a_learner_goes_to_a_spawned_process() -> None:
    episode = task(make_batch(1, WAYS, 2, 3, SHAPE, torch.float32), 0)
    learners = [
        LEARNERS[kind](NETWORKS[net]()) for kind in ("maml", "metalstm", "protonet") for net in ("own", "conv4")
    ]
    metas = [learner.init(torch.Generator().manual_seed(0)) for learner in learners]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.starmap(_adapted, [(*pair, episode) for pair in zip(learners, metas, strict=True)])
    for logits, learner, meta in zip(found, learners, metas, strict=True):
        torch.testing.assert_close(logits, _adapted(learner, meta, episode))


class TwoNames(nn.Module):
    """Registers its parts by themselves and in a row, as many do."""

    def __init__(self, row_first: bool) -> None:
        super().__init__()
        a, b = nn.Linear(256, 8), nn.Linear(8, WAYS)
        if row_first:
            self.net = nn.Sequential(nn.Flatten(), a, nn.Tanh(), b)
        self.a, self.b = a, b
        if not row_first:
            self.net = nn.Sequential(nn.Flatten(), self.a, nn.Tanh(), self.b)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.parametrize("row_first", [False, True])
@pytest.mark.parametrize("head", [None, "b", "net.3"])
def test_a_module_under_two_names_is_one(row_first: bool, head: str | None, episode: Episode) -> None:
    network = TwoNames(row_first)
    plain = nn.Sequential(*network.net)
    names = dict(zip([n for n, _ in plain.named_parameters()], [n for n, _ in network.named_parameters()], strict=True))
    for kind in (MAML, ANIL, BOIL, ProtoNet):
        given = {} if kind is MAML or head is None else {"head": head}
        learner = kind(network, **given)  # type: ignore[arg-type]
        other = kind(plain, **({"head": "3"} if kind is not MAML else {}))  # type: ignore[arg-type]
        g, _ = task_gradient(learner, theta(learner), episode)
        expected, _ = task_gradient(other, theta(other), episode)
        assert len(g) == len(expected)
        assert all(torch.equal(g[names[n]], expected[n]) for n in expected)
    check_gradient(MAML(network), theta(MAML(network)), episode)


@pytest.mark.parametrize(
    "load",
    [
        lambda net: net.load_state_dict({n: torch.full_like(v, 0.01) for n, v in net.state_dict().items()}),
        lambda net: [p.data.fill_(0.01) for p in net.parameters()],
        lambda net: [nn.init.constant_(p, 0.01) for p in net.parameters()],
        lambda net: setattr(net, "head", nn.Linear(4, WAYS)),
    ],
)
@pytest.mark.parametrize("later", [lambda net: net, lambda net: net.double(), copy.deepcopy])
def test_our_own_network_keeps_weights_that_it_was_given(
    load: Callable[[nn.Module], Any], later: Callable[[Conv4], Conv4]
) -> None:
    network = Conv4(WAYS, SHAPE, hidden=4)
    assert not network.was_given_weights
    load(network)
    network = later(network)
    for kind in LEARNERS:
        learner = LEARNERS[kind](network)
        start = learner.initial(learner.init(torch.Generator().manual_seed(3)))
        for name, p in network.named_parameters():
            if kind != "protonet" or not name.startswith("head"):
                assert torch.equal(start[name], p), (kind, name)


@pytest.mark.parametrize("later", [lambda net: net, lambda net: net.double(), lambda net: net.half(), copy.deepcopy])
def test_a_fresh_network_is_redrawn(later: Callable[[Conv4], Conv4]) -> None:
    learner = MAML(later(Conv4(WAYS, SHAPE, hidden=4)))
    one, two, three = (learner.init(torch.Generator().manual_seed(seed)) for seed in (1, 2, 1))
    assert not torch.equal(one["head.weight"], two["head.weight"])
    assert all(torch.equal(one[n], three[n]) for n in one)


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_learner_gives_a_plain_module(kind: str, network: str, episode: Episode) -> None:
    made = NETWORKS[network]()
    learner = LEARNERS[kind](made)
    meta = theta(learner)
    adapted = learner.adapt(meta, episode.support_x, episode.support_y)
    for params in (meta, adapted):
        module = learner.module(params)
        phi = adapted if params is adapted else learner.initial(meta)
        torch.testing.assert_close(module(episode.query_x), learner.predict(phi, episode.query_x))
        assert [*module.state_dict()] == [*made.state_dict()]
        made.double().load_state_dict(module.state_dict())
        torch.testing.assert_close(made(episode.query_x), module(episode.query_x))
    with pytest.raises(ConfigError, match=r"not the network's parameters"):
        learner.module({**adapted, next(iter(adapted)): torch.zeros(1)})


class Compiled(nn.Module):
    """What torch.compile returns, as far as its names tell, without waiting for a compiler."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (nn.DataParallel, r"DataParallel.*hand over the module inside it, network\.module"),
        (Compiled, r"torch\.compile.*network\._orig_mod"),
        (
            lambda net: torch.jit.trace(net, torch.zeros(2, *SHAPE)),  # type: ignore[no-untyped-call]
            r"scripted or traced",
        ),
        (lambda net: nn.Sequential(nn.DataParallel(net)), r"module '0' is a DataParallel.*network\.0\.module"),
    ],
)
def test_wrappers_are_told_to_hand_over_what_is_inside(wrap: Callable[[nn.Module], nn.Module], remedy: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's deprecation
        wrapped = wrap(Tiny(WAYS, SHAPE))
    with pytest.raises(ConfigError, match=remedy):
        MAML(wrapped)


def test_a_network_that_cannot_be_copied_is_explained() -> None:
    network = Tiny(WAYS, SHAPE)
    network.lock = (k for k in range(3))  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"Tiny\) cannot be copied \(TypeError"):
        MAML(network)
