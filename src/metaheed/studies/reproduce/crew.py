"""Doing jobs, several at a time. A job is a sequence of commands, each of which runs in a process of its own.

1. A free slot takes the first waiting job whose lock it gets. A job that another process works on waits.
2. The job's next command is found from what is on disk, and started as a process whose output goes to the job's log.
3. If the command succeeds, step 2 is repeated until nothing is left to do. If it fails, the job has failed.
4. After a signal every process is asked to stop, upon which it writes a checkpoint, and is waited for.

Whatever ends a crew, the next one continues from the state on disk.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from metaheed.errors import Interrupted, MetaheedError
from metaheed.files.opening import make_folder, open_in_place, open_to_read, try_lock
from metaheed.studies.reproduce.plan import Job, Slot, Stage, command

_POLL = 0.1  # seconds between two checks of the processes
_ELSEWHERE = 1.0  # seconds until a job that another process works on is tried again


class Board(Protocol):
    """Receives the progress of a crew."""

    def begin(self, name: str, what: str, iteration: int, iterations: int) -> None:
        """A job's next stage has begun."""

    def step(self, name: str, iteration: int, validation: float | None) -> None:
        """A job's number of outer steps done, and the accuracy of its newest validation."""

    def end(self, name: str) -> None:
        """No process of the job is running any more."""

    def count(self, done: int) -> None:
        """The number of jobs done or failed so far."""

    def message(self, text: str) -> None:
        """A notice that is worth a line of output."""


@dataclass(frozen=True)
class Failure:
    """A job that failed."""

    name: str
    reason: str
    """Why, in one line."""
    log: Path


class Log:
    """A job's log file, with the output of its commands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent, path.parent.parent)
        self.file: IO[bytes] = open_in_place(path, "ab")
        self._begin = 0

    def begin(self, arguments: Sequence[str]) -> None:
        """Write the command line whose output follows."""
        self.file.write(f"$ {shlex.join(arguments)}\n".encode())
        self.file.flush()
        self._begin = self.file.tell()

    def reason(self, status: int) -> str:
        """Why the newest command failed: its last error message, or else its exit status and last line."""
        with open_to_read(self.path) as file:
            file.seek(self._begin)
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if errors:
            return errors[-1]
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"it was ended by {signal.Signals(-status).name}"
        return f"it ended with status {status}{f' ({lines[-1].strip()})' if lines else ''}"


class Follower:
    """Reads new lines of a run's metrics.jsonl while another process writes it."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.iteration: int | None = None
        self.validation: float | None = None

    def look(self) -> None:
        """Read the lines that are new since the last call."""
        try:
            with open_to_read(self._path) as file:
                if file.seek(0, os.SEEK_END) < self._read:
                    self._read = 0  # it was truncated to its checkpoint
                file.seek(self._read)
                lines = file.read()
        except OSError:
            return  # not there yet
        whole, _, _ = lines.rpartition(b"\n")
        self._read += len(whole) + bool(whole)
        for line in whole.splitlines():
            # A line of which one part was read before the log was truncated and one after is not JSON.
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                values: dict[str, Any] = json.loads(line)
                self.iteration = values["iteration"]
                self.validation = values.get("validation_accuracy", self.validation)


class _Work:
    """A job that this process works on, in a slot."""

    def __init__(self, job: Job, slot: Slot, lock: IO[bytes], out: Path) -> None:
        self.job, self.slot, self._lock = job, slot, lock
        self.log = Log(out / "logs" / f"{job.name}.log")
        self.process: subprocess.Popen[bytes] | None = None
        self.stage: Stage | None = None
        self._follower = None if job.metrics is None else Follower(job.metrics)

    def go_on(self, board: Board) -> bool:
        """Start the next stage and return True; return False if the job is done.

        Raises:
            MetaheedError: the job's folder holds something else, or the stage before had no effect.
            _Elsewhere: another process trains the run.
        """
        standing = self.job.look()
        if standing.held:
            raise _Elsewhere
        if standing.done:
            return False
        stage = self.job.next(standing, self.slot)
        if self.stage is not None and self.stage.what == stage.what:
            raise MetaheedError(f"{stage.what} ended, but it is still to be done")
        arguments = command(stage)
        self.log.begin(arguments)
        # In a session of its own, so that a Ctrl-C at the terminal reaches only this process, which passes it on once.
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=self.log.file, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.stage = stage
        board.begin(self.job.name, stage.what, standing.iteration, standing.iterations)
        return True

    def tell(self, board: Board) -> None:
        """Report how far the training is."""
        if self._follower is not None and self.stage is not None and self.stage.what == "training":
            self._follower.look()
            if self._follower.iteration is not None:
                board.step(self.job.name, self._follower.iteration, self._follower.validation)

    def is_elsewhere(self) -> bool:
        """Whether another process trains the run, because of which ours could not."""
        try:
            return self.job.look().held
        except MetaheedError:
            return False

    def close(self) -> None:
        """Close the log and release the job's lock."""
        self.log.file.close()
        self._lock.close()


class _Elsewhere(Exception):  # noqa: N818  # a state, not an error
    """Another process works on the job."""


def lock(out: Path, name: str) -> IO[bytes] | None:
    """Lock a name until the returned file is closed; None if another process has locked it.

    Raises:
        OSError: the lock file cannot be written.
    """
    path = out / "locks" / f"{name}.lock"
    make_folder(path.parent, out)
    file = open_in_place(path, "ab")
    if try_lock(file):
        return file
    file.close()
    return None


class Crew:
    """Does jobs in slots, as many at a time as there are slots.

    Args:
        jobs: in the order in which they are started.
        slots: the devices and threads on which they run.
        out: folder of logs and locks.
        board: receives the progress.
        finished: called with each job that is done.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: Sequence[Slot],
        out: Path,
        board: Board,
        finished: Callable[[Job], None],
    ) -> None:
        self._waiting, self._slots, self._out = list(jobs), slots, out
        self._board, self._finished = board, finished
        self._working: dict[int, _Work] = {}
        self._later: dict[str, float] = {}
        self._done = 0
        self.failures: list[Failure] = []

    def work(self, received: list[int]) -> list[Failure]:
        """Do all jobs, and return the failures.

        Args:
            received: the list to which signals are added; a signal ends the work.

        Raises:
            Interrupted: a signal came, and all processes have ended.
        """
        total = len(self._waiting)
        try:
            while self._waiting or self._working:
                if received:
                    self._board.message("stopping: each run writes a checkpoint")
                    raise Interrupted(
                        f"stopped with {self._done} of {total} done; the same command continues",
                        received[0],
                    )
                for k in range(len(self._slots)):
                    self._fill(k)
                time.sleep(_POLL)
                for k in list(self._working):
                    self._watch(k)
        finally:
            self._stop()
        return self.failures

    def _fill(self, k: int) -> None:
        """Give a job to the slot, if it is free and a job is waiting."""
        now = time.monotonic()
        for job in [job for job in self._waiting if self._later.get(job.name, 0.0) <= now]:
            if k in self._working:
                return
            self._waiting.remove(job)
            held = lock(self._out, job.name)
            if held is None:
                self._wait(job)
            else:
                self._working[k] = _Work(job, self._slots[k], held, self._out)
                self._go_on(k)

    def _go_on(self, k: int) -> None:
        try:
            if not self._working[k].go_on(self._board):
                self._settle(k, None)
        except _Elsewhere:
            self._put_off(k)
        except MetaheedError as error:
            self._settle(k, str(error))

    def _watch(self, k: int) -> None:
        mine = self._working[k]
        mine.tell(self._board)
        assert mine.process is not None  # it has been started
        status = mine.process.poll()
        if status == 0:
            self._go_on(k)
        elif status is not None and mine.is_elsewhere():
            self._put_off(k)  # another process began it first
        elif status is not None:
            self._settle(k, mine.log.reason(status))

    def _settle(self, k: int, reason: str | None) -> None:
        """Count the slot's job as done, or as failed if there is a reason."""
        mine = self._leave(k)
        self._done += 1
        if reason is None:
            self._finished(mine.job)
        else:
            self.failures.append(Failure(mine.job.name, reason, mine.log.path))
            self._board.message(f"{mine.job.name} failed: {reason}")
        self._board.count(self._done)

    def _put_off(self, k: int) -> None:
        self._wait(self._leave(k).job)

    def _leave(self, k: int) -> _Work:
        mine = self._working.pop(k)
        mine.close()
        self._board.end(mine.job.name)
        return mine

    def _wait(self, job: Job) -> None:
        if job.name not in self._later:
            self._board.message(f"{job.name} is being worked on by another process: waiting for it")
        self._later[job.name] = time.monotonic() + _ELSEWHERE
        self._waiting.append(job)

    def _stop(self) -> None:
        """Ask all processes to stop, and wait for them; kill them if this process is interrupted meanwhile."""
        processes = [mine.process for mine in self._working.values() if mine.process is not None]
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
        except KeyboardInterrupt:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
            raise
        finally:
            for k in list(self._working):
                self._leave(k)
