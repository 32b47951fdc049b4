"""im2col and streams: what the contract suite does not ask of every learner."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, vmap

from metaheed.config import TASKS_AT_ONCE, TrainingConfig
from metaheed.engine.executions import im2col as module
from metaheed.learners import MAML, Conv4
from metaheed.networks.closed_form.cpu import ClosedForm
from metaheed.outer import (
    describe_execution,
    looped,
    map_im2col,
    map_looped,
    map_streamed,
    pick_execution,
    task_gradient,
    tasks_at_once,
    vectorized,
)
from tests.conftest import Run, make_batch
from tests.networks import Tiny
from tests.reference import assert_close

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "uneven": {"stride": (2, 1), "padding": (0, 2)},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 2)])
def test_patches_are_the_convolution(options: dict[str, Any], kernel: tuple[int, int], rng: torch.Generator) -> None:
    x, weight, bias = (
        torch.randn(*shape, generator=rng, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 6, 5), (4, 3, *kernel), (4,))
    )

    plain: Callable[..., Tensor] = partial(F.conv2d, **options)

    def convolve(*arguments: Tensor) -> Tensor:
        with module.Im2col():
            return plain(*arguments)

    torch.testing.assert_close(convolve(x, weight, bias), plain(x, weight, bias))
    torch.testing.assert_close(convolve(x, weight), plain(x, weight))
    inputs = (x[:1], weight[:2], bias[:2])
    assert gradcheck(convolve, inputs)
    assert gradgradcheck(convolve, inputs)


@pytest.mark.parametrize("options", [{"groups": 3}, {"dilation": 2}, {"padding": "same"}], ids=str)
def test_what_is_no_plain_convolution_is_left_as_it_is(options: dict[str, Any], rng: torch.Generator) -> None:
    net = nn.Conv2d(3, 3, 3, **options)
    x = torch.randn(2, 3, 7, 7, generator=rng)
    with module.Im2col():
        assert torch.equal(net(x), functional_call(net, dict(net.named_parameters()), (x,)))
        inside = net(x)
    assert torch.equal(inside, net(x))


def test_im2col_multiplies_matrices(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """It really takes the place of every convolution, and of none outside."""
    learner = MAML(Conv4(3, (1, 16, 16), hidden=4), adaptation_steps=1)
    batch = make_batch(4, 3, 1, 2, (1, 16, 16), torch.float32)
    meta, calls = learner.init(rng), list[tuple[int, ...]]()
    original = module.patch_convolution

    def counted(x: Tensor, *rest: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return original(x, *rest)

    monkeypatch.setattr(module, "patch_convolution", counted)
    whole = map_im2col(partial(task_gradient, learner))(meta, batch)
    assert len(calls) == 4 * 3  # blocks × (support, query, query before adaptation)
    chunked = map_im2col(partial(task_gradient, learner), 3)(meta, batch)
    assert len(calls) == 4 * 3 * 3
    plain = map_looped(partial(task_gradient, learner))(meta, batch)
    assert len(calls) == 4 * 3 * 3
    for grads, info in (whole, chunked):
        assert_close(grads, plain[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.stack([*info]), torch.stack([*plain[1]]))


def test_patches_of_images_not_vectorised(rng: torch.Generator) -> None:
    """Weights of many tasks on the images of one, and the other way round."""
    x, weight = torch.randn(2, 3, 6, 6, generator=rng), torch.randn(5, 4, 3, 3, 3, generator=rng)
    convolve = partial(module.patch_convolution, bias=None, stride=(1, 1), padding=(1, 1))
    torch.testing.assert_close(
        vmap(lambda w: convolve(x, w))(weight), torch.stack([F.conv2d(x, w, padding=1) for w in weight])
    )
    torch.testing.assert_close(
        vmap(lambda w: convolve(x, w), out_dims=1)(weight).movedim(1, 0),
        torch.stack([F.conv2d(x, w, padding=1) for w in weight]),
    )
    torch.testing.assert_close(
        vmap(lambda one: convolve(one, weight[0]), in_dims=2)(x.unsqueeze(2).expand(-1, -1, 3, -1, -1)),
        F.conv2d(x, weight[0], padding=1).expand(3, -1, -1, -1, -1),
    )


def test_streams_fork_and_join(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it is looped; with CUDA's calls stood in for, each stream waits for the caller's and is waited for."""
    learner = MAML(Conv4(3, (1, 16, 16), hidden=4), adaptation_steps=1)
    batch, meta = make_batch(3, 3, 1, 2, (1, 16, 16), torch.float32), learner.init(rng)
    plain = map_looped(partial(task_gradient, learner))(meta, batch)
    streamed = map_streamed(partial(task_gradient, learner))(meta, batch)
    assert all(torch.equal(plain[0][n], streamed[0][n]) for n in meta)

    log: list[tuple[str, object, object]] = []

    class Stream:
        def __init__(self, device: object = None) -> None:
            self.name = f"side {len(made)}" if device is not None else "caller"
            made.append(self)

        def wait_stream(self, other: "Stream") -> None:
            log.append(("wait", self.name, other.name))

        def __enter__(self) -> None:
            log.append(("enter", self.name, ""))

        def __exit__(self, *_: object) -> None:
            pass

    made: list[Stream] = []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)

    class OnCuda:
        """A batch that says it lies there."""

        def __init__(self) -> None:
            self.support_x = self
            self.device = torch.device("cuda")

        def __iter__(self) -> Any:
            return iter(batch)

    again = map_streamed(partial(task_gradient, learner))(meta, OnCuda())  # type: ignore[arg-type]
    assert all(torch.equal(plain[0][n], again[0][n]) for n in meta)
    sides = ["side 0", "side 1", "side 2"]
    assert log == [
        *(("wait", side, "caller") for side in sides),
        *(("enter", side, "") for side in sides),
        *(("wait", "caller", side) for side in sides),
    ]


def test_execution_is_picked_by_device_network_and_size() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_execution("auto", cpu, 2, closed_form=False, tasks=4) == "threaded"
    assert pick_execution("auto", cpu, 2, tasks=1) == "looped"
    assert pick_execution("auto", cuda, 2, tasks=1) == "looped"
    assert pick_execution("auto", cuda, 2, own_network=True, tasks=4) == "streamed"
    assert pick_execution("im2col", cpu, 2, tasks=1) == "im2col"


def test_it_is_said_how_a_run_is_executed() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")

    closed, general = MAML(Conv4(3, (1, 16, 16), hidden=4)), MAML(Tiny(3, (1, 16, 16)))

    def said(device: torch.device, images_there: bool = True, **settings: Any) -> str:
        return describe_execution(TrainingConfig(**settings), device, 4, closed, images_there)

    assert said(cpu, execution="threaded", threads=2) == (
        "execution: threaded, 2 tasks at a time on 1 thread each; execution overrides"
    )
    assert said(cpu, execution="looped", threads=1) == (
        "execution: looped, a task at a time on 1 thread; execution overrides"
    )
    assert said(cpu, execution="processes", threads=2) == (
        "execution: processes, 4 tasks at a time on 2 processes of 1 thread; execution overrides"
    )
    assert "4 tasks at a time on 4 processes of 2 threads;" in said(cpu, execution="processes", threads=9)
    assert "4 tasks at a time on 1 process of 1 thread;" in said(cpu, execution="processes", threads=1)
    assert said(cuda, execution="vectorized", chunk_size=3) == (
        "execution: vectorized, 3 tasks at a time on cuda:0, captured, in blocks of at most 100 iterations; "
        "execution and capture override"
    )
    assert ", captured, " not in said(cuda, execution="threaded", threads=2)
    assert said(cuda, images_there=False, execution="streamed").endswith("on cuda:0; execution overrides")
    assert ", not captured, in blocks of at most 7 " in said(cpu, execution="streamed", capture="on", block=7)
    assert tasks_at_once(TrainingConfig(execution="im2col"), cpu, 40, closed) == 40
    assert tasks_at_once(TrainingConfig(execution="threaded", threads=8), cpu, 4, closed) == 4
    assert tasks_at_once(TrainingConfig(execution="vectorized"), cpu, 40, closed) == TASKS_AT_ONCE
    assert tasks_at_once(TrainingConfig(execution="vectorized", chunk_size=9), cpu, 40, closed) == 9
    assert tasks_at_once(TrainingConfig(execution="vectorized"), cpu, 40, general) == 40
    assert tasks_at_once(TrainingConfig(execution="vectorized"), cuda, 40, closed) == 40


@pytest.mark.parametrize(("chunk_size", "expected"), [(None, {TASKS_AT_ONCE, 1}), (3, {3}), (20, {9})])
def test_memory_is_bounded_in_closed_form(
    chunk_size: int | None, expected: set[int], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = MAML(Conv4(3, (1, 16, 16), hidden=4), adaptation_steps=1)
    batch, meta, seen = make_batch(9, 3, 1, 2, (1, 16, 16), torch.float32), learner.init(rng), set()
    original = ClosedForm.gradient

    def noted(self: Any, params: Any, x: Tensor, *rest: Any, **named: Any) -> Any:
        seen.add(len(x))
        return original(self, params, x, *rest, **named)

    monkeypatch.setattr(ClosedForm, "gradient", noted)
    gradient, _ = vectorized(learner, chunk_size)(meta, batch)
    assert seen == expected
    assert_close(gradient, looped(learner)(meta, batch)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"), [([], "4 tasks"), (["--chunk-size", 5], "5 tasks"), (["--execution", "im2col"], "6 tasks")]
)
def test_the_start_line_says_how_many_tasks_are_together(
    options: list[object], said: str, metaheed: Run, tmp_path: Path
) -> None:
    small = ["--meta-batch-size", 6, "--queries", 1, "--adaptation-steps", 1, "--iterations", 1, "--val-tasks", 1]
    status, _, err = metaheed(
        "train", "maml", *small, "--threads", 1, *options, "--device", "cpu", "--out", tmp_path / "run"
    )
    assert status == 0
    name = "im2col" if "im2col" in options else "vectorized"
    assert f"execution: {name}, {said} at a time on 1 thread; --execution overrides" in err
