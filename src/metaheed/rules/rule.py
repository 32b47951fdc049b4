"""Batch rules: how the gradients of a meta-batch become the next θ.

A rule is a pure pair (init, step). Its step is handed callables, not results, so that it decides itself at which θ
gradients are taken and on which batches; it never looks inside a learner.

A step can be captured in a CUDA graph (steps.py), where t is a 0-d int64 tensor and not an int: it may be counted on
from, handed to `Tools.train` and `Tools.probe`, and compared by tensor operations, but its value is not to be read.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metaheed.rules.attention import weighted_sum
from metaheed.rules.optimizers import OptState, OuterOptimizer
from metaheed.types import Episode, Params, TaskInfo

Gradients = Callable[[Params, Episode], tuple[Params, TaskInfo]]
"""(θ, batch) -> (g with leading B, infos (B,))."""


class Tools(NamedTuple):
    """What a rule works with, the same at every step."""

    gradients: Gradients
    """Of `task_gradient`."""
    initial_gradients: Callable[[Params, Episode], tuple[Params, Tensor]]
    """(θ, batch) -> (∇_θ L*(φ⁰) with leading B, L*(φ⁰) (B,))."""
    optimizer: OuterOptimizer
    """The outer step on θ."""
    train: Callable[[int], Episode]
    """t -> training batch t, the same under every rule at equal seed."""
    probe: Callable[[int], Episode]
    """t -> batch t of the second stream, disjoint from the first."""
    gradients_without_initial_loss: Gradients | None = None
    """`gradients` without L*⁰ (NaN), for rules that do not look at it; none: `gradients`."""

    @property
    def cheapest_gradients(self) -> Gradients:
        """The cheapest gradients there are."""
        return self.gradients_without_initial_loss or self.gradients


class OuterState(NamedTuple):
    """Everything that passes from one outer step to the next."""

    meta: Params
    """θ."""
    optimizer: OptState
    """The outer optimiser's."""
    rule: Params
    """The rule's own: δ and its optimiser for `attended`, empty for `uniform`."""


class StepRecord(NamedTuple):
    """What an outer step did, for the logs and for the checks on finite numbers."""

    info: TaskInfo
    """(B,) of the training batch."""
    weights: Tensor
    """(B,) the weights its gradients were summed with."""


class Rule(NamedTuple):
    """A pure batch rule."""

    init: Callable[[Params], Params]
    """θ -> the rule's own state before the first step."""
    step: Callable[[OuterState, int, Tools], tuple[OuterState, StepRecord]]
    """(state, t, tools) -> (the next state, record)."""


def weighted(weigh: Callable[[int, TaskInfo], Tensor]) -> Rule:
    """θ' = outer step on Σ_i w_i g_i, w = weigh(t, infos)."""

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        task_grads, info = tools.cheapest_gradients(state.meta, tools.train(t))
        weights = weigh(t, info)
        meta, optimizer = tools.optimizer.step(state.meta, state.optimizer, weighted_sum(weights, task_grads))
        return OuterState(meta, optimizer, state.rule), StepRecord(info, weights)

    return Rule(lambda meta: {}, step)


def uniform_weights(info: TaskInfo) -> Tensor:
    """1/B for each of the B tasks, (B,)."""
    return torch.full_like(info.query_loss, 1 / info.query_loss.shape[0])
