"""A batch's tasks on processes of their own, one a core: what threads would lose by Python's one lock.

The workers are forked, so they hold the learner without a copy being sent, and start at once. Parameters and images go
to them, and results come back, through a piece of shared memory each; the pipes carry shapes only.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaheed.engine.executions.basic import Execution, map_together, merge
from metaheed.errors import ConfigError, StartError, WorkerError
from metaheed.learners.learner import Learner
from metaheed.types import Episode, Params

T = TypeVar("T")

AVAILABLE = sys.platform.startswith("linux")
"""Elsewhere a forked process may not use the system's libraries."""
_ALIGNMENT = 64


class Workers:
    """Forked processes that run functions of a learner; they end with this object, and with the process.

    They are forked at the first use, from the thread that makes it and must outlive them. Threads of ours may be at
    work then: those that draw batches are waited for (`run_between_forks`), the streams that a progress bar writes to
    are opened anew in the worker, and it uses nothing else that they may hold. A user's own threads must hold no lock
    of a library then.

    Args:
        learner: as it is at the first use; later changes to it are not seen.
        threads: of all together: so many workers of one thread each or, of fewer tasks, a worker for each with its
            share of the threads. Where PyTorch's operations sum in an order of their threads', so do they here.

    Raises:
        ConfigError: fewer than one thread, or a system where processes cannot be forked safely.
    """

    def __init__(self, learner: Learner, threads: int) -> None:
        if threads < 1:
            raise ConfigError(f"worker processes of {threads} threads: there must be at least 1")
        if not AVAILABLE:
            raise ConfigError(f"the execution 'processes' needs Linux, but this is {sys.platform}: use 'threaded'")
        self.threads = threads
        self._learner = weakref.ref(learner)  # so that workers kept for a learner end with it
        self._running: list[_Worker] = []

    def map(self, function: Callable[[Learner, Params, Episode], T], meta: Params, batch: Episode) -> T:
        """function(learner, θ, task) over a batch, its tasks dealt out to the workers in order.

        Args:
            function: found by its name in the workers, so one of a module.
            meta: θ.
            batch: tasks.

        Raises:
            StartError: the system starts no further process.
            WorkerError: a worker died. Whatever the function raises in one.
        """
        processes, threads = shared_out(self.threads, len(batch.support_y))
        shares = list(zip(*(torch.tensor_split(part, processes) for part in batch), strict=True))
        # Results are a gradient a task at most, and a few numbers.
        results = len(shares[0][0]) * (_room(meta.values()) + 4096)
        needed = _room([*meta.values(), *shares[0]]) + results
        if self._running and self._running[0].room < needed:
            self.close()
        while len(self._running) < len(shares):
            learner = self._learner()
            if learner is None:
                raise RuntimeError("the learner of these workers is gone: keep it as long as they are used")
            room = self._running[0].room if self._running else 2 * needed
            self._running.append(_Worker(learner, room))
        at_work = self._running[: len(shares)]
        answers: list[Any] = []
        try:
            for worker, share in zip(at_work, shares, strict=True):
                worker.begin(threads, function, meta, Episode(*share))
            answers = [worker.end() for worker in at_work]
        finally:
            if len(answers) < len(at_work):  # some may still be at work, or gone
                self.close()
        result: T = merge(answers, torch.cat)
        return result

    def close(self) -> None:
        """End the workers; the next use starts new ones."""
        for worker in self._running:
            worker.close()
        self._running.clear()


def shared_out(threads: int, tasks: int) -> tuple[int, int]:
    """How many workers are at work on so many tasks, and with how many threads each."""
    processes = min(threads, tasks)
    return processes, threads // processes


class _Worker:
    def __init__(self, learner: Learner, room: int) -> None:
        self.room = room
        self._memory = mmap.mmap(-1, room)
        self._pipe, theirs = multiprocessing.Pipe()
        for stream in filter(None, (sys.stdout, sys.stderr)):  # none: closed before this process began
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
                os._exit(0)  # nothing of the parent's is to be flushed, saved or cleaned up here
        theirs.close()
        self._finalizer = weakref.finalize(self, _end, self._pid, self._pipe)

    def begin(self, threads: int, function: Callable[..., Any], meta: Params, batch: Episode) -> None:
        writer = _Writer(self._memory)
        self._send(
            (threads, function, {n: writer.put(p) for n, p in meta.items()}, [writer.put(part) for part in batch])
        )

    def end(self) -> Any:
        try:
            failure, answer = self._pipe.recv()
        except (EOFError, OSError):
            _, status = os.waitpid(self._pid, 0)
            self._finalizer.detach()  # its number may be another's now
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
        return  # gone, and waited for


def _close_all_but(kept: int) -> None:
    """So that no lock, log or pipe of the parent is held open here, except for its standard streams."""
    for opened in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if opened > 2 and opened != kept:
            with contextlib.suppress(OSError):  # the one that the listing itself went through
                os.close(opened)


def _serve(learner: Learner, memory: mmap.mmap, pipe: Connection, parent: int) -> None:
    # Where the parent dies of a SIGKILL, a worker in mid-task must not keep the run locked.
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        return
    # Signals to all of a terminal's or a job's processes are the parent's business: it stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # A progress bar's thread may have been writing when the process was forked: its lock is never given back here.
    sys.stdout, sys.stderr = (
        stream and open(number, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115  # for good
        for number, stream in ((1, sys.stdout), (2, sys.stderr))
    )
    torch.set_num_threads(1)
    gc.freeze()  # what was there at the fork need not be looked through again
    # Whatever was at work around the first use.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        _answer(learner, memory, pipe)


def _answer(learner: Learner, memory: mmap.mmap, pipe: Connection) -> None:
    now = 1

    def work(threads: int, function: Callable[[Learner, Params, Episode], Any], meta: Any, batch: Any) -> Any:
        nonlocal now
        if now != threads:  # to set it makes libraries forget what they have prepared
            torch.set_num_threads(threads)
            now = threads
        execution: Execution[Any] = map_together(learner, function)
        return _stored(execution(_loaded(memory, meta), Episode(*_loaded(memory, batch))), _Writer(memory))

    # OpenMP's threads belong to the thread that began them. Those of the one that was forked have stayed behind, and it
    # would wait for them for ever; a new one begins its own.
    apart = ThreadPoolExecutor(1)
    while True:
        try:
            threads, *given = pipe.recv()
        except (EOFError, OSError):
            return
        answer: tuple[Exception | None, Any]
        try:
            answer = (None, work(1, *given) if threads == 1 else apart.submit(work, threads, *given).result())
        except Exception as error:  # it is raised again in the parent
            answer = (_portable(error), None)
        pipe.send(answer)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class does when it is pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _Place:
    """Where in the shared memory a tensor lies."""

    def __init__(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.offset, self.shape, self.dtype = offset, shape, dtype


class _Writer:
    """Lays tensors into shared memory one after another."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._end = 0

    def put(self, tensor: Tensor) -> _Place:
        place = _Place(self._end, tuple(tensor.shape), tensor.dtype)
        self._end += _room([tensor])
        if self._end > len(self._memory):
            raise RuntimeError(f"a result of {self._end} bytes does not fit into the {len(self._memory)} shared ones")
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
    return sum(-(-t.numel() * t.element_size() // _ALIGNMENT) * _ALIGNMENT for t in tensors)


def _stored(tree: Any, writer: _Writer) -> Any:
    if isinstance(tree, Tensor):
        return writer.put(tree)
    if isinstance(tree, dict):
        return {name: _stored(value, writer) for name, value in tree.items()}
    fields = [_stored(value, writer) for value in tree]
    return type(tree)(*fields) if hasattr(tree, "_fields") else tuple(fields)


def _loaded(memory: mmap.mmap, tree: Any) -> Any:
    if isinstance(tree, _Place):
        return _view(memory, tree)
    if isinstance(tree, dict):
        return {name: _loaded(memory, value) for name, value in tree.items()}
    fields = [_loaded(memory, value) for value in tree]
    return type(tree)(*fields) if hasattr(tree, "_fields") else fields
