"""Tables of cost: time, memory, and the iterations that each arm needed to reach an accuracy."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from metaheed.studies.report.arms import Arm, title
from metaheed.studies.report.measures import first_reaching, mean_curve
from metaheed.studies.report.pairs import protocol_mismatches
from metaheed.studies.report.table import MISSING, Table, _range, _ratio, listed, percent


def cost_table(arms: Sequence[Arm]) -> Table:
    """Time, memory and tasks of every arm, and their ratios to the same learner under the uniform rule."""
    rows = []
    for arm in arms:
        plain_arm = unattended(arm, arms)
        theirs = {} if plain_arm is None else _costs(plain_arm)
        for where, (seconds, peaks) in (_costs(arm) or {MISSING: _NOT_RECORDED}).items():
            base = theirs.get(where, _NOT_RECORDED)
            rows.append(
                (
                    *(title(arm.setting), arm.label),
                    *(str(arm.tasks_per_iteration), str(arm.updates_per_iteration)),
                    f"{arm.tasks_per_iteration * arm.config.training.iterations:,}",
                    _range(seconds, 3) if seconds else "not recorded",
                    _ratio(seconds, base[0]),
                    _range([p / 2**20 for p in peaks], 0) if peaks else "not recorded",
                    _ratio([float(p) for p in peaks], [float(p) for p in base[1]]),
                    where,
                )
            )
    return Table(
        "Cost",
        "Seconds: the time of one outer iteration without validation and checkpoints. It is the median over the parts "
        "of a run between two checkpoints, then the median over seeds (smallest – largest). Memory: peak resident "
        "memory, or peak allocated memory on CUDA. With the execution 'processes' it is the sum over the workers, so "
        "memory that they share is counted once for each worker. Ratio: relative to the same learner under the uniform "
        "rule on the same device, processor, number of threads and execution. Runs without a timing.jsonl are shown as "
        "not recorded.",
        (
            *("setting", "arm", "tasks per iteration", "outer steps per iteration", "tasks in total"),
            *("seconds per iteration", "ratio", "peak memory, MiB", "ratio", "computed on"),
        ),
        tuple(rows),
    )


def unattended(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm of the same learner and protocol under the uniform rule; None if there is none.

    If there are several, the one that agrees with `arm` in most settings.
    """
    fitting = [
        a
        for a in arms
        if (a.setting, a.learner, a.rule) == (arm.setting, arm.learner, "uniform") and not protocol_mismatches(arm, a)
    ]
    return min(fitting, key=lambda a: sum(a.settings.get(n) != v for n, v in arm.settings.items()), default=None)


_NOT_RECORDED: tuple[list[float], list[int]] = ([], [])


def _costs(arm: Arm) -> dict[str, tuple[list[float], list[int]]]:
    """Device and execution -> seconds per iteration and peak bytes of the runs computed there."""
    found: dict[str, tuple[list[float], list[int]]] = defaultdict(lambda: ([], []))
    for run in arm.runs:
        if run.cost is not None:
            found[run.cost.where][0].append(run.cost.seconds)
            if run.cost.peak_bytes is not None:
                found[run.cost.where][1].append(run.cost.peak_bytes)
    return dict(found)


_BELOW_BEST = (0.05, 0.01)


def reach_table(arms: Sequence[Arm], thresholds: Sequence[float]) -> Table:
    """The iterations, outer steps and tasks that each arm needs to reach a validation accuracy.

    Args:
        arms: the arms of all settings.
        thresholds: accuracies in [0, 1]. If empty, 5 points and 1 point below the best accuracy of the same learner
            under the uniform rule.
    """
    rows = []
    for family in _families(arms):
        first = next((arm for arm in family if arm.rule == "uniform"), family[0])
        curves = {id(arm): mean_curve([run.validations for run in arm.runs]) for arm in family}
        own = curves[id(first)]
        if not len(own.values):
            continue
        asked = thresholds or [t for t in (float(own.values.max()) - below for below in _BELOW_BEST) if t > 0]
        for threshold in asked:
            for arm in family:
                base = unattended(arm, family) or first
                reached = first_reaching(curves[id(arm)], threshold)
                seeds = [first_reaching(mean_curve([run.validations]), threshold) for run in arm.runs]
                there = [s for s in seeds if s is not None]
                rows.append(
                    (
                        *(title(arm.setting), percent(threshold), arm.label),
                        *_reached(arm, reached, base, threshold),
                        f"{len(there)} of {len(seeds)}"
                        + (f", median {statistics.median(there):,.0f}" if there else ""),
                    )
                )
    return Table(
        "Iterations to a given accuracy",
        "The iteration of the first validation at which the mean curve over seeds reaches the accuracy, also expressed "
        "in outer steps and in training tasks. The columns with × divide the outer steps (equal updates) and the tasks "
        "(equal tasks) by what the same learner needed under the uniform rule; if several arms are such, the one that "
        "agrees in most settings counts. For these ratios both mean curves are over the seeds that both arms have. "
        + (
            "The accuracies are those given with --thresholds."
            if thresholds
            else "The accuracies are 5 points and 1 point below the best of the learner's mean curve under the uniform "
            "rule (that of the first such arm, or of the first arm if there is none)."
        ),
        (
            *(
                "setting",
                "validation accuracy, %",
                "arm",
                "iterations",
                "outer steps",
                "× (equal updates)",
                "tasks",
            ),
            *("× (equal tasks)", "× over seeds", "seeds that reached it"),
        ),
        tuple(rows),
    )


def _reached(arm: Arm, reached: int | None, base: Arm, threshold: float) -> tuple[str, ...]:
    common = sorted({run.seed for run in arm.runs} & {run.seed for run in base.runs})
    ours, theirs = (
        first_reaching(mean_curve([run.validations for run in side.runs if run.seed in common]), threshold)
        for side in (arm, base)
    )
    ratios = [MISSING] * 3
    if ours is not None and theirs is not None:
        updates = ours * arm.updates_per_iteration / (theirs * base.updates_per_iteration)
        tasks = ours * arm.tasks_per_iteration / (theirs * base.tasks_per_iteration)
        ratios = [f"{updates:.2f}", f"{tasks:.2f}", listed(map(str, common))]
    if reached is None:
        return "not reached", MISSING, ratios[0], MISSING, *ratios[1:]
    steps, seen = (reached * each for each in (arm.updates_per_iteration, arm.tasks_per_iteration))
    return f"{reached:,}", f"{steps:,}", ratios[0], f"{seen:,}", *ratios[1:]


def _families(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Arms of one setting, learner and protocol."""
    families: list[list[Arm]] = []
    for arm in arms:
        for family in families:
            head = family[0]
            if (head.setting, head.learner) == (arm.setting, arm.learner) and not protocol_mismatches(head, arm):
                family.append(arm)
                break
        else:
            families.append([arm])
    return families
