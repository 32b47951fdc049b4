"""Judging a trained run on frozen tasks, and comparing runs on the same ones."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from metaheed.config import EvaluationConfig
from metaheed.data import Episodes, load_dataset
from metaheed.errors import DataError, NonFiniteError, RunError
from metaheed.outer import Execution, adapted_outcome, build_execution, initial_outcome
from metaheed.process import cpu_threads, float32_products, memory_explained, pick_device
from metaheed.runs import RunFolder, check_writable, load_weights, write_whole
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


def evaluate_run(
    path: Path,
    config: EvaluationConfig,
    data_root: Path | None = None,
    device: str | None = None,
    on_tasks: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Judge a run and write its result.json.

    Args:
        path: the run folder.
        config: which tasks, which checkpoint.
        data_root: where the data lies now; none: where it lay in training.
        device: none: the run's own, if it is here.
        on_tasks: see `evaluate`.

    Returns:
        What result.json holds: accuracy and its half-width, per-task accuracies, the tasks' hash, and what was judged.

    Raises:
        RunError, DataError, ConfigError: the run, its data or the setting cannot be used.
        OutOfMemoryError: the tasks computed at once do not fit.
    """
    folder = RunFolder(path)
    run = folder.read_config()
    file = folder.result_file if config.split == "test" else folder.validation_result_file
    check_writable(file)
    learner, meta, about = load_weights(folder, run, config.checkpoint)
    where = pick_device(device or run.training.device, fall_back=device is None)
    meta = {name: p.to(where) for name, p in meta.items()}
    ways, shots, queries = (
        asked if asked is not None else own
        for asked, own in zip((config.ways, config.shots, config.queries), run.episodes.test_shape, strict=True)
    )
    replace(run, episodes=replace(run.episodes, test_ways=ways))  # refuses more ways than the head has
    data = run.episodes
    dataset = load_dataset(data.data, data_root or data.data_root, data.image_size, data.split_seed).to(where)
    folder.check_classes(dataset, config.split)
    if list(dataset.image_shape) != list(about["image_shape"]):
        raise DataError(f"{path} was trained on images {about['image_shape']}, but these are {dataset.image_shape}")
    episodes = Episodes(dataset, config.split, ways, shots, queries, config.episode_seed)
    with (
        cpu_threads(run.training),
        float32_products(run.training.tf32),
        memory_explained(run, where, min(_AT_ONCE, config.tasks)),
    ):
        adapted, initial = (
            evaluate(build_execution(run.training, where, learner, outcome), meta, episodes, config.tasks, told)
            for outcome, told in ((adapted_outcome, on_tasks), (initial_outcome, None))
        )
    accuracy, half_width = interval(adapted.accuracies)
    initial_accuracy, initial_half_width = interval(initial.accuracies)
    result = {
        "algorithm": run.algorithm,
        "data": run.episodes.data,
        "split": config.split,
        "ways": ways,
        "shots": shots,
        "queries": queries,
        "tasks": config.tasks,
        "episode_seed": config.episode_seed,
        "episodes_sha256": episodes.fingerprint(config.tasks),
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
    write_whole(file, (json.dumps(result, indent=1) + "\n").encode())
    return result


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


ONE_SEED = "covers test tasks only, one training seed"


def compare(runs: Sequence[Path], against: Sequence[Path]) -> Difference:
    """Paired differences on the same frozen tasks.

    With one seed a side: 1.96·s/√n over the per-task differences, which says nothing about another training run. With
    several: the seed is the unit, a t-interval over the per-seed mean differences.

    Raises:
        RunError: a run has not been evaluated, the tasks differ, or the seeds of the two sides do not match.
    """
    left, right = _by_seed(runs), _by_seed(against)
    if len(left) == len(right) == 1:
        (seed,), (other_seed,) = left, right
        if seed != other_seed:
            raise RunError(
                f"the two runs have seeds {seed} and {other_seed}, so their training tasks differ: compare equal seeds"
            )
    elif set(left) != set(right):
        raise RunError(f"seeds {sorted(left)} are set against seeds {sorted(right)}: give the same seeds on both sides")
    for field, what in (("episodes_sha256", "on different tasks"), ("checkpoint", "at different kinds of checkpoint")):
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
    return Difference(
        mean,
        half_width,
        covers,
        per_seed,
        float(np.mean([r["accuracy"] for _, r in left.values()])),
        float(np.mean([r["accuracy"] for _, r in right.values()])),
    )


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95% Student interval, n at least 2."""
    n = len(values)
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), t_quantile(0.975, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)


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


def _by_seed(paths: Sequence[Path]) -> dict[int, tuple[Path, dict[str, Any]]]:
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path in paths:
        result = read_result(path)
        seed = result["seed"]
        if seed in found:
            raise RunError(f"{path} and {found[seed][0]} both have seed {seed}: give one run a seed on each side")
        found[seed] = (path, result)
    return found


_RESULT_FIELDS: dict[str, type] = {
    **{"algorithm": str, "checkpoint": str, "episodes_sha256": str},
    **{"accuracies": list, "accuracy": float, "seed": int, "tasks": int},
}


def read_result(path: Path) -> dict[str, Any]:
    """A run's result.json.

    Raises:
        RunError: it is missing or damaged.
    """
    file = RunFolder(path).result_file
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        missing = {*_RESULT_FIELDS} - set(result)
        for name in _RESULT_FIELDS:
            if name in result and not isinstance(result[name], _RESULT_FIELDS[name]):
                raise ValueError(f"its {name} is {result[name]!r}")
        if not missing:
            accuracies = np.array(result["accuracies"], dtype=np.float64)
            if accuracies.shape != (result["tasks"],):
                raise ValueError(f"it has {result['tasks']} tasks, but accuracies of shape {accuracies.shape}")
    except FileNotFoundError:
        raise RunError(f"{path} has no result.json: run 'metaheed evaluate {path}' first") from None
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file} cannot be read ({error}): run 'metaheed evaluate {path}' again") from error
    if missing:
        raise RunError(f"{file} lacks {', '.join(sorted(missing))}: run 'metaheed evaluate {path}' again")
    return dict(result)
