"""Paired comparison of runs on the same frozen tasks, over one or several training seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaheed.errors import RunError
from metaheed.running.results import OWN_SHAPE, TaskShape, read_result
from metaheed.running.statistics import interval, t_interval, t_test


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


def compare(
    runs: Sequence[str | Path], against: Sequence[str | Path], data: str | None = None, shape: TaskShape = OWN_SHAPE
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


def _by_seed(paths: Sequence[str | Path], data: str | None, shape: TaskShape) -> dict[int, tuple[Path, dict[str, Any]]]:
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path in map(Path, paths):
        result = read_result(path, data, shape)
        seed = result["seed"]
        if seed in found:
            raise RunError(f"{path} and {found[seed][0]} both have seed {seed}: give one run a seed on each side")
        found[seed] = (path, result)
    return found
