"""Tables of attention weights, settings and runs."""

import math
import statistics
from collections.abc import Iterable, Sequence

from metaheed.studies.report.arms import (
    Arm,
    title,
)
from metaheed.studies.report.measures import INPUTS, AttentionLog
from metaheed.studies.report.reading import Run, plain
from metaheed.studies.report.table import MISSING, Table, listed, percent


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
        "Pearson's correlation. Within batches: over the tasks of each batch, then averaged over batches. Pooled: over "
        "the tasks of all batches together. Means over seeds (smallest – largest). Batches in which an input or the "
        "weights are the same for all tasks have no correlation and are skipped. Apart from position: pooled, after "
        "the mean of each position over a hundred batches is subtracted from the weights, and the mean of each batch "
        "from the input; if position explains most of the variance of the weights, the other correlations are small. "
        "First and last tenth: the same over these parts of the run. Correlations in the first tenth are due to the "
        "random start of the attention module, so only what changes by the last tenth was learned.",
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


def legend_table(arms: Sequence[Arm]) -> Table:
    """The full names of the arms that have a numbered name."""
    return Table(
        "What the numbered names stand for",
        "Options that are not the defaults are in round brackets; what tells arms of one name apart is in square ones.",
        ("setting", "arm", "stands for"),
        tuple((title(arm.setting), arm.label, arm.described) for arm in arms if arm.described),
    )


def settings_table(arms: Sequence[Arm]) -> Table:
    """The settings of all arms: those that all share in the caption, the others in the rows."""
    names = list(dict.fromkeys(name for arm in arms for name in arm.settings))
    absent = object()
    shared = {n for n in names if len({repr(arm.settings.get(n, absent)) for arm in arms}) == 1} if arms else set()

    def text(arm: Arm, which: Iterable[str]) -> str:
        found = [(*n.split("."), arm.settings[n]) for n in which if n in arm.settings]
        return plain(listed(f"{part if name == 'name' else name} {value}" for part, name, value in found))

    return Table(
        "Settings",
        "As in config.yaml, without the options of one run or machine."
        + (f" The same in all: {text(arms[0], [n for n in names if n in shared])}." if shared else ""),
        ("setting", "arm", "seeds", "differs in"),
        tuple(
            (
                *(title(arm.setting), arm.label, listed(str(run.seed) for run in arm.runs)),
                text(arm, [n for n in names if n not in shared]),
            )
            for arm in arms
        ),
        folded=True,
    )


def runs_table(arms: Sequence[Arm]) -> Table:
    """Every run of every arm."""
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
    """Runs that are left out of the accuracies, and the reasons."""
    rows = [(run.name, run.problem or "") for run in unfinished if run.problem is not None]
    return Table(
        "Left out",
        "Run folders that were found but are left out of the accuracies above. Finished runs that are not judged are "
        "still in the figures.",
        ("folder", "left out because"),
        (*rows, *others),
    )
