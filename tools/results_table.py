"""Write the results tables, between their two markers, from the evidence in results/.

python tools/results_table.py
"""

import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.table import LABELS, fastest_peer, spread

from metaheed.config import ALGORITHMS
from metaheed.running.compare import compare
from metaheed.running.folder import RunFolder
from metaheed.running.log import stream_lines
from metaheed.running.results import read_result
from metaheed.studies.report.arms import Arm, group
from metaheed.studies.report.measures import INPUTS, AttentionLog, attention_log, holm
from metaheed.studies.report.page import markdown_table
from metaheed.studies.report.pairs import (
    Comparison,
    attention_pairs,
    control_pairs,
    metalstm_pairs,
    mismatches,
    protocol_mismatches,
)
from metaheed.studies.report.reading import find
from metaheed.studies.report.record_tables import correlation_table, weights_table
from metaheed.studies.report.table import mean_accuracy, p_text, percent, points

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: python tools/results_table.py -->\n", "<!-- end of results -->\n"
STUDIES = ("cifar_fs", "omniglot_20way", "first_runs")
"""Folders of results/ whose runs docs/findings.md lists one by one."""
HEADER = (
    "| evidence | data | setting | algorithm | iterations | seeds | test accuracy | difference to its counterparts |\n"
    "|---|---|---|---|---|---|---|---|\n"
)
DIFFERENCES = (
    "| arm | against | difference of each seed | mean, 95% t-interval | p | p by Holm |\n|---|---|---|---|---|---|\n"
)
BY_SEED = (
    "| arm | tasks an iteration | accuracy of each seed | ahead of equal weights | of equal weights on 2B tasks |\n"
    "|---|---|---|---|---|\n"
)
SPEED = (
    "| setting | our MAML, seconds a step | share of the limit | fastest peer | its time over ours "
    "| our TA-MAML over MAML | with probe reuse |\n|---|---|---|---|---|---|---|\n"
)
CURVES = "\n| algorithm | validations | last validation | jitter of the validation curve |\n|---|---|---|---|\n"


def table(*studies: Path) -> str:
    """One row an arm (runs of one config but for the seed), differences paired on the same test tasks; of those studies
    that are there. Runs that are in no row, as one that diverged, are named below with the reason.
    """
    parts = [_rows(study) for study in studies if study.exists()]
    left_out = [f"`results/{name}` ({reason})" for _, runs in parts for name, reason in runs]
    below = f"\nIn no row: {'; '.join(left_out)}.\n" if left_out else ""
    return HEADER + "".join(row for rows, _ in parts for row in rows) + below


@cache  # several tables are of one study
def _read(study: Path) -> tuple[list[Arm], list[tuple[str, str]]]:
    """The arms of a study, and its runs that are in none with the reason, the same wherever this checkout lies."""
    found = find([study])
    if found.unreadable:
        raise SystemExit(f"{': '.join(found.unreadable[0])}")
    arms, doubled = group(found.runs)
    reasons = [(run.name, run.problem) for run in found.runs if run.problem is not None] + doubled
    return arms, [
        (Path(name).relative_to(study.parent).as_posix(), why.replace(f"{study}/", "")) for name, why in reasons
    ]


def _rows(study: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The rows of a study, and its runs that are in none."""
    arms, left_out = _read(study)
    comparisons = _comparisons(arms)
    adjusted = _adjusted(comparisons)
    against: dict[int, list[str]] = defaultdict(list)
    for comparison in comparisons:
        d = comparison.difference
        if len(d.per_seed) == 1:
            text = f"{points(d.mean)} ± {percent(d.half_width)} (one seed, test tasks only)"
        elif len(d.per_seed) < TESTED:
            text = f"{', '.join(map(points, d.per_seed.values()))} (seeds {', '.join(map(str, d.per_seed))})"
        else:
            p = f"p = {p_text(adjusted[id(comparison)])} by Holm".replace("= <", "<")
            text = f"{points(d.mean)} ± {percent(d.half_width)} ({len(d.per_seed)} seeds; {p})"
        against[id(comparison.arm)].append(f"to {comparison.against.label}: {text}")
    rows = []
    for arm in arms:
        results = [*arm.results.values()]
        accuracy = ", ".join(f"{percent(r.accuracy)} ± {percent(r.half_width)}" for r in results)
        if len(results) > LISTED:
            ends = percent(min(r.accuracy for r in results)), percent(max(r.accuracy for r in results))
            accuracy = f"{mean_accuracy(arm)}, {' – '.join(ends)}"
        cells = (
            *(f"`results/{study.name}`", arm.setting.data, f"{arm.setting.ways}-way {arm.setting.shots}-shot"),
            *(arm.label, str(arm.config.training.iterations), ", ".join(map(str, arm.results)), accuracy or "—"),
            "<br>".join(against[id(arm)]) or "—",
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    return rows, left_out


def _comparisons(arms: Sequence[Arm]) -> list[Comparison]:
    """All that the report's tables have."""
    return [c for family in (metalstm_pairs, attention_pairs, control_pairs) for c in family(arms).compared]


def _adjusted(comparisons: Sequence[Comparison]) -> dict[int, float]:
    """Comparison -> its p-value by Holm among all of a study that have seeds enough for one."""
    tested = [c for c in comparisons if len(c.difference.per_seed) >= TESTED]
    values = [c.difference.p_value for c in tested if c.difference.p_value is not None]
    return dict(zip(map(id, tested), holm(values), strict=True))


def main_differences(study: Path) -> str:
    """One row a comparison with seeds enough for a p-value, the training seed as the unit."""
    comparisons = _comparisons(_read(study)[0])
    adjusted = _adjusted(comparisons)
    rows = [DIFFERENCES]
    for c in comparisons:
        if id(c) in adjusted:
            d = c.difference
            cells = [c.arm.label, c.against.label, ", ".join(f"{s}: {points(v)}" for s, v in d.per_seed.items())]
            cells += (f"{points(d.mean)} ± {percent(d.half_width)}", p_text(d.p_value), p_text(adjusted[id(c)]))
            rows.append(f"| {' | '.join(cells)} |\n")
    return "".join(rows)


def seed_by_seed(study: Path) -> str:
    """One row an arm: each seed's accuracy, and what it is ahead of equal weights, on B tasks and on 2B."""
    arms, _ = _read(study)
    rows = [BY_SEED]
    for arm in arms:
        accuracies = [f"{seed}: {percent(result.accuracy)}" for seed, result in arm.results.items()]
        cells = [arm.label, str(arm.tasks_per_iteration), "<br>".join(accuracies) or "—"]
        for rule in ("uniform", "uniform-2b"):
            others = [
                other
                for other in arms
                if (other.setting, other.learner, other.rule) == (arm.setting, arm.learner, rule)
                and not protocol_mismatches(arm, other)
            ]
            lines = [_seed_difference(arm, other, seed) for other in others for seed in arm.results if other is not arm]
            cells += ("<br>".join(filter(None, lines)) or "—",)
        rows.append(f"| {' | '.join(cells)} |\n")
    return "".join(rows)


def _seed_difference(arm: Arm, other: Arm, seed: int) -> str:
    if seed not in other.results:
        return ""
    if reasons := mismatches(arm, other):
        raise SystemExit(f"{arm.label} and {other.label}: {'; '.join(reasons)}")
    d = compare([arm.judged_runs[seed].path], [other.judged_runs[seed].path])
    return f"{seed}: {points(d.mean)} ± {percent(d.half_width)}"


LISTED = 3
"""Up to so many seeds each is shown with its interval over test tasks; of more the mean over seeds with its own."""
TESTED = 3
"""From so many seeds a difference over seeds has an interval and a p-value: with two Student's factor is 12.7, and two
that are alike by chance give any p."""


def weights(*studies: Path) -> str:
    """What the weights of the attended arms did, as the report has it: how far they go, and whether they follow the
    loss (the report has all four inputs).
    """
    parts = []
    logs = {study: _attended(study) for study in studies}
    for made in (weights_table, correlation_table):
        tables = [(study, made(attended)) for study, attended in logs.items()]
        columns = ("evidence", *tables[0][1].columns)
        rows = tuple((f"results/{study.name}", *row) for study, table in tables for row in table.rows)
        if "input" in columns:
            rows = tuple(row for row in rows if row[columns.index("input")] == INPUTS["query_loss"])
        parts.append(replace(tables[0][1], columns=columns, rows=rows))
    return "\n\n".join(map(markdown_table, parts)) + "\n"


def _attended(study: Path) -> list[tuple[Arm, list[AttentionLog]]]:
    arms = [arm for arm in _read(study)[0] if arm.rule == "attended"]
    return [(arm, [attention_log(run.path / "tasks.jsonl") for run in arm.runs]) for arm in arms]


def noise(study: Path) -> str:
    """One row an arm: the interval over 300 test tasks, the paper's number, and what could be mistaken for it."""
    header = (
        "| arm | accuracy | ± by binomial noise alone | ± measured, 1.96 s/√300 | 1.96 s with accuracy as a share |\n"
        "|---|---|---|---|---|\n"
    )
    rows = []
    for arm in _read(study)[0]:
        results = [*arm.results.values()]
        if not results:
            continue
        mean = statistics.fmean(r.accuracy for r in results)
        spread_of_tasks = statistics.fmean(r.half_width * r.judged.tasks**0.5 for r in results)  # 1.96 s
        questions = arm.setting.ways * arm.config.episodes.test_shape[2]
        binomial = 1.96 * (mean * (1 - mean) / questions / 300) ** 0.5
        cells = (
            arm.label,
            percent(mean),
            percent(binomial),
            percent(spread_of_tasks / 300**0.5),
            f"{spread_of_tasks:.2f}",
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    return header + "".join(rows)


def curves(study: Path) -> str:
    """One row a run: how unsteady its validation curve is.

    Jitter is the root of half the mean squared difference of successive validations (von Neumann), in points, over the
    second half of the run: the spread of the curve about its trend. Every validation is on the same tasks.
    """
    rows = []
    for path in sorted(p.parent for p in study.glob("*/result.json")):
        lines = [*stream_lines(RunFolder(path).metrics_file)]
        values = [100 * line["validation_accuracy"] for line in lines if "validation_accuracy" in line]
        late = values[len(values) // 2 :]
        squares = [(b - a) ** 2 for a, b in itertools.pairwise(late)]
        jitter = (statistics.fmean(squares) / 2) ** 0.5
        algorithm = read_result(path)["algorithm"]
        rows.append((algorithm, f"| {algorithm} | {len(values)} | {values[-1]:.2f} | {jitter:.2f} |\n"))
    rows.sort(key=lambda row: [*ALGORITHMS].index(row[0]))
    return CURVES + "".join(row for _, row in rows)


def table_and_curves(study: Path) -> str:
    """What the README of a study has."""
    return table(study) + curves(study)


def progress(study: Path) -> str:
    """One row a validation, that all runs of a study have at the same iterations: the mean training loss since the one
    before it, and its accuracy, of every run.
    """
    columns: list[str] = []
    cells: dict[int, list[str]] = defaultdict(list)
    for arm in _read(study)[0]:
        for run in arm.runs:
            columns += [f"{arm.label}, training loss since the row above", "validation"]
            losses: list[float] = []
            for line in stream_lines(RunFolder(run.path).metrics_file):
                if "validation_accuracy" in line:
                    cells[line["iteration"]] += [
                        f"{statistics.fmean(losses):.3f}",
                        percent(line["validation_accuracy"]),
                    ]
                    losses = []
                else:
                    losses.append(line["loss"])
    if any(len(row) != len(columns) for row in cells.values()):
        raise SystemExit(f"the runs of {study} were validated at different iterations")
    header = f"| iterations | {' | '.join(columns)} |\n{'|---' * (1 + len(columns))}|\n"
    return header + "".join(f"| {iteration:,} | {' | '.join(row)} |\n" for iteration, row in sorted(cells.items()))


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


CUDA = (
    "| setting | learn2learn's MAML, steps a second | our MAML | ratio | TA-MAML | 55,000 of them "
    "| with probe reuse | MAML and TA-MAML with TF32 |\n|---|---|---|---|---|---|---|---|\n"
)
CUDA_SETTINGS = {
    "a": "(a) miniImageNet 3×84×84, 5-way 1-shot, B = 4",
    "b": "(b) miniImageNet 3×84×84, 5-way 5-shot, B = 4",
    "cifar": "(c) CIFAR-FS 3×32×32, 5-way 1-shot, B = 4",
    "omniglot": "(d) Omniglot 1×28×28, 20-way 1-shot, B = 16",
}


def cuda_speed(file: Path) -> str:
    """One row a setting of `benchmarks/on_cuda.py --parts speed`: captured steps of the default execution."""
    result = json.loads(file.read_text())
    rates: dict[tuple[str, ...], dict[str, float]] = {}
    for row in result["results"]:
        if "library" not in row and (row["learner"], row["execution"], row["captured"]) == ("maml", "vectorized", True):
            rates[row["setting"], row["rule"], "TF32" if row["tf32"] else ""] = row
    rows = []
    for setting, title in CUDA_SETTINGS.items():
        plain, attended = rates[setting, "uniform", ""], rates[setting, "attended", ""]
        peer = plain["per_second"] / plain["times_learn2learn"]
        cells = [title, f"{peer:.2f}", f"{plain['per_second']:.1f}", f"{plain['times_learn2learn']:.0f}"]
        cells += [f"{attended['per_second']:.1f}", f"{attended['minutes_of_55000']:.1f} min"]
        cells.append(f"{rates[setting, 'attended, probe reused', '']['per_second']:.1f}")
        rough = [rates.get((setting, rule, "TF32")) for rule in ("uniform", "attended")]
        cells.append(", ".join(f"{row['per_second']:.1f}" for row in rough if row is not None) or "—")
        rows.append(f"| {' | '.join(cells)} |\n")
    about = result["about"]
    return f"{about['device']}, PyTorch {about['torch']}, Python {about['python']}.\n\n" + CUDA + "".join(rows)


WORDS = {
    "(faithful-to-release)": "with the leak",
    "(attention-reuse-probe)": "with probe reuse",
    "(attention-architecture equivariant, attention-standardize)": "equivariant, standardised",
}
"""Options in an arm's label -> what a page calls them."""


def worded(write: Callable[..., str], *studies: Path) -> str:
    """A table with words for options."""
    text = write(*studies)
    for option, words in WORDS.items():
        text = text.replace(option, words)
    return text


_RESULTS = ROOT / "results"
TABLES: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (lambda: worded(main_differences, _RESULTS / "cifar_fs"),),
    "results/eight_algorithms/README.md": (lambda: table_and_curves(_RESULTS / "eight_algorithms"),),
    "results/omniglot_20way/README.md": (lambda: table_and_curves(_RESULTS / "omniglot_20way"),),
    "docs/performance.md": (
        lambda: speed(_RESULTS / "speed" / "speed.json"),
        lambda: cuda_speed(_RESULTS / "cuda" / "speed.json"),
    ),
    "docs/findings.md": (
        lambda: worded(main_differences, _RESULTS / "cifar_fs"),
        lambda: worded(seed_by_seed, _RESULTS / "cifar_fs"),
        lambda: progress(_RESULTS / "omniglot_20way"),
        lambda: worded(weights, *(_RESULTS / study for study in (*STUDIES, "eight_algorithms"))),
        lambda: worded(noise, _RESULTS / "cifar_fs"),
        lambda: table(*(_RESULTS / study for study in STUDIES)),
    ),
}
"""File -> what stands between each pair of its markers, in order."""


def filled(text: str, tables: Sequence[Callable[[], str]]) -> str:
    """A file's text with the tables between its markers."""
    first, *rest = text.split(BEGIN)
    if len(rest) != len(tables) or any(part.count(END) != 1 for part in rest):
        raise SystemExit(
            f"{text.count(BEGIN)} markers {BEGIN!r} and {text.count(END)} {END!r} for {len(tables)} tables"
        )
    return first + "".join(BEGIN + write() + END + part.split(END)[1] for part, write in zip(rest, tables, strict=True))


if __name__ == "__main__":
    for name, tables in TABLES.items():
        (ROOT / name).write_text(filled((ROOT / name).read_text(), tables))
