"""The tables, as plain text in cells: what they say of the runs, and how each number is to be read."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metaheed.config import default_config
from metaheed.evaluation import t_interval
from metaheed.paper import ITERATIONS, LABELS, Cell, Setting, accuracy
from metaheed.paper import TABLES as PAPER_TABLES
from metaheed.report.arms import RATES, Arm, Comparison, NotCompared, Pairs, protocol_mismatches, settings_of, title
from metaheed.report.measures import INPUTS, AttentionLog, first_reaching, holm, mean_curve
from metaheed.report.reading import Run, plain

MISSING = "—"


@dataclass(frozen=True)
class Table:
    """Cells of text; a line break in one is a line break."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    """Long and seldom read: shut until it is opened."""


def percent(share: float) -> str:
    """A share as a number of per cent."""
    return f"{100 * share:.2f}"


def points(difference: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * difference:+.2f}"


def count(number: int, what: str) -> str:
    """A number of things."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def mean_accuracy(arm: Arm) -> str:
    """The mean over seeds with its interval, labelled; or that of the one seed."""
    results = [*arm.results.values()]
    if not results:
        return MISSING
    if len(results) == 1:
        return f"{percent(results[0].accuracy)} (1 seed)"
    mean, half_width = t_interval([r.accuracy for r in results])
    return f"{percent(mean)} ± {percent(half_width)} ({len(results)} seeds)"


def paper_table(name: str, arms: Sequence[Arm]) -> Table:
    """A table of the paper, every algorithm twice: the paper's numbers, and ours below them."""
    paper = PAPER_TABLES[name]
    ours, filled, remarks = _our_cells(tuple(paper.rows), paper.columns, arms)
    rows: list[tuple[str, ...]] = []
    for algorithm, values in paper.rows.items():
        rows.append((LABELS[algorithm], "paper", *(f"{value:.2f}" for value in values)))
        rows.append((LABELS[algorithm], "ours", *ours[algorithm]))
    caption = (
        f"Test accuracy in %. Ours: the mean over training seeds ± the half-width of its 95% t-interval over seeds; "
        f"{filled} of {len(paper.rows) * len(paper.columns)} cells are filled, {MISSING} is missing. {remarks}"
        "Most of the ± that the paper prints for 5 and 10 ways cannot be 95% intervals of a mean over 300 tasks "
        "(binomial noise alone gives more), so they are not repeated here."
    )
    columns = ("", "", *map(_head, paper.columns))
    return Table(f"Table {name.removeprefix('table')} of the paper, and ours", caption, columns, tuple(rows))


def elsewhere_table(arms: Sequence[Arm]) -> Table | None:
    """The algorithms of the paper's tables in settings that these lack; none: there is no such run."""
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
    heads = ("", *(_head(columns[k]) for k in there))
    return Table("The same algorithms in settings that the paper's tables lack", caption.strip(), heads, tuple(rows))


def _head(setting: Setting) -> str:
    return f"{plain(setting.data)}\n{setting.ways}-way {setting.shots}-shot"


def _our_cells(
    algorithms: Sequence[str], columns: Sequence[Setting], arms: Sequence[Arm]
) -> tuple[dict[str, list[str]], int, str]:
    """Algorithm -> our cells, column by column; how many are filled; and what is to be said of them."""
    chosen = {(a, s): _of_cell(arms, s, a) for a in algorithms for s in columns}
    shown = [found[0] for found in chosen.values() if found]
    lengths = {arm.config.training.iterations for arm in shown}
    others = [f"{title(arm.setting)} {arm.label}" for found in chosen.values() for arm in found[1:]]
    otherwise = [f"{title(arm.setting)} {arm.label}: {what}" for arm in shown if (what := _otherwise(arm))]
    cells = {a: [_cell_text(chosen[a, s], several=len(lengths) > 1) for s in columns] for a in algorithms}
    remarks = (
        f"The paper trains for {ITERATIONS:,} iterations"
        + (f", ours were {_listed(f'{n:,}' for n in sorted(lengths))}. " if lengths else ". ")
        + (f"Shown is the longest run of each cell; also there: {_listed(others)}. " if others else "")
        + (f"Not as in the paper but for rates and iterations: {'; '.join(otherwise)}. " if otherwise else "")
    )
    return cells, len(shown), remarks


def _cell_text(chosen: Sequence[Arm], several: bool) -> str:
    """The accuracy of a cell, where the cells are of several lengths with its own."""
    if not chosen:
        return MISSING
    return mean_accuracy(chosen[0]) + (f"\n{chosen[0].config.training.iterations:,} iterations" if several else "")


def _otherwise(arm: Arm) -> str:
    """In what an arm of a cell differs from the paper's setting, but for what is tuned, and how long and often."""
    config = default_config(arm.algorithm, *arm.setting)
    found = []
    for name, papers in settings_of(config).items():
        ours = arm.settings.get(name)
        if ours != papers and name not in (*RATES, "training.iterations", "training.val_every"):
            option = name.partition(".")[2].replace("_", "-")
            found.append(plain(f"{option} {ours} instead of {papers}"))
    return _listed(found)


def _of_cell(arms: Sequence[Arm], setting: Setting, algorithm: str) -> list[Arm]:
    """Judged arms that are a cell of a table: trained in its setting, nothing special about the rule; longest first."""
    found = [
        arm
        for arm in arms
        if (arm.setting, arm.algorithm) == (setting, algorithm)
        and arm.results
        and arm.plain_rule
        and arm.config.episodes.train_shape[:2] == setting[1:]
    ]
    return sorted(found, key=lambda arm: (-arm.config.training.iterations, -len(arm.results)))


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


def accuracy_table(arms: Sequence[Arm]) -> Table:
    """Every arm's accuracy."""
    rows = []
    for arm in arms:
        results = [*arm.results.values()]
        mean, over_seeds, over_tasks = MISSING, MISSING, MISSING
        if results:
            mean = percent(statistics.fmean(r.accuracy for r in results))
            over_tasks = _range([100 * r.half_width for r in results], 2)
        if len(results) > 1:
            over_seeds = percent(t_interval([r.accuracy for r in results])[1])
        each = _listed(f"{seed}: {percent(result.accuracy)}" for seed, result in arm.results.items())
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
        "of one config, one a seed. Of the two intervals only the one over training seeds says where another training "
        "run would lie; the one over test tasks is each run's own 1.96·s/√n (smallest – largest over seeds).",
        (
            *("setting", "arm", "iterations", "seeds", "mean", "± 95%, training seeds", "± 95%, test tasks only"),
            *("test tasks", "each seed"),
        ),
        tuple(rows),
    )


def difference_table(name: str, about: str, pairs: Pairs, beside_the_paper: bool = False) -> Table:
    """A family of paired differences; its p-values are adjusted together.

    Args:
        name, about: its title, and what its caption begins with.
        pairs: the family.
        beside_the_paper: with the same difference of the paper's numbers, where it has them.
    """
    tested = [c for c in pairs.compared if c.difference.p_value is not None]
    adjusted = holm([c.difference.p_value for c in tested if c.difference.p_value is not None])
    by_pair = {id(c): p for c, p in zip(tested, adjusted, strict=True)}
    caption = (
        f"{about} Differences in percentage points, paired on the same test tasks at equal seeds. The training seed is "
        "the unit: a t-interval over the per-seed differences, and the paired t-test's two-sided p. Holm: adjusted "
        f"over the {count(len(tested), 'test')} of this table. Beside them the interval over test tasks, these "
        "training runs taken as given: it says nothing about another training run."
    )
    columns: tuple[str, ...] = (
        *("setting", "arm", "against", "accuracy", "seeds", "difference", "± 95%, training seeds", "p", "p (Holm)"),
        *("± 95%, test tasks only", "tasks seen an iteration", "notes"),
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


def p_text(p: float | None) -> str:
    """A p-value to three places."""
    return MISSING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def not_compared_table(missing: Sequence[NotCompared]) -> Table:
    """What was not paired, and why."""
    rows = dict.fromkeys((title(m.setting), m.label, m.against, m.reason) for m in missing)
    return Table(
        "Not compared",
        "Pairs that these runs would suggest, and what stands against them. Nothing is paired unless data set, tasks "
        "of training, validation and test, network, T, B and iterations agree.",
        ("setting", "arm", "against", "not compared because"),
        tuple(rows),
    )


def cost_table(arms: Sequence[Arm]) -> Table:
    """Time, memory and tasks of every arm beside those of its counterpart under the uniform rule."""
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
        "Seconds of an outer iteration, validation and checkpoints left out: each run's median over the stretches "
        "between its checkpoints, then the median over seeds (smallest – largest). Memory: the most that was resident "
        "(on CUDA: allocated); under the execution 'processes' the sum over workers, what they share being counted in "
        "each. The ratios are to the same learner under the uniform rule, computed in the same place. Runs by versions "
        "that did not write timing.jsonl show as not recorded.",
        (
            *("setting", "arm", "tasks seen an iteration", "outer steps an iteration", "tasks seen in all"),
            *("seconds an iteration", "ratio", "peak memory, MiB", "ratio", "computed on"),
        ),
        tuple(rows),
    )


def unattended(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm of the same learner and protocol under the uniform rule; of several the one that is like it in most."""
    fitting = [
        a
        for a in arms
        if (a.setting, a.learner, a.rule) == (arm.setting, arm.learner, "uniform") and not protocol_mismatches(arm, a)
    ]
    return min(fitting, key=lambda a: sum(a.settings.get(n) != v for n, v in arm.settings.items()), default=None)


_NOT_RECORDED: tuple[list[float], list[int]] = ([], [])


def _costs(arm: Arm) -> dict[str, tuple[list[float], list[int]]]:
    """Where -> seconds an iteration and peak bytes of the runs computed there."""
    found: dict[str, tuple[list[float], list[int]]] = defaultdict(lambda: ([], []))
    for run in arm.runs:
        if run.cost is not None:
            found[run.cost.where][0].append(run.cost.seconds)
            if run.cost.peak_bytes is not None:
                found[run.cost.where][1].append(run.cost.peak_bytes)
    return dict(found)


def _range(values: Sequence[float], places: int) -> str:
    texts = [f"{v:,.{places}f}" for v in (statistics.median(values), min(values), max(values))]
    return texts[0] if len({*texts}) == 1 else f"{texts[0]} ({texts[1]} – {texts[2]})"


def _ratio(values: Sequence[float], base: Sequence[float]) -> str:
    return f"{statistics.median(values) / statistics.median(base):.2f}" if values and base else MISSING


_BELOW_BEST = (0.05, 0.01)


def reach_table(arms: Sequence[Arm], thresholds: Sequence[float]) -> Table:
    """How long each arm takes to a validation accuracy, in iterations, outer steps and tasks.

    Args:
        arms: of all settings.
        thresholds: accuracies in [0, 1]; none: 5 and 1 points below the counterpart's best.
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
        "The first validation at which the mean curve over seeds is at the accuracy or above (so no finer than one "
        "validation to the next), what that is in outer steps and in training tasks seen, and each as a multiple of "
        "what the same learner under the uniform rule took (of several such arms the one that is like it in most "
        "settings): at equal updates and at equal tasks seen, both sides being mean curves over the seeds that both "
        "have. "
        + (
            "The accuracies were asked for."
            if thresholds
            else "The accuracies are 5 and 1 points below the best of that learner's mean curve under the uniform rule "
            "(of the first such arm; where there is none, of the first arm)."
        ),
        (
            *(
                "setting",
                "validation accuracy, %",
                "arm",
                "iterations",
                "outer steps",
                "× (equal updates)",
                "tasks seen",
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
        ratios = [f"{updates:.2f}", f"{tasks:.2f}", _listed(map(str, common))]
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


def correlation_table(logs: Sequence[tuple[Arm, Sequence[AttentionLog]]]) -> Table:
    """The numbers of figure 5 (a)."""
    rows = []
    for arm, of_runs in logs:
        for name, words in INPUTS.items():
            found = [log.correlations[name] for log in of_runs]
            rows.append(
                (
                    *(title(arm.setting), arm.label, words, str(len(found))),
                    _mean_text([c.per_batch for c in found]),
                    f"{sum(c.skipped for c in found):,} of {sum(c.skipped + c.batches for c in found):,}",
                    _mean_text([c.pooled for c in found]),
                    _mean_text([log.apart_from_position[name] for log in of_runs]),
                    *(_mean_text([log.apart_at_ends[name][end] for log in of_runs]) for end in (0, 1)),
                )
            )
    return Table(
        "Correlation of attention's inputs with its weights",
        "Pearson's, over the tasks of each batch and then averaged over batches; and over the tasks of all batches "
        "together. Means over seeds (smallest – largest). Batches in which an input, or the weights, are the same for "
        "all tasks have no correlation: they are skipped and counted. Apart from position: pooled, a position's mean "
        "over a hundred batches taken off its weights and each batch's mean off the input, for where most of the "
        "weights' variance goes by position, nothing else can correlate much with them; and the same over the first "
        "and the last tenth of the run: what a run begins with was drawn with the attention module, not learned.",
        (
            *("setting", "arm", "input", "seeds", "within batches", "batches skipped", "pooled", "apart from position"),
            *("first tenth", "last tenth"),
        ),
        tuple(rows),
    )


def weights_table(logs: Sequence[tuple[Arm, Sequence[AttentionLog]]]) -> Table:
    """The numbers of figures 4 and 5 (b), and what of the weights a task's position explains."""
    rows = []
    for arm, of_runs in logs:
        B = of_runs[0].tasks
        smallest, largest, rank = (
            statistics.fmean(float(band.mean.mean()) for band in bands)
            for bands in zip(*((log.smallest, log.largest, log.rank) for log in of_runs), strict=True)
        )
        shares = [log.by_position for log in of_runs if math.isfinite(log.by_position)]
        by_position = f"{100 * statistics.fmean(shares):.0f}%" if shares else "undefined"
        deviations = [statistics.fmean(log.deviation[end] for log in of_runs) for end in (0, 1)]
        if len({f"{100 * share:.0f}" for share in shares}) > 1:
            by_position += f" ({100 * min(shares):.0f}% – {100 * max(shares):.0f}%)"
        rows.append(
            (
                *(title(arm.setting), arm.label, str(len(of_runs))),
                *(f"{1 / B:.3f}", f"{smallest:.3f}", f"{largest:.3f}", *(f"{d:.3f}" for d in deviations)),
                *(by_position, f"{rank:.2f} of {B}"),
            )
        )
    return Table(
        "How far attention's weights leave 1/B",
        "Each batch's smallest and largest weight, means over batches and seeds; the weights' root mean square "
        "deviation from 1/B in the first and in the last tenth of the run, means over seeds. By position: how much of "
        "the weights' variance about 1/B a task's position in its batch explains by itself (means over stretches of a "
        "hundred batches, so chance gives 1%). Which task stands where is drawn at random: 100% means that the weights "
        "say nothing of the tasks. Rank: by weight, of the task with the largest loss after adaptation; 1 weighs most.",
        (
            *("setting", "arm", "seeds", "1/B", "smallest weight", "largest weight", "deviation at first", "at last"),
            *("by position", "rank of the largest loss"),
        ),
        tuple(rows),
    )


def _mean_text(values: Sequence[float]) -> str:
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "undefined"
    ends = f" ({min(finite):+.3f} – {max(finite):+.3f})" if len(finite) > 1 else ""
    return f"{statistics.fmean(finite):+.3f}{ends}"


def settings_table(arms: Sequence[Arm]) -> Table:
    """What the arms' configs are: in the caption what all share, in the rows the rest."""
    names = list(dict.fromkeys(name for arm in arms for name in arm.settings))
    absent = object()
    shared = {n for n in names if len({repr(arm.settings.get(n, absent)) for arm in arms}) == 1} if arms else set()

    def text(arm: Arm, which: Iterable[str]) -> str:
        found = [(*n.split("."), arm.settings[n]) for n in which if n in arm.settings]
        return plain(_listed(f"{part if name == 'name' else name} {value}" for part, name, value in found))

    return Table(
        "Settings",
        "As in config.yaml, but for what belongs to a run or machine."
        + (f" The same in all: {text(arms[0], [n for n in names if n in shared])}." if shared else ""),
        ("setting", "arm", "seeds", "differs in"),
        tuple(
            (
                *(title(arm.setting), arm.label, _listed(str(run.seed) for run in arm.runs)),
                text(arm, [n for n in names if n not in shared]),
            )
            for arm in arms
        ),
        folded=True,
    )


def runs_table(arms: Sequence[Arm]) -> Table:
    """Every run that is in an arm."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            best = max(run.validations, key=lambda v: v.accuracy)
            accuracy = MISSING
            if run.result is not None:
                accuracy = f"{percent(run.result.accuracy)} ± {percent(run.result.half_width)}"
            rows.append(
                (
                    *(run.name, title(arm.setting), arm.label, str(run.seed), accuracy),
                    *(f"{percent(best.accuracy)} (iteration {best.iteration:,})", run.problem or ""),
                )
            )
    return Table(
        "Runs",
        "Test accuracy in % ± 95% over test tasks only; validation accuracy in % where it was best.",
        ("folder", "setting", "arm", "seed", "test accuracy", "best validation", "remark"),
        tuple(rows),
        folded=True,
    )


def left_out_table(unfinished: Sequence[Run], others: Sequence[tuple[str, str]]) -> Table:
    """Runs that are in no accuracy, and why."""
    rows = [(run.name, run.problem or "") for run in unfinished if run.problem is not None]
    return Table(
        "Left out",
        "Run folders that were found, but are in no accuracy above. Finished runs that are not judged are still in the "
        "figures.",
        ("folder", "left out because"),
        (*rows, *others),
    )
