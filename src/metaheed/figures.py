"""Figures of training runs, drawn without a screen."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metaheed.runs import RunFolder, stream_lines, write_whole

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which people with any colour vision can tell apart; their yellow, too faint for lines, left out."""


def training_figure(runs: Mapping[str, Path], out: Path) -> None:
    """Validation accuracy and each meta-batch's largest and smallest weight against iteration (paper, figs. 3, 4).

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
        validations = [line for line in read_lines(folder.metrics_file) if "validation_accuracy" in line]
        iterations = [line["iteration"] for line in validations]
        left.plot(
            iterations, [100 * v["validation_accuracy"] for v in validations], "o-", color=colour, label=label, ms=4
        )
        weights = np.array([line["weights"] for line in read_lines(folder.tasks_file)])
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
    _save(figure, out)


def trajectory_figure(
    trajectories: Mapping[str, Sequence[tuple[float, float]]], optima: Sequence[tuple[float, float]], out: Path
) -> None:
    """Paths of two meta-parameters over the plane, with every task's optimum (paper, fig. 1).

    Args:
        trajectories: label -> points.
        optima: a point a task.
        out: the PNG to write.
    """
    _save(draw_trajectories(trajectories, optima), out)


def draw_trajectories(
    trajectories: Mapping[str, Sequence[tuple[float, float]]], optima: Sequence[tuple[float, float]]
) -> Figure:
    """What `trajectory_figure` writes."""
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


def _save(figure: Figure, out: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    write_whole(out, buffer.getvalue())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file.

    Raises:
        RunError: it is missing or damaged.
    """
    return [*stream_lines(path)]


def _smooth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over a twentieth of the run, at the iterations of its windows' ends."""
    width = max(1, len(values) // 20)
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    return width + np.arange(len(means)), means
