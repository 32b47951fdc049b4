"""Executions: what the contract suite does not ask of every learner."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from metaheed.errors import ConfigError
from metaheed.learners import MAML, Conv4
from metaheed.outer import (
    evaluate_adapted,
    initial_gradient,
    looped,
    map_im2col,
    map_looped,
    map_threaded,
    map_together,
    task_gradient,
    threaded,
    vectorized,
)
from metaheed.types import Episode, Params
from tests.conftest import make_batch
from tests.networks import Tiny
from tests.reference import assert_close

SHAPE = (1, 16, 16)
FUNCTIONS: list[Callable[..., Any]] = [task_gradient, initial_gradient, evaluate_adapted]
EXECUTIONS: dict[str, Callable[..., Any]] = {
    "looped": lambda learner, function: map_looped(partial(function, learner)),
    "threaded": lambda learner, function: map_threaded(learner, function, 2),
    "vectorized": map_together,
    "im2col": lambda learner, function: map_im2col(partial(function, learner)),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "closed form": lambda: Conv4(3, SHAPE, hidden=4),
    "general": lambda: Tiny(3, SHAPE),
}


def leaves(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [leaf for part in (result.values() if isinstance(result, dict) else result) for leaf in leaves(part)]


@pytest.mark.parametrize("made", ["there", "before"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_inference_mode_changes_nothing(
    function: Callable[..., Any], execution: str, network: str, made: str, rng: torch.Generator
) -> None:
    learner = MAML(NETWORKS[network](), adaptation_steps=2, fast_lr=0.1)
    meta, batch = learner.init(rng), make_batch(2, 3, 1, 2, SHAPE, torch.float32)
    meta = {name: p.double() for name, p in meta.items()}
    batch = Episode(*(part.double() if part.is_floating_point() else part for part in batch))
    expected = leaves(EXECUTIONS[execution](learner, function)(meta, batch))
    with torch.inference_mode():
        if made == "there":
            meta, batch = {name: p.clone() for name, p in meta.items()}, Episode(*(part.clone() for part in batch))
        found = leaves(EXECUTIONS[execution](learner, function)(meta, batch))
    assert any(leaf.abs().max() > 0 for leaf in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("network", NETWORKS)
def test_autocast_on_a_cpu_is_followed_or_left_alone(network: str, rng: torch.Generator) -> None:
    """A thread of its own has no autocast; the others agree under it."""
    learner = MAML(NETWORKS[network](), adaptation_steps=2, fast_lr=0.01)
    meta, batch = learner.init(rng), make_batch(3, 3, 1, 2, SHAPE, torch.float32)
    exact, _ = looped(learner)(meta, batch)
    with torch.autocast("cpu", torch.bfloat16):
        one_by_one, info = looped(learner)(meta, batch)
        together, together_info = vectorized(learner)(meta, batch)
        apart, _ = threaded(learner, 2)(meta, batch)
    assert_close(together, one_by_one)
    torch.testing.assert_close(together_info, info)
    assert not all(torch.equal(one_by_one[name], exact[name]) for name in meta), "autocast has no effect"
    assert_close(apart, exact)


def test_a_failure_on_a_thread_is_the_callers(rng: torch.Generator) -> None:
    learner = MAML(Tiny(3, (1, 16, 16)))
    started = []

    def failing(own: object, meta: Params, task: Episode) -> torch.Tensor:
        started.append(own)
        assert own is not learner, "each thread has a copy"
        raise RuntimeError("no luck")

    batch = make_batch(50, 3, 1, 1, (1, 16, 16), torch.float32)
    run = map_threaded(learner, failing, 2)
    with pytest.raises(RuntimeError, match="no luck"):
        run(learner.init(rng), batch)
    with pytest.raises(RuntimeError, match="no luck"):  # and may be called again
        run(learner.init(rng), batch)
    assert len(set(map(id, started))) <= 2
    with pytest.raises(ConfigError, match=r"0 workers"):
        threaded(learner, 0)
