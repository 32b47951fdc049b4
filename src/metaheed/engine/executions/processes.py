"""The tasks of a meta-batch on worker processes, one a core, which do not share Python's global lock as threads do.

The workers are forked: so they start at once and hold the learner without receiving a copy. Each worker shares a piece
of memory with this process, through which parameters and images go to it and results come back; the pipes carry only
shapes.
"""

import contextlib
import ctypes
import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaheed.engine.batching import has_closed_form
from metaheed.engine.executions.basic import Execution, map_looped, map_together, merge
from metaheed.errors import ConfigError, StartError, WorkerError
from metaheed.learners.learner import Learner
from metaheed.types import Episode, Params

T = TypeVar("T")

AVAILABLE = sys.platform.startswith("linux")
"""Forking is safe on Linux only: elsewhere a forked process may not use the system's libraries."""
_ALIGNMENT = 64


class Workers:
    """Forked processes that run functions of a learner. They end with this object, and with the process.

    They are forked at the first use, by the calling thread, which must outlive them. Other threads may be running then.
    Ours cause no harm: the fork waits for those that draw batches (`run_between_forks`), a worker reopens the streams
    that a progress bar writes to, and it uses nothing else that our threads may have locked. The user's own threads
    must not hold a lock of a library at that moment.

    Args:
        learner: used as it is at the first use; later changes to it are not seen.
        threads: the number of threads of all workers together: `threads` workers of one thread each or, if there are
            fewer tasks, one worker a task with an equal share of the threads. Results depend on the threads a worker
            has where PyTorch's operations depend on them (in the order of their sums).

    Raises:
        ConfigError: fewer than one thread, or a system where processes cannot be forked safely.
    """

    def __init__(self, learner: Learner, threads: int) -> None:
        if threads < 1:
            raise ConfigError(f"worker processes of {threads} threads: there must be at least 1")
        if not AVAILABLE:
            raise ConfigError(f"the execution 'processes' needs Linux, but this is {sys.platform}: use 'threaded'")
        self.threads = threads
        self._learner = weakref.ref(learner)  # a weak reference, so that the workers of a learner end with it
        self._running: list[_Worker] = []

    def map(self, function: Callable[[Learner, Params, Episode], T], meta: Params, batch: Episode) -> T:
        """Execute function(learner, θ, task) over a batch. The workers get equal shares of the tasks, in order.

        Args:
            function: a function of a module, which the workers find by its name.
            meta: θ.
            batch: the tasks.

        Raises:
            StartError: the system cannot start another process.
            WorkerError: a worker died. An exception of the function itself is raised again here.
        """
        processes, threads = workers_and_threads(self.threads, len(batch.support_y))
        shares = list(zip(*(torch.tensor_split(part, processes) for part in batch), strict=True))
        # The results of a task are at most a gradient and a few numbers.
        results = len(shares[0][0]) * (_room(meta.values()) + 4096)
        needed = _room([*meta.values(), *shares[0]]) + results
        if self._running and self._running[0].room < needed:
            self.close()
        while len(self._running) < len(shares):
            learner = self._learner()
            if learner is None:
                raise RuntimeError("the learner of these workers was deleted: keep a reference to it")
            room = self._running[0].room if self._running else 2 * needed
            self._running.append(_Worker(learner, room))
        at_work = self._running[: len(shares)]
        answers: list[Any] = []
        try:
            for worker, share in zip(at_work, shares, strict=True):
                worker.begin(threads, function, meta, Episode(*share))
            answers = [worker.end() for worker in at_work]
        finally:
            if len(answers) < len(at_work):  # some workers may still be busy, or dead
                self.close()
        result: T = merge(answers, torch.cat)
        return result

    def close(self) -> None:
        """End the workers. The next use starts new ones."""
        for worker in self._running:
            worker.close()
        self._running.clear()


def workers_and_threads(threads: int, tasks: int) -> tuple[int, int]:
    """How many workers so many tasks are divided among, and how many threads each has."""
    processes = min(threads, tasks)
    return processes, threads // processes


class _Worker:
    """One forked process, with its shared memory of `room` bytes and its pipe."""

    def __init__(self, learner: Learner, room: int) -> None:
        self.room = room
        self._memory = mmap.mmap(-1, room)
        self._pipe, theirs = multiprocessing.Pipe()
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it was closed before this process began
            stream.flush()
        parent = os.getpid()
        try:
            self._pid = os.fork()
        except OSError as error:
            raise StartError(str(error)) from error
        if self._pid == 0:
            try:
                _close_all_but(theirs.fileno())
                _serve(learner, self._memory, theirs, parent)
            finally:
                os._exit(0)  # without flushing, saving or cleaning up what is the parent's
        theirs.close()
        self._finalizer = weakref.finalize(self, _end, self._pid, self._pipe)

    def begin(self, threads: int, function: Callable[..., Any], meta: Params, batch: Episode) -> None:
        """Write the arguments into the shared memory and tell the worker to start."""
        writer = _Writer(self._memory)
        self._send(
            (threads, function, {n: writer.put(p) for n, p in meta.items()}, [writer.put(part) for part in batch])
        )

    def end(self) -> Any:
        """Wait for the worker's result; raises its exception, or WorkerError if it died."""
        try:
            failure, answer = self._pipe.recv()
        except (EOFError, OSError):
            _, status = os.waitpid(self._pid, 0)
            self._finalizer.detach()  # another process may have its number now
            self._pipe.close()
            raise WorkerError(os.waitstatus_to_exitcode(status)) from None
        if failure is not None:
            raise failure
        return _loaded(self._memory, answer)

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except (BrokenPipeError, ConnectionResetError):
            self.end()

    def close(self) -> None:
        self._finalizer()


def _end(pid: int, pipe: Connection) -> None:
    pipe.close()
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return  # it had ended, and was waited for


def _close_all_but(kept: int) -> None:
    """Close all files but the standard streams and this one, so that no lock, log or pipe of the parent stays open."""
    for opened in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if opened > 2 and opened != kept:
            with contextlib.suppress(OSError):  # the listing's own descriptor is closed already
                os.close(opened)


def _serve(learner: Learner, memory: mmap.mmap, pipe: Connection, parent: int) -> None:
    # If the parent is killed by SIGKILL, a worker that is busy must not keep the run locked.
    """The life of a worker: prepare the forked process, then answer requests until the pipe closes."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        return
    # The parent handles the signals that go to all processes of a terminal or a job, and stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # If a progress bar's thread was writing during the fork, the stream's lock would never be released here.
    sys.stdout, sys.stderr = (
        stream and open(number, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115  # for good
        for number, stream in ((1, sys.stdout), (2, sys.stderr))
    )
    torch.set_num_threads(1)
    gc.freeze()  # the collector need not examine again what existed at the fork
    # The contexts around the first use do not count here.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        _answer(learner, memory, pipe)


def _answer(learner: Learner, memory: mmap.mmap, pipe: Connection) -> None:
    """Answer requests until the pipe closes."""
    now = 1

    def work(threads: int, function: Callable[[Learner, Params, Episode], Any], meta: Any, batch: Any) -> Any:
        nonlocal now
        if now != threads:  # setting it makes libraries discard what they have prepared
            torch.set_num_threads(threads)
            now = threads
        # Without a closed form one task after another is faster than torch.func.vmap.
        one_by_one = map_looped(partial(function, learner))
        execution: Execution[Any] = map_together(learner, function) if has_closed_form(learner) else one_by_one
        return _stored(execution(_loaded(memory, meta), Episode(*_loaded(memory, batch))), _Writer(memory))

    # OpenMP's threads belong to the thread that started them. Those of the forked thread exist only in the parent, and
    # it would wait for them for ever; a new thread starts its own.
    apart = ThreadPoolExecutor(1)
    while True:
        try:
            threads, *given = pipe.recv()
        except (EOFError, OSError):
            return
        answer: tuple[Exception | None, Any]
        try:
            answer = (None, work(1, *given) if threads == 1 else apart.submit(work, threads, *given).result())
        except Exception as error:  # the parent raises it again
            answer = (_portable(error), None)
        pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """The exception itself if it can be pickled, else a RuntimeError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs the class's own code, which may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _Place:
    """Where in the shared memory a tensor lies."""

    def __init__(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.offset, self.shape, self.dtype = offset, shape, dtype


class _Writer:
    """Writes tensors into the shared memory one after another."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._end = 0

    def put(self, tensor: Tensor) -> _Place:
        place = _Place(self._end, tuple(tensor.shape), tensor.dtype)
        self._end += _room([tensor])
        if self._end > len(self._memory):
            raise RuntimeError(f"a result of {self._end} bytes exceeds the {len(self._memory)} bytes of shared memory")
        _view(self._memory, place).copy_(tensor)
        return place


def _view(memory: mmap.mmap, place: _Place) -> Tensor:
    count = 1
    for size in place.shape:
        count *= size
    if not count:
        return torch.empty(place.shape, dtype=place.dtype)
    return torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset).view(place.shape)


def _room(tensors: Any) -> int:
    """The bytes that these tensors take in the shared memory."""
    return sum(-(-t.numel() * t.element_size() // _ALIGNMENT) * _ALIGNMENT for t in tensors)


def _stored(tree: Any, writer: _Writer) -> Any:
    """Write a tree's tensors into the shared memory; returns the tree with a `_Place` for each."""
    if isinstance(tree, Tensor):
        return writer.put(tree)
    if isinstance(tree, dict):
        return {name: _stored(value, writer) for name, value in tree.items()}
    fields = [_stored(value, writer) for value in tree]
    return type(tree)(*fields) if hasattr(tree, "_fields") else tuple(fields)


def _loaded(memory: mmap.mmap, tree: Any) -> Any:
    """The inverse of `_stored`: the tree with tensors that are views of the shared memory."""
    if isinstance(tree, _Place):
        return _view(memory, tree)
    if isinstance(tree, dict):
        return {name: _loaded(memory, value) for name, value in tree.items()}
    fields = [_loaded(memory, value) for value in tree]
    return type(tree)(*fields) if hasattr(tree, "_fields") else fields
