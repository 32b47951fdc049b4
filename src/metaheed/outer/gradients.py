"""The per-task meta-gradient g_i = ∇_θ L_i*(φ_iᵀ), and how a meta-batch of them is executed.

Legend: B tasks; Params with a leading B hold one gradient a task; TaskInfo batched holds (B,) in each field.
"""

import copy
import functools
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.func import vmap

from metaheed.config import TASKS_AT_ONCE
from metaheed.errors import ConfigError
from metaheed.learners.base import Learner, NetworkLearner, loss_gradient, takes_batches, task_loss
from metaheed.learners.closed_form_cuda import copies
from metaheed.learners.derivatives import detached, ordinary, recorded, transformed
from metaheed.types import Episode, Params, TaskInfo

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
Execution = Callable[[Params, Episode], T]
"""(θ, batched Episode) -> the per-task results with a leading B."""


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
    before = initial_outcome(learner, meta, episode)[0] if initial else torch.full_like(loss, torch.nan)
    return pullback(v), TaskInfo(
        query_loss=loss,
        query_accuracy=accuracy(logits, episode.query_y),
        initial_loss=before,
        grad_norm=global_norm(v, episode.query_y.shape[:-1]),
    )


def plain_gradient(learner: Learner, meta: Params, episode: Episode) -> tuple[Params, TaskInfo]:
    """`task_gradient` without L*⁰."""
    return task_gradient(learner, meta, episode, initial=False)


@_in_any_mode
def initial_gradient(learner: Learner, meta: Params, episode: Episode) -> tuple[Params, Tensor]:
    """∇_θ L*(φ⁰) of one task and L*(φ⁰), 0-d: the query loss before adaptation, which equity rules weigh."""
    start, pullback = recorded(learner.initial, detached(meta))
    v, loss, _ = loss_gradient(learner, start, episode.query_x, episode.query_y)
    return pullback(v), loss


def initial_outcome(learner: Learner, meta: Params, episode: Episode) -> tuple[Tensor, Tensor]:
    """Query loss and accuracy (0-d) at φ⁰; no graph is kept."""
    with torch.no_grad():
        loss, logits = task_loss(learner, learner.initial(meta), episode.query_x, episode.query_y)
        return loss, accuracy(logits, episode.query_y)


def adapted_outcome(learner: Learner, meta: Params, episode: Episode) -> tuple[Tensor, Tensor]:
    """Query loss and accuracy (0-d) at φᵀ; no graph is kept. The adaptation is the learner's own, as in training."""
    with torch.no_grad():
        adapted = learner.adapt(meta, episode.support_x, episode.support_y)
        loss, logits = task_loss(learner, adapted, episode.query_x, episode.query_y)
        return loss, accuracy(logits, episode.query_y)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of right answers in [0, 1], 0-d, in the logits' dtype."""
    return (logits.argmax(-1) == y).to(logits.dtype).mean(-1)


def global_norm(tree: Params, tasks: tuple[int, ...] = ()) -> Tensor:
    """Euclidean norm over all leaves, 0-d; its derivative where everything is zero is zero.

    With `tasks` (B,): of leaves with a leading B, (B,).
    """
    # Summed in float64: squares of large float32 entries overflow long before their root does.
    square = torch.stack([leaf.double().square().reshape(*tasks, -1).sum(-1) for leaf in tree.values()]).sum(0)
    positive = square > 0
    norm = torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
    return norm.to(next(iter(tree.values())).dtype)


def looped(learner: Learner) -> Execution[tuple[Params, TaskInfo]]:
    """`task_gradient` of one task after another: the least memory."""
    return map_looped(partial(task_gradient, learner))


def vectorized(learner: Learner, chunk_size: int | None = None) -> Execution[tuple[Params, TaskInfo]]:
    """`task_gradient` of `chunk_size` tasks at once as one program; agrees with `looped` to rounding.

    Our own networks in closed form (learners/closed_form.py), on a CPU without a chunk size TASKS_AT_ONCE of them at
    once; else by `torch.func.vmap`, without a chunk size all.
    """
    return map_together(learner, task_gradient, chunk_size)


def threaded(learner: Learner, workers: int) -> Execution[tuple[Params, TaskInfo]]:
    """`task_gradient` of `workers` tasks at a time, each on a thread of its own; agrees with `looped` to rounding.

    On CPUs with several cores: small convolutions gain more from a task a core than from a convolution over all cores.
    For that PyTorch's own threads must be one (`torch.set_num_threads(1)`), which the command line sees to.

    Each thread works on a copy of the learner as it is at its first use, and outside of the caller's contexts that
    PyTorch keeps for a thread (`torch.autocast` above all). Switches that PyTorch keeps for the whole process
    (`sdpa_kernel` and other `torch.backends` contexts) must not be thrown inside the network's forward: throw them
    around the call.
    """
    return map_threaded(learner, task_gradient, workers)


def map_looped(per_task: Callable[[Params, Episode], T]) -> Execution[T]:
    """Any per-task function over a batch, one task after another."""

    def run(meta: Params, batch: Episode) -> T:
        result: T = merge([per_task(meta, Episode(*task)) for task in zip(*batch, strict=True)], torch.stack)
        return result

    return run


def map_vectorized(per_task: Callable[[Params, Episode], T], chunk_size: int | None = None) -> Execution[T]:
    """Any per-task function over a batch, `chunk_size` tasks at once (none: all), by `torch.func.vmap`.

    Under a CPU's autocast one after another: there PyTorch 2.13's vmap of a network's derivatives fails on mixed types.
    """
    looped = map_looped(per_task)

    def run(meta: Params, batch: Episode) -> T:
        if batch.support_x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return looped(meta, batch)
        result: T = vmap(partial(per_task, meta), chunk_size=chunk_size)(batch)
        return result

    return run


def map_together(
    learner: Learner, function: Callable[[Learner, Params, Episode], T], chunk_size: int | None = None
) -> Execution[T]:
    """function(learner, θ, task) over a batch, `chunk_size` tasks at once, as one program.

    In closed form where the learner `takes_batches` (none: all, on a CPU TASKS_AT_ONCE); else as `map_vectorized`.
    """
    general = map_vectorized(partial(function, learner), chunk_size)

    def run(meta: Params, batch: Episode) -> T:
        if not all(takes_batches(learner, meta, images) for images in (batch.support_x, batch.query_x)):
            if isinstance(learner, NetworkLearner) and not learner.backbone.is_examined:
                learner.backbone.examine(learner.initial(meta), batch.support_x[0])  # inside, vmap would hide it
            return general(meta, batch)
        # A processor's cache is to hold what is computed at once; a GPU is to have enough to do.
        at_once = chunk_size or (TASKS_AT_ONCE if batch.support_x.device.type == "cpu" else len(batch.support_x))
        chunks = zip(*(torch.split(part, at_once) for part in batch), strict=True)
        result: T = merge([function(learner, _copies(meta, len(c[0])), Episode(*c)) for c in chunks], torch.cat)
        return result

    return run


def _copies(meta: Params, tasks: int) -> Params:
    """θ for each task; weights of convolutions lie in memory as the closed form wants them, and so will φ."""
    if next(iter(meta.values())).device.type != "cpu":
        return copies(meta, tasks)
    laid = {n: p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for n, p in meta.items()}
    return {name: p.expand(tasks, *p.shape) for name, p in laid.items()}


def map_threaded(learner: Learner, function: Callable[[Learner, Params, Episode], T], workers: int) -> Execution[T]:
    """function(learner, θ, task) over a batch, `workers` tasks at a time on threads.

    Raises:
        ConfigError: fewer than one worker.
    """
    if workers < 1:
        raise ConfigError(f"threaded with {workers} workers: there must be at least 1")
    # A copy of the learner for each: `functional_call` puts parameters into the module it calls while it runs.
    free: queue.SimpleQueue[Learner] = queue.SimpleQueue()
    # A new thread's convolutions use every core until PyTorch has told it how many it may.
    pool = ThreadPoolExecutor(
        workers, "metaheed-task", initializer=lambda: torch.set_num_threads(torch.get_num_threads())
    )

    def one(meta: Params, task: Episode) -> T:
        try:
            own = free.get_nowait()
        except queue.Empty:
            own = copy.deepcopy(learner)
        try:
            return function(own, meta, task)
        finally:
            free.put(own)

    def run(meta: Params, batch: Episode) -> T:
        futures = [pool.submit(one, meta, Episode(*task)) for task in zip(*batch, strict=True)]
        try:
            result: T = merge([future.result() for future in futures], torch.stack)
        finally:
            for future in futures:  # after an error or an interruption: those not begun are not to begin
                future.cancel()
        return result

    return run


def merge(results: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Trees of one form (tensors, dicts, tuples), joined leaf by leaf."""
    first = results[0]
    if isinstance(first, Tensor):
        return join(list(results))
    if isinstance(first, dict):
        return {name: join([r[name] for r in results]) for name in first}
    fields = [merge(column, join) for column in zip(*results, strict=True)]
    return type(first)(*fields) if hasattr(first, "_fields") else tuple(fields)
