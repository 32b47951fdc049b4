"""A table of the report, and the format of its numbers."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metaheed.running.statistics import t_interval
from metaheed.studies.report.arms import Arm

MISSING = "—"


@dataclass(frozen=True)
class Table:
    """A table whose cells are text. A newline in a cell is shown as a line break."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    """Whether the page hides the table until the reader opens it: for long tables that are seldom read."""


def percent(share: float) -> str:
    """A share in [0, 1] in per cent, without the sign."""
    return f"{100 * share:.2f}"


def points(difference: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * difference:+.2f}"


def count(number: int, what: str) -> str:
    """A number with its noun, in the plural unless the number is 1."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def mean_accuracy(arm: Arm) -> str:
    """The mean accuracy over seeds with its interval and the number of seeds; without interval for a single seed."""
    results = [*arm.results.values()]
    if not results:
        return MISSING
    if len(results) == 1:
        return f"{percent(results[0].accuracy)} (1 seed)"
    mean, half_width = t_interval([r.accuracy for r in results])
    return f"{percent(mean)} ± {percent(half_width)} ({len(results)} seeds)"


def few_seeds(seeds: Iterable[int]) -> str:
    """An explanation of wide intervals if any of the numbers of seeds is 2 or 3; empty otherwise."""
    few = sorted({n for n in seeds if n in (2, 3)})
    said = {
        2: "An interval over two seeds is always wide: Student's t with one degree of freedom takes 12.7 standard "
        "errors to each side, compared with 4.3 for three seeds and 2 for many.",
        3: "An interval over three seeds takes 4.3 standard errors to each side (Student's t with two degrees of "
        "freedom), compared with 2 for many seeds.",
    }
    return f" {said[few[0]]}" if few else ""


def listed(words: Iterable[str]) -> str:
    """Join words with commas."""
    return ", ".join(words)


def p_text(p: float | None) -> str:
    """A p-value with three decimal places."""
    return MISSING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _range(values: Sequence[float], places: int) -> str:
    texts = [f"{v:,.{places}f}" for v in (statistics.median(values), min(values), max(values))]
    return texts[0] if len({*texts}) == 1 else f"{texts[0]} ({texts[1]} – {texts[2]})"


def _ratio(values: Sequence[float], base: Sequence[float]) -> str:
    return f"{statistics.median(values) / statistics.median(base):.2f}" if values and base else MISSING
