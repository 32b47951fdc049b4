"""Each task of a meta-batch on a CUDA stream of its own: the device runs their ordinary kernels side by side."""

from collections.abc import Callable

import torch

from metaheed.engine.executions.basic import Execution, T, map_looped, merge
from metaheed.types import Episode, Params


def map_streamed(per_task: Callable[[Params, Episode], T]) -> Execution[T]:
    """Execute any per-task function over a batch, each task on a CUDA stream of its own; on other devices one after
    another.

    Events make the streams start after the caller's stream and the caller's stream wait for all of them. So a capture
    of the caller's stream captures them too.
    """
    looped = map_looped(per_task)
    made: dict[torch.device, list[torch.cuda.Stream]] = {}

    def run(meta: Params, batch: Episode) -> T:
        device = batch.support_x.device
        if device.type != "cuda":
            return looped(meta, batch)
        tasks = [Episode(*task) for task in zip(*batch, strict=True)]
        side = made.setdefault(device, [])
        while len(side) < len(tasks):
            side.append(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        used, caller = side[: len(tasks)], torch.cuda.current_stream(device)
        # Memory needs no `record_stream`: what a side stream frees is used again only by that stream, and only after
        # its next wait below, when the caller's stream has read it.
        for stream in used:
            stream.wait_stream(caller)
        results = []
        for stream, task in zip(used, tasks, strict=True):
            with torch.cuda.stream(stream):
                results.append(per_task(meta, task))
        for stream in used:
            caller.wait_stream(stream)
        result: T = merge(results, torch.stack)
        return result

    return run
