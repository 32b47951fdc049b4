"""How our step's cost grows: `python -m benchmarks.scaling`.

One setting (3×32×32, 5-way 1-shot, Q = 15, T = 5, B = 4, second-order MAML), of which one number is varied at a time; T
also with --recompute.
Every point is a process of its own, so that its peak memory is its own; they run one after another. Its execution
is the one that training would pick, and is written down: one task is looped, several are on worker processes.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.ours import RECOMPUTED
from benchmarks.processes import ROOT, Process
from benchmarks.settings import SETTINGS, Setting
from benchmarks.speed import WARM_UP, conditions
from benchmarks.table import save, spread
from metaheed.files.writing import write_whole

BASE = replace(SETTINGS["c"], algorithms=("maml",))
AXES: dict[str, tuple[int, ...]] = {
    "steps": (1, 2, 5, 10, 20, 50),
    "tasks": (1, 2, 4, 8, 16, 32),
    "ways": (2, 5, 10, 20),
    "side": (28, 32, 48, 64, 84),
}
"""What is varied -> its values."""
LABELS = {"steps": "T, inner steps", "tasks": "B, tasks", "ways": "N, ways", "side": "side of the images, pixels"}


def varied(axis: str, value: int) -> Setting:
    """The base setting with one number replaced."""
    values = BASE.to_json()
    return Setting.from_json(values | ({"image_shape": (3, value, value)} if axis == "side" else {axis: value}))


def point(setting: Setting, repeats: int, algorithm: str) -> dict[str, Any]:
    """Times of steps in seconds, the process's peak memory in bytes, and the execution, picked as training picks it."""
    with Process() as process:
        made = process.ask("build", entry="ours", algorithm=algorithm, setting=setting.to_json(), speed_settings=True)
        for _ in range(WARM_UP):
            process.ask("step")
        seconds = [process.ask("step")["seconds"] for _ in range(repeats)]
        return {"seconds": seconds, **process.ask("memory"), **made}


def run(axes: Sequence[str], repeats: int, out: Path) -> dict[str, Any]:
    """Measure and write scaling.json and scaling.png into `out`; returns what scaling.json holds."""
    points = []
    for axis in axes:
        for algorithm, value in itertools.product(("maml", RECOMPUTED) if axis == "steps" else ("maml",), AXES[axis]):
            measured = point(varied(axis, value), repeats, algorithm)
            points.append({"axis": axis, "value": value, "algorithm": algorithm, **measured})
            seconds, peak = spread(measured["seconds"], 3), measured["peak_bytes"] / 1e6
            print(f"{algorithm}, {LABELS[axis]} = {value}: {seconds} s, {peak:.0f} MB", flush=True)
    result = {**conditions(), "base": BASE.to_json(), "repeats": repeats, "points": points}
    write_whole(out / "scaling.json", (json.dumps(result, indent=1) + "\n").encode())
    figure(result, out / "scaling.png")
    return result


def figure(result: dict[str, Any], out: Path) -> None:
    """Time and peak memory against each number, both axes logarithmic; dotted: in proportion to the work."""
    axes_present = list(dict.fromkeys(p["axis"] for p in result["points"]))
    picture = Figure(figsize=(3.4 * len(axes_present), 5.6), layout="constrained")
    grid = picture.subplots(2, len(axes_present), sharex="col", sharey="row", squeeze=False)
    for column, axis in enumerate(axes_present):
        points = [p for p in result["points"] if p["axis"] == axis]
        top, bottom = grid[:, column]
        for algorithm, marker, label in (("maml", "o-", "every step kept"), (RECOMPUTED, "s--", "--recompute")):
            line = [p for p in points if p["algorithm"] == algorithm]
            if not line:
                continue
            values = [p["value"] for p in line]
            times = [1000 * statistics.median(p["seconds"]) for p in line]
            if algorithm == "maml":
                power = 2 if axis == "side" else 1
                proportional = [times[-1] * (v / values[-1]) ** power for v in values]
                top.plot(values, proportional, ":", color="black", lw=1)
            top.plot(values, times, marker, color="#4477aa", ms=4, label=label)
            bottom.plot(values, [p["peak_bytes"] / 1e6 for p in line], marker, color="#cc6677", ms=4, label=label)
        if any(p["algorithm"] == RECOMPUTED for p in points):
            top.legend(frameon=False)
            bottom.legend(frameon=False)
        bottom.set_xlabel(LABELS[axis])
        for panel in (top, bottom):
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(values, [str(v) for v in values])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.2)
    grid[0, 0].set_ylabel("milliseconds an outer iteration")
    grid[1, 0].set_ylabel("peak memory of the process, MB")
    picture.suptitle("metaheed's MAML, 3×32×32 5-way 1-shot, T = 5, B = 4, one number varied (dotted: proportional)")
    save(picture, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="Cost against T, B, ways, size.")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=[*AXES], help="what to vary")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each point")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "bench", help="folder of the results (the evidence: results/speed)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.repeats < 1:
        parser.error(f"--repeats is {chosen.repeats}, but it must be at least 1")
    run(chosen.axes, chosen.repeats, chosen.out)


if __name__ == "__main__":
    main()
