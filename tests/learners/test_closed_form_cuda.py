"""The kernels for CUDA without a device: Triton's interpreter runs them on a CPU, and its compiler builds them.

What only a device can show is in tests/test_on_cuda.py.
"""

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaheed.engine.batching import takes_batches
from metaheed.learners import ANIL, BOIL, MAML, Conv4, Learner, MetaLSTM, MetaSGD
from metaheed.networks.closed_form import cuda as module
from metaheed.networks.closed_form.cpu import closed_form
from metaheed.networks.closed_form.cuda import ClosedFormCUDA
from metaheed.outer import looped, map_together, task_gradient
from metaheed.types import Params
from tests.conftest import make_batch
from tests.learners import kernel_builds
from tests.learners.test_closed_form import autograd

pytestmark = [
    pytest.mark.slow,  # the interpreter is
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted"),
]
WAYS = 3


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """Interpreted: tests/conftest.py sees to it before anything imports Triton."""
    from metaheed.networks.closed_form import kernels

    return kernels


@pytest.fixture(autouse=True)
def large_tiles(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a tile costs about the same however large it is."""
    monkeypatch.setattr(kernels, "_tile", lambda *_: kernels._Tile(1024, 4, 3))
    monkeypatch.setattr(kernels, "_TILE", 1024)
    monkeypatch.setattr(kernels, "_SUMMED", 512)


@pytest.fixture(autouse=True)
def _overflow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter checks every operation for an index that overflows: 40% of its time, and once is enough.

    It is checked in `test_gradient_and_hessian_product_are_autograds`.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if "are_autograds" not in request.node.name:
        monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))


def known(network: nn.Module) -> ClosedFormCUDA:
    form = closed_form(network, ClosedFormCUDA)
    assert form is not None
    return form


def drawn(network: nn.Module, tasks: int, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tasks, *p.shape, generator=generator) for name, p in network.named_parameters()}


def double(tree: Params) -> Params:
    return {name: p.double() for name, p in tree.items()}


def assert_near(found: Params, expected: Params, limit: float = 2e-5) -> None:
    for name, leaf in expected.items():
        assert found[name].shape == leaf.shape
        if name.endswith("conv.bias"):
            assert not found[name].any()
        else:
            assert float((found[name] - leaf).norm()) <= limit * float(leaf.norm()), name


@pytest.mark.parametrize(
    ("shape", "hidden", "places", "ways"),
    [((3, 17, 18), 3, 128, 3), ((1, 16, 16), 1, 512, 17), ((9, 16, 17), 17, 1024, 3)],
    ids=["odd, in many tiles", "one channel and filter, many ways", "many channels"],
)
def test_gradient_and_hessian_product_are_autograds(
    shape: tuple[int, int, int],
    hidden: int,
    places: int,
    ways: int,
    kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_tile", lambda *_: kernels._Tile(places, 4, 3))
    monkeypatch.setattr(kernels, "_TILE", places)
    monkeypatch.setattr(kernels, "_SUMMED", min(places, 256))
    monkeypatch.setattr(kernels, "_SMALL", 1 << 16 if places > 128 else 0)
    net = Conv4(ways, shape, hidden=hidden)
    form, params, direction = known(net), drawn(net, 2, 1), drawn(net, 2, 2)
    generator = torch.Generator().manual_seed(3)
    # Neither lies in memory as its shape says.
    x = torch.randn(2, 2, *shape, generator=generator).transpose(0, 1)
    y = torch.randint(0, ways, (2, 2), generator=generator).T
    assert form.fits({n: p[0] for n, p in params.items()}, x)
    loss, gradient, product = autograd(net.double(), double(params), x.double(), y, double(direction))
    found, found_loss, logits, tape = form.gradient(params, x, y, keep=True)
    torch.testing.assert_close(found_loss.double(), loss, rtol=1e-5, atol=1e-6)
    assert_near(found, gradient)
    assert_near(form.hessian_product(params, tape, direction), product, 2e-4)
    assert torch.equal(form.logits(params, x), logits)


def test_a_part_is_that_part_of_the_whole() -> None:
    net = Conv4(WAYS, (1, 16, 16), hidden=3)
    form, params, direction = known(net), drawn(net, 1, 1), drawn(net, 1, 2)
    x, y = torch.randn(1, 2, 1, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([[0, 2]])
    found, _, _, tape = form.gradient(params, x, y, keep=True)
    again = form.gradient(params, x, y, ("body.2.norm.bias", "head.bias"))[0]
    assert list(again) == ["body.2.norm.bias", "head.bias"]
    assert all(torch.equal(again[n], found[n]) for n in again)
    still = {n: d if n.startswith("body.1") else torch.zeros_like(d) for n, d in direction.items()}
    # A second time from the same tape, which is left as it was.
    part = form.hessian_product(params, tape, {n: d for n, d in direction.items() if n.startswith("body.1")})
    whole = form.hessian_product(params, tape, still)
    assert all(torch.equal(part[n], whole[n]) for n in whole)
    assert any(leaf.any() for leaf in whole.values())


def test_a_gain_of_zero_takes_autograds_maxima() -> None:
    net = Conv4(WAYS, (1, 16, 16), hidden=3)
    params = drawn(net, 1, 1)
    params["body.1.norm.weight"][0, 1], params["body.1.norm.bias"][0, 1] = 0.0, 0.5
    x, y = torch.randn(1, 4, 1, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([[0, 1, 2, 0]])
    _, gradient, _ = autograd(net.double(), double(params), x.double(), y, double(params))
    found = known(net).gradient(params, x, y)[0]
    assert gradient["body.1.norm.weight"][0, 1] != 0
    assert_near(found, gradient)


def test_what_is_not_a_number_is_not_hidden() -> None:
    net = Conv4(WAYS, (1, 16, 16), hidden=3)
    params, y = drawn(net, 2, 1), torch.zeros(2, 4, dtype=torch.int64)
    x = torch.randn(2, 4, 1, 16, 16)
    x[1, 2, 0, 5, 5] = torch.nan
    gradient, loss, _, _ = known(net).gradient(params, x, y)
    assert torch.isfinite(loss).tolist() == [True, False]
    assert all(torch.isfinite(g[0]).all() for g in gradient.values())
    assert not torch.isfinite(gradient["head.weight"][1]).all()


LEARNERS: dict[str, Callable[[nn.Module], Learner]] = {
    "maml": lambda net: MAML(net, adaptation_steps=2, fast_lr=0.3),
    "maml, recomputed": lambda net: MAML(net, adaptation_steps=2, fast_lr=0.3, recompute=True),
    "fomaml": lambda net: MAML(net, adaptation_steps=2, fast_lr=0.3, first_order=True),
    "metasgd": lambda net: MetaSGD(net, adaptation_steps=2, fast_lr=0.3),
    "metalstm": lambda net: MetaLSTM(net, adaptation_steps=2),
    "anil": lambda net: ANIL(net, adaptation_steps=2, fast_lr=0.3),
    "boil": lambda net: BOIL(net, adaptation_steps=2, fast_lr=0.3),
}


def on_kernels(learner: Any) -> Any:
    """The learner, made to use the kernels where it would use the closed form of a CPU."""
    learner.backbone.closed_form_on_cpu = learner.backbone.closed_form_on_cuda
    assert isinstance(learner.backbone.closed_form_on_cpu, ClosedFormCUDA)
    return learner


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learners_meta_gradient(name: str) -> None:
    net = Conv4(WAYS, (1, 16, 16), hidden=2)
    reference, learner = LEARNERS[name](net), on_kernels(LEARNERS[name](net))
    meta = reference.init(torch.Generator().manual_seed(0))
    batch = make_batch(2, WAYS, 1, 1, (1, 16, 16), torch.float32)
    exact = type(batch)(*(part.double() if part.is_floating_point() else part for part in batch))
    assert takes_batches(learner, meta, batch.support_x)
    expected, about = looped(reference)(double(meta), exact)
    found, info = map_together(learner, task_gradient)(meta, batch)
    for ours, theirs in zip(info, about, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    a, b = (torch.cat([tree[n].double().flatten(1) for n in meta], 1) for tree in (found, expected))
    assert float(((a - b).norm(dim=1) / b.norm(dim=1)).max()) < 1e-4


@pytest.mark.parametrize("tasks", [(), (2,)], ids=["one task", "two"])
def test_derivatives_of_any_order(tasks: tuple[int, ...]) -> None:
    """A user's own loop: the gradient of a gradient through adaptation."""
    net = Conv4(WAYS, (1, 16, 16), hidden=2)
    batch = make_batch(2, WAYS, 1, 1, (1, 16, 16), torch.float32)
    x, y, query_x, query_y = (part if tasks else part[0] for part in batch)
    results = []
    for learner in (MAML(net, adaptation_steps=2, fast_lr=0.2), on_kernels(MAML(net, adaptation_steps=2, fast_lr=0.2))):
        start = learner.init(torch.Generator().manual_seed(0))
        meta = {n: p.expand(*tasks, *p.shape).clone().requires_grad_() for n, p in start.items()}
        adapted = learner.adapt(meta, x, y)
        each = (
            [({n: p[i] for n, p in adapted.items()}, query_x[i]) for i in range(2)] if tasks else [(adapted, query_x)]
        )
        logits = torch.cat([learner.predict(phi, images) for phi, images in each])
        loss = nn.functional.cross_entropy(logits, query_y.flatten())
        slopes = torch.autograd.grad(loss, list(meta.values()), create_graph=True)
        square = torch.stack([g.square().sum() for g in slopes]).sum()
        results.append([*slopes, *torch.autograd.grad(square, list(meta.values()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.detach().abs().max()) + 1e-6)


@pytest.mark.parametrize(
    ("network", "shape", "dtype"),
    [
        (lambda: Conv4(WAYS, (1, 28, 28), hidden=4, downsample="stride"), (1, 28, 28), torch.float32),
        (lambda: Conv4(WAYS, (1, 16, 16), hidden=65), (1, 16, 16), torch.float32),
        (lambda: Conv4(WAYS, (1, 16, 16), hidden=4), (2, 16, 16), torch.float32),
        (lambda: Conv4(WAYS, (1, 16, 16), hidden=4), (1, 15, 16), torch.float32),
        (lambda: Conv4(WAYS, (1, 16, 16), hidden=4), (1, 16, 16), torch.float64),
    ],
    ids=["strided", "too many filters", "other channels", "too small", "float64"],
)
def test_what_the_kernels_do_not_cover(
    network: Callable[[], Conv4], shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    net = network()
    params = {n: p.detach().to(dtype) for n, p in net.named_parameters()}
    assert not known(net).fits(params, torch.zeros(3, *shape, dtype=dtype))


def test_where_no_kernel_runs_it_is_said_once(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch, kernels: ModuleType
) -> None:
    monkeypatch.setattr(module, "_WORKS", {})
    for _ in range(2):
        assert not module.works_on(torch.device("cuda", 77))
    (warning,) = recwarn.list
    assert "own CUDA kernels do not run here (" in str(warning.message)
    assert "by autograd" in str(warning.message)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "cross_entropy", full)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    with pytest.raises(torch.OutOfMemoryError):  # which is another matter, and is over when there is memory again
        module.works_on(torch.device("cuda", 78))
    assert torch.device("cuda", 78) not in module._WORKS


def test_without_triton_networks_are_made_all_the_same() -> None:
    code = """if True:
        import sys, types, warnings
        sys.modules["triton"] = types.ModuleType("triton")
        import torch
        from metaheed.learners import MAML, Conv4
        from metaheed.networks.closed_form.cuda import works_on
        MAML(Conv4(3, (1, 16, 16)))
        warnings.simplefilter("error")
        try:
            works_on(torch.device("cuda", 0))
        except UserWarning as warning:
            print(warning)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "own CUDA kernels do not run here (" in done.stdout


@pytest.mark.parametrize("label", [-1, WAYS, 17])
def test_a_label_that_is_no_class_gives_no_loss(label: int) -> None:
    net = Conv4(WAYS, (1, 16, 16), hidden=1)
    params, x = drawn(net, 2, 1), torch.randn(2, 2, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    gradient, loss, _, _ = known(net).gradient(params, x, torch.tensor([[0, label], [1, 2]]))
    assert torch.isfinite(loss).tolist() == [False, True]
    assert not torch.isfinite(gradient["head.bias"][0]).any()
    assert all(torch.isfinite(g[1]).all() for g in gradient.values())


@pytest.mark.parametrize("y", [torch.zeros(2, 2), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 2, WAYS)])
def test_what_is_not_a_label_is_refused(y: Tensor) -> None:
    net = Conv4(WAYS, (1, 16, 16), hidden=1)
    with pytest.raises(ValueError, match=r"need \(2, 2\) of torch.int64: one class in \[0, 3\) for each image"):
        known(net).gradient(drawn(net, 2, 1), torch.randn(2, 2, 1, 16, 16), y)


def test_a_rate_that_is_learned_has_a_gradient() -> None:
    net, batch = Conv4(WAYS, (1, 16, 16), hidden=1), make_batch(2, WAYS, 1, 1, (1, 16, 16), torch.float32)
    slopes: list[Tensor] = []
    for learner in (MAML(net, adaptation_steps=1), on_kernels(MAML(net, adaptation_steps=1))):
        rate = torch.tensor(0.2, requires_grad=True)
        learner.fast_lr = rate
        meta = module.copies_for_kernels(learner.init(torch.Generator().manual_seed(0)), 2)
        adapted = learner.adapt(meta, batch.support_x, batch.support_y)
        slopes += torch.autograd.grad(torch.stack([p.square().sum() for p in adapted.values()]).sum(), rate)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_changed_changes_no_derivative() -> None:
    net, batch = Conv4(WAYS, (1, 16, 16), hidden=1), make_batch(2, WAYS, 1, 1, (1, 16, 16), torch.float32)
    learner = on_kernels(MAML(net))
    products = []
    for factor in (1, 100):
        start = module.copies_for_kernels(learner.init(torch.Generator().manual_seed(0)), 2)
        at = {n: p.requires_grad_() for n, p in start.items()}
        gradient, _, _ = learner.loss_gradient(at, batch.support_x, batch.support_y)
        total = torch.stack([g.sum() for g in gradient.values()]).sum()
        with torch.no_grad():
            for g in gradient.values():
                g.mul_(factor)
        products.append(torch.autograd.grad(total, list(at.values())))
    assert all(map(torch.equal, *products))


@pytest.mark.parametrize("device", kernel_builds.DEVICES)
def test_every_kernel_is_built_for_a_device(device: str) -> None:
    """And asks for no more shared memory than it has."""
    count, shared = kernel_builds.outcome(device)
    assert count >= 20
    assert shared <= kernel_builds.DEVICES[device][4] * 1024


def test_a_change_of_the_kernels_is_noticed_and_one_of_words_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "kernels.py"
    monkeypatch.setattr(kernel_builds, "SOURCES", (source,))
    found = []
    for text in ('"""One."""\nx = 1\n', '"""Another."""\nx = 1  # why\n', '"""One."""\nx = 2\n'):
        source.write_text(text)
        found.append(kernel_builds.digest("TF32 on Hopper"))
    assert found[0] == found[1] != found[2]


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, metaheed, metaheed.learners, metaheed.outer; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_copies_lie_as_the_kernels_want_them(rng: torch.Generator) -> None:
    net = Conv4(WAYS, (3, 16, 16), hidden=4)
    meta = MAML(net).init(rng)
    copied = module.copies_for_kernels(meta, 3)
    for name, p in meta.items():
        assert torch.equal(copied[name], p.expand(3, *p.shape))
    weight: Tensor = copied["body.1.conv.weight"]
    assert weight.permute(0, 3, 4, 2, 1).is_contiguous()
