"""Workers of the benchmark, begun as forks of one process that has imported everything.

Importing PyTorch takes seconds of processor time, which a process of its own is given anew. A fork has it at hand, and
is as much a process of its own: with its own memory, settings and threads.
"""

import atexit
import contextlib
import multiprocessing
import os
import subprocess
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["benchmarks.worker"])


class Popen:
    """What `benchmarks.processes` uses of `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], **_: Any) -> None:
        assert command[-2:] == ["-m", "benchmarks.worker"]
        reads, writes = os.pipe(), os.pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(DupFd(reads[0]), DupFd(writes[1])))
        self._process.start()
        os.close(reads[0])
        os.close(writes[1])
        self.stdin, self.stdout = os.fdopen(reads[1], "w"), os.fdopen(writes[0])

    def wait(self, timeout: float | None = None) -> int:
        """The status with which it ended; of a signal, its negative number."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("benchmarks.worker", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()


class Subprocess:
    """In place of the module `subprocess`."""

    Popen = Popen
    PIPE, DEVNULL, TimeoutExpired = subprocess.PIPE, subprocess.DEVNULL, subprocess.TimeoutExpired


def _serve(reads: Any, writes: Any) -> None:
    """Be the worker, in the fork; it ends as a process of its own would, and not as one of multiprocessing's."""
    os.dup2(reads.detach(), 0)
    os.dup2(writes.detach(), 1)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123  # as the worker's standard error is in a process of its own
        os.dup2(nowhere.fileno(), 2)
    import sys

    from benchmarks import worker

    status = 1
    with contextlib.suppress(BaseException):
        sys.stdin = os.fdopen(0)
        worker.main()
        status = 0
    atexit._run_exitfuncs()
    os._exit(status)
