"""Judging a trained run on frozen tasks, and comparing runs on the same ones."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaheed.config import CHUNKED, EvaluationConfig, ExecutionName, FreezeConfig, RunConfig, TrainingConfig
from metaheed.data import Episodes, load_dataset
from metaheed.data.convert import convert
from metaheed.data.frozen import Frozen, FrozenEpisodes, freeze, read_episodes
from metaheed.errors import ConfigError, DataError, NonFiniteError, RunError, brief, shown
from metaheed.files import JSON_BYTES, read_bounded
from metaheed.learners import find_backbone, place_constants
from metaheed.outer import (
    Execution,
    adapted_outcome,
    build_execution,
    initial_outcome,
    pick_for_run,
    workers_ended,
)
from metaheed.parsing import from_json
from metaheed.process import (
    cpu_threads,
    failures_explained,
    float32_products,
    memory_explained,
    pick_device,
    starts_explained,
)
from metaheed.runs import Pixels, RunFolder, check_writable, is_writable, load_weights, recorded_pixels, write_whole
from metaheed.seals import seal_values, unseal_values
from metaheed.types import Params

_AT_ONCE = 10  # tasks a batch in evaluation: bounds memory, and how long an interruption waits


class Outcomes(NamedTuple):
    """(n,) float64 each, one entry a task."""

    losses: np.ndarray
    accuracies: np.ndarray


def evaluate(
    execution: Execution[tuple[Tensor, Tensor]],
    meta: Params,
    episodes: Episodes,
    tasks: int,
    on_tasks: Callable[[int], None] | None = None,
) -> Outcomes:
    """Query loss and accuracy of the first `tasks` tasks; no graph is kept, so memory does not grow with their number.

    Args:
        execution: of `adapted_outcome` or `initial_outcome`.
        meta: θ.
        episodes: the frozen tasks.
        tasks: how many.
        on_tasks: called with the number done after each few; may raise to stop.

    Raises:
        NonFiniteError: a loss is not finite, so that its accuracy would mean nothing.
    """
    losses, accuracies = np.zeros(tasks), np.zeros(tasks)
    for first in range(0, tasks, _AT_ONCE):
        count = min(_AT_ONCE, tasks - first)
        loss, accuracy = execution(meta, episodes.batch(first, count))
        losses[first : first + count] = loss.double().cpu().numpy()
        accuracies[first : first + count] = accuracy.double().cpu().numpy()
        if on_tasks is not None:
            on_tasks(first + count)
    if not np.isfinite(losses).all():
        task = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise NonFiniteError(f"the loss of task {task + 1} of the {episodes.split.name} tasks is not finite")
    return Outcomes(losses, accuracies)


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and the half-width 1.96·s/√n of its 95% interval, s the sample standard deviation; infinite for n = 1."""
    array = np.asarray(values, dtype=np.float64)
    half_width = 1.96 * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.inf
    return float(array.mean()), float(half_width)


@starts_explained()
def evaluate_run(
    path: str | Path,
    config: EvaluationConfig,
    data_root: str | Path | None = None,
    device: str | None = None,
    on_tasks: Callable[[int], None] | None = None,
    execution: ExecutionName | None = None,
    chunk_size: int | None = None,
    threads: int | None = None,
    trust: bool = False,
    out: str | Path | None = None,
    notice: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Judge a run and write its result.json; or, so that this one stays that of the run's own test setting,
    result-on-DATA.json, result-5way5shot15query.json, result-val.json.

    Where the folder cannot be written, as on a read-only disk or another user's, the result is not kept.

    Args:
        path: the run folder.
        config: which tasks, which checkpoint.
        data_root: where the data lies now; none: where it lay in training.
        device: none: the run's own, if it is here.
        on_tasks: see `evaluate`.
        execution: how the tasks are run; none: as in training, on a device of another kind as that suits it.
        chunk_size: this many at once, under the executions vectorized (taken where only this is given) and im2col.
        threads: of the CPU; none: as in training.
        trust: let the code of a network run that the run folder names, is not one of ours, and was not allowed before.
        out: the file to write instead of one in the run folder.
        notice: told where the result is not kept.

    Returns:
        What the result file holds: accuracy and its half-width, per-task accuracies, the tasks' hash, what was judged
        and, on another data set than the training's, how its images were made to fit.

    Raises:
        RunError, DataError, ConfigError: the run, its data or the setting cannot be used.
        OutOfMemoryError: the tasks computed at once do not fit.
        StartError, WorkerError: a thread or worker process cannot be started, or a worker died.
    """
    folder = RunFolder(path)
    path, data_root = folder.path, None if data_root is None else Path(data_root)
    run = folder.read_config(trust)
    find_backbone(run.learner.backbone, run.learner.backbone_path)  # refused before anything is made or read
    frozen = None if config.episodes is None else read_episodes(config.episodes)
    setting = _setting(config, run, frozen)
    trained_on = run.episodes.data
    shape = setting.ways, setting.shots, setting.queries
    file = Path(out) if out is not None else _result_file(folder, run, setting.data, shape, setting.split)
    if out is not None and folder.needs(file):
        raise ConfigError(f"--out is {out}, which is a file of the run itself: name another")
    kept = True
    if out is None and not is_writable(file):
        kept = False
        if notice is not None:
            notice(f"{path} cannot be written: the result is not kept there (--out FILE keeps it elsewhere)")
    else:
        check_writable(file)
    run.check_ways(setting.ways)
    learner, meta, about = load_weights(folder, run, config.checkpoint, setting.ways)
    where = pick_device(device or run.training.device, fall_back=device is None)
    meta = {name: p.to(where) for name, p in meta.items()}
    place_constants(learner, where)
    run = replace(run, training=_judging(run, execution, chunk_size, threads, where))
    episodes, conversion = _episodes(path, setting, frozen, run, about, data_root, where)
    folder.check_classes(episodes.dataset, setting.split)
    with (
        workers_ended(),
        cpu_threads(run.training),
        float32_products(run.training.tf32),
        memory_explained(run, where, min(_AT_ONCE, setting.tasks), learner),
        failures_explained(run, where, learner, meta, lambda: episodes.batch(0, 1), judging=True),
    ):
        adapted, initial = (
            evaluate(build_execution(run.training, where, learner, outcome), meta, episodes, setting.tasks, told)
            for outcome, told in ((adapted_outcome, on_tasks), (initial_outcome, None))
        )
    accuracy, half_width = interval(adapted.accuracies)
    initial_accuracy, initial_half_width = interval(initial.accuracies)
    result = {
        "algorithm": run.algorithm,
        **setting._asdict(),
        "trained_on": trained_on,
        "conversion": conversion,
        "caution": _caution(trained_on, setting.data),
        "episodes_sha256": episodes.fingerprint(setting.tasks),
        "seed": run.training.seed,
        "checkpoint": config.checkpoint,
        "iteration": about["iteration"],
        "accuracy": accuracy,
        "half_width_95": half_width,
        "loss": float(adapted.losses.mean()),
        "initial_accuracy": initial_accuracy,
        "initial_half_width_95": initial_half_width,
        "initial_loss": float(initial.losses.mean()),
        "accuracies": [round(a, 6) for a in adapted.accuracies.tolist()],
    }
    result = seal_values(result)
    if kept:
        write_whole(file, (json.dumps(result, indent=1) + "\n").encode())
    return result


def _judging(
    run: RunConfig, execution: ExecutionName | None, chunk_size: int | None, threads: int | None, where: torch.device
) -> TrainingConfig:
    """How the run's own settings run tasks there."""
    training = run.training
    if chunk_size is not None:
        return replace(
            training, execution=execution or "vectorized", chunk_size=chunk_size, threads=threads or training.threads
        )
    if execution is None:
        elsewhere = where.type != torch.device(training.device).type
        execution = "auto" if elsewhere else training.execution
    picked = pick_for_run(run, execution, where, _AT_ONCE)
    chunk_size = training.chunk_size if picked in CHUNKED else None
    return replace(training, execution=picked, chunk_size=chunk_size, threads=threads or training.threads)


class _Setting(NamedTuple):
    """What is judged on."""

    data: str
    split: str
    ways: int
    shots: int
    queries: int
    tasks: int
    episode_seed: int


def _setting(config: EvaluationConfig, run: RunConfig, frozen: Frozen | None) -> _Setting:
    if frozen is not None:
        shape = frozen.ways, frozen.shots, frozen.queries
        return _Setting(frozen.data, frozen.split, *shape, len(frozen.tasks), frozen.episode_seed)
    ways, shots, queries = (
        asked if asked is not None else own
        for asked, own in zip((config.ways, config.shots, config.queries), run.episodes.test_shape, strict=True)
    )
    return _Setting(
        config.data or run.episodes.data,
        config.split or FreezeConfig.split,
        *(ways, shots, queries),
        config.tasks or FreezeConfig.tasks,
        FreezeConfig.episode_seed if config.episode_seed is None else config.episode_seed,
    )


def _episodes(
    path: Path,
    setting: _Setting,
    frozen: Frozen | None,
    run: RunConfig,
    about: dict[str, Any],
    data_root: Path | None,
    where: torch.device,
) -> tuple[Episodes, str | None]:
    """The tasks, with images that the run's network takes, and how they were made such; none: they are."""
    elsewhere = setting.data != run.episodes.data
    channels, height, width = about["image_shape"]
    shape = channels, height, width
    if frozen is None or frozen.images is None:
        own = run.episodes
        of_folder = (None, None) if elsewhere else (own.image_size, own.split_seed)
        dataset = load_dataset(setting.data, data_root or own.data_root, *of_folder)
        if frozen is not None:
            frozen = frozen.filled(dataset)
        elif elsewhere:
            drawn = Episodes(dataset, *setting[1:5], seed=setting.episode_seed)
            frozen = freeze(drawn, setting.tasks)
        elif dataset.image_shape == shape:
            return Episodes(dataset.to(where), *setting[1:5], seed=setting.episode_seed), None
        else:
            raise DataError(f"{path} was trained on images {list(shape)}, but these are {dataset.image_shape}")
    assert frozen.images is not None  # read, filled or drawn
    images, conversion = convert(frozen.images, shape)
    if conversion is not None and not elsewhere:
        raise DataError(f"{path} was trained on images {list(shape)}, but these are {frozen.image_shape}")
    return FrozenEpisodes(frozen, images.to(where), *_pixels(path, frozen, run, about, data_root)), conversion


def _pixels(path: Path, frozen: Frozen, run: RunConfig, about: dict[str, Any], data_root: Path | None) -> Pixels:
    """How the run's network is used to see pixels scaled, whatever data they are of."""
    recorded = recorded_pixels(about)
    if recorded is not None:
        return recorded
    if frozen.data == run.episodes.data:
        return Pixels(frozen.mean, frozen.std)
    try:
        data = run.episodes
        own = load_dataset(data.data, data.data_root or data_root, data.image_size, data.split_seed)
    except DataError as error:
        raise DataError(
            f"{path} was trained by a version that did not record how pixels were scaled, so {run.episodes.data} is "
            f"needed as well: {error}"
        ) from error
    return Pixels(own.mean, own.std)


_MADE_OF = {
    **dict.fromkeys(("cifar-fs", "fc100"), "CIFAR-100"),
    **dict.fromkeys(("miniimagenet", "tieredimagenet"), "ImageNet"),
    **dict.fromkeys(("omniglot", "omniglot-vinyals"), "Omniglot"),
}


def _caution(trained_on: str, data: str) -> str | None:
    origin = _MADE_OF.get(data)
    if trained_on == data or origin is None or origin != _MADE_OF.get(trained_on):
        return None
    return f"{trained_on} and {data} are both made of {origin}: classes judged on may have been trained on"


class Difference(NamedTuple):
    """A paired difference of accuracies: runs minus the runs they are set against."""

    mean: float
    half_width: float
    covers: str
    """What the interval speaks of."""
    per_seed: dict[int, float]
    """Seed -> mean difference over the tasks."""
    accuracy: float
    """Mean over seeds and tasks of the runs."""
    accuracy_against: float
    """The same of the runs they are set against."""
    tasks_half_width: float
    """Half-width of the 95% interval over test tasks, these training runs taken as given: 1.96·s/√n over the per-task
    differences, averaged over seeds. It says nothing about other training runs."""
    p_value: float | None
    """Two-sided, of the paired t-test with the seed as the unit; none: one seed, which cannot tell."""


ONE_SEED = "covers test tasks only, one training seed"


Asked = tuple[int | None, int | None, int | None]
"""(ways, shots, queries) of a result; none: the run's own test setting."""
_OWN: Asked = (None, None, None)


def compare(
    runs: Sequence[str | Path], against: Sequence[str | Path], data: str | None = None, shape: Asked = _OWN
) -> Difference:
    """Paired differences on the same frozen tasks.

    With one seed a side: 1.96·s/√n over the per-task differences, which says nothing about another training run. With
    several: the seed is the unit, a t-interval over the per-seed mean differences.

    Args:
        runs: one algorithm's, one a seed.
        against: another's, of the same seeds.
        data: compare on this data set, on which all were evaluated; none: on the one they were trained on.
        shape: compare on tasks of this shape, on which all were evaluated.

    Raises:
        RunError: a run has not been evaluated, the tasks differ, the seeds of the two sides do not match, or the runs
            were trained on different data sets.
    """
    left, right = _by_seed(runs, data, shape), _by_seed(against, data, shape)
    if len(left) == len(right) == 1:
        (seed,), (other_seed,) = left, right
        if seed != other_seed:
            raise RunError(
                f"the two runs have seeds {seed} and {other_seed}, so their training tasks differ: compare equal seeds"
            )
    elif set(left) != set(right):
        raise RunError(f"seeds {sorted(left)} are set against seeds {sorted(right)}: give the same seeds on both sides")
    origins = {r.get("trained_on", r.get("data")): p for side in (left, right) for p, r in side.values()}
    if len(origins) > 1:
        (a, b), (of_a, of_b) = list(origins.values())[:2], list(origins)[:2]
        raise RunError(
            f"{a} was trained on {of_a} and {b} on {of_b}: compare runs that were trained on the same data set"
        )
    for field, what in (
        ("episodes_sha256", "on different tasks"),
        ("tasks", "on different numbers of tasks"),
        ("checkpoint", "at different kinds of checkpoint"),
    ):
        values = {r[field]: p for side in (left, right) for p, r in side.values()}
        if len(values) > 1:
            a, b = list(values.values())[:2]
            raise RunError(f"{a} and {b} were evaluated {what}: evaluate them with the same settings")
    for side in (left, right):
        names = {r["algorithm"]: p for p, r in side.values()}
        if len(names) > 1:
            raise RunError(
                f"{' and '.join(map(str, names.values()))} are of different algorithms ({', '.join(names)}): "
                "give one algorithm a side"
            )
    same = {p.resolve() for p, _ in left.values()} & {p.resolve() for p, _ in right.values()}
    if same:
        raise RunError(f"{min(same)} stands on both sides: a run cannot be set against itself")
    differences = {
        seed: np.array(left[seed][1]["accuracies"]) - np.array(right[seed][1]["accuracies"]) for seed in sorted(left)
    }
    per_seed = {seed: float(d.mean()) for seed, d in differences.items()}
    if len(differences) == 1:
        mean, half_width = interval(next(iter(differences.values())))
        covers = ONE_SEED
    else:
        mean, half_width = t_interval(list(per_seed.values()))
        covers = f"covers training seeds: t-interval over {len(per_seed)} per-seed differences"
    _, tasks_half_width = interval(np.mean([*differences.values()], axis=0))
    return Difference(
        mean,
        half_width,
        covers,
        per_seed,
        float(np.mean([r["accuracy"] for _, r in left.values()])),
        float(np.mean([r["accuracy"] for _, r in right.values()])),
        tasks_half_width,
        t_test([*per_seed.values()]) if len(per_seed) > 1 else None,
    )


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95% Student interval, n at least 2."""
    n = len(values)
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), t_quantile(0.975, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)


def t_test(values: Sequence[float]) -> float:
    """Two-sided p-value of Student's one-sample test that the mean is zero, n at least 2."""
    n = len(values)
    array = np.asarray(values, dtype=np.float64)
    mean, error = abs(float(array.mean())), float(array.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return 0.0 if mean else 1.0
    return 2 * (1 - t_cdf(mean / error, n - 1))


def t_quantile(p: float, freedom: int) -> float:
    """The p-quantile (0.5 ≤ p < 1) of Student's t with whole degrees of freedom, by bisection of `t_cdf`."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, freedom: int) -> float:
    """P(T ≤ t) for t ≥ 0: Abramowitz & Stegun 26.7.3 (odd) and 26.7.4 (even degrees of freedom)."""
    angle = math.atan(t / math.sqrt(freedom))
    term, total = 1.0, 0.0
    first = 1 if freedom % 2 else 0
    if first:
        term = math.cos(angle)
    for k in range(first, freedom - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    central = 2 / math.pi * (angle + math.sin(angle) * total) if first else math.sin(angle) * total
    return 0.5 + central / 2


def _by_seed(paths: Sequence[str | Path], data: str | None, shape: Asked) -> dict[int, tuple[Path, dict[str, Any]]]:
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path in map(Path, paths):
        result = read_result(path, data, shape)
        seed = result["seed"]
        if seed in found:
            raise RunError(f"{path} and {found[seed][0]} both have seed {seed}: give one run a seed on each side")
        found[seed] = (path, result)
    return found


_RESULT_FIELDS: dict[str, type] = {
    **{"algorithm": str, "checkpoint": str, "episodes_sha256": str},
    **{"accuracies": list, "accuracy": float, "seed": int, "tasks": int},
}
_ALSO: dict[str, type] = {
    **{"data": str, "split": str, "ways": int, "shots": int, "iteration": int, "half_width_95": float}
}
_ROUNDED = 1e-5  # what a mean of accuracies that are rounded to a millionth may be off, and more


def _result_file(
    folder: RunFolder, run: RunConfig, data: str, shape: tuple[int, int, int], split: str = "test"
) -> Path:
    own = run.episodes
    return folder.result(split, None if data == own.data else data, None if shape == own.test_shape else shape)


def read_result(path: str | Path, data: str | None = None, shape: Asked = _OWN) -> dict[str, Any]:
    """A run's result.json, or that of its evaluation on another data set, or on tasks of another shape.

    What `compare` and `report` rest on is checked here, for both.

    Raises:
        RunError: it is missing or damaged, or its numbers contradict each other.
    """
    folder = RunFolder(path)
    file, again = folder.result_file, f"metaheed evaluate {path}"
    if data is not None or shape != _OWN:
        run = folder.read_config()
        own = run.episodes
        ways, shots, queries = (o if a is None else a for a, o in zip(shape, own.test_shape, strict=True))
        file = _result_file(folder, run, data or own.data, (ways, shots, queries))
        named = {"data": None if data == own.data else data, "ways": shape[0], "shots": shape[1], "queries": shape[2]}
        again += "".join(f" --{name} {value}" for name, value in named.items() if value is not None)
    try:
        result = unseal_values(from_json(read_bounded(file, JSON_BYTES)))
        missing = {*_RESULT_FIELDS} - set(result)
        if not missing:
            _check_result(result)
    except FileNotFoundError:
        raise RunError(f"{path} has no {file.name}: run '{again}' first") from None
    except OSError as error:
        raise RunError(f"{file} cannot be read ({error.strerror or error}): run '{again}' again") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise RunError(f"{file} cannot be read ({brief(str(error), 300)}): run '{again}' again") from error
    if missing:
        raise RunError(f"{file} lacks {', '.join(sorted(missing))}: run '{again}' again")
    return result


def _check_result(result: dict[str, Any]) -> None:
    """Raise ValueError unless a result is one that evaluation can have written."""
    for name, kind in {**_RESULT_FIELDS, **_ALSO}.items():
        value = result.get(name)
        if (
            not isinstance(value, kind)
            or isinstance(value, bool)
            or (isinstance(value, int) and not 0 <= value < 2**63)
        ):
            raise ValueError(f"its {name} is {shown(value)}")
    if not isinstance(result.get("trained_on", ""), str):
        raise ValueError(f"its trained_on is {shown(result['trained_on'])}")
    accuracies, tasks = result["accuracies"], result["tasks"]
    if len(accuracies) != tasks or tasks < 2:
        raise ValueError(f"it has {tasks} tasks, but {len(accuracies)} accuracies; two at least are judged")
    for accuracy in accuracies:
        if not isinstance(accuracy, float | int) or isinstance(accuracy, bool) or not 0 <= accuracy <= 1:
            raise ValueError(f"one of its accuracies is {shown(accuracy)}, and not a number from 0 to 1")
    found, mean = result["accuracy"], math.fsum(accuracies) / tasks
    if not abs(found - mean) <= _ROUNDED:  # of NaN, too
        raise ValueError(f"its accuracy is {shown(found)}, but its tasks' mean is {mean:.6f}")
    if not 0 <= result["half_width_95"] <= 1:  # of two tasks, one right and one wrong, it is 0.98
        raise ValueError(f"its half_width_95 is {shown(result['half_width_95'])}")
