"""The executions for every device: the tasks of a meta-batch one after another, as one program, or on threads.

A `map_…` function turns a function of one task into the same function of a batch. `looped`, `vectorized` and `threaded`
do so with `task_gradient`.

Legend: B tasks; batched values have a leading axis B.
"""

import copy
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from metaheed.config import TASKS_AT_ONCE
from metaheed.engine.batching import takes_batches
from metaheed.engine.estimate import task_gradient
from metaheed.errors import ConfigError
from metaheed.learners.learner import Learner, NetworkLearner
from metaheed.networks.closed_form.cuda import copies_for_kernels
from metaheed.types import Episode, Params, TaskInfo

T = TypeVar("T")

Execution = Callable[[Params, Episode], T]
"""(θ, batched Episode) -> the per-task results, with a leading B."""


def looped(learner: Learner) -> Execution[tuple[Params, TaskInfo]]:
    """`task_gradient` of one task after another; takes the least memory."""
    return map_looped(partial(task_gradient, learner))


def vectorized(learner: Learner, chunk_size: int | None = None) -> Execution[tuple[Params, TaskInfo]]:
    """`task_gradient` of `chunk_size` tasks at once as one program; agrees with `looped` to rounding.

    Our own networks are computed in closed form (networks/closed_form/); without a chunk size, TASKS_AT_ONCE tasks at
    once on a CPU and all of them on other devices. All other networks use `torch.func.vmap`; without a chunk size, over
    all tasks.
    """
    return map_together(learner, task_gradient, chunk_size)


def threaded(learner: Learner, workers: int) -> Execution[tuple[Params, TaskInfo]]:
    """`task_gradient` of `workers` tasks at a time, each on a thread of its own; agrees with `looped` to rounding.

    This is for CPUs with several cores, where small convolutions gain more from one task a core than from one
    convolution over all cores. PyTorch itself must then use one thread (`torch.set_num_threads(1)`); the command line
    sets that.

    Each thread works on a copy of the learner, made at the thread's first task. PyTorch keeps some contexts for each
    thread (`torch.autocast` above all): the workers do not see the caller's. Others it keeps for the whole process
    (`sdpa_kernel` and other `torch.backends` contexts): they must not be entered in the network's forward, but around
    the call.
    """
    return map_threaded(learner, task_gradient, workers)


def map_looped(per_task: Callable[[Params, Episode], T]) -> Execution[T]:
    """Execute any per-task function over a batch, one task after another."""

    def run(meta: Params, batch: Episode) -> T:
        result: T = merge([per_task(meta, Episode(*task)) for task in zip(*batch, strict=True)], torch.stack)
        return result

    return run


def map_vectorized(per_task: Callable[[Params, Episode], T], chunk_size: int | None = None) -> Execution[T]:
    """Execute any per-task function over a batch by `torch.func.vmap`, `chunk_size` tasks at once (all if None).

    Under a CPU's autocast the tasks run one after another instead, because there PyTorch 2.13's vmap of a network's
    derivatives fails on mixed types.
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
    """Execute function(learner, θ, task) over a batch as one program, `chunk_size` tasks at once.

    If the learner `takes_batches`, in closed form; without a chunk size, TASKS_AT_ONCE tasks at once on a CPU and all
    of them on other devices. Otherwise as `map_vectorized` does.
    """
    general = map_vectorized(partial(function, learner), chunk_size)

    def run(meta: Params, batch: Episode) -> T:
        if not all(takes_batches(learner, meta, images) for images in (batch.support_x, batch.query_x)):
            if isinstance(learner, NetworkLearner) and not learner.backbone.is_examined:
                learner.backbone.examine(learner.initial(meta), batch.support_x[0])  # vmap would hide what it does
            return general(meta, batch)
        # A chunk should fit into a processor's cache, but keep a GPU busy.
        at_once = chunk_size or (TASKS_AT_ONCE if batch.support_x.device.type == "cpu" else len(batch.support_x))
        chunks = zip(*(torch.split(part, at_once) for part in batch), strict=True)
        result: T = merge(
            [function(learner, _meta_for_each_task(meta, len(c[0])), Episode(*c)) for c in chunks], torch.cat
        )
        return result

    return run


def _meta_for_each_task(meta: Params, tasks: int) -> Params:
    """θ with a leading axis of tasks.

    The weights of convolutions are laid out in memory as the closed form needs them; φ, computed from them, then is
    too.
    """
    if next(iter(meta.values())).device.type != "cpu":
        return copies_for_kernels(meta, tasks)
    laid = {n: p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for n, p in meta.items()}
    return {name: p.expand(tasks, *p.shape) for name, p in laid.items()}


def map_threaded(learner: Learner, function: Callable[[Learner, Params, Episode], T], workers: int) -> Execution[T]:
    """Execute function(learner, θ, task) over a batch, `workers` tasks at a time on threads; see `threaded`.

    Raises:
        ConfigError: fewer than one worker.
    """
    if workers < 1:
        raise ConfigError(f"threaded with {workers} workers: there must be at least 1")
    # A copy of the learner for each thread: `functional_call` puts parameters into the module while it runs.
    free: queue.SimpleQueue[Learner] = queue.SimpleQueue()
    # Convolutions on a new thread use every core until the number of threads is set there.
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
            for future in futures:  # after an error or an interruption, tasks that have not begun must not begin
                future.cancel()
        return result

    return run


def merge(results: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Join trees of the same structure (tensors, dicts, tuples) leaf by leaf."""
    first = results[0]
    if isinstance(first, Tensor):
        return join(list(results))
    if isinstance(first, dict):
        return {name: join([r[name] for r in results]) for name in first}
    fields = [merge(column, join) for column in zip(*results, strict=True)]
    return type(first)(*fields) if hasattr(first, "_fields") else tuple(fields)
