"""Reproducing the paper's tables and figures: missing runs are trained, interrupted ones resumed, and all reported on.

    plan       the runs of an experiment, how far each one is, and what it needs next
    crew       runs them, several at a time, each in a process of its own
    estimate   estimates how long they will take

All state is in the output folder, so the same command continues whatever ended the one before.
"""

import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from metaheed.config import ReportConfig, ReproduceConfig
from metaheed.data import find_shape
from metaheed.data.reading.download import BY_HAND, PUBLISHED
from metaheed.errors import DataError, MetaheedError, MissingDataError, RunError
from metaheed.running.process import pick_device, signals_received
from metaheed.running.progress import make_board
from metaheed.running.results import read_result
from metaheed.studies import recipes
from metaheed.studies.reproduce.crew import Crew, Failure, lock
from metaheed.studies.reproduce.estimate import Estimate, estimate, spread_over
from metaheed.studies.reproduce.plan import RECIPES, TOY, Job, RecipeRun, Slot, Standing, make_jobs


def reproduce(experiment: str, config: ReproduceConfig, say: Callable[[str], None] = print) -> Path:
    """Do the runs of an experiment, and report on all runs in the output folder.

    Args:
        experiment: table1, table2 or figures.
        config: which of its runs to do, and how.
        say: called with each line of output.

    Returns:
        The page of the report; the picture of the toy if only that was asked for.

    Raises:
        ConfigError: what is asked for is unknown or cannot be used; nothing was started.
        DataError: data sets that are needed are missing; nothing was started.
        RunError: a folder holds something else (nothing was started), or runs failed (the others were done).
        Interrupted: a signal came; every run that was being trained has written a checkpoint.
    """
    jobs = make_jobs(experiment, config)
    standings = [(job, job.look()) for job in jobs]
    waiting = [(job, standing) for job, standing in standings if not standing.done]
    absent = _absent_data(waiting)
    if absent:
        raise DataError(_explain(absent, experiment, config, "is needed and cannot be used; nothing was begun"))
    slots = make_slots(config, len(waiting))
    for job, _ in waiting:
        if isinstance(job, RecipeRun):
            recipes.write(job.recipe, job.file)
    say(f"{_count(standings)}; {_describe(slots)}")

    def finished(job: Job) -> None:
        board.message(f"{job.name}: {_outcome(job)}")

    failures: Sequence[Failure] = ()
    if waiting:
        board = make_board(len(waiting))
        try:
            with signals_received() as received:
                crew = Crew([job for job, _ in waiting], slots, config.out, board, finished)
                failures = crew.work(received)
        finally:
            board.stop()
    try:
        page = _report(experiment, config, say)
    except RunError as error:
        if not failures:
            raise
        page = None
        say(f"no report: {error}")
    if failures:
        lines = "".join(f"\n  {f.name}: {f.reason} (log: {f.log})" for f in failures)
        there = "" if page is None else f" The report on the others is {page}."
        raise RunError(f"{len(failures)} of {len(jobs)} failed; the same command tries them again.{there}{lines}")
    return page or config.out / TOY / "trajectories.png"  # the toy has no runs to report on


def dry_run(experiment: str, config: ReproduceConfig, say: Callable[[str], None], tell: Callable[[str], None]) -> None:
    """List the runs of an experiment, what each still needs, and how long that will take, without starting any.

    Args:
        experiment, config: as for `reproduce`.
        say: called with each line of the list.
        tell: called with a line before each measurement.

    Raises:
        ConfigError, RunError: as `reproduce`.
    """
    jobs = make_jobs(experiment, config)
    standings = [(job, job.look()) for job in jobs]
    waiting = [(job, standing) for job, standing in standings if not standing.done]
    slots = make_slots(config, len(waiting))
    began = time.monotonic()
    estimates = estimate(waiting, slots[0], config.out, tell)
    taken = time.monotonic() - began
    absent = _absent_data(waiting)
    width = max(len(job.name) for job in jobs)
    for job, standing in standings:
        line = f"{job.name:{width}}  {standing!s:32}"
        if job.name in estimates:
            line += f"  {_duration(estimates[job.name])}"
        if isinstance(job, RecipeRun) and not standing.done and job.recipe.config.episodes.data in absent:
            line += "  (its data set is not there)"
        say(line.rstrip())
    say(f"\n{_count(standings)}; {_describe(slots)}")
    for line in _summary(estimates, len(slots), taken):
        say(line)
    kinds = Counter(job.recipe.provenance["kind"] for job in jobs if isinstance(job, RecipeRun))
    if kinds:
        say("Recipes: " + ", ".join(f"{number} runs {kind}" for kind, number in sorted(kinds.items())) + ".")
    if absent:
        say(_explain(absent, experiment, config, "is needed and cannot be used as it is"))


def make_slots(config: ReproduceConfig, waiting: int) -> list[Slot]:
    """The slots for a number of waiting jobs: --jobs of them, or else one for each GPU or as many as the cores allow.

    Raises:
        ConfigError: this machine does not have the device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device in ("auto", "cuda") and gpus:
        devices = [f"cuda:{k}" for k in range(gpus)]
    else:
        devices = [str(pick_device(config.device))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = len(devices) if devices[0].startswith("cuda") else cores // (config.threads or 1)
    jobs = config.jobs or max(1, min(most, waiting))
    threads = config.threads or max(1, cores // jobs)
    return [Slot(devices[k % len(devices)], threads) for k in range(jobs)]


def _absent_data(waiting: Sequence[tuple[Job, Standing]]) -> dict[str, DataError]:
    """Data set -> its error, for those data sets that are needed and cannot be used."""
    needed = {}
    for job, _ in waiting:
        if isinstance(job, RecipeRun):
            e = job.recipe.config.episodes
            needed[e.data, e.image_size, e.split_seed] = job.data_root
    absent: dict[str, DataError] = {}
    for (data, *of_folder), root in needed.items():
        try:
            find_shape(data, root, *of_folder)
        except DataError as error:
            absent[data] = error
    return absent


def _explain(absent: dict[str, DataError], experiment: str, config: ReproduceConfig, what: str) -> str:
    lines = []
    for data, error in absent.items():
        remedy = ""
        if isinstance(error, MissingDataError) and data in {**PUBLISHED, **BY_HAND}:
            root = shlex.quote(str(config.data_root or "DATA"))
            does = "says how to get it" if data in BY_HAND else "fetches it"
            remedy = f"\n    'metaheed data download {data} --data-root {root}' {does}"
        lines.append(f"\n  {data}: {error}{remedy}")
    return (
        f"{experiment}: {', '.join(absent)} {what}:{''.join(lines)}\n"
        "Leave a data set out by naming the others: --only DATA..."
    )


def _report(experiment: str, config: ReproduceConfig, say: Callable[[str], None]) -> Path | None:
    """Write the report on all runs of the folder and return its page; None if no run has been evaluated."""
    from metaheed.studies.report import report

    runs = sorted(file.parent for file in config.out.glob("*/config.yaml") if file.parent.name != RECIPES)
    if not any((run / "result.json").exists() for run in runs):
        return None
    drawn = config.out / TOY
    toy = (drawn / "toy.json").exists()
    while (held := lock(config.out, "report")) is None:
        time.sleep(0.2)  # another process is writing the same report
    with held:
        shown = ReportConfig(toy=toy or experiment == "figures")
        return report([*runs, *([drawn] if toy else [])], config.out / "report", shown, say)


def _outcome(job: Job) -> str:
    if not isinstance(job, RecipeRun):
        return "done"
    try:
        result = read_result(job.folder.path)
    except MetaheedError as error:
        return str(error)
    return f"{result['accuracy']:.2%} ± {result['half_width_95']:.2%} over {result['tasks']} test tasks"


def _count(standings: Sequence[tuple[Job, Standing]]) -> str:
    kinds = Counter(
        "done"
        if standing.done
        else "to be evaluated"
        if standing.trained
        else "to be resumed"
        if standing.iteration
        else "missing"
        for _, standing in standings
    )
    return f"{len(standings)} runs: " + ", ".join(f"{number} {kind}" for kind, number in kinds.items())


def _describe(slots: Sequence[Slot]) -> str:
    where = sorted({slot.device for slot in slots})
    threads = f", {slots[0].threads} thread{'s' * (slots[0].threads > 1)} each" if where == ["cpu"] else ""
    return f"{len(slots)} at a time on {', '.join(where)}{threads}"


_SOURCES = {
    "logged": "as fast as the runs here have gone (timing.jsonl)",
    "measured": "measured now, one at a time, on images of noise",
    "kept": "measured before (times.json)",
    "usual": "as the toy usually takes",
}


def _summary(estimates: dict[str, Estimate], slots: int, taken: float) -> list[str]:
    seconds = [e.seconds for e in estimates.values() if e.seconds is not None]
    if not seconds:
        return []
    unknown = len(estimates) - len(seconds)
    without = f", without the {unknown} whose time is not known" if unknown else ""
    at_once = f"; {slots} at a time {_length(spread_over(seconds, slots))} at least" if slots > 1 else ""
    sources = Counter(e.source for e in estimates.values() if e.seconds is not None)
    parts = [f"{number} {_SOURCES[source]}" for source, number in sources.items()]
    measuring = f" Measuring took {taken:.0f} s." if sources["measured"] else ""
    lines = [f"Estimated time: {_length(sum(seconds))} one at a time{at_once}{without}."]
    lines.append(f"Of these estimates: {'; '.join(parts)}.{measuring} Validations and evaluations are included.")
    return lines


def _duration(found: Estimate) -> str:
    return f"({found.source})" if found.seconds is None else _length(found.seconds)


def _length(seconds: float) -> str:
    """A duration with about two digits."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 10:
        return f"{hours} h {rest:02d} min"
    return f"{round(seconds / 3600)} h" if hours < 72 else f"{seconds / 86400:.1f} days"
