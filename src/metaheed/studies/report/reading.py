"""Find run folders and read what the tables need, which is neither checkpoints nor data.

This module reads config.yaml, metrics.jsonl, result.json and, if there is one, timing.jsonl. The large tasks.jsonl is
streamed by `measures`, for the runs that need it. The files may come from strangers, so every value is checked.
"""

import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from metaheed.config import RunConfig
from metaheed.errors import RunError, brief, shown
from metaheed.running.folder import STUDY_FILE, RunFolder
from metaheed.running.log import stream_lines
from metaheed.running.results import read_result
from metaheed.studies.paper import Setting

TOY_FILE = "toy.json"
_MOST = 10**9  # maximum number of iterations in a config


class Validation(NamedTuple):
    """One validation of a run."""

    iteration: int
    accuracy: float
    """Mean over the validation tasks, in [0, 1]."""


class Judged(NamedTuple):
    """The evaluation protocol of a run. Runs are compared only if it is the same."""

    episodes_sha256: str
    tasks: int
    checkpoint: str


class Result(NamedTuple):
    """A run's result.json."""

    setting: Setting
    """The setting of the evaluation, whose ways and shots may differ from those of training."""
    judged: Judged
    accuracy: float
    """Mean over test tasks, in [0, 1]."""
    half_width: float
    """Half-width of the 95% interval over test tasks."""


class Cost(NamedTuple):
    """The cost of a run, on the machine and execution where most of its iterations were computed."""

    seconds: float
    """Seconds per iteration: the median over the parts of the run between checkpoints."""
    peak_bytes: int | None
    """Peak memory in bytes; None if the system does not report it."""
    where: str
    """Device, processor, threads and execution."""


@dataclass(frozen=True)
class Run:
    """A run folder that could be read."""

    path: Path
    config: RunConfig
    iterations: int
    """Number of finished iterations, according to the log."""
    validations: tuple[Validation, ...]
    result: Result | None
    """None if the run is not evaluated, or has changed since its evaluation."""
    cost: Cost | None
    """None if it was not recorded."""
    problem: str | None
    """Why the run is left out of the accuracies; None if it is included."""

    @property
    def name(self) -> str:
        """The folder, as the page shows it."""
        return plain(str(self.path))

    @property
    def seed(self) -> int:
        """The training seed."""
        return self.config.training.seed

    @property
    def finished(self) -> bool:
        """Whether all iterations are done and the last one is followed by a validation."""
        total = self.config.training.iterations
        return self.iterations == total and bool(self.validations) and self.validations[-1].iteration >= total

    @property
    def setting(self) -> Setting:
        """The setting of its evaluation, or the one that its config gives if it is not evaluated."""
        if self.result is not None:
            return self.result.setting
        e = self.config.episodes
        return Setting(e.data, *e.test_shape[:2])


class Found(NamedTuple):
    """What was found in the given folders."""

    runs: tuple[Run, ...]
    unreadable: tuple[tuple[str, str], ...]
    """(run folder, why it cannot be read)."""
    toys: tuple[Path, ...]
    """Files that `metaheed toy` wrote."""
    studies: tuple[tuple[str, str], ...]
    """(folder of a search, remark): its trials were not read."""


def plain(text: str) -> str:
    """Untrusted text on one line, with control characters, such as those for terminals or text direction, replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def find(paths: Sequence[Path]) -> Found:
    """Read the run folders among these folders and, recursively, inside them. A folder named twice counts once.

    Links are followed. The trials of a search do not repeat each other, so they are read only if a trial's folder is
    given. A run that cannot be read for any reason is listed in `Found.unreadable`; the others are read all the same.

    Raises:
        RunError: no path is given, one is not a folder or cannot be opened, or no run is found.
    """
    if not paths:
        raise RunError("no run was named: name run folders, or folders that hold some")
    runs: list[Run] = []
    unreadable: list[tuple[str, str]] = []
    toys: list[Path] = []
    studies: list[tuple[str, str]] = []
    seen: set[Path] = set()
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path} is not a folder: name run folders, or folders that hold some")
        for folder, below, files in _walk(path, seen, unreadable):
            if TOY_FILE in files:
                toys.append(folder / TOY_FILE)
            if STUDY_FILE in files:
                below.clear()
                trials = len([*folder.glob("trials/*/config.yaml")])
                studies.append((plain(str(folder)), f"trials of a search ({trials}): name a trial's folder to see it"))
            if "config.yaml" in below:
                below.remove("config.yaml")
                unreadable.append((plain(str(folder)), "its config.yaml is a folder"))
            elif "config.yaml" in files:
                try:
                    runs.append(read_run(folder))
                    below.clear()  # folders inside a run belong to that run
                except RunError as error:
                    # The config.yaml may belong to another program, and runs may lie below it.
                    unreadable.append((plain(str(folder)), plain(brief(str(error), 500))))
                except Exception as error:  # an unforeseen error in one run must not stop the report
                    reason = brief(f"it cannot be read ({type(error).__name__}: {error})", 500)
                    unreadable.append((plain(str(folder)), plain(reason)))
    if not runs and not unreadable:
        passed = "".join(f"; {name} holds {what}" for name, what in studies)
        raise RunError(
            f"no run folder (one with a config.yaml) is in {', '.join(map(str, paths))}: train one first{passed}"
        )
    return Found(tuple(runs), tuple(unreadable), tuple(toys), tuple(studies))


def _walk(
    path: Path, seen: set[Path], unreadable: list[tuple[str, str]]
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`, but follow links and skip folders in `seen`. Folders that cannot be opened go to `unreadable`."""

    def refuse(error: OSError) -> None:
        if Path(error.filename) == path:
            raise RunError(f"{error.filename} cannot be looked into: {error.strerror}") from error
        unreadable.append((plain(str(error.filename)), f"it cannot be looked into: {error.strerror}"))

    for folder, below, files in os.walk(path, onerror=refuse, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:  # given twice, or reached again by a link
            below.clear()
            continue
        seen.add(real)
        below.sort()
        yield Path(folder), below, files


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        RunError: its config, log or result cannot be read. A run that is merely unfinished or not evaluated is returned
            with a `problem`.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    folder.check_logs()
    iterations, validations = _read_metrics(folder.metrics_file)
    run = Run(path, config, iterations, validations, None, _read_cost(folder.timing_file), None)
    total = config.training.iterations
    problem: str | None = None
    if iterations < total:
        problem = f"unfinished: {iterations:,} of {total:,} iterations"
    elif iterations > total:
        problem = f"its log has {iterations:,} iterations, its config {total:,}"
    elif not run.finished:
        problem = "unfinished: not validated after its last iteration"
    elif not folder.result_file.exists():
        problem = "not judged: run 'metaheed evaluate' on it"
    else:
        result, problem = _read_result(path, run)
        if problem is None:
            return Run(path, config, iterations, validations, result, run.cost, None)
    return Run(path, config, iterations, validations, None, run.cost, problem)


def _read_metrics(file: Path) -> tuple[int, tuple[Validation, ...]]:
    done, validations = 0, []
    for line in stream_lines(file):
        iteration, accuracy = line.get("iteration"), line.get("validation_accuracy")
        if not isinstance(iteration, int) or not 0 < iteration <= _MOST:
            raise RunError(f"{file} has a line whose iteration is {shown(iteration)}")
        if accuracy is None:
            done = max(done, iteration)
        elif isinstance(accuracy, float | int) and 0 <= accuracy <= 1:
            validations.append(Validation(iteration, float(accuracy)))
        else:
            raise RunError(f"{file}: the validation after iteration {iteration} has accuracy {shown(accuracy)}")
    return done, tuple(validations)


def _read_result(path: Path, run: Run) -> tuple[Result | None, str | None]:
    """A run's result and None; or None and the reason why the result is not of the run in its present state."""
    found = read_result(path)
    config = run.config
    if (found["seed"], found["algorithm"]) != (run.seed, config.algorithm):
        return None, f"its result.json is of {plain(found['algorithm'])} with seed {found['seed']}"
    if found["split"] != "test":
        return None, f"its result.json is of the split {plain(found['split'])}"
    if found["data"] != config.episodes.data:
        return None, f"its result.json is of the data set {plain(found['data'])}"
    now = run.iterations
    if found["checkpoint"] == "best":
        # Training keeps the first of several equally good checkpoints.
        now = max(run.validations, key=lambda v: v.accuracy).iteration
    if found["iteration"] != now:
        return None, (
            f"judged at iteration {found['iteration']:,}, but its {plain(found['checkpoint'])} checkpoint is now of "
            f"iteration {now:,}: judge it again"
        )
    setting = Setting(found["data"], found["ways"], found["shots"])
    judged = Judged(found["episodes_sha256"], found["tasks"], found["checkpoint"])
    return Result(setting, judged, found["accuracy"], found["half_width_95"]), None


def _word(value: Any) -> str:
    return brief(value) if isinstance(value, str) else shown(value)


def _read_cost(file: Path) -> Cost | None:
    """Read timing.jsonl; None if it is missing or has no usable line."""
    if not file.exists():
        return None
    lines: list[dict[str, Any]] = []
    try:
        for line in stream_lines(file):
            iterations, seconds = line.get("iterations"), line.get("seconds")
            timed = isinstance(seconds, float | int) and 0 < seconds < math.inf
            if timed and isinstance(iterations, int) and 0 < iterations <= _MOST:
                lines.append(line)
    except RunError as error:
        raise RunError(f"{error}. Delete that file: only the cost of the run is in it") from error
    if not lines:
        return None

    def where(line: dict[str, Any]) -> str:
        threads = _word(line.get("threads"))
        counted = f"{threads} thread{'s' * (threads != '1')}"
        return plain(
            ", ".join(_word(p) for p in (line.get("device"), line.get("processor"), counted, line.get("execution")))
        )

    count: Counter[str] = Counter()
    for line in lines:
        count[where(line)] += line["iterations"]
    most = max(sorted(count), key=count.__getitem__)
    there = [line for line in lines if where(line) == most]
    peaks = [peak for line in there if isinstance(peak := line.get("peak_bytes"), int) and 0 < peak < 2**60]
    return Cost(
        statistics.median(line["seconds"] / line["iterations"] for line in there), max(peaks, default=None), most
    )
