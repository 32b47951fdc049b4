import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from metaheed.data import Episodes, load_dataset
from metaheed.engine.batching import takes_batches
from metaheed.errors import ConfigError
from metaheed.learners import MAML, Conv4, MetaSGD
from metaheed.networks.closed_form import block
from metaheed.networks.closed_form.cpu import ClosedForm, closed_form
from metaheed.outer import looped, task_gradient, vectorized
from metaheed.types import Episode, Params
from tests.conftest import make_batch

WAYS = 3
SHAPES = {"odd": (3, 21, 18), "one channel": (1, 16, 17), "even": (2, 32, 32)}
NETWORKS: dict[str, Callable[[tuple[int, int, int]], Conv4]] = {
    "pooled": lambda shape: Conv4(WAYS, shape, hidden=4),
    "strided": lambda shape: Conv4(WAYS, shape, hidden=3, downsample="stride"),
    "one filter": lambda shape: Conv4(WAYS, shape, hidden=1),
}


def known(network: Conv4) -> ClosedForm:
    form = closed_form(network)
    assert form is not None
    return form


def drawn(network: nn.Module, tasks: int) -> Params:
    """Parameters of each task, gains of either sign."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tasks, *p.shape, generator=generator, dtype=torch.float64)
        for name, p in network.named_parameters()
    }


def autograd(network: nn.Module, params: Params, x: Tensor, y: Tensor, direction: Params) -> tuple[Any, ...]:
    """Losses, gradients and Hessian products, task by task, by double backward of PyTorch's own modules."""
    rows = []
    for task in range(len(y)):
        at = {n: p[task].clone().requires_grad_() for n, p in params.items()}
        loss = nn.functional.cross_entropy(functional_call(network, at, (x[task],)), y[task])
        slopes = torch.autograd.grad(loss, list(at.values()), create_graph=True)
        along = torch.stack([(g * direction[n][task]).sum() for g, n in zip(slopes, at, strict=True)])
        products = torch.autograd.grad(along.sum(), list(at.values()))
        rows.append((loss.detach(), [g.detach() for g in slopes], list(products)))
    losses, *kinds = zip(*rows, strict=True)
    trees = ({n: torch.stack(p) for n, p in zip(params, zip(*t, strict=True), strict=True)} for t in kinds)
    return torch.stack(losses), *trees


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("slice_bytes", [1 << 21, 4000], ids=["whole", "sliced"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradient_and_hessian_product_are_autograds(
    network: str, shape: str, slice_bytes: int, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "_SLICE_BYTES", slice_bytes)
    net = NETWORKS[network](SHAPES[shape])
    form, params, direction = known(net), drawn(net, tasks), drawn(net, 2 * tasks)
    direction = {name: d[tasks:] for name, d in direction.items()}
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tasks, 7, *SHAPES[shape], generator=generator, dtype=torch.float64)
    y = torch.randint(0, WAYS, (tasks, 7), generator=generator)
    loss, gradient, product = autograd(net, params, x, y, direction)
    for keep in (False, True):
        found, found_loss, logits, tape = form.gradient(params, x, y, keep=keep)
        torch.testing.assert_close(found_loss, loss)
        torch.testing.assert_close(logits, form.logits(params, x))
        for name in params:
            torch.testing.assert_close(found[name], gradient[name], rtol=1e-8, atol=1e-10)
    assert tape is not None
    for _ in range(2):  # the tape is left as it was
        found = form.hessian_product(params, tape, direction)
        for name in params:
            torch.testing.assert_close(found[name], product[name], rtol=1e-8, atol=1e-9)
            if name.endswith("conv.bias"):
                assert not found[name].any()


@pytest.mark.parametrize("part", ["head", "body.3", "body.1", "body.0.norm"])
def test_a_part_of_the_gradient_and_of_the_direction(part: str) -> None:
    net = Conv4(WAYS, (1, 16, 16), hidden=4)
    form, params = known(net), drawn(net, 2)
    names = tuple(name for name in params if name.startswith(part))
    batch = make_batch(2, WAYS, 2, 1, (1, 16, 16))
    x, y = batch.support_x, batch.support_y
    direction = {name: torch.ones_like(p) * (name in names) for name, p in params.items()}
    _, gradient, product = autograd(net, params, x, y, direction)
    found = form.gradient(params, x, y, names)[0]
    assert list(found) == list(names)
    for name in names:
        torch.testing.assert_close(found[name], gradient[name], rtol=1e-8, atol=1e-10)
    tape = form.gradient(params, x, y, names, keep=True)[3]
    assert tape is not None
    found = form.hessian_product(params, tape, {name: direction[name] for name in names})
    for name in params:
        torch.testing.assert_close(found[name], product[name], rtol=1e-8, atol=1e-9)


def test_derivatives_through_adaptation_of_any_order_by_plain_autograd() -> None:
    """A user's own loop: φ from adapt, a loss of it, its gradient, and that one's derivative."""
    batch = make_batch(1, WAYS, 1, 2, (1, 16, 16))
    x, y, query_x, query_y = (part[0] for part in batch)
    results = []
    for network in (Conv4(WAYS, (1, 16, 16), hidden=3), Subclass(WAYS, (1, 16, 16), hidden=3)):
        learner = MAML(network, adaptation_steps=2, fast_lr=0.2)
        assert (learner.backbone.closed_form_on_cpu is None) == isinstance(network, Subclass)
        meta = {n: p.double().requires_grad_() for n, p in learner.init(torch.Generator().manual_seed(0)).items()}
        adapted = learner.adapt(meta, x, y)
        loss = nn.functional.cross_entropy(learner.predict(adapted, query_x), query_y)
        slope = torch.autograd.grad(loss, list(meta.values()), create_graph=True)
        square = torch.stack([g.square().sum() for g in slope]).sum()
        results.append([loss, *slope, *torch.autograd.grad(square, list(meta.values()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("tasks", [(), (2,)], ids=["one task", "two"])
def test_many_vectors_at_once(tasks: tuple[int, ...]) -> None:
    """torch.autograd.grad(…, is_grads_batched=True), as torch.autograd.functional.jacobian(vectorize=True) has it."""
    batch = make_batch(2, WAYS, 1, 2, (1, 16, 16))
    x, y = (part if tasks else part[0] for part in (batch.support_x, batch.support_y))
    learner = MAML(Conv4(WAYS, (1, 16, 16), hidden=3), adaptation_steps=2, fast_lr=0.2)
    drawn = learner.init(torch.Generator().manual_seed(0))
    meta = {n: p.double().expand(*tasks, *p.shape).clone().requires_grad_() for n, p in drawn.items()}
    adapted = learner.adapt(meta, x, y)["head.bias"]
    vectors = torch.randn(3, *adapted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = list(meta.values())
    one_by_one = [torch.autograd.grad(adapted, leaves, vector, retain_graph=True) for vector in vectors]
    together = torch.autograd.grad(adapted, leaves, vectors, is_grads_batched=True)
    for found, *expected in zip(together, *one_by_one, strict=True):
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-7, atol=1e-9)
    assert any(leaf.any() for leaf in together)


class Subclass(Conv4):
    """May do anything."""


def hooked(network: Conv4) -> None:
    network.body[0].register_forward_hook(lambda module, given, output: 2 * output)


def frozen(network: Conv4) -> None:
    network.head.bias.requires_grad_(False).zero_()


def other_norm(network: Conv4) -> None:
    network.body[1].norm = nn.GroupNorm(1, 4)


def other_activation(network: Conv4) -> None:
    network.body[2].relu = nn.LeakyReLU()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrised(network: Conv4) -> None:
    nn.utils.parametrize.register_parametrization(network.head, "weight", Doubled())


@pytest.mark.parametrize("change", [hooked, frozen, other_norm, other_activation, parametrised])
def test_a_changed_network_is_not_taken_for_the_one_that_is_known(change: Callable[[Conv4], None]) -> None:
    network = Conv4(WAYS, (1, 16, 16), hidden=4)
    change(network)
    learner = MAML(network, adaptation_steps=2, fast_lr=0.2)
    meta = {n: p.double() for n, p in learner.init(torch.Generator().manual_seed(0)).items()}
    batch = make_batch(2, WAYS, 1, 2, (1, 16, 16))
    assert not takes_batches(learner, meta, batch.support_x)
    gradient, info = vectorized(learner)(meta, batch)
    for task in range(2):
        loss, slope = by_autograd(network.double(), meta, type(batch)(*(part[task] for part in batch)))
        torch.testing.assert_close(info.query_loss[task], loss)
        for name, g in slope.items():
            torch.testing.assert_close(gradient[name][task], g, rtol=1e-6, atol=1e-9)


def by_autograd(network: nn.Module, meta: Params, episode: Episode) -> tuple[Tensor, Params]:
    """Query loss after two steps of MAML with rate 0.2, and its gradient."""
    at = {n: p.clone().requires_grad_() for n, p in meta.items()}
    phi = at
    for _ in range(2):
        loss = nn.functional.cross_entropy(functional_call(network, phi, (episode.support_x,)), episode.support_y)
        slope = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        phi = {n: p - 0.2 * g for (n, p), g in zip(phi.items(), slope, strict=True)}
    loss = nn.functional.cross_entropy(functional_call(network, phi, (episode.query_x,)), episode.query_y)
    return loss.detach(), dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))


def other_convolution(network: Any) -> None:
    network.body[0].conv = nn.Conv2d(1, 4, 5, padding=2)


def other_stride(network: Any) -> None:
    network.body[0].conv.stride = (1, 1)


def other_padding(network: Any) -> None:
    network.body[1].conv.padding = (2, 0)


def other_epsilon(network: Any) -> None:
    network.body[3].norm.eps = 0.3


def one_more_layer(network: Any) -> None:
    network.body[2].append(nn.Tanh())


def another_order(network: Any) -> None:
    parts = network.body[1]._modules
    parts["norm"] = parts.pop("norm")  # after ReLU


def without_mean(network: Any) -> None:
    network.body[4].output_size = (1, 2)
    network.head = nn.Linear(8, WAYS)


def other_class(network: Any) -> None:
    network.body[2].relu.__class__ = nn.Sigmoid


def running_statistics(network: Any) -> None:
    norm = network.body[1].norm
    norm.running_mean, norm.running_var = torch.ones(4).double(), torch.full((4,), 2.0).double()
    norm.eval()


def half_frozen(network: Any) -> None:
    network.body[0].norm.bias.requires_grad_(False)


def own_forward(network: Any) -> None:
    norm = network.body[1].norm
    norm.forward = lambda x: 2 * nn.BatchNorm2d.forward(norm, x)


def own_convolution(network: Any) -> None:
    conv = network.body[2].conv
    own = conv._conv_forward
    conv._conv_forward = lambda x, weight, bias: own(x, 2 * weight, bias)


LATER: list[Callable[[Any], None]] = [
    *(other_convolution, other_stride, other_padding, other_epsilon, one_more_layer, another_order, without_mean),
    *(other_class, running_statistics, half_frozen, hooked, other_norm, other_activation, parametrised),
    *(own_forward, own_convolution),
]


@pytest.mark.parametrize("change", LATER)
def test_a_network_changed_after_the_learner_was_made_is_followed(change: Callable[[Any], None]) -> None:
    learner = MAML(Conv4(WAYS, (1, 24, 24), hidden=4, downsample="stride"), adaptation_steps=2, fast_lr=0.2)
    batch = make_batch(2, WAYS, 1, 2, (1, 24, 24))
    meta = {n: p.double() for n, p in learner.init(torch.Generator().manual_seed(0)).items()}
    assert takes_batches(learner, meta, batch.support_x)
    network: Any = learner.backbone.module
    change(network)
    made = {n: p.detach().double() for n, p in network.named_parameters()}
    meta = {n: meta[n] if n in meta and meta[n].shape == p.shape else p for n, p in made.items()}
    assert not takes_batches(learner, meta, batch.support_x)
    for execution in (looped(learner), vectorized(learner)):
        gradient, info = execution(meta, batch)
        for task in range(2):
            episode = type(batch)(*(part[task] for part in batch))
            loss, slope = by_autograd(network, meta, episode)
            torch.testing.assert_close(info.query_loss[task], loss)
            for name, g in slope.items():
                torch.testing.assert_close(gradient[name][task], g, rtol=1e-6, atol=1e-9)


def test_gains_of_zero_have_autograds_choice_of_maxima() -> None:
    network = Conv4(WAYS, (1, 16, 16), hidden=4)
    learner = MAML(network, adaptation_steps=1, fast_lr=0.2)
    meta = {n: p.double() for n, p in learner.init(torch.Generator().manual_seed(0)).items()}
    meta["body.1.norm.weight"][:2] = 0.0
    meta["body.1.norm.bias"][:] = 1.0
    batch = make_batch(2, WAYS, 1, 2, (1, 16, 16))
    assert not takes_batches(learner, meta, batch.support_x)
    for execution in (looped(learner), vectorized(learner)):
        gradient, _ = execution(meta, batch)
        for task in range(2):
            support_x, support_y, query_x, query_y = (part[task] for part in batch)
            at = {n: p.clone().requires_grad_() for n, p in meta.items()}
            loss = nn.functional.cross_entropy(functional_call(network, at, (support_x,)), support_y)
            slope = torch.autograd.grad(loss, list(at.values()), create_graph=True)
            phi = {n: p - 0.2 * g for (n, p), g in zip(at.items(), slope, strict=True)}
            loss = nn.functional.cross_entropy(functional_call(network, phi, (query_x,)), query_y)
            for name, g in zip(at, torch.autograd.grad(loss, list(at.values())), strict=True):
                torch.testing.assert_close(gradient[name][task], g, rtol=1e-6, atol=1e-9)


def test_hooks_for_all_modules_are_called() -> None:
    learner = MAML(Conv4(WAYS, (1, 16, 16), hidden=4), adaptation_steps=1)
    meta = learner.init(torch.Generator().manual_seed(0))
    batch = make_batch(1, WAYS, 1, 2, (1, 16, 16), torch.float32)
    called = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, output: called.append(module))
    try:
        looped(learner)(meta, batch)
    finally:
        hook.remove()
    assert any(isinstance(module, Conv4) for module in called)


def test_hooks_of_the_backward_pass_are_seen() -> None:
    network = Conv4(WAYS, (1, 16, 16), hidden=4)
    assert known(network).applies
    network.head.register_full_backward_pre_hook(lambda module, slopes: None)
    assert not known(network).applies


def test_a_norm_over_one_place_is_refused_as_everywhere() -> None:
    learner = MAML(Conv4(2, (1, 16, 16), hidden=4, downsample="stride"))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        learner.predict(learner.init(torch.Generator().manual_seed(0)), torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize("shape", [(2, 64, 83, 83), (1, 1024, 84, 84), (3, 2100, 7, 5), (1, 3, 1, 2)])
def test_sums_of_planes_lose_nothing_whatever_their_size(shape: tuple[int, ...]) -> None:
    y = torch.full(shape, 0.1234567).to(memory_format=torch.channels_last)
    y[0, :, 0] += torch.arange(shape[1])[:, None] % 7
    total, square = block._moments(y)
    exact = y.double()
    np.testing.assert_allclose(total, exact.sum((0, 2, 3)).numpy(), rtol=5e-6)
    np.testing.assert_allclose(square, exact.square().sum((0, 2, 3)).numpy(), rtol=5e-6)


def test_images_of_other_channels_are_refused_as_everywhere() -> None:
    learner = MAML(Conv4(WAYS, (1, 16, 16), hidden=4))
    meta = learner.init(torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="to have 1 channels"):
        learner.predict(meta, torch.zeros(4, 2, 16, 16))


def test_whatever_the_default_device() -> None:
    learner = MAML(Conv4(WAYS, (1, 17, 16), hidden=5), adaptation_steps=2)
    meta = learner.init(torch.Generator().manual_seed(0))
    batch = make_batch(2, WAYS, 1, 2, (1, 17, 16), torch.float32)
    with torch.device("meta"):
        gradient, _ = vectorized(learner)(meta, batch)
    expected, _ = vectorized(learner)(meta, batch)
    for name in meta:
        assert torch.equal(gradient[name], expected[name])


def test_a_learner_that_changes_what_ours_does_is_followed() -> None:
    class Sharper(MAML):
        def predict(self, adapted: Params, x: Tensor) -> Tensor:
            return 3 * super().predict(adapted, x)

    class Slower(MetaSGD):
        def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
            return self.initial(meta)

    batch = make_batch(2, WAYS, 1, 2, (1, 16, 16))
    network = Conv4(WAYS, (1, 16, 16), hidden=4)
    plain, sharper = (kind(network, adaptation_steps=1, fast_lr=0.1) for kind in (MAML, Sharper))
    meta = {n: p.double() for n, p in plain.init(torch.Generator().manual_seed(0)).items()}
    assert not torch.allclose(looped(sharper)(meta, batch)[1].query_loss, looped(plain)(meta, batch)[1].query_loss)
    torch.testing.assert_close(vectorized(sharper)(meta, batch), looped(sharper)(meta, batch))
    slower = Slower(network)
    meta = {n: p.double() for n, p in slower.init(torch.Generator().manual_seed(0)).items()}
    info = vectorized(slower)(meta, batch)[1]
    torch.testing.assert_close(info.query_loss, info.initial_loss)


def test_under_transforms_of_torch_func() -> None:
    learner = MAML(Conv4(WAYS, (1, 16, 16), hidden=4), adaptation_steps=1, fast_lr=0.1)
    meta = {n: p.double() for n, p in learner.init(torch.Generator().manual_seed(0)).items()}
    batch = make_batch(2, WAYS, 1, 2, (1, 16, 16))
    expected = torch.stack([learner.predict(meta, x) for x in batch.query_x])
    torch.testing.assert_close(vmap(lambda x: learner.predict(meta, x))(batch.query_x), expected)
    x = batch.query_x[0]
    value, slope = jvp(lambda x: learner.predict(meta, x), (x,), (torch.ones_like(x),))  # type: ignore[misc]
    torch.testing.assert_close(value, expected[0])
    step = 1e-5
    difference = (learner.predict(meta, x + step) - learner.predict(meta, x - step)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-6)


def test_planes_are_freed_without_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes: list[weakref.ref[Any]] = []
    original = ClosedForm.gradient

    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        if result[3] is not None:
            tapes.extend(weakref.ref(block.z) for block in result[3].blocks)
        return result

    monkeypatch.setattr(ClosedForm, "gradient", noted)
    learner = MAML(Conv4(WAYS, (1, 16, 16), hidden=4), adaptation_steps=2)
    meta = learner.init(torch.Generator().manual_seed(0))
    batch = make_batch(1, WAYS, 1, 2, (1, 16, 16))
    gc.disable()
    try:
        kept = task_gradient(learner, meta, type(batch)(*(part[0] for part in batch)))
        assert len(tapes) == 8
        assert not [tape for tape in tapes if tape() is not None]
        # Nor by what a graph that is never used leaves behind.
        adapted = learner.adapt(
            {n: p.requires_grad_() for n, p in meta.items()}, batch.support_x[0], batch.support_y[0]
        )
        assert len([tape for tape in tapes if tape() is not None]) == 8
        del adapted
        assert not [tape for tape in tapes if tape() is not None]
    finally:
        gc.enable()
    assert kept


@pytest.mark.parametrize("shots", [1, 5])
def test_float32_on_images_with_a_constant_background(shots: int) -> None:
    """Where every place has the same value, an inexact mean shifts all of them, and ReLUs and maxima flip."""
    episodes = Episodes(load_dataset("glyphs"), "train", 5, shots, 15, seed=0)
    off = []
    for index in range(3):
        x, y, query_x, query_y = episodes.batch(index, 1)
        learner = MAML(Conv4(5, x.shape[2:]), adaptation_steps=5, fast_lr=0.01)  # type: ignore[arg-type]
        meta = learner.init(torch.Generator().manual_seed(index))
        exact = {name: p.double() for name, p in meta.items()}
        gradient, _ = vectorized(learner)(meta, Episode(x, y, query_x, query_y))
        expected, _ = vectorized(learner)(exact, Episode(x.double(), y, query_x.double(), query_y))
        difference, size = (
            torch.stack([g.double().square().sum() for g in tree.values()]).sum().sqrt()
            for tree in ({name: gradient[name] - expected[name] for name in meta}, expected)
        )
        off.append(float(difference / size))
        for images in (x[0], query_x[0]):
            logits = learner.predict(meta, images).double()
            exactly = learner.predict(exact, images.double())
            assert (logits - exactly).square().mean().sqrt() < 2e-6 * exactly.square().mean().sqrt()
    assert sorted(off)[1] < 3e-5  # two places that are all but equal may change order in any float32 computation


def test_images_of_another_size_are_refused() -> None:
    learner = MAML(Conv4(WAYS, (1, 32, 32), hidden=4), adaptation_steps=1)
    meta, x, y = learner.init(torch.Generator()), torch.rand(3, 1, 64, 64), torch.arange(3)
    message = r"64×64 pixels leave 16 places after the network's last block.*for 4"
    with pytest.raises(ConfigError, match=message):
        learner.adapt(meta, x, y)
    with pytest.raises(ConfigError, match=message):
        learner.predict(meta, x)
    batch = Episode(*(part.unsqueeze(0) for part in (x, y, x, y)))
    for execution in (looped(learner), vectorized(learner)):
        with pytest.raises(ConfigError, match=message):
            execution(meta, batch)
    strided = MAML(Conv4(WAYS, (1, 32, 32), hidden=4, downsample="stride"), adaptation_steps=1)
    strided.adapt(strided.init(torch.Generator()), x, y)  # its head sees the mean over whatever is left


class Named(MAML):
    """Adds to MAML what changes nothing of it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, adaptation_steps=1)
        self.name = "mine"

    def describe(self) -> str:
        return self.name


class Other(MAML):
    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        return super().adapt(meta, support_x, support_y)


class Sworn(Other):
    elementwise = True


class Grandchild(Named):
    pass


class Undone(Sworn):
    def initial(self, meta: Params) -> Params:
        return dict(meta)


@pytest.mark.parametrize(
    ("kind", "known"), [(Named, True), (Grandchild, True), (Other, False), (Sworn, True), (Undone, False)]
)
def test_a_subclass_keeps_the_closed_form_unless_it_replaces_a_part(kind: type[MAML], known: bool) -> None:
    learner = kind(Conv4(WAYS, (1, 16, 16), hidden=4))
    x = torch.rand(2, 3, 1, 16, 16)
    assert takes_batches(learner, learner.init(torch.Generator()), x) == known
