"""Outer steps in blocks over static buffers, which on CUDA are captured in a graph.

steps.py describes the buffers and the steps over them, with the legend of shapes.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaheed.data.episodes import run_between_forks
from metaheed.engine.steps import (
    Interrupting,
    OneByOne,
    Stop,
    Streams,
    copy_state,
    finite_tasks,
    first_non_finite,
    raise_non_finite_state,
    raise_non_finite_task,
    watched_tools,
)
from metaheed.rules.rule import Gradients, OuterState, Rule, StepRecord, Tools
from metaheed.types import Episode, Params, TaskInfo

_PATIENCE = 2.0  # the most seconds for a block, estimated from the steps before it
_COLUMNS = len(TaskInfo._fields) + 1  # what attention sees of a task, and the task's weight


class Buffered:
    """Makes the steps in blocks over static buffers; captured in a CUDA graph if that is asked for and possible.

    The first step is made by `OneByOne`: rules that keep something for the next step begin with it, and it shows which
    batches the rule asks for. If a step cannot be captured, because the network or the rule reads a value on the host,
    `OneByOne` makes all steps from then on, with a notice.

    Args:
        rule, tools, streams, state: as for `OneByOne`.
        block: k, the most steps in a block.
        capture: capture the step in a CUDA graph; the state must lie on a CUDA device.
        notice: is called with the reason if a step cannot be captured.
        interrupting: as for `OneByOne`, for the steps that it makes.
    """

    def __init__(
        self,
        rule: Rule,
        tools: Tools,
        streams: Streams,
        state: OuterState,
        block: int,
        capture: bool,
        notice: Callable[[str], None],
        interrupting: Interrupting = contextlib.nullcontext,
    ) -> None:
        self.block = block
        self._one_by_one = partial(OneByOne, rule, tools, streams, interrupting=interrupting)
        self._over_buffers = partial(_Buffers, rule, tools, streams, block)
        self._single: OneByOne | None = self._one_by_one(state)
        self._buffers: _Buffers | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capture, self._notice = capture, notice
        self._given_up = False
        # A device gets all steps of a block at once. If steps are slow, blocks must be short, so that a stop is quick.
        self._most_steps = self._most_steps_next = min(block, 2) if capture else block
        """The most steps of this block, and of the next one, whose batches are drawn meanwhile."""
        self._drawing = _Drawing(streams)

    @property
    def state(self) -> OuterState:
        """See `Steps`; here it is a copy."""
        if self._single is not None:
            return self._single.state
        assert self._buffers is not None  # one of the two is there
        return copy_state(self._buffers.state)

    def advance(self, t: int, count: int, stop: Stop) -> Iterator[StepRecord]:
        """See `Steps`."""
        if self._buffers is None:
            assert self._single is not None  # one of the two is there
            yield from self._single.advance(t, 1, stop)
            if self._single.asked and not self._given_up:
                self._single.close()
                self._buffers, self._single = self._over_buffers(self._single.state, self._single.asked), None
            return
        count = min(count, self._most_steps)
        self._buffers.begin(t, self._drawing.take(self._buffers.spans, t, count))
        if self._capture and self._graph is None:
            self._try_capture(self._buffers, t, count)
            if self._graph is None:
                return  # the caller calls again, and `OneByOne` makes the step
        self._drawing.ahead(self._buffers.spans, t + count, self._most_steps_next)
        step = self._buffers.step if self._graph is None else self._graph.replay
        began, done = time.monotonic(), 0
        while done < count and not stop():
            step()
            done += 1
        for number, record in enumerate(self._buffers.read(done)):
            if number == 0 and self._graph is not None:  # the device has finished the block
                taken = max(time.monotonic() - began, 1e-9)
                self._most_steps = self._most_steps_next
                self._most_steps_next = max(1, min(self.block, int(_PATIENCE * done / taken)))
            yield record

    def _try_capture(self, buffers: "_Buffers", t: int, count: int) -> None:
        """Capture the step; if that fails, give the buffers up and go on with `OneByOne`."""
        before = copy_state(buffers.state)
        try:
            self._graph = capture_step(buffers, before, t, min(count, 2))
        except RuntimeError as error:
            first: BaseException = error
            while isinstance(first.__context__, RuntimeError):  # ending a failed capture fails too
                first = first.__context__
            reason = str(first).strip().partition("\n")[0]
            self._notice(f"the outer step is not captured in a CUDA graph ({reason}): the steps are made one by one")
            self._single, self._buffers, self._given_up = self._one_by_one(before), None, True

    def close(self) -> None:
        """End the thread that draws, and free the graph's memory."""
        self._drawing.close()
        if self._single is not None:
            self._single.close()
        if self._buffers is not None:
            self._buffers.close()
        if self._graph is not None:
            self._graph.reset()
            self._graph = None


class _Buffers:
    """The static buffers, and the step over them.

    Call `begin`, then `step` at most as often as there are batches, then `read`.
    """

    def __init__(
        self,
        rule: Rule,
        tools: Tools,
        streams: Streams,
        block: int,
        state: OuterState,
        asked: Mapping[str, set[int]],
    ) -> None:
        self.state = copy_state(state)
        self.spans = {stream: range(min(offsets), max(offsets) + 1) for stream, offsets in asked.items()}
        self._rule, self._streams, self._block = rule, streams, block
        self._tools: Tools | None = watched_tools(tools, self._noted, self._batch)
        self.device = device = next(iter(self.state.meta.values())).device
        self._t, self._first = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self._places = torch.arange(block, device=device)
        self._rows: dict[str, Tensor] = {}
        for stream, span in self.spans.items():
            episodes = streams.episodes[stream]
            shape = (block + len(span) - 1, streams.tasks, episodes.ways, episodes.shots + episodes.queries)
            self._rows[stream] = torch.zeros(shape, dtype=torch.int64, device=device)
        self._records: Tensor | None = None  # its width is known after the first step
        self._layout = _Layout(0, [])
        self._finite: list[Tensor] = []
        self._tasks: list[tuple[str, int]] = []

    def begin(self, t: int, rows: Mapping[str, np.ndarray]) -> None:
        """Begin a block at iteration t, with the rows of its batches; the host copies them and fills two numbers."""
        for stream, drawn in rows.items():
            self._rows[stream][: len(drawn)].copy_(torch.from_numpy(drawn))
        self._t.fill_(t)
        self._first.fill_(t)

    def restore(self, state: OuterState, t: int) -> None:
        """Go back to this state, before iteration t of the same block, and empty the records."""
        if self._records is not None:
            self._records.zero_()
        for ours, theirs in zip(self.state, state, strict=True):
            for name, leaf in ours.items():
                leaf.copy_(theirs[name])
        self._t.fill_(t)

    def step(self) -> None:
        """Make one outer step, which is a function of the buffers alone."""
        self._finite, self._tasks = [], []
        # The rule does not read the value of t: see rules/rule.py.
        assert self._tools is not None  # not closed
        state, record = self._rule.step(self.state, self._t, self._tools)  # type: ignore[arg-type]
        found = [*record.info, record.weights, *torch.cat(self._finite, dim=1), first_non_finite(state).reshape(1)]
        row = torch.cat([part.double() for part in found])
        self._finite = []
        if self._records is None:
            self._records = torch.zeros(self._block, len(row), dtype=row.dtype, device=row.device)
        self._layout = _Layout(len(record.weights), self._tasks)
        here = (self._places == self._t - self._first).unsqueeze(1)
        self._records.copy_(torch.where(here, row, self._records))
        self._keep(state)
        self._t.add_(1)

    def read(self, count: int) -> Iterator[StepRecord]:
        """Yield the records of the block's first `count` steps, after waiting for the device."""
        if count == 0:
            return
        assert self._records is not None  # a step has been made
        tasks, named = self._layout
        for row in self._records[:count].cpu():
            columns, finite, place = row.split([_COLUMNS * tasks, 2 * len(named), 1])
            raise_non_finite_task(finite.view(2, -1).bool().tolist(), named)
            raise_non_finite_state(self.state, int(place))
            *info, weights = columns.view(_COLUMNS, tasks)
            yield StepRecord(TaskInfo(*info), weights)

    def close(self) -> None:
        """Drop the tools, which are closures over this object and would keep it alive."""
        self._tools = None

    def peek(self, count: int) -> Tensor:
        """A copy of the records of the block's first `count` steps."""
        assert self._records is not None
        return self._records[:count].clone()

    def _batch(self, stream: str, t: Any) -> Episode:
        self._streams.note(stream)
        row = t - self._first - self.spans[stream].start
        rows = self._rows[stream].index_select(0, row.reshape(1)).squeeze(0)
        return self._streams.episodes[stream].gather(rows)

    def _noted(self, gradients: Gradients) -> Gradients:
        def noted(meta: Params, batch: Episode) -> tuple[Params, TaskInfo]:
            result = gradients(meta, batch)
            self._finite.append(finite_tasks(result))
            self._tasks += self._streams.name_tasks(self._finite[-1].shape[1])
            return result

        return noted

    def _keep(self, state: OuterState) -> None:
        """Overwrite the state with the next one."""
        pairs = []
        for ours, theirs in zip(self.state, state, strict=True):
            if ours.keys() != theirs.keys():
                raise RuntimeError(f"the rule's step changed its state's names: {sorted({*ours} ^ {*theirs})}")
            pairs += [(leaf, theirs[name].detach()) for name, leaf in ours.items() if theirs[name] is not leaf]
        # A rule may return a tensor of the old state under another name, which is copied before it is overwritten.
        held = {leaf.untyped_storage()._cdata for tree in self.state for leaf in tree.values()}
        pairs = [(leaf, new.clone() if new.untyped_storage()._cdata in held else new) for leaf, new in pairs]
        for dtype in {leaf.dtype for leaf, _ in pairs}:  # one kernel copies all leaves of a dtype
            alike = [pair for pair in pairs if pair[0].dtype == dtype]
            torch._foreach_copy_([leaf for leaf, _ in alike], [new for _, new in alike])


class _Layout(NamedTuple):
    """The layout of a row of the records, in columns.

    _COLUMNS · tasks (infos and weights), then 2 · named (whether losses and gradients are finite), then 1 (the position
    of the first number of the state that is not finite).
    """

    tasks: int
    named: list[tuple[str, int]]


class _Drawing:
    """Draws the rows of a block's batches, and those of the next block ahead of time on a thread."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._pool = ThreadPoolExecutor(1, "metaheed-episodes")
        self._next: tuple[int, int, Future[dict[str, np.ndarray]]] | None = None
        self._closed = False

    def _draw(self, spans: Mapping[str, range], t: int, count: int) -> dict[str, np.ndarray]:
        return {
            stream: self._streams.rows(stream, t + span.start, count + len(span) - 1, lambda: self._closed)
            for stream, span in spans.items()
        }

    def ahead(self, spans: Mapping[str, range], t: int, count: int) -> None:
        """Begin to draw the rows of iterations t … t+count−1 on the thread."""
        self._next = (t, count, self._pool.submit(run_between_forks, self._draw, spans, t, count))

    def take(self, spans: Mapping[str, range], t: int, count: int) -> dict[str, np.ndarray]:
        """The rows of each stream's batches for iterations t … t+count−1, from batch t+span.start on."""
        if self._next is not None and self._next[0] == t and self._next[1] >= count:
            drawn = self._next[2].result()
            return {stream: drawn[stream][: count + len(span) - 1] for stream, span in spans.items()}
        return self._draw(spans, t, count)

    def close(self) -> None:
        """End the thread, even while it is drawing."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)


def capture_step(buffers: _Buffers, before: OuterState, t: int, compared: int) -> torch.cuda.CUDAGraph:
    """Capture the step over these buffers in a CUDA graph. The buffers are left at the state `before` and iteration t.

    1. Warm-up steps on the stream that is captured later, in which libraries initialise themselves outside the graph.
       All but the first of them fail if they make the host wait, because such a step cannot be captured.
    2. The capture, which computes nothing.
    3. A few replayed steps, whose records are compared with those of the warm-up: they differ if the network keeps
       something from one call to the next.

    Raises:
        RuntimeError: the step makes the host wait, cannot be captured, or gives other numbers when it is replayed.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(buffers.device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            buffers.step()
            buffers.restore(before, t)
            with _no_waiting():
                for _ in range(compared):
                    buffers.step()
            expected = buffers.peek(compared)
            buffers.restore(before, t)
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads may use the device while this one captures.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            buffers.step()
        for _ in range(compared):
            graph.replay()
        found = buffers.peek(compared)
        buffers.restore(before, t)
    # NaN is reported by the training loop, and kernels may round differently from call to call.
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-4, equal_nan=True):
        raise RuntimeError("a replay gives other numbers than a call: something is kept from one call to the next")
    return graph


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside this context, whatever makes the host wait for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
