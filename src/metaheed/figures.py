"""Figures of training runs, drawn without a screen."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metaheed.errors import RunError
from metaheed.runs import RunFolder

_COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa8800", "#66ccee", "#aa3377")


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
    for (label, path), colour in zip(runs.items(), _COLOURS * (1 + len(runs) // len(_COLOURS)), strict=False):
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
    part = out.with_suffix(".part")
    figure.savefig(part, dpi=130, format="png")
    part.replace(out)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _smooth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over a twentieth of the run, at the iterations of its windows' ends."""
    width = max(1, len(values) // 20)
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    return width + np.arange(len(means)), means
