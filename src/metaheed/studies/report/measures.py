"""The numbers behind tables and figures: adjusted p-values, curves over seeds, what attention did.

Shapes: n batches, B tasks in each.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metaheed.errors import RunError, brief, shown
from metaheed.running.log import stream_lines
from metaheed.studies.report.reading import Validation
from metaheed.types import TaskInfo

_WORDS = {
    "grad_norm": "gradient norm",
    "query_loss": "loss after adaptation",
    "query_accuracy": "accuracy after adaptation",
    "loss_ratio": "loss after / before",
}
_ALWAYS = ("query_loss", "query_accuracy", "initial_loss", "grad_norm")  # in every log


def inputs_of(fields: Sequence[str]) -> dict[str, str]:
    """What a reader calls each input of attention, given the fields of TaskInfo; the loss before is in the ratio."""
    names = [*_WORDS, *(name for name in fields if name not in _ALWAYS)]
    return {name: _WORDS.get(name, name.replace("_", " ")) for name in names}


INPUTS = inputs_of(TaskInfo._fields)
"""Attention's inputs and what a reader calls them."""
_POINTS = 200  # of a curve: a figure has no more pixels to show
_RANK_POINTS = 50  # of a rank, which jumps from batch to batch
_STRETCH = 20  # batches in a stretch at least, where there are enough for ten
_AT_ONCE = 1000  # batches: bounds memory
_POSITION_STRETCH = 100  # batches
_ROUNDING = 1e-9  # of a mean of accuracies, each of which is logged to a millionth


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given.

    The k-th smallest of m is multiplied by m − k + 1. The result is at most 1 and at least the one before it.
    """
    # Written out because SciPy has no Holm, and statsmodels, which has one, would bring pandas.
    m, largest = len(p_values), 0.0
    adjusted = [0.0] * m
    for k, index in enumerate(sorted(range(m), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (m - k) * p_values[index]))
        adjusted[index] = largest
    return adjusted


class Curve(NamedTuple):
    """Something against iteration; (k,) each."""

    iterations: np.ndarray
    values: np.ndarray


def mean_curve(runs: Sequence[Sequence[Validation]]) -> Curve:
    """Mean validation accuracy over seeds, at the iterations at which all were validated."""
    tables = [{v.iteration: v.accuracy for v in run} for run in runs]
    common = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    means = [sum(table[i] for table in tables) / len(tables) for i in common]
    return Curve(np.array(common, dtype=np.int64), np.array(means, dtype=np.float64))


def first_reaching(curve: Curve, threshold: float) -> int | None:
    """The first iteration at which a curve is at the threshold or above, but for rounding; none: it never is."""
    above = np.flatnonzero(curve.values >= threshold - _ROUNDING)
    return int(curve.iterations[above[0]]) if len(above) else None


class Band(NamedTuple):
    """Something of every batch, in stretches of iterations; (k,) each."""

    iterations: np.ndarray
    """The middle of each stretch."""
    mean: np.ndarray
    low: np.ndarray
    """The 5th percentile of its batches."""
    high: np.ndarray
    """The 95th."""


def band(iterations: np.ndarray, values: np.ndarray, most: int = _POINTS) -> Band:
    """Summarise a value a batch in stretches of equal length, `most` at most."""
    n = len(values)
    stretches = np.array_split(np.arange(n), min(most, max(n // _STRETCH, min(n, 10))))
    parts = [values[s] for s in stretches]
    low, high = (np.array([np.percentile(part, q) for part in parts]) for q in (5, 95))
    middle = np.array([iterations[s].mean() for s in stretches])
    return Band(middle, np.array([part.mean() for part in parts]), low, high)


def mean_band(bands: Sequence[Band]) -> Band:
    """The mean over runs of the same length."""
    return Band(*(np.mean([b[i] for b in bands], axis=0) for i in range(len(Band._fields))))


class Correlation(NamedTuple):
    """Of one input with the weights, Pearson's."""

    per_batch: float
    """Over the tasks of each batch, then averaged over batches; NaN: in no batch is it defined."""
    batches: int
    """Batches averaged over."""
    skipped: int
    """Batches in which it is undefined: input or weights are the same for all tasks, or the input was not logged."""
    pooled: float
    """Over the tasks of all batches together; NaN: undefined."""


class Ends(NamedTuple):
    """Something of the first and the last tenth of a run, a stretch of about a hundred batches at least."""

    first: float
    last: float


class AttentionLog(NamedTuple):
    """What the weights of a run did."""

    largest: Band
    """The largest weight of each batch."""
    smallest: Band
    """The smallest."""
    rank: Band
    """The rank by weight of the task with the largest loss after adaptation: 1, it weighs most; B, least. Tasks of the
    same weight share the mean of their ranks."""
    correlations: dict[str, Correlation]
    """Input -> its correlation with the weights."""
    tasks: int
    """B."""
    batches: int
    """Of how many batches."""
    by_position: float
    """Share, in [0, 1], of the weights' variance about 1/B that a task's position in its batch explains: where the
    weights go by position, the same place weighs the same in batch after batch, whatever task stands there. Means are
    taken over stretches of about a hundred batches, so chance gives 1%. NaN: all weights are 1/B."""
    apart_from_position: dict[str, float]
    """Input -> its pooled correlation with what position leaves of the weights: each position's mean over a stretch is
    taken off the weights, and each batch's mean off the input. What attention does with a task where most of its
    weights' variance goes by position, which the other correlations drown in. NaN: undefined."""
    deviation: Ends
    """Of the weights from 1/B, root mean square."""
    apart_at_ends: dict[str, Ends]
    """Input -> `apart_from_position`. What a run begins with was drawn with δ, not learned."""


def attention_log(file: Path) -> AttentionLog:
    """Go through a run's tasks.jsonl once, a thousand batches at a time.

    Raises:
        RunError: it is missing, empty or damaged.
    """
    iterations: list[int] = []
    largest: list[np.ndarray] = []
    smallest: list[np.ndarray] = []
    rank: list[np.ndarray] = []
    pooled = {name: _Pooled() for name in INPUTS}
    sums, counts, skipped = (dict.fromkeys(INPUTS, 0.0), dict.fromkeys(INPUTS, 0), dict.fromkeys(INPUTS, 0))
    B = 0
    by_position = 0.0
    of_stretch: list[_Stretch] = []
    for chunk, inputs, weights in _chunks(file):
        iterations += chunk
        B = weights.shape[1]
        off = weights - 1 / B
        stretches = max(1, len(off) // _POSITION_STRETCH)
        parts = np.array_split(np.arange(len(off)), stretches)
        of_position = np.concatenate([off[p].mean(axis=0, keepdims=True).repeat(len(p), 0) for p in parts])
        by_position += float((of_position**2).sum())
        of_stretch += [_Stretch(float((off[p] ** 2).sum()), off[p].size, {n: _Pooled() for n in INPUTS}) for p in parts]
        largest.append(weights.max(axis=1))
        smallest.append(weights.min(axis=1))
        rank.append(ranks(inputs["query_loss"], weights))
        for name, values in inputs.items():
            r = batch_correlations(values, weights)
            defined = np.isfinite(r)
            sums[name] += float(r[defined].sum())
            counts[name] += int(defined.sum())
            skipped[name] += int((~defined).sum())
            pooled[name].add(values.ravel(), weights.ravel())
            with np.errstate(all="ignore"):
                of_task = values - values.mean(axis=1, keepdims=True)
            for stretch, p in zip(of_stretch[-stretches:], parts, strict=True):
                stretch.apart[name].add(of_task[p].ravel(), (off - of_position)[p].ravel())
    if not iterations:
        raise RunError(f"{file} is empty: it holds the weights of no batch")
    steps = np.array(iterations, dtype=np.float64)
    bands = [band(steps, np.concatenate(parts)) for parts in (largest, smallest)]
    bands.append(band(steps, np.concatenate(rank), _RANK_POINTS))
    correlations = {
        name: Correlation(
            sums[name] / counts[name] if counts[name] else math.nan, counts[name], skipped[name], pooled[name].value()
        )
        for name in INPUTS
    }
    variance = sum(stretch.squares for stretch in of_stretch)
    uniform = variance <= len(iterations) * B * 1e-12  # weights are float32
    share = math.nan if uniform else by_position / variance

    def apart(name: str, stretches: Sequence[_Stretch]) -> float:
        return math.nan if uniform else _merged([s.apart[name] for s in stretches]).value()

    tenth = max(1, len(of_stretch) // 10)
    ends = of_stretch[:tenth], of_stretch[-tenth:]
    deviation = Ends(*(math.sqrt(sum(s.squares for s in end) / sum(s.weights for s in end)) for end in ends))
    left = {name: apart(name, of_stretch) for name in INPUTS}
    at_ends = {name: Ends(*(apart(name, end) for end in ends)) for name in INPUTS}
    return AttentionLog(bands[0], bands[1], bands[2], correlations, B, len(iterations), share, left, deviation, at_ends)


def ranks(losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n, B) each -> (n,): the rank by weight, 1 the largest, of each batch's task with the largest loss."""
    hardest = np.argmax(losses, axis=1)
    own = np.take_along_axis(weights, hardest[:, None], axis=1)
    above, same = (weights > own).sum(axis=1), (weights == own).sum(axis=1)
    ranked: np.ndarray = 1 + above + (same - 1) / 2
    return ranked


def batch_correlations(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n, B) each -> (n,): Pearson's correlation within each batch; NaN where a side is constant or not finite."""
    with np.errstate(all="ignore"):
        constant = (np.ptp(values, axis=1) == 0) | (np.ptp(weights, axis=1) == 0)
        x, w = (side - side.mean(axis=1, keepdims=True) for side in (values, weights))
        spread = np.sqrt((x**2).sum(axis=1) * (w**2).sum(axis=1))
        r = (x * w).sum(axis=1) / spread
    r[constant | ~np.isfinite(r) | ~np.isfinite(spread)] = np.nan
    return np.asarray(r)


class _Pooled:
    """Pearson's correlation of pairs that come in parts: Chan, Golub & LeVeque's (1979) merging of moments."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = np.zeros(2)
        self._moments = np.zeros((2, 2))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        finite = np.isfinite(x) & np.isfinite(y)
        part = _Pooled()
        pairs = np.stack([x[finite], y[finite]])  # (2, m)
        part._count = pairs.shape[1]
        if part._count:
            with np.errstate(all="ignore"):  # what is too large to be squared has no correlation in the end
                part._mean = pairs.mean(axis=1)
                centred = pairs - part._mean[:, None]
                part._moments = centred @ centred.T
            self.merge(part)

    def merge(self, part: "_Pooled") -> None:
        total = self._count + part._count
        if not part._count:
            return
        with np.errstate(all="ignore"):
            apart = part._mean - self._mean
            self._moments = self._moments + part._moments + np.outer(apart, apart) * (self._count * part._count / total)
            self._mean = self._mean + apart * (part._count / total)
        self._count = total

    def value(self) -> float:
        (xx, xy), (_, yy) = self._moments
        return float(xy / (math.sqrt(xx) * math.sqrt(yy))) if 0 < xx < math.inf and 0 < yy < math.inf else math.nan


class _Stretch(NamedTuple):
    """About a hundred batches."""

    squares: float
    """Of the weights' distances from 1/B, their sum."""
    weights: int
    """How many."""
    apart: dict[str, _Pooled]
    """Input -> its moments with what position leaves of the weights."""


def _merged(parts: Sequence[_Pooled]) -> _Pooled:
    whole = _Pooled()
    for part in parts:
        whole.merge(part)
    return whole


def _chunks(file: Path) -> Iterator[tuple[list[int], dict[str, np.ndarray], np.ndarray]]:
    """Iterations, attention's inputs and the weights of a thousand batches at a time."""
    names = ("weights", *_ALWAYS, *(name for name in INPUTS if name not in _WORDS))
    iterations: list[int] = []
    columns: dict[str, list[list[float]]] = {name: [] for name in names}

    def packed() -> tuple[list[int], dict[str, np.ndarray], np.ndarray]:
        table = {name: np.array(rows, dtype=np.float64) for name, rows in columns.items()}
        shapes = {array.shape for array in table.values()}
        if len(shapes) > 1 or len(next(iter(shapes))) != 2:
            raise ValueError("its columns have different lengths")
        if not (np.isfinite(table["weights"]).all() and np.isfinite(table["query_loss"]).all()):
            raise ValueError("a weight or a loss is not a number")
        if table["weights"].min() < 0 or table["weights"].max() > 1:
            raise ValueError("a weight is not between 0 and 1")
        with np.errstate(all="ignore"):
            ratio = table["query_loss"] / table.pop("initial_loss")
        inputs = {name: table[name] for name in INPUTS if name in table} | {"loss_ratio": ratio}
        return [*iterations], inputs, table["weights"]

    tasks = 0
    try:
        for line in stream_lines(file):
            B = len(line["weights"])
            if B == 0 or tasks not in (0, B):
                raise ValueError(f"batches of {tasks} and of {B} tasks")
            tasks = B
            if not 0 < line["iteration"] <= 10**9:
                raise ValueError(f"iteration {shown(line['iteration'])}")
            iterations.append(int(line["iteration"]))
            for name in names:
                # Inputs that came later are not in earlier logs.
                values = line[name] if name == "weights" or name in _ALWAYS else line.get(name, [None] * B)
                columns[name].append([math.nan if v is None else v for v in values])
            if len(iterations) == _AT_ONCE:
                yield packed()
                iterations.clear()
                for rows in columns.values():
                    rows.clear()
        if iterations:
            yield packed()
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RunError(f"{file} is damaged: {brief(repr(error), 300)}") from error
