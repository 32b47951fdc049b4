"""How the tasks of a meta-batch are executed: one after another, as one program, or on threads."""

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
"""(θ, batched Episode) -> the per-task results with a leading B."""


def looped(learner: Learner) -> Execution[tuple[Params, TaskInfo]]:
    """`task_gradient` of one task after another: the least memory."""
    return map_looped(partial(task_gradient, learner))


def vectorized(learner: Learner, chunk_size: int | None = None) -> Execution[tuple[Params, TaskInfo]]:
    """`task_gradient` of `chunk_size` tasks at once as one program; agrees with `looped` to rounding.

    Our own networks in closed form (networks/closed_form/), on a CPU without a chunk size TASKS_AT_ONCE of them at
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
        result: T = merge(
            [function(learner, _meta_for_each_task(meta, len(c[0])), Episode(*c)) for c in chunks], torch.cat
        )
        return result

    return run


def _meta_for_each_task(meta: Params, tasks: int) -> Params:
    """θ for each task; weights of convolutions lie in memory as the closed form wants them, and so will φ."""
    if next(iter(meta.values())).device.type != "cpu":
        return copies_for_kernels(meta, tasks)
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
