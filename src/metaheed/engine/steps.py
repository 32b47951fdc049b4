"""How training advances: one outer step after another (`OneByOne`), or in blocks over static buffers (`Buffered`).

`OneByOne`, in this file, makes the rule's step and then checks its numbers. `Buffered`, in captured.py, makes the same
step a function of tensors that stay in place on the device and that the host does not read while a block runs, so that
a CUDA graph can hold it:

    state     θ, the optimiser's state, the rule's state; overwritten at the end of a step
    t         () int64, the iteration; counted up at the end of a step
    first     () int64, the iteration that the block began with
    rows      for each stream (n, B, N, K+Q) int64, the rows of the images in the block's batches, drawn by the host
    records   (k, columns) float64, a row an iteration: infos, weights, and where numbers are not finite

1. Gather batch t from the images, by its rows.
2. Make the rule's step, whose t is the tensor.
3. Write row t − first of the records, then the next state and t + 1.

Meanwhile the host draws the rows of the next block on a thread; it reads the records when the block is done. Both forms
give the same bits on a CPU, wherever blocks begin and end.

Legend: B tasks, N ways, K shots, Q queries per class, at most k steps in a block.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from metaheed.data.episodes import Episodes, Prefetcher
from metaheed.errors import NonFiniteError, NonFiniteTaskError
from metaheed.rules.rule import Gradients, OuterState, Rule, StepRecord, Tools
from metaheed.types import Episode, Params, TaskInfo

Stop = Callable[[], bool]
"""Whether to stop before the next step."""
Interrupting = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes a context in which an exception may end the computation at any moment."""


class Steps(Protocol):
    """Makes the outer steps of a run."""

    block: int
    """The most steps that one call of `advance` makes."""

    @property
    def state(self) -> OuterState:
        """The state after the steps made so far; a caller may keep its tensors."""
        ...

    def advance(self, t: int, count: int, stop: Stop) -> Iterator[StepRecord]:
        """Make steps t … t+count−1, or fewer, and yield their records.

        Raises:
            NonFiniteError: in the step whose record would be next. The state cannot be used after that.
        """
        ...

    def close(self) -> None:
        """Free threads, memory and graphs."""
        ...


class Streams:
    """The two streams of batches of B tasks, "training" and "probe"; notes which of them was asked for last."""

    def __init__(self, training: Episodes, probe: Episodes, tasks: int) -> None:
        self.episodes = {"training": training, "probe": probe}
        self.tasks = tasks
        self._latest, self._seen = "", 0

    def batch(self, stream: str, t: int) -> Episode:
        """Batch t of a stream."""
        self.note(stream)
        return self.episodes[stream].batch(t * self.tasks, self.tasks)

    def lie_on(self, device: torch.device) -> bool:
        """Whether the images lie on a device of this type, so that batches can be gathered there."""
        return all(episodes.split.images.device.type == device.type for episodes in self.episodes.values())

    def rows(self, stream: str, first: int, count: int, cancelled: Stop = lambda: False) -> np.ndarray:
        """(count, B, N, K+Q), the image rows of batches first … first+count−1 of a stream.

        Raises:
            CancelledError: see `Episodes.batch_rows`.
        """
        rows = self.episodes[stream].batch_rows(first * self.tasks, count * self.tasks, cancelled)
        return rows.reshape(count, self.tasks, *rows.shape[1:])

    def note(self, stream: str) -> None:
        """Note that a batch of this stream was handed out: the next gradients are those of its tasks."""
        self._latest, self._seen = stream, 0

    def name_tasks(self, count: int) -> list[tuple[str, int]]:
        """(stream, number from 1) of each of the next `count` tasks of the batch that was handed out last."""
        first = self._seen % self.tasks
        self._seen = first + count
        return [(self._latest, first + task) for task in range(1, count + 1)]


def finite_tasks(result: tuple[Params, TaskInfo]) -> Tensor:
    """(2, B) bool: whether each task's losses are finite, and whether its gradient is."""
    grads, info = result
    entries = torch.cat([g.reshape(len(g), -1) for g in grads.values()], dim=1)
    # An initial loss that was not asked for is NaN, so NaN is allowed there.
    loss = torch.isfinite(info.query_loss) & ~torch.isinf(info.initial_loss)
    return torch.stack([loss, torch.isfinite(info.grad_norm) & torch.isfinite(entries).all(1)])


def raise_non_finite_task(finite: Sequence[Sequence[bool]], tasks: Sequence[tuple[str, int]]) -> None:
    """Raise NonFiniteTaskError for the first task that is not finite, if there is one.

    Args:
        finite: two rows, as `finite_tasks` gives them.
        tasks: (stream, number) of each task.
    """
    for loss, gradient, (stream, task) in zip(*finite, tasks, strict=True):
        if not (loss and gradient):
            raise NonFiniteTaskError("gradient" if loss else "loss", task, stream)


def first_non_finite(state: OuterState) -> Tensor:
    """The position of the first number that is not finite, in θ and the rule's state laid end to end: 0-d int64.

    If all are finite, it is the number of entries. See `raise_non_finite_state`.
    """
    entries = torch.cat([leaf.reshape(-1) for _, _, leaf in _checked_leaves(state)])
    places = torch.arange(len(entries), device=entries.device)
    return torch.where(torch.isfinite(entries), len(entries), places).amin()


def raise_non_finite_state(state: OuterState, place: int) -> None:
    """Raise NonFiniteError for the leaf at the position that `first_non_finite` found, if there is one."""
    for group, name, leaf in _checked_leaves(state):
        if place < leaf.numel():
            raise NonFiniteError(f"{name!r} of the {group} is not finite after the outer step")
        place -= leaf.numel()


def _checked_leaves(state: OuterState) -> Iterator[tuple[str, str, Tensor]]:
    for group, tree in (("parameters", state.meta), ("attention", state.rule)):
        for name, leaf in tree.items():
            if leaf.is_floating_point():
                yield group, name, leaf


def watched_tools(tools: Tools, look: Callable[[Gradients], Gradients], batch: Callable[[str, Any], Episode]) -> Tools:
    """The tools with a check (`look`) around every gradient, and with batches from the function `batch`."""
    return tools._replace(
        gradients=look(tools.gradients),
        gradients_without_initial_loss=look(tools.cheapest_gradients),
        train=partial(batch, "training"),
        probe=partial(batch, "probe"),
    )


class OneByOne:
    """Makes the rule's steps one by one and checks the numbers after each. A thread a stream draws the next batches
    meanwhile.

    Args:
        rule: the batch rule.
        tools: with the gradients of an execution; `train` and `probe` are replaced.
        streams: the batches.
        state: the state before the first step.
        interrupting: a context around the rule's step. An exception in it abandons the step, and the state stays as it
            was.
    """

    block = 1

    def __init__(
        self,
        rule: Rule,
        tools: Tools,
        streams: Streams,
        state: OuterState,
        interrupting: Interrupting = contextlib.nullcontext,
    ) -> None:
        self._rule, self._streams, self._interrupting = rule, streams, interrupting
        self.state = state
        self._t = 0
        self._ahead = {stream: Prefetcher(episodes) for stream, episodes in streams.episodes.items()}
        self.asked: dict[str, set[int]] = {}
        """Stream -> the batches that the rule asked for, as offsets from t."""
        self._tools: Tools | None = watched_tools(tools, self._checked, self._batch)

    def _batch(self, stream: str, t: int) -> Episode:
        self.asked.setdefault(stream, set()).add(t - self._t)
        self._streams.note(stream)
        return self._ahead[stream].batch(t * self._streams.tasks, self._streams.tasks)

    def _checked(self, gradients: Gradients) -> Gradients:
        def checked(meta: Params, batch: Episode) -> tuple[Params, TaskInfo]:
            result = gradients(meta, batch)
            finite = finite_tasks(result)
            raise_non_finite_task(finite.tolist(), self._streams.name_tasks(finite.shape[1]))
            return result

        return checked

    def advance(self, t: int, count: int, stop: Stop) -> Iterator[StepRecord]:
        """See `Steps`."""
        for self._t in range(t, t + count):
            if stop():
                return
            assert self._tools is not None  # not closed
            with self._interrupting():
                made = self._rule.step(self.state, self._t, self._tools)
            self.state, record = made
            raise_non_finite_state(self.state, int(first_non_finite(self.state)))
            yield record

    def close(self) -> None:
        """End the threads and drop the tools, which are closures over this object and would keep it alive."""
        for ahead in self._ahead.values():
            ahead.close()
        self._tools = None


def copy_state(state: OuterState) -> OuterState:
    """A copy of the state, with tensors of its own."""
    return OuterState(*({name: leaf.clone() for name, leaf in tree.items()} for tree in state))
