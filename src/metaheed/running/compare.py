"""Paired comparison of evaluated runs on the same frozen tasks, over one or several training seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaheed.errors import RunError
from metaheed.running.results import OWN_SHAPE, TaskShape, read_result
from metaheed.running.statistics import interval, t_interval, t_test


class Difference(NamedTuple):
    """Accuracy of some runs minus the accuracy of the runs that they are compared with, task by task."""

    mean: float
    """Mean difference over seeds and tasks."""
    half_width: float
    """Half-width of its 95% interval."""
    covers: str
    """Over what the interval generalises: test tasks only, or training seeds."""
    per_seed: dict[int, float]
    """Seed -> mean difference over the tasks."""
    accuracy: float
    """Mean accuracy of the runs over seeds and tasks."""
    accuracy_against: float
    """Mean accuracy of the runs that they are compared with."""
    tasks_half_width: float
    """Half-width of the 95% interval over test tasks for these training runs: 1.96·s/√n over the per-task differences,
    which are averaged over seeds first. It says nothing about other training runs."""
    p_value: float | None
    """Two-sided p-value of the paired t-test over seeds; None if there is one seed."""


ONE_SEED = "covers test tasks only, one training seed"


def compare(
    runs: str | Path | Sequence[str | Path],
    against: str | Path | Sequence[str | Path],
    data: str | None = None,
    shape: TaskShape = OWN_SHAPE,
) -> Difference:
    """Compare the accuracies of two algorithms on the same frozen tasks.

    With one seed a side, the interval is 1.96·s/√n over the per-task differences and says nothing about other training
    runs. With several seeds, it is a t-interval over the mean difference of each seed.

    Args:
        runs: folders of one algorithm's runs, one for each seed; a single one may be given as it is.
        against: folders of another algorithm's runs, with the same seeds.
        data: compare the evaluations on this data set; by default on the one that the runs were trained on.
        shape: compare the evaluations on tasks of these (ways, shots, queries); by default on the runs' own.

    Raises:
        RunError: a run has not been evaluated, the tasks differ, the seeds of the two sides do not match, or the runs
            were trained on different data sets.
    """
    left, right = (_by_seed([side] if isinstance(side, str | Path) else side, data, shape) for side in (runs, against))
    if len(left) == len(right) == 1:
        (seed,), (other_seed,) = left, right
        if seed != other_seed:
            raise RunError(
                f"the two runs have seeds {seed} and {other_seed}, so their training tasks differ: compare equal seeds"
            )
    elif set(left) != set(right):
        raise RunError(
            f"seeds {sorted(left)} are compared with seeds {sorted(right)}: give the same seeds on both sides"
        )
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
                f"{' and '.join(map(str, names.values()))} were trained by different algorithms ({', '.join(names)}): "
                "give runs of one algorithm on each side"
            )
    same = {p.resolve() for p, _ in left.values()} & {p.resolve() for p, _ in right.values()}
    if same:
        raise RunError(f"{min(same)} stands on both sides: a run cannot be compared with itself")
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


def _by_seed(paths: Sequence[str | Path], data: str | None, shape: TaskShape) -> dict[int, tuple[Path, dict[str, Any]]]:
    """Seed -> (run folder, its result)."""
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path in map(Path, paths):
        result = read_result(path, data, shape)
        seed = result["seed"]
        if seed in found:
            raise RunError(f"{path} and {found[seed][0]} both have seed {seed}: give one run a seed on each side")
        found[seed] = (path, result)
    return found
