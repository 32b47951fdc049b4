"""Tables of accuracies and differences, with captions that say how to read each number."""

import statistics
from collections.abc import Sequence

from metaheed.config import default_config
from metaheed.running.statistics import t_interval
from metaheed.studies.paper import ITERATIONS, LABELS, Cell, Setting, accuracy
from metaheed.studies.paper import TABLES as PAPER_TABLES
from metaheed.studies.report.arms import RATES, Arm, settings_of, title
from metaheed.studies.report.measures import holm
from metaheed.studies.report.pairs import Comparison, NotCompared, Pairs
from metaheed.studies.report.reading import plain
from metaheed.studies.report.table import (
    MISSING,
    Table,
    _range,
    count,
    few_seeds,
    listed,
    mean_accuracy,
    p_text,
    percent,
    points,
)


def paper_table(name: str, arms: Sequence[Arm]) -> Table | None:
    """A table of the paper, with two rows for each algorithm: the paper's numbers, and ours below them.

    None if no run fills a cell of it.
    """
    paper = PAPER_TABLES[name]
    ours, filled, remarks = _our_cells(tuple(paper.rows), paper.columns, arms)
    if not filled:
        return None
    rows: list[tuple[str, ...]] = []
    for algorithm, values in paper.rows.items():
        rows.append((LABELS[algorithm], "paper", *(f"{value:.2f}" for value in values)))
        rows.append((LABELS[algorithm], "ours", *ours[algorithm]))
    caption = (
        f"Test accuracy in %. Ours: the mean over training seeds ± the half-width of its 95% t-interval over seeds; "
        f"{filled} of {len(paper.rows) * len(paper.columns)} cells are filled, {MISSING} is missing. {remarks}"
        "Most of the ± that the paper prints for 5 and 10 ways cannot be 95% intervals of a mean over 300 tasks "
        "(binomial noise alone gives more), so they are not repeated here." + few_seeds(_seeds_of(arms))
    )
    columns = ("", "", *map(_head, paper.columns))
    return Table(f"Table {name.removeprefix('table')} of the paper, and ours", caption, columns, tuple(rows))


def _seeds_of(arms: Sequence[Arm]) -> list[int]:
    return [len(arm.results) for arm in arms]


def elsewhere_table(arms: Sequence[Arm]) -> Table | None:
    """The paper's algorithms in settings that its tables do not have; None if there is no such run."""
    papers = {setting for paper in PAPER_TABLES.values() for setting in paper.columns}
    columns = [s for s in dict.fromkeys(arm.setting for arm in arms) if s not in papers]
    ours, filled, remarks = _our_cells(tuple(LABELS), columns, arms)
    there = [k for k in range(len(columns)) if any(ours[algorithm][k] != MISSING for algorithm in ours)]
    if not there:
        return None
    rows = [(LABELS[algorithm], *(cells[k] for k in there)) for algorithm, cells in ours.items()]
    caption = (
        "Test accuracy in %: the mean over training seeds ± the half-width of its 95% t-interval over seeds; "
        f"{filled} of {len(rows) * len(there)} cells are filled, {MISSING} is missing. {remarks}"
    )
    caption = caption.strip() + few_seeds(_seeds_of(arms))
    heads = ("", *(_head(columns[k]) for k in there))
    return Table("The same algorithms in settings that the paper's tables lack", caption, heads, tuple(rows))


def _head(setting: Setting) -> str:
    return f"{plain(setting.data)}\n{setting.ways}-way {setting.shots}-shot"


def _our_cells(
    algorithms: Sequence[str], columns: Sequence[Setting], arms: Sequence[Arm]
) -> tuple[dict[str, list[str]], int, str]:
    """Algorithm -> our cells, one for each column; the number of filled cells; and remarks for the caption."""
    chosen = {(a, s): _of_cell(arms, s, a) for a in algorithms for s in columns}
    shown = [found[0] for found in chosen.values() if found]
    lengths = {arm.config.training.iterations for arm in shown}
    others = [f"{title(arm.setting)} {arm.label}" for found in chosen.values() for arm in found[1:]]
    otherwise = [f"{title(arm.setting)} {arm.label}: {what}" for arm in shown if (what := _otherwise(arm))]
    cells = {a: [_cell_text(chosen[a, s], several=len(lengths) > 1) for s in columns] for a in algorithms}
    remarks = (
        f"The paper trains for {ITERATIONS:,} iterations"
        + (f", ours were {listed(f'{n:,}' for n in sorted(lengths))}. " if lengths else ". ")
        + (f"Shown is the longest run of each cell; also there: {listed(others)}. " if others else "")
        + (f"Not as in the paper but for rates and iterations: {'; '.join(otherwise)}. " if otherwise else "")
    )
    return cells, len(shown), remarks


def _cell_text(chosen: Sequence[Arm], several: bool) -> str:
    """The accuracy of a cell, with its number of iterations if the cells of the table differ in it."""
    if not chosen:
        return MISSING
    return mean_accuracy(chosen[0]) + (f"\n{chosen[0].config.training.iterations:,} iterations" if several else "")


def _otherwise(arm: Arm) -> str:
    """How an arm differs from the paper's setting, apart from tuned settings, iterations and validation interval."""
    config = default_config(arm.algorithm, *arm.setting)
    found = []
    for name, papers in settings_of(config).items():
        ours = arm.settings.get(name)
        if ours != papers and name not in (*RATES, "training.iterations", "training.val_every"):
            option = name.partition(".")[2].replace("_", "-")
            found.append(plain(f"{option} {ours} instead of {papers}"))
    return listed(found)


def _of_cell(arms: Sequence[Arm], setting: Setting, algorithm: str) -> list[Arm]:
    """Evaluated arms for a cell of a table: trained in its setting with default options; longest training first."""
    found = [
        arm
        for arm in arms
        if (arm.setting, arm.algorithm) == (setting, algorithm)
        and arm.results
        and arm.plain_rule
        and arm.config.episodes.train_shape[:2] == setting[1:]
    ]
    return sorted(found, key=lambda arm: (-arm.config.training.iterations, -len(arm.results)))


def accuracy_table(arms: Sequence[Arm]) -> Table:
    """The test accuracy of every arm."""
    rows = []
    for arm in arms:
        results = [*arm.results.values()]
        mean, over_seeds, over_tasks = MISSING, MISSING, MISSING
        if results:
            mean = percent(statistics.fmean(r.accuracy for r in results))
            over_tasks = _range([100 * r.half_width for r in results], 2)
        if len(results) > 1:
            over_seeds = percent(t_interval([r.accuracy for r in results])[1])
        each = listed(f"{seed}: {percent(result.accuracy)}" for seed, result in arm.results.items())
        tasks = MISSING if arm.judged is None else f"{arm.judged.tasks:,}"
        iterations = f"{arm.config.training.iterations:,}"
        unjudged = len(arm.runs) - len(results)
        seeds = str(len(results)) + (f" (+{unjudged} not judged)" if unjudged else "")
        rows.append(
            (title(arm.setting), arm.label, iterations, seeds, mean, over_seeds, over_tasks, tasks, each or MISSING)
        )
    return Table(
        "Test accuracy of every arm",
        "Accuracy in % after adaptation, transductive: batch norm sees all query images of a task. An arm is the runs "
        "of one config with different seeds. The interval over training seeds says where the mean of other training "
        "runs would lie. The interval over test tasks does not: it is 1.96·s/√n for each run (smallest – largest)."
        + few_seeds(_seeds_of(arms)),
        (
            *("setting", "arm", "iterations", "seeds", "mean", "± 95%, training seeds", "± 95%, test tasks only"),
            *("test tasks", "each seed"),
        ),
        tuple(rows),
    )


def difference_table(name: str, about: str, pairs: Pairs, beside_the_paper: bool = False) -> Table:
    """A table of paired differences, whose p-values are adjusted together.

    Args:
        name, about: title of the table and beginning of its caption.
        pairs: the comparisons.
        beside_the_paper: add a column with the same difference between the paper's numbers.
    """
    tested = [c for c in pairs.compared if c.difference.p_value is not None]
    adjusted = holm([c.difference.p_value for c in tested if c.difference.p_value is not None])
    by_pair = {id(c): p for c, p in zip(tested, adjusted, strict=True)}
    caption = (
        f"{about} Differences in percentage points, paired on the same test tasks at equal seeds. The training seed is "
        "the unit: a t-interval over the per-seed differences, and the paired t-test's two-sided p. Holm: adjusted "
        f"over the {count(len(tested), 'test')} of this table. The interval over test tasks takes these "
        "training runs as given: it says nothing about another training run."
        + few_seeds(len(c.difference.per_seed) for c in pairs.compared)
    )
    columns: tuple[str, ...] = (
        *("setting", "arm", "against", "accuracy", "seeds", "difference", "± 95%, training seeds", "p", "p (Holm)"),
        *("± 95%, test tasks only", "tasks per iteration", "notes"),
    )
    rows = [_difference_row(c, by_pair.get(id(c))) for c in pairs.compared]
    if beside_the_paper:
        columns = (*columns[:-1], "difference in the paper", "notes")
        rows = [(*row[:-1], _paper_difference(c), row[-1]) for row, c in zip(rows, pairs.compared, strict=True)]
    return Table(name, caption, columns, tuple(rows))


def _paper_difference(comparison: Comparison) -> str:
    arm, against = comparison.arm, comparison.against
    ours, theirs = (accuracy(Cell(*a.setting, a.algorithm)) for a in (arm, against))
    return f"{ours - theirs:+.2f}" if ours is not None and theirs is not None and arm.plain_rule else MISSING


def _difference_row(comparison: Comparison, adjusted: float | None) -> tuple[str, ...]:
    arm, against, d, notes = comparison
    seeds, over_tasks = len(d.per_seed), percent(d.tasks_half_width)
    over_seeds = percent(d.half_width)
    if seeds == 1:
        over_seeds = f"{MISSING} (one seed)"
        over_tasks += " (test tasks only, one training seed)"
    ours, theirs = arm.tasks_per_iteration, against.tasks_per_iteration
    return (
        *(title(arm.setting), arm.label, against.label),
        f"{percent(d.accuracy)} against {percent(d.accuracy_against)}",
        *(str(seeds), points(d.mean), over_seeds, p_text(d.p_value), p_text(adjusted), over_tasks),
        f"{ours} against {theirs}" + (" (equal)" if ours == theirs else ""),
        "; ".join(notes),
    )


def not_compared_table(missing: Sequence[NotCompared]) -> Table:
    """The comparisons that could not be made, and the reasons."""
    rows = dict.fromkeys((title(m.setting), m.label, m.against, m.reason) for m in missing)
    return Table(
        "Not compared",
        "Comparisons that these runs suggest but that cannot be made, with the reason. Two arms are compared only if "
        "data set, tasks of training, validation and test, network, T, B and iterations agree.",
        ("setting", "arm", "against", "not compared because"),
        tuple(rows),
    )
