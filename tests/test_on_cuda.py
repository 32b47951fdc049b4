"""What only a CUDA device can show; skipped where there is none. benchmarks/on_cuda.py asks more, and measures."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from metaheed.data.images import Dataset
from metaheed.engine.batching import takes_batches
from metaheed.learners import MAML, Conv4
from metaheed.outer import (
    OuterState,
    map_im2col,
    map_looped,
    map_streamed,
    map_together,
    map_vectorized,
    task_gradient,
)
from metaheed.running.process import float32_products
from metaheed.types import Episode
from tests.conftest import Run, make_batch
from tests.outer.test_steps import RULES, SHAPE, WAYS, Training, advance, streams_of
from tests.test_training import SMALL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
EXECUTIONS: dict[str, Callable[..., Any]] = {
    "looped": lambda learner, function: map_looped(partial(function, learner)),
    "vectorized": map_together,
    "vectorized, by autograd": lambda learner, function: map_vectorized(partial(function, learner)),
    "im2col": lambda learner, function: map_im2col(partial(function, learner)),
    "streamed": lambda learner, function: map_streamed(partial(function, learner)),
}


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    with float32_products(False):
        yield


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_gradients_are_the_cpus(execution: str, rng: torch.Generator) -> None:
    learner = MAML(Conv4(WAYS, SHAPE), adaptation_steps=3, fast_lr=0.1)
    meta, batch = learner.init(rng), make_batch(4, WAYS, 2, 4, SHAPE, torch.float32)
    expected, _ = map_looped(partial(task_gradient, learner))(meta, batch)
    there = type(batch)(*(part.cuda() for part in batch))
    found, _ = EXECUTIONS[execution](learner, task_gradient)({n: p.cuda() for n, p in meta.items()}, there)
    a, b = (torch.cat([tree[n].cpu().flatten(1) for n in meta], dim=1) for tree in (found, expected))
    assert float(((a - b).norm(dim=1) / b.norm(dim=1)).max()) < 1e-4


@pytest.mark.parametrize(
    ("shape", "hidden", "ways", "tasks"),
    [((3, 84, 84), 32, 5, 2), ((3, 33, 35), 64, 5, 2), ((1, 28, 28), 32, 20, 16), ((9, 21, 18), 17, 3, 3)],
    ids=["84 px", "64 filters", "many tasks", "odd"],
)
def test_kernels_are_autograd_in_float64(shape: tuple[int, int, int], hidden: int, ways: int, tasks: int) -> None:
    from metaheed.networks.closed_form.kernels import precision  # needs Triton

    learner = MAML(Conv4(ways, shape, hidden=hidden), adaptation_steps=2, fast_lr=0.05)
    meta = {n: p.cuda() for n, p in learner.init(torch.Generator().manual_seed(0)).items()}
    batch = Episode(*(part.cuda() for part in make_batch(tasks, ways, 1, 3, shape, torch.float32)))
    assert takes_batches(learner, meta, batch.support_x)
    exact = Episode(*(part.double() if part.is_floating_point() else part for part in batch))
    expected, about = map_looped(partial(task_gradient, learner))({n: p.double() for n, p in meta.items()}, exact)
    found, info = map_together(learner, task_gradient)(meta, batch)
    again, _ = map_together(learner, task_gradient)(meta, batch)
    assert all(torch.equal(found[n], again[n]) for n in meta)
    torch.testing.assert_close(info.query_loss.double(), about.query_loss, rtol=1e-4, atol=1e-5)
    a, b = (torch.cat([tree[n].double().flatten(1) for n in meta], dim=1) for tree in (found, expected))
    # Two places of a plane that are equal but for rounding may change order, and a task's gradient jumps.
    distances = (a - b).norm(dim=1) / b.norm(dim=1)
    assert float(distances.median()) < 1e-4
    with float32_products(True):
        if precision(batch.support_x) != "tf32":
            return  # the device has no units for it
        rough, _ = map_together(learner, task_gradient)(meta, batch)
    c = torch.cat([rough[n].double().flatten(1) for n in meta], dim=1)
    assert 10 * distances.median() < ((c - b).norm(dim=1) / b.norm(dim=1)).median() < 1


@pytest.mark.parametrize(
    ("rule", "execution"), [*((rule, "vectorized") for rule in RULES), *(("attended", e) for e in EXECUTIONS)]
)
def test_captured_steps_are_the_single_ones(rule: str, execution: str, small_dataset: Dataset) -> None:
    cuda = torch.device("cuda")
    learner = MAML(Conv4(WAYS, SHAPE, hidden=8), adaptation_steps=2, fast_lr=0.1)
    training = Training(small_dataset, learner, RULES[rule](), EXECUTIONS[execution])
    training.streams = streams_of(small_dataset.to(cuda))
    training.start = OuterState(*({n: leaf.to(cuda) for n, leaf in tree.items()} for tree in training.start))
    plain, blocks = training.one_by_one(), training.buffered(3, capture=True)  # a notice fails the test
    a, b = torch.tensor(advance(plain, 0, 7)), torch.tensor(advance(blocks, 0, 7))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    blocks.close()


def test_a_run_is_trained_and_resumed(metaheed: Run, tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    small = [*SMALL, "--backbone", "conv4-32", "--device", "cuda"]
    status, _, err = metaheed("train", "ta-maml", *small, "--iterations", 10, "--out", tmp_path / "whole")
    assert (status, ", captured, in blocks of at most 100 iterations" in err) == (0, True), err
    assert "not captured" not in err
    metaheed("train", "ta-maml", *small, "--iterations", 6, "--out", tmp_path / "cut")
    assert metaheed("train", "--resume", tmp_path / "cut", "--iterations", 10)[0] == 0
    losses = [
        [json.loads(line)["query_loss"] for line in (tmp_path / run / "tasks.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-5)
