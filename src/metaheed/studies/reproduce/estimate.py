"""Estimating how long jobs will take on this machine, from times that runs here have logged or from a measurement.

The time of an outer step does not depend on the rates or the content of the images. So one measurement serves all runs
with the same learner, rule, task shape, image size and processor. Measurements are kept in OUT/times.json.
"""

import contextlib
import hashlib
import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metaheed.config import RunConfig, to_dict
from metaheed.data import find_shape
from metaheed.errors import DataError, MetaheedError, RunError
from metaheed.files.opening import JSON_BYTES, read_bounded
from metaheed.files.parsing import from_json
from metaheed.files.writing import write_whole
from metaheed.running.folder import RunFolder
from metaheed.running.log import stream_lines
from metaheed.running.process import describe_processor
from metaheed.running.speed import Speed, measure_speed
from metaheed.studies.paper import IMAGE_SHAPES
from metaheed.studies.recipes import PAPERS_SEARCH, without_run
from metaheed.studies.reproduce.plan import Job, RecipeRun, Slot, Standing

_RECENT = 10  # newest lines of timing.jsonl that are used
_TOY = 30.0  # seconds that the toy takes on any machine, roughly


class Estimate(NamedTuple):
    """The time that a job will take."""

    seconds: float | None
    """None if it cannot be estimated."""
    source: str
    """Its source: logged, kept (measured by an earlier call), measured or usual; or why it cannot be estimated."""


def estimate(
    jobs: Sequence[tuple[Job, Standing]], slot: Slot, out: Path, tell: Callable[[str], None]
) -> dict[str, Estimate]:
    """Name -> estimate, for every job that is not done.

    Args:
        jobs: jobs with their standings.
        slot: the device and threads on which each of them computes.
        out: the folder of the runs and of times.json.
        tell: called with a line before each measurement.
    """
    where = _where(slot)
    logged, kept = _read_logged(out, where), _read_kept(out)
    found: dict[str, Estimate] = {}
    unknown: dict[str, str] = {}  # key -> why
    sources = dict.fromkeys(kept, "kept")
    for job, standing in jobs:
        if standing.done:
            continue
        if not isinstance(job, RecipeRun):
            found[job.name] = Estimate(_TOY, "usual")
            continue
        shape = _shape(job)
        if shape is None:
            found[job.name] = Estimate(None, "the size of its images is unknown")
            continue
        config = job.recipe.config
        key = cost_key(config, shape, where)
        if key not in kept and key not in unknown:
            tell(f"measuring {config.algorithm}, {config.episodes.ways}-way {config.episodes.shots}-shot, {shape}")
            placed = replace(config.training, device=slot.device, threads=slot.threads)
            try:
                kept[key], sources[key] = measure_speed(replace(config, training=placed), shape), "measured"
                _write_kept(out, kept)
            except MetaheedError as error:
                unknown[key] = str(error)
        if key in unknown:
            found[job.name] = Estimate(None, unknown[key])
            continue
        speed, source = kept[key], sources[key]
        if key in logged:
            speed, source = speed._replace(iteration=logged[key]), "logged"
        found[job.name] = Estimate(_seconds(job, standing, speed), source)
    return found


def cost_key(config: RunConfig, shape: tuple[int, int, int], where: str) -> str:
    """A key that is the same for configs whose iterations take the same time on a processor."""
    values = to_dict(without_run(config))
    del values["training"], values["episodes"]["data"]
    for group, names in PAPERS_SEARCH.items():
        for name in names:
            values[group].pop(name, None)
    text = json.dumps([values, shape, where], sort_keys=True)
    return f"{config.algorithm} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def spread_over(seconds: Sequence[float], slots: int) -> float:
    """Seconds until the last of these jobs ends if they start in this order, `slots` at a time."""
    ends = [0.0] * slots
    for duration in seconds:
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)


def _seconds(job: RecipeRun, standing: Standing, speed: Speed) -> float:
    training = job.recipe.config.training
    left = standing.iterations - standing.iteration
    validations = -(-standing.iterations // training.val_every) - standing.iteration // training.val_every
    judged = job.tasks + (0 if standing.trained else max(validations, 1) * training.val_tasks)
    return left * speed.iteration + judged * speed.task


def _shape(job: RecipeRun) -> tuple[int, int, int] | None:
    e = job.recipe.config.episodes
    try:
        return find_shape(e.data, job.data_root, e.image_size, e.split_seed)
    except DataError:
        return IMAGE_SHAPES.get(e.data)


def _where(slot: Slot) -> str:
    processor = describe_processor(torch.device(slot.device))
    return processor if slot.device.startswith("cuda") else f"{processor}, {slot.threads} threads"


def _read_logged(out: Path, where: str) -> dict[str, float]:
    """Key -> seconds for an iteration, from the newest lines of runs that were trained on such a processor."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(out.glob("*/timing.jsonl")):
        try:
            folder = RunFolder(file.parent)
            config = folder.read_config()
            lines = [line for line in stream_lines(file) if _line_where(line) == where]
            taken = [(int(line["iterations"]), float(line["seconds"])) for line in lines[-_RECENT:]]
            shape = IMAGE_SHAPES.get(config.episodes.data) or _logged_shape(folder)
        except (RunError, KeyError, TypeError, ValueError):
            continue  # a damaged run gives no times; it is reported when its turn comes
        if taken and shape is not None:
            found.setdefault(cost_key(config, shape, where), []).extend(taken)
    return {key: sum(s for _, s in taken) / sum(n for n, _ in taken) for key, taken in found.items()}


def _logged_shape(folder: RunFolder) -> tuple[int, int, int] | None:
    checkpoint, _ = folder.read_checkpoint()
    return None if checkpoint is None else checkpoint.image_shape


def _line_where(line: Mapping[str, Any]) -> str:
    on_device = str(line["device"]).startswith("cuda")
    return str(line["processor"]) if on_device else f"{line['processor']}, {line['threads']} threads"


def _read_kept(out: Path) -> dict[str, Speed]:
    kept: dict[str, Speed] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        for key, values in from_json(read_bounded(out / "times.json", JSON_BYTES)).items():
            kept[key] = Speed(float(values["iteration"]), float(values["task"]))
    return kept


def _write_kept(out: Path, kept: Mapping[str, Speed]) -> None:
    values = {key: {name: float(f"{s:.4g}") for name, s in speed._asdict().items()} for key, speed in kept.items()}
    write_whole(out / "times.json", (json.dumps(values, indent=1) + "\n").encode())
