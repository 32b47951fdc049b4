"""The interface of batch rules: how the gradients of a meta-batch become the next θ.

A rule is a pure pair (init, step). Its step receives callables, not results: so the rule itself decides at which θ and
on which batches gradients are taken. It never looks inside a learner.

A step can be captured in a CUDA graph (engine/captured.py). Then t is not an int but a 0-d int64 tensor: a rule may add
to it, hand it to `Tools.train` and `Tools.probe`, and use it in tensor operations, but must not read its value.

Legend: B tasks; "leading B" means that every leaf begins with an axis of tasks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metaheed.rules.attention import weighted_sum
from metaheed.rules.optimizers import OptState, OuterOptimizer
from metaheed.types import Episode, Params, TaskInfo

Gradients = Callable[[Params, Episode], tuple[Params, TaskInfo]]
"""(θ, batch) -> (gradients with a leading B, infos (B,))."""


class Tools(NamedTuple):
    """What a rule works with; the same at every step."""

    gradients: Gradients
    """`task_gradient` of every task of a batch."""
    initial_gradients: Callable[[Params, Episode], tuple[Params, Tensor]]
    """(θ, batch) -> (∇_θ L*(φ⁰) with leading B, L*(φ⁰) (B,))."""
    optimizer: OuterOptimizer
    """The outer step on θ."""
    train: Callable[[int], Episode]
    """t -> training batch t, the same under every rule that has the same seed."""
    probe: Callable[[int], Episode]
    """t -> batch t of a second stream, whose tasks are other ones than the first stream's."""
    gradients_without_initial_loss: Gradients | None = None
    """As `gradients`, but L*⁰ is NaN: cheaper, for rules that do not use it. `gradients` if None."""

    @property
    def cheapest_gradients(self) -> Gradients:
        """The gradients without L*⁰ if there are such, else `gradients`."""
        return self.gradients_without_initial_loss or self.gradients


class OuterState(NamedTuple):
    """Everything that passes from one outer step to the next."""

    meta: Params
    """θ."""
    optimizer: OptState
    """The outer optimiser's state."""
    rule: Params
    """The rule's own state: δ and the state of its optimiser for `attended`, empty for `uniform`."""


class StepRecord(NamedTuple):
    """What an outer step has done, for the logs and for the check that all numbers are finite."""

    info: TaskInfo
    """The infos (B,) of the training batch."""
    weights: Tensor
    """(B,), the weights of the tasks' gradients in their sum."""


class Rule(NamedTuple):
    """A pure batch rule."""

    init: Callable[[Params], Params]
    """θ -> the rule's own state before the first step."""
    step: Callable[[OuterState, int, Tools], tuple[OuterState, StepRecord]]
    """(state, t, tools) -> (the next state, record)."""


def weighted(weigh: Callable[[int, TaskInfo], Tensor]) -> Rule:
    """The rule θ' = outer step on Σ_i w_i g_i, with w = weigh(t, infos of the batch)."""

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        task_grads, info = tools.cheapest_gradients(state.meta, tools.train(t))
        weights = weigh(t, info)
        meta, optimizer = tools.optimizer.step(state.meta, state.optimizer, weighted_sum(weights, task_grads))
        return OuterState(meta, optimizer, state.rule), StepRecord(info, weights)

    return Rule(lambda meta: {}, step)


def uniform_weights(info: TaskInfo) -> Tensor:
    """(B,): 1/B for each of the B tasks."""
    return torch.full_like(info.query_loss, 1 / info.query_loss.shape[0])
