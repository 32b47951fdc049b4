"""Write the README's results table from results/, between its two markers.

python tools/results_table.py
"""

from collections import defaultdict
from pathlib import Path

from metaheed.evaluation import compare, read_result
from metaheed.runs import RunFolder

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: python tools/results_table.py -->\n", "<!-- end of results -->\n"
COUNTERPART = {"ta-maml": "maml"}
HEADER = (
    "| data | setting | algorithm | iterations | seeds | test accuracy, each seed | difference to its counterpart |\n"
    "|---|---|---|---|---|---|---|\n"
)


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
        for algorithm, runs in sorted(algorithms.items()):
            results = [read_result(path) for _, path in sorted(runs.items())]
            accuracy = ", ".join(f"{100 * r['accuracy']:.2f} ± {100 * r['half_width_95']:.2f}" for r in results)
            difference = "—"
            other = algorithms.get(COUNTERPART.get(algorithm, ""))
            if other and set(other) == set(runs):
                d = compare(list(runs.values()), list(other.values()))
                difference = f"{100 * d.mean:+.2f} ± {100 * d.half_width:.2f} ({d.covers})"
            seeds = ", ".join(str(seed) for seed in sorted(runs))
            rows.append(f"| {data} | {setting} | {algorithm} | {iterations} | {seeds} | {accuracy} | {difference} |\n")
    return HEADER + "".join(rows)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(before + BEGIN + table(ROOT / "results" / "first_runs") + END + after)
