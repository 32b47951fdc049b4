"""Write the results tables, between their two markers, from the evidence in results/.

python tools/results_table.py
"""

import itertools
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.table import LABELS, fastest_peer, spread

from metaheed.config import ALGORITHMS
from metaheed.evaluation import compare, read_result
from metaheed.figures import read_lines
from metaheed.runs import RunFolder

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: python tools/results_table.py -->\n", "<!-- end of results -->\n"
COUNTERPART = {
    **{"ta-maml": "maml", "taml": "maml", "ta-metasgd": "metasgd"},
    **{"metalstm++": "metalstm", "ta-metalstm++": "metalstm++"},
}
HEADER = (
    "| data | setting | algorithm | iterations | seeds | test accuracy, each seed | difference to its counterpart |\n"
    "|---|---|---|---|---|---|---|\n"
)
SPEED = (
    "| setting | our MAML, seconds a step | share of the limit | fastest peer | its time over ours "
    "| our TA-MAML over MAML | with probe reuse |\n|---|---|---|---|---|---|---|\n"
)
CURVES = "\n| algorithm | validations | last validation | jitter of the validation curve |\n|---|---|---|---|\n"


def table(study: Path) -> str:
    """One row an algorithm, data set and setting; differences paired on the same test tasks."""
    cells: dict[tuple[str, str, int], dict[str, dict[int, Path]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(p.parent for p in study.glob("*/result.json")):
        result, config = read_result(path), RunFolder(path).read_config()
        setting = f"{result['ways']}-way {result['shots']}-shot"
        key = (result["data"], setting, config.training.iterations)
        cells[key][result["algorithm"]][result["seed"]] = path
    rows = []
    for (data, setting, iterations), algorithms in sorted(cells.items(), reverse=True):
        for algorithm, runs in sorted(algorithms.items(), key=lambda item: [*ALGORITHMS].index(item[0])):
            results = [read_result(path) for _, path in sorted(runs.items())]
            accuracy = ", ".join(f"{100 * r['accuracy']:.2f} ± {100 * r['half_width_95']:.2f}" for r in results)
            difference = "—"
            counterpart = COUNTERPART.get(algorithm, "")
            other = algorithms.get(counterpart)
            if other and set(other) == set(runs):
                d = compare(list(runs.values()), list(other.values()))
                difference = f"{100 * d.mean:+.2f} ± {100 * d.half_width:.2f} to {counterpart} ({d.covers})"
            seeds = ", ".join(str(seed) for seed in sorted(runs))
            rows.append(f"| {data} | {setting} | {algorithm} | {iterations} | {seeds} | {accuracy} | {difference} |\n")
    return HEADER + "".join(rows)


def curves(study: Path) -> str:
    """One row a run: how unsteady its validation curve is.

    Jitter is the root of half the mean squared difference of successive validations (von Neumann), in points, over the
    second half of the run: the spread of the curve about its trend. Every validation is on the same tasks.
    """
    rows = []
    for path in sorted(p.parent for p in study.glob("*/result.json")):
        lines = read_lines(RunFolder(path).metrics_file)
        values = [100 * line["validation_accuracy"] for line in lines if "validation_accuracy" in line]
        late = values[len(values) // 2 :]
        squares = [(b - a) ** 2 for a, b in itertools.pairwise(late)]
        jitter = (statistics.fmean(squares) / 2) ** 0.5
        algorithm = read_result(path)["algorithm"]
        rows.append((algorithm, f"| {algorithm} | {len(values)} | {values[-1]:.2f} | {jitter:.2f} |\n"))
    rows.sort(key=lambda row: [*ALGORITHMS].index(row[0]))
    return CURVES + "".join(row for _, row in rows)


def speed(file: Path) -> str:
    """One row a setting of `make bench`: our MAML, the fastest peer with its own settings, and what attention costs."""
    result = json.loads(file.read_text())
    rows = []
    for setting in result["settings"]:
        measured = [row for row in result["rows"] if row["setting"] == setting["name"] and row["ratios"]]
        ours = {row["algorithm"]: row for row in reversed(measured) if row["entry"] == "ours"}
        peer = fastest_peer(measured)
        cells = [f"({setting['name']}) {setting['title']}", spread(ours["maml"]["seconds"], 3)]
        cells.append(f"{100 * ours['maml']['share_of_limit']:.0f}%")
        cells += ["—", "—"] if peer is None else [LABELS[peer["entry"]], spread(peer["ratios"])]
        cells += [spread(ours[name]["ratios"]) if name in ours else "—" for name in ("ta-maml", "ta-maml-reuse")]
        rows.append(f"| {' | '.join(cells)} |\n")
    about = f"Commit {result['commit'][:7]}, {result['rounds']} rounds, median (smallest – largest).\n\n"
    return about + SPEED + "".join(rows)


TABLES = {
    "README.md": lambda: table(ROOT / "results" / "first_runs"),
    "results/eight_algorithms/README.md": lambda: (
        table(ROOT / "results" / "eight_algorithms") + curves(ROOT / "results" / "eight_algorithms")
    ),
    "docs/performance.md": lambda: speed(ROOT / "results" / "speed" / "speed.json"),
}
"""File -> what stands between its markers."""

if __name__ == "__main__":
    for name, write in TABLES.items():
        file = ROOT / name
        if file.exists():
            before, rest = file.read_text().split(BEGIN)
            _, after = rest.split(END)
            file.write_text(before + BEGIN + write() + END + after)
