"""A worker of a search, which trains trials one after another and gives signs of life meanwhile."""

import contextlib
import os
import platform
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from metaheed.errors import Interrupted, NonFiniteError, RunError
from metaheed.files.opening import cannot_write_message, make_folder, open_in_place, try_lock
from metaheed.running.checkpoint import RunProgress
from metaheed.running.folder import RunFolder
from metaheed.running.process import pick_device
from metaheed.running.reporter import Reporter
from metaheed.running.train import resume, train
from metaheed.studies.search.database import FAILURES, reason, shown_as
from metaheed.studies.search.draws import configured, used
from metaheed.studies.search.results import write_results
from metaheed.studies.search.study import SharedStudy, count_finished, refuse_difference, trial_record

_BEATS = 8  # number of signs of life within --lost-after
_POLL = 2.0  # seconds between two attempts to claim a trial


def how_to_go_on(out: Path, storage: str | None) -> str:
    """How to resume the study, for messages. A database that is not the folder's own must be named again."""
    named = "" if storage is None else f" --storage {shlex.quote(shown_as(storage, out))}"
    return f"resume with the same command, or with: metaheed search --resume {shlex.quote(str(out))}{named}"


class Presence:
    """This process's file in workers/. It is locked until the process ends, however it ends."""

    def __init__(self, out: Path) -> None:
        self._out, self._folder = out, out / "workers"
        # If the system has no network address, uuid makes one up, and no worker is known to be on this machine.
        self.machine = f"{platform.node()}/{uuid.getnode():x}"
        self.name = f"{self.machine}/{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> "Presence":
        path = self._path(self.name)
        while True:
            try:
                make_folder(self._folder, self._out)
                self._file = open_in_place(path, "a+")
            except OSError as error:
                raise RunError(cannot_write_message(error, path)) from error
            if try_lock(self._file) and path.exists():
                return self
            self._file.close()  # another process opened or deleted the file before it was locked

    def __exit__(self, failure: object, *_: object) -> None:
        if failure is None:  # after a failure the file stays, so that others see that the worker of its trial is dead
            self._path(self.name).unlink(missing_ok=True)
        self._file.close()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name.rpartition('/')[2]}.lock"

    def knows_dead(self, name: str) -> bool:
        """Whether a worker was on this machine and has ended; False also if that cannot be known."""
        path = self._path(name)
        if name.rpartition("/")[0] != self.machine or name == self.name:
            return False
        try:
            with open_in_place(path, "r+") as file:
                return try_lock(file)
        except OSError:
            return False  # no file: the worker uses another folder, or ended normally and gave its trial back

    def tidy(self) -> None:
        """Delete the files of dead workers."""
        for path in self._folder.glob("*.lock"):
            if self.knows_dead(f"{self.machine}/{path.stem}"):
                path.unlink(missing_ok=True)


class _TakenOver(Exception):  # noqa: N818  # a state, not an error
    """Another worker has claimed this worker's trial."""


class Worker:
    """Trains the trials that this process claims."""

    def __init__(
        self, shared: SharedStudy, presence: Presence, reporters: Callable[[], Reporter], tell: Callable[[str], None]
    ) -> None:
        self._shared, self._presence, self._reporters, self._tell = shared, presence, reporters, tell
        self._signs: dict[int, tuple[object, float]] = {}
        self._said: set[str] = set()
        self._began = time.monotonic()

    def work(self) -> None:
        """Train trials until all trials of the study are finished."""
        shared = self._shared
        self._announce()
        self._at_first = count_finished(shared.trials())
        waiting = False
        while True:
            trial = shared.claim(self._presence.name, self._gone)
            if trial is not None:
                waiting = False
                self._train(trial)
                continue
            trials = shared.trials()
            left = len(trials) - count_finished(trials)
            if not left:
                self._presence.tidy()
                return
            if not waiting:
                self._tell(f"waiting for {left} {'trial' if left == 1 else 'trials'} of other workers")
                waiting = True
            time.sleep(_POLL)

    def _announce(self) -> None:
        config, settings, shared = self._shared.config, self._shared.settings, self._shared
        ranges = {n: f"{n} {low:g} to {high:g}" for n, (low, high) in settings.ranges.items()}
        ours = used(config, settings)
        others = [name for name in ranges if name not in ours]
        self._tell(
            f"study {settings.study} in {shared.shown}: {count_finished(shared.trials())} of {settings.trials} trials "
            f"are done, each of {config.training.iterations} iterations with training seed {config.training.seed}"
        )
        unused = f"; drawn too, but not used by {config.algorithm}: {', '.join(others)}" if others else ""
        self._tell(f"searched: {', '.join(ranges[n] for n in ours)}{unused}")

    def _gone(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial is dead."""
        owner = trial.user_attrs.get("worker")
        if owner in ("", self._presence.name):  # the trial was given back, or this worker had it and has none now
            return True
        if owner is not None and self._presence.knows_dead(owner):
            return True
        sign = (owner, trial.user_attrs.get("beat"))
        seen, since = self._signs.get(trial.number, (None, 0.0))
        if seen != sign:
            self._signs[trial.number] = (sign, time.monotonic())
            return False
        return time.monotonic() - since > self._shared.settings.lost_after

    def _train(self, trial: Trial) -> None:
        shared, number = self._shared, trial.number
        folder = shared.folder(number)
        values = ", ".join(f"{name} {trial.params[name]:.4g}" for name in used(shared.config, shared.settings))
        self._tell(f"trial {number}: {values}")
        trial_id = shared.id_of(number)
        with _Heartbeat(shared, trial_id, self._presence.name, self._tell) as beat:
            report = _TrialReporter(self._reporters(), trial, beat, self._said, shared.config.training.iterations)
            try:
                outcome = self._outcome(trial, folder, report)
                beat.check()
            except (_TakenOver, optuna.exceptions.UpdateFinishedTrialError):
                self._tell(f"trial {number} was taken over by another worker: left to it")
                return
            except Interrupted as stop:
                self._give_back(trial_id)
                more = how_to_go_on(shared.out, shared.settings.storage)
                raise Interrupted(
                    f"stopped in trial {number} after iteration {report.iteration}; {more}",
                    stop.signal_number,
                ) from None
            except BaseException:
                self._give_back(trial_id)
                raise
            state, value, facts, said = outcome
            for name, fact in facts.items():
                trial.set_user_attr(name, fact)
            shared.study.tell(trial, value, state)
        summary = write_results(shared)
        best = "none yet" if summary.accuracy is None else f"{summary.accuracy:.2%} (trial {summary.best})"
        self._tell(
            f"trial {number}: {said}; best so far {best}; {summary.trials} of {shared.settings.trials} done"
            f"{self._time_left(summary.trials)}"
        )

    def _outcome(
        self, trial: Trial, folder: RunFolder, report: "_TrialReporter"
    ) -> tuple[TrialState, float | None, dict[str, Any], str]:
        """Train a trial; returns its state, value and further attributes, and a line that describes the outcome."""
        about = {"host": platform.node()}
        try:
            progress = self._trained(trial, folder, report)
        except NonFiniteError as error:
            facts = {**about, "iterations": report.iteration, "reason": str(error).partition(". ")[0]}
            return TrialState.FAIL, None, facts, f"failed: {facts['reason']}"
        except optuna.TrialPruned:
            facts = {**about, "iterations": report.iteration}
            return TrialState.PRUNED, None, facts, f"stopped after iteration {report.iteration}"
        facts = {**about, "iterations": progress.iteration, "best_iteration": progress.best_iteration}
        said = f"validation accuracy {progress.best_accuracy:.2%} at iteration {progress.best_iteration}"
        return TrialState.COMPLETE, progress.best_accuracy, facts, said

    def _trained(self, trial: Trial, folder: RunFolder, report: "_TrialReporter") -> RunProgress:
        base = self._shared.config
        config = configured(base, trial.params)
        config = replace(config, training=replace(config.training, out=folder.path))
        self._await_lock(folder)
        if folder.config_file.exists():
            found = folder.read_config()
            refuse_difference(str(folder.path), trial_record(found), trial_record(config))
            recorded = found.training.device
            here = str(pick_device(recorded, fall_back=True)) == recorded
            device = None if here else base.training.device
            chunk = base.training.chunk_size  # the user may have changed it because memory ran out
            changed = chunk if chunk != found.training.chunk_size else None
            resume(folder.path, None, base.episodes.data_root, device, report, chunk_size=changed)
        else:
            train(config, report)
        checkpoint, _ = folder.read_checkpoint()
        if checkpoint is None:
            raise RunError(f"{folder.path} has lost its checkpoints: delete it, and the trial is trained anew")
        return checkpoint.progress

    def _await_lock(self, folder: RunFolder) -> None:
        """Wait until no other process holds the run folder: a worker that was taken for dead may still be writing."""
        said = False
        while folder.lock_file.exists():
            if not folder.is_held():
                return
            if not said:
                self._tell(f"{folder.path} is still held by another process: waiting for its end")
                said = True
            time.sleep(_POLL / 4)

    def _give_back(self, trial_id: int) -> None:
        """Give a trial back, so that another worker or the next call can resume it at once."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            if self._shared.is_worked_on_by(trial_id, self._presence.name):
                self._shared.storage.set_trial_user_attr(trial_id, "worker", "")

    def _time_left(self, done: int) -> str:
        since, left = done - self._at_first, self._shared.settings.trials - done
        if since < 1 or not left:
            return ""
        seconds = int(left * (time.monotonic() - self._began) / since)
        return f", about {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"


class _TrialReporter(Reporter):
    """A reporter of a trial, which also records its validations and stops it if it is taken over or pruned."""

    def __init__(self, inner: Reporter, trial: Trial, beat: "_Heartbeat", said: set[str], iterations: int) -> None:
        self._inner, self._trial, self._beat, self._said, self._last = inner, trial, beat, said, iterations
        self._reported = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        self.iteration = 0

    def start(self, iteration: int, iterations: int) -> None:
        self.iteration = iteration
        self._inner.start(iteration, iterations)

    def step(self, iteration: int, loss: float, accuracy: float) -> None:
        self.iteration = iteration
        self._beat.check()
        self._inner.step(iteration, loss, accuracy)

    def validation(self, iteration: int, accuracy: float, half_width: float, best: bool) -> None:
        self._beat.check()
        if iteration not in self._reported:  # a worker that died before it wrote its checkpoint may have reported it
            self._trial.report(accuracy, iteration)
        # A trial that has reached its end is not pruned, because stopping it would save nothing.
        if iteration < self._last and self._trial.should_prune():
            raise optuna.TrialPruned

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        self._inner.log(iteration, values)

    def message(self, text: str) -> None:
        if text not in self._said:  # messages that are the same for all trials are shown once
            self._said.add(text)
            self._inner.message(text)

    def stop(self) -> None:
        self._inner.stop()


class _Heartbeat:
    """A thread that writes signs of life for a running trial into the database."""

    def __init__(self, shared: SharedStudy, trial_id: int, worker: str, tell: Callable[[str], None]) -> None:
        self._shared, self._trial_id, self._worker, self._tell = shared, trial_id, worker, tell
        self._end, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def check(self) -> None:
        """Raise _TakenOver if the trial no longer belongs to this worker."""
        if self._lost.is_set():
            raise _TakenOver

    def _run(self) -> None:
        storage, first = self._shared.storage, time.monotonic()
        try:
            while not self._end.is_set():
                try:
                    if not self._shared.is_worked_on_by(self._trial_id, self._worker):
                        self._lost.set()
                        return
                    storage.set_trial_user_attr(self._trial_id, "beat", round(time.monotonic() - first, 3))
                except optuna.exceptions.UpdateFinishedTrialError:
                    return  # the trial has just been finished
                except FAILURES as error:
                    self._tell(f"the database took no sign of life ({reason(error)}); trying again")
                self._end.wait(self._shared.settings.lost_after / _BEATS)
        finally:
            storage.remove_session()
