"""Telling a person how training goes: a live bar on a terminal, plain lines elsewhere. Both on standard error."""

import contextlib
import math
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from metaheed.running.reporter import Reporter


def make_reporter(brief: bool = False) -> "Bar | Lines":
    """A bar if standard error is a terminal, else lines; brief: a bar that vanishes at its end, or a line a minute."""
    console = Console(stderr=True)
    return Bar(console, brief) if console.is_terminal else Lines(60.0 if brief else 10.0)


class Bar(Reporter):
    """A live progress bar with loss, accuracy, iterations a second and time left."""

    def __init__(self, console: Console, transient: bool = False) -> None:
        self._console, self._transient = console, transient
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._pace = _TrainingPace()
        self._note = ""

    def watcher(self) -> "Work":
        """A bar that vanishes once the data set is read."""
        return Work(self._console, transient=True)

    def start(self, iteration: int, iterations: int) -> None:
        """Show the bar."""
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=self._transient,
        )
        self._task = self._progress.add_task("train", total=iterations, completed=iteration, note="")
        self._progress.start()
        self._pace.start(iteration, iterations)

    def step(self, iteration: int, loss: float, accuracy: float) -> None:
        """Advance."""
        assert self._progress is not None
        self._note = self._pace.step(iteration, loss, accuracy)
        self._progress.update(self._task, completed=iteration, note=self._note)

    def validating(self, done: int, tasks: int) -> None:
        """Say beside the bar how far the validation is."""
        assert self._progress is not None
        self._pace.pause()
        self._progress.update(self._task, note=f"validating {done}/{tasks}")

    def validation(self, iteration: int, accuracy: float, half_width: float, best: bool) -> None:
        """A line above the bar."""
        self._pace.go_on()
        if self._progress is not None:
            self._progress.update(self._task, note=self._note)
        self._console.print(_validation(iteration, accuracy, half_width, best), highlight=False)

    def message(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Lines(Reporter):
    """A line every so many seconds at most, and one for each validation."""

    def __init__(self, every: float = 10.0) -> None:
        self._every = every
        self._iterations = 0
        self._pace = _TrainingPace()
        self._said = 0.0

    def watcher(self) -> "WorkLines":
        """Lines on how reading the data set goes."""
        return WorkLines(brief=True)

    def start(self, iteration: int, iterations: int) -> None:
        """Begin the clock."""
        self._iterations = iterations
        self._pace.start(iteration, iterations)
        self._said = time.monotonic()

    def step(self, iteration: int, loss: float, accuracy: float) -> None:
        """Say how it stands, now and then."""
        note = self._pace.step(iteration, loss, accuracy)
        if time.monotonic() - self._said >= self._every or iteration == self._iterations:
            self._said = time.monotonic()
            self.message(f"iteration {iteration}/{self._iterations}  {note}")

    def validating(self, done: int, tasks: int) -> None:
        """Say how far the validation is, now and then."""
        self._pace.pause()
        if time.monotonic() - self._said >= self._every:
            self._said = time.monotonic()
            self.message(f"validating {done}/{tasks}")

    def validation(self, iteration: int, accuracy: float, half_width: float, best: bool) -> None:
        """Say it."""
        self._pace.go_on()
        self.message(_validation(iteration, accuracy, half_width, best))

    def message(self, text: str) -> None:
        """Say it, if anybody is left to hear it: a lost listener must not end a training."""
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Nothing to put away."""


def make_watcher(brief: bool = False) -> "Work | WorkLines":
    """Who tells of work on images or tasks: a bar if standard error is a terminal, else lines.

    Args:
        brief: whether the bar vanishes at its end, and no line is said of work that takes less than a second.
    """
    console = Console(stderr=True)
    return Work(console, brief) if console.is_terminal else WorkLines(brief)


class Work:
    """A live progress bar with the items done and the time left.

    Args:
        console: where to draw it.
        transient: whether it vanishes at its end.
    """

    def __init__(self, console: Console, transient: bool = False) -> None:
        self._console, self._transient = console, transient
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def start(self, what: str, items: int, done: int, unit: str = "images") -> None:
        """Show the bar."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}  left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=self._transient,
        )
        self._task = self._progress.add_task(what, total=items, completed=done)
        self._progress.start()

    def advance(self, items: int) -> None:
        """Advance."""
        if self._progress is not None:
            self._progress.advance(self._task, items)

    def message(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def stop(self) -> None:
        """Leave the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class WorkLines:
    """A line after the first second and then every ten seconds at most.

    Args:
        brief: whether nothing is said of work that takes less than a second.
    """

    def __init__(self, brief: bool = False) -> None:
        self._brief = brief
        self._what, self._unit, self._items, self._done, self._first = "", "", 0, 0, 0
        self._since = self._due = 0.0

    def start(self, what: str, items: int, done: int, unit: str = "images") -> None:
        """Begin the clock."""
        self._what, self._unit, self._items, self._done, self._first = what, unit, items, done, done
        self._since = time.monotonic()
        self._due = self._since + 1
        if done:
            self.message(f"{what}: going on after {done} of {items} {unit}")

    def advance(self, items: int) -> None:
        """Say how it stands, now and then."""
        self._done += items
        now = time.monotonic()
        short = self._brief and now - self._since < 1
        if now >= self._due or (self._done == self._items and not short):
            self._due = now + 10
            rate = (self._done - self._first) / max(now - self._since, 1e-9)
            left = _clock((self._items - self._done) / rate if rate else 0)
            self.message(f"{self._what}: {self._done}/{self._items} {self._unit}  left {left}")

    def message(self, text: str) -> None:
        """Say it, if anybody is left to hear it."""
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Nothing to put away."""


def make_board(jobs: int) -> "Board | BoardLines":
    """Who tells of so many jobs, several at a time: live bars if standard error is a terminal, else lines."""
    console = Console(stderr=True)
    return Board(console, jobs) if console.is_terminal else BoardLines(jobs)


class Board:
    """A live bar for every job that is being worked on, and one that counts those that are done."""

    def __init__(self, console: Console, jobs: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._all = self._progress.add_task("runs done", total=jobs, note="")
        self._tasks: dict[str, TaskID] = {}
        self._paces: dict[str, _Pace] = {}
        self._progress.start()

    def begin(self, name: str, what: str, iteration: int, iterations: int) -> None:
        """Show the job's bar, or let it begin anew."""
        self.end(name)
        self._tasks[name] = self._progress.add_task(name, total=iterations, completed=iteration, note=what)
        self._paces[name] = _Pace(what, iteration, iterations)

    def step(self, name: str, iteration: int, validation: float | None) -> None:
        """Advance it."""
        note = self._paces[name](iteration, validation)
        self._progress.update(self._tasks[name], completed=iteration, note=note)

    def end(self, name: str) -> None:
        """Take its bar away."""
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))

    def count(self, done: int) -> None:
        """Advance the bar of all."""
        self._progress.update(self._all, completed=done)

    def message(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the bars as they stand."""
        self._progress.stop()


class BoardLines:
    """A line when a job begins a stage, and once a minute one for each."""

    def __init__(self, jobs: int) -> None:
        self._jobs, self._done = jobs, 0
        self._paces: dict[str, _Pace] = {}
        self._said: dict[str, float] = {}

    def begin(self, name: str, what: str, iteration: int, iterations: int) -> None:
        """Say it."""
        self._paces[name], self._said[name] = _Pace(what, iteration, iterations), time.monotonic()
        after = f" after iteration {iteration}" if what == "training" and iteration else ""
        self.message(f"{name}: {what}{after}")

    def step(self, name: str, iteration: int, validation: float | None) -> None:
        """Say how it stands, now and then."""
        note = self._paces[name](iteration, validation)
        if time.monotonic() - self._said[name] >= 60:
            self._said[name] = time.monotonic()
            self.message(f"{name}: iteration {iteration}/{self._paces[name].iterations}  {note}")

    def end(self, name: str) -> None:
        """Nothing to put away."""

    def count(self, done: int) -> None:
        """Say how many are done."""
        self.message(f"{done} of {self._jobs} done")

    def message(self, text: str) -> None:
        """Say it, if anybody is left to hear it."""
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Nothing to put away."""


class _Pace:
    """How fast a job in another process goes, from when it is first seen to go on."""

    def __init__(self, what: str, iteration: int, iterations: int) -> None:
        self.iterations, self._what, self._latest = iterations, what, iteration
        self._rate: _Rate | None = None

    def __call__(self, iteration: int, validation: float | None) -> str:
        # A log that is cut back to its checkpoint goes backwards.
        if iteration < self._latest or (self._rate is None and iteration > self._latest):
            self._rate = _Rate()
            self._rate.start(iteration)
        self._latest = iteration
        rate = 0.0 if self._rate is None else self._rate(iteration)
        parts = [self._what]
        if rate:
            parts.append(f"{rate:.2f} it/s  left {_clock((self.iterations - iteration) / rate)}")
        if validation is not None:
            parts.append(f"validation {validation:.2%}")
        return "  ".join(parts)


class Transfers:
    """How downloads go: a live bar on a terminal; elsewhere a line when one begins, and every ten seconds."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._name, self._total, self._said = "", "", 0.0

    def begin(self, name: str, done: int, total: int | None) -> None:
        """Show the bar, or say a line."""
        self.end()
        self._name, self._total = name, "" if total is None else f" of {total / 1e6:,.1f}"
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn(name),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task(name, total=total, completed=done)
            self._progress.start()
        self._say(done)

    def reached(self, done: int) -> None:
        """So many bytes are there."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done)
        elif time.monotonic() - self._said >= 10:
            self._say(done)

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def message(self, text: str) -> None:
        """A line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _say(self, done: int) -> None:
        self._said = time.monotonic()
        if self._progress is None:
            self.message(f"{self._name}: {done / 1e6:,.1f}{self._total} MB")


def _validation(iteration: int, accuracy: float, half_width: float, best: bool) -> str:
    spread = f" ± {half_width:.2%}" if math.isfinite(half_width) else " on one task, which has no interval"
    return f"validation after {iteration}: {accuracy:.2%}{spread}{' (best so far)' if best else ''}"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class _Smooth:
    """Running means of loss and accuracy: single batches of few tasks say little."""

    def __init__(self) -> None:
        self._means: tuple[float, float] | None = None

    def __call__(self, loss: float, accuracy: float) -> tuple[float, float]:
        before = self._means or (loss, accuracy)
        self._means = (0.95 * before[0] + 0.05 * loss, 0.95 * before[1] + 0.05 * accuracy)
        return self._means


class _Rate:
    """Iterations a second since the start of this process's work, without the time between `pause` and `go_on`."""

    def start(self, iteration: int) -> None:
        self._first, self._since = iteration, time.monotonic()
        self._paused: float | None = None

    def pause(self) -> None:
        if self._paused is None:
            self._paused = time.monotonic()

    def go_on(self) -> None:
        if self._paused is not None:
            self._since += time.monotonic() - self._paused
            self._paused = None

    def __call__(self, iteration: int) -> float:
        return (iteration - self._first) / max(time.monotonic() - self._since, 1e-9)


class _TrainingPace:
    """What is said of an iteration: smoothed loss and accuracy, iterations a second without validations, time left."""

    def __init__(self) -> None:
        self._smooth, self._rate, self._iterations = _Smooth(), _Rate(), 0

    def start(self, iteration: int, iterations: int) -> None:
        self._iterations = iterations
        self._rate.start(iteration)

    def step(self, iteration: int, loss: float, accuracy: float) -> str:
        loss, accuracy = self._smooth(loss, accuracy)
        rate = self._rate(iteration)
        left = _clock((self._iterations - iteration) / rate if rate else 0)
        return f"loss {loss:.3f}  accuracy {accuracy:.2%}  {rate:.2f} it/s  left {left}"

    def pause(self) -> None:
        self._rate.pause()

    def go_on(self) -> None:
        self._rate.go_on()
