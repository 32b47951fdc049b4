"""How training advances: an outer step at a time, or in blocks over static buffers, which a CUDA graph can hold.

`OneByOne` is the rule's step with a look at its numbers. `Buffered` makes the same step a function of tensors that stay
where they are, on the device, and that nobody reads while it runs:

    state     θ, the optimiser's, the rule's                          overwritten at the end of the step
    t         () int64, the iteration                                 counted up
    first     () int64, the iteration that the block began with
    rows      of each stream (n, B, N, K+Q) int64, the images of the block's batches, drawn by the host
    records   (k, columns) float64, a row an iteration: infos, weights, and where numbers are not finite

1. Batch t: its rows, the images there, as network input.
2. The rule's step, whose t is the tensor.
3. Row t − first of the records; the next state; t + 1.

The host draws the rows of the next block meanwhile (a thread), and looks at the records when the block is done. Both
forms give the same bits on a CPU, wherever blocks begin and end.

Legend: B tasks, N ways, K shots, Q queries per class, k steps in a block at most.
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
"""Makes a context in which what is computed may be ended by an exception at any moment."""


class Steps(Protocol):
    """A run's outer steps."""

    block: int
    """Steps that one call of `advance` makes at most."""

    @property
    def state(self) -> OuterState:
        """After the steps made so far; the tensors are the caller's to keep."""
        ...

    def advance(self, t: int, count: int, stop: Stop) -> Iterator[StepRecord]:
        """Make steps t … t+count−1, or fewer; their records.

        Raises:
            NonFiniteError: of the step whose record would have come next; the state is then good for nothing.
        """
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


class Streams:
    """The streams of batches of B tasks, "training" and "probe", and which of them was asked for last."""

    def __init__(self, training: Episodes, probe: Episodes, tasks: int) -> None:
        self.episodes = {"training": training, "probe": probe}
        self.tasks = tasks
        self._latest, self._seen = "", 0

    def batch(self, stream: str, t: int) -> Episode:
        """Batch t."""
        self.note(stream)
        return self.episodes[stream].batch(t * self.tasks, self.tasks)

    def lie_on(self, device: torch.device) -> bool:
        """Whether the images lie on a device of this kind, where rows can be gathered."""
        return all(episodes.split.images.device.type == device.type for episodes in self.episodes.values())

    def rows(self, stream: str, first: int, count: int, cancelled: Stop = lambda: False) -> np.ndarray:
        """(count, B, N, K+Q) image rows of batches first … first+count−1.

        Raises:
            CancelledError: as `Episodes.batch_rows`.
        """
        rows = self.episodes[stream].batch_rows(first * self.tasks, count * self.tasks, cancelled)
        return rows.reshape(count, self.tasks, *rows.shape[1:])

    def note(self, stream: str) -> None:
        """A batch of this stream was handed out: gradients asked for now are of its tasks."""
        self._latest, self._seen = stream, 0

    def name_tasks(self, count: int) -> list[tuple[str, int]]:
        """The stream and number, from 1, of the next `count` tasks of the batch handed out last."""
        first = self._seen % self.tasks
        self._seen = first + count
        return [(self._latest, first + task) for task in range(1, count + 1)]


def finite_tasks(result: tuple[Params, TaskInfo]) -> Tensor:
    """(2, B) bool of a batch's gradients: whether a task's losses are finite, and whether its gradient is."""
    grads, info = result
    entries = torch.cat([g.reshape(len(g), -1) for g in grads.values()], dim=1)
    # NaN is also what an initial loss is that nobody asked for.
    loss = torch.isfinite(info.query_loss) & ~torch.isinf(info.initial_loss)
    return torch.stack([loss, torch.isfinite(info.grad_norm) & torch.isfinite(entries).all(1)])


def raise_non_finite_task(finite: Sequence[Sequence[bool]], tasks: Sequence[tuple[str, int]]) -> None:
    """Raise NonFiniteTaskError of the first of these tasks with a False in `finite`, laid out as by `finite_tasks`."""
    for loss, gradient, (stream, task) in zip(*finite, tasks, strict=True):
        if not (loss and gradient):
            raise NonFiniteTaskError("gradient" if loss else "loss", task, stream)


def first_non_finite(state: OuterState) -> Tensor:
    """Where the first number that is not finite stands in θ and the rule's state laid end to end; none: their length.

    0-d int64; see `raise_non_finite_state`.
    """
    entries = torch.cat([leaf.reshape(-1) for _, _, leaf in _checked_leaves(state)])
    places = torch.arange(len(entries), device=entries.device)
    return torch.where(torch.isfinite(entries), len(entries), places).amin()


def raise_non_finite_state(state: OuterState, place: int) -> None:
    """Raise NonFiniteError of the leaf that `first_non_finite` found."""
    for group, name, leaf in _checked_leaves(state):
        if place < leaf.numel():
            raise NonFiniteError(f"{name!r} of the {group} is not finite after the outer step")
        place -= leaf.numel()


def _checked_leaves(state: OuterState) -> Iterator[tuple[str, str, Tensor]]:
    for group, tree in (("parameters", state.meta), ("attention", state.rule)):
        for name, leaf in tree.items():
            if leaf.is_floating_point():
                yield group, name, leaf


def watched(tools: Tools, look: Callable[[Gradients], Gradients], batch: Callable[[str, Any], Episode]) -> Tools:
    """The tools with a look at every gradient, and with batches of the streams from elsewhere."""
    return tools._replace(
        gradients=look(tools.gradients),
        plain_gradients=look(tools.plain),
        train=partial(batch, "training"),
        probe=partial(batch, "probe"),
    )


class OneByOne:
    """The rule's step, and a look at its numbers after each; the next batches are drawn meanwhile (a thread a stream).

    Args:
        rule: the batch rule.
        tools: with the gradients as an execution gives them; `train` and `probe` are replaced.
        streams: the batches.
        state: before the first step.
        interrupting: entered around the rule's step, before whose end nothing is changed: what it raises abandons it.
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
        """Stream -> which of its batches were asked for, counted from t."""
        self._tools: Tools | None = watched(tools, self._checked, self._batch)

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
        """End the threads, and forget the batches: the tools are closures over this object, which would keep it."""
        for ahead in self._ahead.values():
            ahead.close()
        self._tools = None


def _copied(state: OuterState) -> OuterState:
    return OuterState(*({name: leaf.clone() for name, leaf in tree.items()} for tree in state))
