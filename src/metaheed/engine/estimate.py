"""The per-task meta-gradient g_i = ∇_θ L_i*(φ_iᵀ), and how a meta-batch of them is executed.

Legend: B tasks; Params with a leading B hold one gradient a task; TaskInfo batched holds (B,) in each field.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from metaheed.learners.learner import Learner, loss_gradient, task_loss
from metaheed.networks.derivatives import detached, ordinary, recorded, transformed
from metaheed.trees import global_norm
from metaheed.types import Episode, Params, TaskInfo

F = TypeVar("F", bound=Callable[..., Any])


def _in_any_mode(function: F) -> F:
    """The function of a task, its derivatives recorded even under torch.inference_mode, and of tensors made there."""

    @functools.wraps(function)
    def outside(learner: Learner, meta: Params, episode: Episode, *args: Any, **kwargs: Any) -> Any:
        if transformed():  # torch.func records in any mode
            return function(learner, meta, episode, *args, **kwargs)
        with torch.inference_mode(False):
            meta, episode = {name: ordinary(p) for name, p in meta.items()}, Episode(*map(ordinary, episode))
            return function(learner, meta, episode, *args, **kwargs)

    return cast(F, outside)


@_in_any_mode
def task_gradient(learner: Learner, meta: Params, episode: Episode, initial: bool = True) -> tuple[Params, TaskInfo]:
    """g = ∇_θ L*(φᵀ) of one task, and what attention sees of it.

    With v = ∇_φ L*(φᵀ), g is v pulled back through the adaptation; so ‖v‖ costs nothing extra and the query pass needs
    no second derivative.

    θ counts as a constant: no graph is kept to it even if it requires gradients.

    Args:
        learner: adapts.
        meta: θ.
        episode: the task.
        initial: also compute L*⁰, which takes a forward pass of the query set; else it is NaN.

    Returns:
        Gradient with θ's names, shapes and dtype; TaskInfo of 0-d tensors. Of a batch of tasks, with a θ for each,
        where the learner `takes_batches`: all with a leading B.
    """
    meta = detached(meta)
    adapted, pullback = recorded(lambda m: learner.adapt(m, episode.support_x, episode.support_y), meta)
    v, loss, logits = loss_gradient(learner, adapted, episode.query_x, episode.query_y)
    before = evaluate_initial(learner, meta, episode)[0] if initial else torch.full_like(loss, torch.nan)
    return pullback(v), TaskInfo(
        query_loss=loss,
        query_accuracy=accuracy(logits, episode.query_y),
        initial_loss=before,
        grad_norm=global_norm(v, episode.query_y.shape[:-1]),
    )


def gradient_without_initial_loss(learner: Learner, meta: Params, episode: Episode) -> tuple[Params, TaskInfo]:
    """`task_gradient` without L*⁰."""
    return task_gradient(learner, meta, episode, initial=False)


@_in_any_mode
def initial_gradient(learner: Learner, meta: Params, episode: Episode) -> tuple[Params, Tensor]:
    """∇_θ L*(φ⁰) of one task and L*(φ⁰), 0-d: the query loss before adaptation, which equity rules weigh."""
    start, pullback = recorded(learner.initial, detached(meta))
    v, loss, _ = loss_gradient(learner, start, episode.query_x, episode.query_y)
    return pullback(v), loss


def evaluate_initial(learner: Learner, meta: Params, episode: Episode) -> tuple[Tensor, Tensor]:
    """Query loss and accuracy (0-d) at φ⁰; no graph is kept."""
    with torch.no_grad():
        loss, logits = task_loss(learner, learner.initial(meta), episode.query_x, episode.query_y)
        return loss, accuracy(logits, episode.query_y)


def evaluate_adapted(learner: Learner, meta: Params, episode: Episode) -> tuple[Tensor, Tensor]:
    """Query loss and accuracy (0-d) at φᵀ; no graph is kept. The adaptation is the learner's own, as in training."""
    with torch.no_grad():
        adapted = learner.adapt(meta, episode.support_x, episode.support_y)
        loss, logits = task_loss(learner, adapted, episode.query_x, episode.query_y)
        return loss, accuracy(logits, episode.query_y)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of right answers in [0, 1], 0-d, in the logits' dtype."""
    return (logits.argmax(-1) == y).to(logits.dtype).mean(-1)
