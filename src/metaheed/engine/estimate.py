"""The per-task meta-gradient g_i = ∇_θ L_i*(φ_iᵀ), and the loss and accuracy of a task before and after adaptation.

Legend: batched Params have a leading axis B of tasks in every leaf; a batched TaskInfo holds (B,) in each field.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from metaheed.learners.learner import Estimate, Learner, OwnEstimate, loss_gradient, task_loss
from metaheed.networks.derivatives import detached, ordinary, recorded, transformed
from metaheed.trees import global_norm
from metaheed.types import Episode, Params, TaskInfo

F = TypeVar("F", bound=Callable[..., Any])


def _in_any_mode(function: F) -> F:
    """Wrap a function of one task so that its derivatives can be recorded even under torch.inference_mode.

    Tensors that were made in that mode are copied, because autograd refuses them.
    """

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
    """g = ∇_θ L*(φᵀ) of one task, and the numbers of it that attention sees.

    With v = ∇_φ L*(φᵀ), g is v pulled back through the adaptation. So ‖v‖ costs nothing extra, and the query pass needs
    no second derivative. θ counts as a constant: no graph is kept to it, even if it requires gradients. A learner with
    an `estimate` of its own (Reptile) says itself what g is.

    Args:
        learner: how the task is adapted.
        meta: θ.
        episode: the task.
        initial: also compute L*⁰, which costs a forward pass of the query set; otherwise it is NaN.

    Returns:
        The gradient, with θ's names, shapes and dtype, and a TaskInfo of 0-d tensors. For a learner that
        `takes_batches`, `meta` and `episode` may have a leading axis B of tasks (a θ for each); then all results have
        it too.
    """
    meta = detached(meta)
    if isinstance(learner, OwnEstimate):
        gradient, v, loss, logits = learner.estimate(meta, episode)
    else:
        gradient, v, loss, logits = _derivative_of_query_loss(learner, meta, episode)
    before = evaluate_initial(learner, meta, episode)[0] if initial else torch.full_like(loss, torch.nan)
    return gradient, TaskInfo(
        query_loss=loss,
        query_accuracy=accuracy(logits, episode.query_y),
        initial_loss=before,
        grad_norm=global_norm(v, episode.query_y.shape[:-1]),
    )


def _derivative_of_query_loss(learner: Learner, meta: Params, episode: Episode) -> Estimate:
    adapted, pullback = recorded(lambda m: learner.adapt(m, episode.support_x, episode.support_y), meta)
    v, loss, logits = loss_gradient(learner, adapted, episode.query_x, episode.query_y)
    return Estimate(pullback(v), v, loss, logits)


def gradient_without_initial_loss(learner: Learner, meta: Params, episode: Episode) -> tuple[Params, TaskInfo]:
    """`task_gradient` without L*⁰, which is NaN."""
    return task_gradient(learner, meta, episode, initial=False)


@_in_any_mode
def initial_gradient(learner: Learner, meta: Params, episode: Episode) -> tuple[Params, Tensor]:
    """∇_θ L*(φ⁰) of one task, and L*(φ⁰) (0-d): the query loss before adaptation, for the equity rule."""
    start, pullback = recorded(learner.initial, detached(meta))
    v, loss, _ = loss_gradient(learner, start, episode.query_x, episode.query_y)
    return pullback(v), loss


def evaluate_initial(learner: Learner, meta: Params, episode: Episode) -> tuple[Tensor, Tensor]:
    """Query loss and accuracy (0-d each) before adaptation, at φ⁰; no graph is kept."""
    with torch.no_grad():
        loss, logits = task_loss(learner, learner.initial(meta), episode.query_x, episode.query_y)
        return loss, accuracy(logits, episode.query_y)


def evaluate_adapted(learner: Learner, meta: Params, episode: Episode) -> tuple[Tensor, Tensor]:
    """Query loss and accuracy (0-d each) after adaptation, at φᵀ; no graph is kept. It adapts just as training does."""
    with torch.no_grad():
        adapted = learner.adapt(meta, episode.support_x, episode.support_y)
        loss, logits = task_loss(learner, adapted, episode.query_x, episode.query_y)
        return loss, accuracy(logits, episode.query_y)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of correct predictions in [0, 1], 0-d, in the logits' dtype; with a leading B of tasks (B,)."""
    return (logits.argmax(-1) == y).to(logits.dtype).mean(-1)
