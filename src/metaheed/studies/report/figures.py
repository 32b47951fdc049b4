"""Draw the paper's figures 1, 3, 4 and 5 for the runs of a report, as PNG and SVG, one file for each setting.

The same runs give the same bytes. Each learner has a panel, and each arm has one colour in all figures of a setting.
Thick lines are means over seeds; thin lines are single seeds.
"""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaheed.errors import RunError, brief
from metaheed.files.opening import JSON_BYTES, read_bounded
from metaheed.files.parsing import from_json
from metaheed.headless import Axes, Figure, own_settings
from metaheed.studies.figures import COLOURS, draw_trajectories
from metaheed.studies.paper import Setting
from metaheed.studies.report.arms import Arm, algorithm_label, title
from metaheed.studies.report.measures import INPUTS, AttentionLog, Band, mean_band, mean_curve
from metaheed.studies.report.reading import plain

_RC: Any = {
    "svg.hashsalt": "metaheed",  # without it, identifiers in the file are random
    "text.parse_math": False,  # a $ in a name is not the start of a formula
    "text.usetex": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.solid_capstyle": "round",
}
_WIDTH, _HEIGHT = 4.6, 3.2  # inches of a panel
_DPI = 130
_COLUMNS = 2
_MARKERS = "osD^vP*X"  # one more than colours, so that pairs of colour and marker repeat late

Logs = Mapping[int, Sequence[AttentionLog]]
"""id() of an arm with attention -> the summaries of its attention weights, one for each run."""


@dataclass(frozen=True)
class Picture:
    """A figure in both formats."""

    name: str
    """Name of its files, without the suffix."""
    title: str
    caption: str
    alternative: str
    """Description for readers who cannot see the figure."""
    png: bytes
    svg: bytes


class Toy(NamedTuple):
    """The data of figure 1."""

    optima: list[tuple[float, float]]
    """The optimum of each task, a point."""
    paths: dict[str, list[tuple[float, float]]]
    """Algorithm -> its meta-parameters at the start and after every outer step."""
    numbers: dict[str, tuple[float, float]]
    """Algorithm -> path length and displacement."""


def all_figures(arms: Sequence[Arm], logs: Logs, toy: Toy | None, toy_from: str) -> Iterator[Picture]:
    """Figures 1, 3, 4 and 5 for every setting that has data for them."""
    names: set[str] = set()
    with own_settings(_RC):
        if toy is not None:
            yield _toy_figure(toy, toy_from)
        settings = dict.fromkeys(arm.setting for arm in arms)
        for number, draw in _DRAWN:
            for setting in settings:
                of_setting = [arm for arm in arms if arm.setting == setting]
                drawn = draw(setting, of_setting, logs)
                if drawn is not None:
                    figure, words, caption, alternative = drawn
                    name = _file_name(f"figure{number}-{setting.data}-{setting.ways}way{setting.shots}shot", names)
                    heading = f"Figure {number}. {words}, {title(setting)}"
                    yield Picture(name, heading, caption, alternative, *_bytes(figure))


def _file_name(wanted: str, taken: set[str]) -> str:
    base = re.sub(r"[^A-Za-z0-9-]+", "-", wanted)[:100].strip("-")
    name = next(n for n in itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2))) if n not in taken)
    taken.add(name)
    return name


def _bytes(figure: Figure) -> tuple[bytes, bytes]:
    """PNG and SVG without dates."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return png.getvalue(), svg.getvalue()


Drawn = tuple[Figure, str, str, str]
"""Figure, title, caption, alternative text."""


def _panels(count: int, height: float = _HEIGHT) -> tuple[Figure, list[Axes]]:
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    width = _WIDTH if columns > 1 else 1.35 * _WIDTH
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _by_learner(arms: Sequence[Arm]) -> dict[str, list[tuple[Arm, str, str]]]:
    """Learner -> its arms, each with colour and marker."""
    found: dict[str, list[tuple[Arm, str, str]]] = {}
    for arm in arms:
        members = found.setdefault(arm.learner, [])
        index = len(members)
        members.append((arm, COLOURS[index % len(COLOURS)], _MARKERS[index % len(_MARKERS)]))
    return found


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.19), borderaxespad=0)


def _wrapped(label: str) -> str:
    """A legend's label, broken into lines that fit into a panel."""
    return "\n".join(textwrap.wrap(label, 60))


def _height(members: Iterable[Sequence[tuple[Arm, str, str]]], entries: int, more: int = 0) -> float:
    """Height of panels in inches with room for a legend below: `entries` for each arm, and `more` further lines."""
    lines = (sum(entries * len(textwrap.wrap(arm.label + " " * 20 + ".", 60)) for arm, _, _ in m) for m in members)
    return _HEIGHT + 0.17 * (max(lines) + more)


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def _learner_title(arm: Arm) -> str:
    label = algorithm_label(arm.config)
    return f"learner {plain(label.partition(',')[0].removeprefix('TA-').removesuffix('++'))}"


def _accuracy(setting: Setting, arms: Sequence[Arm], logs: Logs) -> Drawn | None:
    """Figure 3; None if no arm has the two validations that a line needs."""
    learners = {
        learner: members
        for learner, members in _by_learner(arms).items()
        if any(len(mean_curve([run.validations for run in arm.runs]).values) > 1 for arm, _, _ in members)
    }
    if not learners:
        return None
    figure, panels = _panels(len(learners), _height(learners.values(), 1))
    for axes, members in zip(panels, learners.values(), strict=True):
        for arm, colour, marker in members:
            if len(arm.runs) > 1:
                for run in arm.runs:
                    steps = [v.iteration for v in run.validations]
                    axes.plot(steps, [100 * v.accuracy for v in run.validations], color=colour, lw=0.7, alpha=0.45)
            mean = mean_curve([run.validations for run in arm.runs])
            style = "-" if arm.rule != "attended" else "--"
            label = _wrapped(f"{arm.label}, {_seeds(len(arm.runs))}")
            (line,) = axes.plot(mean.iterations, 100 * mean.values, style, color=colour, lw=1.8, label=label)
            line.set(marker=marker, markersize=4, markevery=max(1, len(mean.values) // 12))
        tasks = sorted({arm.config.training.val_tasks for arm, _, _ in members})
        axes.set(
            title=_learner_title(members[0][0]),
            xlabel="iteration",
            ylabel=f"validation accuracy (%), {' or '.join(map(str, tasks))} tasks",
        )
        _legend(axes)
    caption = (
        "Mean accuracy on the validation tasks, which are the same for every seed. Thick lines: mean over seeds, at "
        "the iterations at which all seeds were validated (dashed with attention). Thin lines: single seeds. "
        "Algorithms differ in the number of tasks per iteration: see Cost of attention."
    )
    ends = []
    for arm in arms:
        mean = mean_curve([run.validations for run in arm.runs])
        if len(mean.values):
            ends.append(f"{arm.label} ends at {100 * mean.values[-1]:.1f}%")
    seen = f"Line plot of validation accuracy against iteration. {'; '.join(ends)}."
    return figure, "Validation accuracy", caption, seen


def _attended(arms: Sequence[Arm], logs: Logs) -> dict[str, list[tuple[Arm, str, str]]]:
    """The arms with attention from `_by_learner`; each keeps its colour and marker."""
    found = {
        learner: [member for member in members if any(log.batches > 1 for log in logs.get(id(member[0]), ()))]
        for learner, members in _by_learner(arms).items()
    }
    return {learner: members for learner, members in found.items() if members}


def _draw_band(axes: Axes, summary: Band, colour: str, style: str, label: str) -> None:
    axes.fill_between(summary.iterations, summary.low, summary.high, color=colour, alpha=0.18, lw=0)
    axes.plot(summary.iterations, summary.mean, style, color=colour, lw=1.6, label=label)


def _weights(setting: Setting, arms: Sequence[Arm], logs: Logs) -> Drawn | None:
    """Figure 4; None if no attention weights could be read."""
    learners = _attended(arms, logs)
    if not learners:
        return None
    figure, panels = _panels(len(learners), _height(learners.values(), 2, 1))
    said = []
    for axes, members in zip(panels, learners.values(), strict=True):
        for arm, colour, _ in members:
            of_runs = logs[id(arm)]
            largest, smallest = (mean_band([getattr(log, name) for log in of_runs]) for name in ("largest", "smallest"))
            _draw_band(axes, largest, colour, "-", _wrapped(f"{arm.label}: largest, {_seeds(len(of_runs))}"))
            _draw_band(axes, smallest, colour, ":", _wrapped(f"{arm.label}: smallest, {_seeds(len(of_runs))}"))
            said.append(f"{arm.label} ends between {smallest.mean[-1]:.3f} and {largest.mean[-1]:.3f}")
        _mark_sizes(axes, [1 / log.tasks for arm, _, _ in members for log in logs[id(arm)]], "1/B (equal weights)")
        axes.set(title=_learner_title(members[0][0]), xlabel="iteration", ylabel="weight of a task", ylim=(0, None))
        _legend(axes)
    caption = (
        "The largest and the smallest weight in each meta-batch. A run is divided into up to 200 stretches of "
        "successive batches. Lines: mean over the batches of a stretch and over seeds. Bands: 5th to 95th percentile "
        "of the batches of a stretch. The weights of a batch sum to 1, so their mean is 1/B."
    )
    return figure, "Largest and smallest attention weight", caption, f"Line plot of weights. {'; '.join(said)}."


def _mark_sizes(axes: Axes, levels: Sequence[float], label: str) -> None:
    for index, level in enumerate(sorted(set(levels))):
        axes.axhline(level, color="#555555", ls=(0, (5, 3)), lw=1, label=label if index == 0 else None)


def _attention(setting: Setting, arms: Sequence[Arm], logs: Logs) -> Drawn | None:
    """Figure 5: (a) correlations, (b) rank of the hardest task, with one row for each learner; None as for figure 4."""
    learners = _attended(arms, logs)
    if not learners:
        return None
    height = _height(learners.values(), 2)
    figure = Figure(figsize=(2 * _WIDTH, height * len(learners)), layout="constrained")
    grid = figure.subplots(len(learners), 2, squeeze=False)
    pairs = [log.correlations[n] for ms in learners.values() for m in ms for log in logs[id(m[0])] for n in INPUTS]
    largest = max((abs(r) for c in pairs for r in (c.per_batch, c.pooled) if math.isfinite(r)), default=1.0)
    limit = min(1.05, max(0.25, 1.15 * largest))
    said = []
    for (left, right), members in zip(grid, learners.values(), strict=True):
        _correlations(left, members, logs, limit)
        for arm, colour, _ in members:
            of_runs = logs[id(arm)]
            if len(of_runs) > 1:
                for log in of_runs:
                    right.plot(log.rank.iterations, log.rank.mean, color=colour, lw=0.5, alpha=0.3)
            mean = mean_band([log.rank for log in of_runs])
            label = _wrapped(f"{arm.label}, {_seeds(len(of_runs))}")
            right.plot(mean.iterations, mean.mean, color=colour, lw=1.7, label=label)
            said.append(f"with {arm.label} the task with the largest loss ends at mean rank {mean.mean[-1]:.2f}")
        sizes = [log.tasks for arm, _, _ in members for log in logs[id(arm)]]
        _mark_sizes(right, [(B + 1) / 2 for B in sizes], "(B + 1)/2, weights independent of the loss")
        right.set(
            title=f"(b) {_learner_title(members[0][0])}",
            xlabel="iteration",
            ylabel="rank by weight (1: largest weight)",
            ylim=(max(sizes) + 0.2, 0.8),
        )
        _legend(right)
    caption = (
        "(a) Pearson's correlation of each input of attention with the weights. Filled markers: over the tasks of each "
        "batch, averaged over batches; batches in which the input or the weights are the same for all tasks are "
        "skipped, and the table below counts them. Hollow markers: over the tasks of all batches together. Large "
        "markers: mean over seeds. Small markers: single seeds. (b) The rank, by weight, of the task with the largest "
        "loss after adaptation in each batch, averaged over each of up to 50 stretches of the run. Thick lines: mean "
        "over seeds."
    )
    seen = f"Dot plot of correlations; line plot of ranks: {'; '.join(said)}."
    return figure, "What attention attends to", caption, seen


def _correlations(axes: Axes, members: Sequence[tuple[Arm, str, str]], logs: Logs, limit: float) -> None:
    kinds = (("per_batch", "within batches"), ("pooled", "pooled"))
    rows = len(members) * len(kinds)
    for place, ((arm, colour, marker), (kind, words)) in enumerate(itertools.product(members, kinds)):
        offset = (place - (rows - 1) / 2) * 0.7 / max(rows, 2)
        values = np.array([[getattr(log.correlations[name], kind) for name in INPUTS] for log in logs[id(arm)]])
        at = np.arange(len(INPUTS)) + offset
        face = colour if kind == "per_batch" else "white"
        for row in values if len(values) > 1 else ():
            axes.plot(row, at, ls="", marker=marker, ms=2.5, color=colour, alpha=0.45, mew=0)
        known = np.isfinite(values)
        means = np.where(known, values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        there = known.any(axis=0)
        label = _wrapped(f"{arm.label}: {words}, {_seeds(len(values))}")
        axes.plot(means[there], at[there], ls="", marker=marker, ms=6, mfc=face, mec=colour, mew=1.3, label=label)
    axes.axvline(0, color="#555555", lw=1)
    axes.set_yticks(range(len(INPUTS)), [*INPUTS.values()])
    axes.set(
        title=f"(a) {_learner_title(members[0][0])}",
        xlabel="correlation with the weights",
        xlim=(-limit, limit),
        ylim=(len(INPUTS) - 0.5, -0.5),
    )
    _legend(axes)


_DRAWN: tuple[tuple[str, Callable[[Setting, Sequence[Arm], Logs], Drawn | None]], ...] = (
    ("3", _accuracy),
    ("4", _weights),
    ("5", _attention),
)


def read_toy(file: Path) -> Toy:
    """Read a file of `metaheed toy`: optima, and for each algorithm its points, path length and displacement.

    Raises:
        RunError: the file cannot be read, or `metaheed toy` does not write such a file.
    """
    try:
        found = from_json(read_bounded(file, JSON_BYTES))
        runs = {plain(str(name)): value for name, value in found.items() if name != "optima"}
        paths = {name: _points(value["points"]) for name, value in runs.items()}
        numbers = {n: (float(value["path_length"]), float(value["displacement"])) for n, value in runs.items()}
        optima = _points(found["optima"])
        if not paths or len(paths) > len(COLOURS):
            raise ValueError(f"{len(paths)} algorithms")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RunError(f"{file} is not what 'metaheed toy' writes: {brief(repr(error), 300)}") from error
    return Toy(optima, paths, numbers)


def _points(values: Any) -> list[tuple[float, float]]:
    points = [(float(x), float(y)) for x, y in values]
    if not points or not np.isfinite(points).all():
        raise ValueError("a path has no points, or one that is not finite")
    return points


def _toy_figure(toy: Toy, toy_from: str) -> Picture:
    figure = draw_trajectories(toy.paths, toy.optima)
    lengths = "; ".join(
        f"{name} takes a path of length {length:.2f} for a displacement of {displacement:.2f}"
        for name, (length, displacement) in toy.numbers.items()
    )
    caption = (
        "The two meta-parameters of a toy problem after every outer step, with a step after every task (MetaLSTM) and "
        f"with one step on the whole meta-batch (MetaLSTM++). {lengths}. {toy_from}"
    )
    words = "Meta-parameters of MetaLSTM and MetaLSTM++"
    return Picture("figure1-toy", f"Figure 1. {words}", caption, f"Two paths in the plane. {lengths}.", *_bytes(figure))
