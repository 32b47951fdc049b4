"""Figures of training runs, searches and the toy, drawn without a display."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from metaheed.files.writing import write_whole
from metaheed.headless import Axes, Figure, colormaps, own_settings
from metaheed.running.folder import RunFolder
from metaheed.running.log import stream_lines

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colours, which all kinds of colour vision tell apart, without their yellow, too faint for lines."""


@own_settings()
def training_figure(runs: Mapping[str, str | Path], out: str | Path) -> None:
    """Draw validation accuracy and the largest and smallest weight of each meta-batch over iterations (Figs. 3 and 4).

    Args:
        runs: label -> run folder.
        out: the PNG to write.

    Raises:
        RunError: a run has no logs.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (label, path), colour in zip(runs.items(), COLOURS * (1 + len(runs) // len(COLOURS)), strict=False):
        folder = RunFolder(path)
        validations = [line for line in stream_lines(folder.metrics_file) if "validation_accuracy" in line]
        iterations = [line["iteration"] for line in validations]
        left.plot(
            iterations, [100 * v["validation_accuracy"] for v in validations], "o-", color=colour, label=label, ms=4
        )
        weights = np.array([line["weights"] for line in stream_lines(folder.tasks_file)])
        steps = 1 + np.arange(len(weights))
        if np.ptp(weights, axis=1).max() == 0:
            right.axhline(weights[0, 0], color=colour, ls="--", lw=1, label=f"{label}: 1/B for every task")
            continue
        for values, style, which in ((weights.max(1), "-", "largest"), (weights.min(1), ":", "smallest")):
            right.plot(steps, values, color=colour, lw=0.5, alpha=0.25)
            right.plot(*_smooth(values), style, color=colour, lw=1.8, label=f"{label}: {which} in the batch")
    left.set(xlabel="iteration", ylabel="validation accuracy (%)", title="Accuracy after adaptation")
    right.set(xlabel="iteration", ylabel="weight", title="Attention weights", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    _save(figure, Path(out))


@own_settings()
def trajectory_figure(
    trajectories: Mapping[str, Sequence[tuple[float, float]]], optima: Sequence[tuple[float, float]], out: Path
) -> None:
    """Draw the paths of two meta-parameters in the plane, with the optimum of each task (Fig. 1).

    Args:
        trajectories: label -> points.
        optima: the best point of each task.
        out: the PNG to write.
    """
    _save(draw_trajectories(trajectories, optima), out)


def draw_trajectories(
    trajectories: Mapping[str, Sequence[tuple[float, float]]], optima: Sequence[tuple[float, float]]
) -> Figure:
    """The figure that `trajectory_figure` writes."""
    figure = Figure(figsize=(5 * len(trajectories), 4.6), layout="constrained")
    panels = figure.subplots(1, len(trajectories), sharex=True, sharey=True, squeeze=False)[0]
    centre = np.mean(optima, axis=0)
    for axes, (label, points), colour in zip(panels, trajectories.items(), COLOURS, strict=False):
        path = np.array(points)
        axes.plot(*path.T, "-", color=colour, lw=0.8, alpha=0.8)
        axes.plot(*path[0], "o", color="black", ms=6, label="start", zorder=3)
        axes.plot(*path[-1], "D", color=colour, mec="black", ms=7, label="end", zorder=3)
        axes.plot(*np.array(optima).T, "*", color="#e69f00", ms=13, ls="", label="optimum of a task")
        axes.plot(*centre, "+", color="black", ms=12, mew=1.5, label="mean of the optima")
        axes.set(xlabel="first meta-parameter", title=f"{label}: {len(path) - 1} outer steps", aspect="equal")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("second meta-parameter")
    panels[-1].legend(frameon=False, fontsize=8)
    return figure


@own_settings()
def parallel_figure(
    axes: Mapping[str, tuple[float, float]],
    rows: Sequence[Sequence[float]],
    values: Sequence[float | None],
    best: int,
    out: Path,
) -> None:
    """Draw every trial of a search as a line that crosses one vertical axis for each setting, and one for the accuracy.

    Args:
        axes: setting -> its bounds, which are above 0; the scale is logarithmic.
        rows: the settings of each trial, in the order of the axes.
        values: validation accuracy of each trial in [0, 1]; None if the trial was not trained to its end.
        best: index of the best trial.
        out: the PNG to write.
    """
    figure = Figure(figsize=(max(5.4, 2.2 + 1.9 * len(axes)), 4.6), layout="constrained")
    plane = figure.subplots()
    whole = [100 * value for value in values if value is not None]
    low, high = min(whole), max(whole)
    low, high = (low - 1, high + 1) if low == high else (low, high)
    places = [_place(np.array(row), np.array([*axes.values()])) for row in rows]
    for index in sorted(range(len(rows)), key=lambda i: (i == best, values[i] or 0.0)):
        value = values[index]
        if value is None:
            plane.plot(range(len(axes)), places[index], "x:", color="#999999", lw=1, ms=4)
            continue
        height = (100 * value - low) / (high - low)
        colour = "#cc3311" if index == best else colormaps["viridis"](0.9 * height)
        line = [*places[index], height]
        plane.plot(range(len(line)), line, "-", color=colour, lw=3 if index == best else 1.2, alpha=0.9)
    for place, (name, bounds) in enumerate(axes.items()):
        _upright(plane, place, name, bounds, rows[best][place])
    plane.axvline(len(axes), color="black", lw=0.8)
    for height in np.linspace(0, 1, 5):
        text = f"{low + height * (high - low):.1f}"
        plane.text(len(axes) + 0.04, height, text, fontsize=8, va="center")
    plane.text(len(axes), 1.05, "validation\naccuracy (%)", ha="center", va="bottom", fontsize=9)
    plane.set(xlim=(-0.25, len(axes) + 0.45), ylim=(-0.06, 1.04))
    plane.axis("off")
    dotted = sum(value is None for value in values)
    rest = f"; {dotted} dotted: not trained to their end" if dotted else ""
    trials = "1 trial" if len(rows) == 1 else f"{len(rows)} trials, the best in red"
    figure.suptitle(trials + rest, fontsize=10)
    _save(figure, out)


def _place(row: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Heights in [0, 1] on logarithmic axes; 0.5 on an axis whose bounds are equal."""
    low, high = np.log(bounds).T
    span = high - low
    return np.where(span > 0, (np.log(row) - low) / np.where(span > 0, span, 1), 0.5)


def _upright(plane: Axes, place: int, name: str, bounds: tuple[float, float], best: float) -> None:
    plane.axvline(place, color="black", lw=0.8)
    marks = {bounds[0], bounds[1], *(10.0**k for k in range(-12, 7) if bounds[0] < 10.0**k < bounds[1])}
    for mark in sorted(marks):
        (height,) = _place(np.array([mark]), np.array([bounds]))
        plane.text(place - 0.04, height, f"{mark:g}", fontsize=8, ha="right", va="center")
    plane.text(place, 1.05, f"{name}\nbest {best:.3g}", ha="center", va="bottom", fontsize=9)


@own_settings()
def importance_figure(importances: Mapping[str, float], trials: int, out: Path) -> None:
    """Draw bars that show how much each setting of a search mattered.

    Args:
        importances: setting -> its share of the importance.
        trials: number of complete trials that they come from.
        out: the PNG to write.
    """
    figure = Figure(figsize=(6, 1.6 + 0.5 * len(importances)), layout="constrained")
    plane = figure.subplots()
    ordered = sorted(importances.items(), key=lambda item: item[1])
    bars = plane.barh([name for name, _ in ordered], [value for _, value in ordered], color=COLOURS[0], height=0.6)
    plane.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    plane.set(xlabel=f"importance (PED-ANOVA) over {trials} trials", xlim=(0, 1.08))
    plane.spines[["top", "right"]].set_visible(False)
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    write_whole(out, buffer.getvalue())


def _smooth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, means): the running mean over a twentieth of the run, placed at the end of each window."""
    width = max(1, len(values) // 20)
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    return width + np.arange(len(means)), means
