"""A table of the report, and how its numbers are written."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metaheed.running.statistics import t_interval
from metaheed.studies.report.arms import Arm

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


def few_seeds(seeds: Iterable[int]) -> str:
    """What is to be said of intervals over very few seeds; empty if there is none among these numbers of seeds."""
    few = sorted({n for n in seeds if n in (2, 3)})
    said = {
        2: "With two seeds an interval is wide whatever the runs are like: Student's t with one degree of freedom "
        "takes 12.7 standard errors to each side, where many seeds take 2; three seeds take 4.3.",
        3: "With three seeds an interval takes 4.3 standard errors to each side (Student's t with two degrees of "
        "freedom), where many seeds take 2.",
    }
    return f" {said[few[0]]}" if few else ""


def listed(words: Iterable[str]) -> str:
    """Words in a row, with commas between them."""
    return ", ".join(words)


def p_text(p: float | None) -> str:
    """A p-value to three places."""
    return MISSING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _range(values: Sequence[float], places: int) -> str:
    texts = [f"{v:,.{places}f}" for v in (statistics.median(values), min(values), max(values))]
    return texts[0] if len({*texts}) == 1 else f"{texts[0]} ({texts[1]} – {texts[2]})"


def _ratio(values: Sequence[float], base: Sequence[float]) -> str:
    return f"{statistics.median(values) / statistics.median(base):.2f}" if values and base else MISSING
