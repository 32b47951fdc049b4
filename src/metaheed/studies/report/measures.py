"""Compute the numbers behind tables and figures: adjusted p-values, curves over seeds, statistics of attention weights.

In shapes, n is the number of batches and B the number of tasks in each.
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
    """Input of attention -> its name on the page, given the fields of TaskInfo.

    The loss before adaptation is no input of its own: attention sees the ratio of the losses after and before.
    """
    names = [*_WORDS, *(name for name in fields if name not in _ALWAYS)]
    return {name: _WORDS.get(name, name.replace("_", " ")) for name in names}


INPUTS = inputs_of(TaskInfo._fields)
"""Input of attention -> its name on the page."""
_POINTS = 200  # maximum number of points in a curve; a figure cannot show more
_RANK_POINTS = 50  # the same for ranks, which vary more from batch to batch
_STRETCH = 20  # minimum number of batches in a stretch, if there are enough for ten stretches
_AT_ONCE = 1000  # batches read at a time, which limits memory
_POSITION_STRETCH = 100  # batches over which the mean weight of a position is taken
_ROUNDING = 1e-9  # tolerance for means of accuracies; the log has six decimal places


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given.

    The k-th smallest of m is multiplied by m − k + 1. The result is at most 1, and at least the
    adjusted value of the next smaller p-value.
    """
    # Written out because SciPy has no Holm, and statsmodels, which has one, would bring pandas.
    m, largest = len(p_values), 0.0
    adjusted = [0.0] * m
    for k, index in enumerate(sorted(range(m), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (m - k) * p_values[index]))
        adjusted[index] = largest
    return adjusted


class Curve(NamedTuple):
    """A quantity at k iterations; both arrays have shape (k,)."""

    iterations: np.ndarray
    values: np.ndarray


def mean_curve(runs: Sequence[Sequence[Validation]]) -> Curve:
    """Mean validation accuracy over runs, at the iterations at which all of them were validated."""
    tables = [{v.iteration: v.accuracy for v in run} for run in runs]
    common = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    means = [sum(table[i] for table in tables) / len(tables) for i in common]
    return Curve(np.array(common, dtype=np.int64), np.array(means, dtype=np.float64))


def first_reaching(curve: Curve, threshold: float) -> int | None:
    """The first iteration at which a curve reaches the threshold, up to rounding; None if it never does."""
    above = np.flatnonzero(curve.values >= threshold - _ROUNDING)
    return int(curve.iterations[above[0]]) if len(above) else None


class Band(NamedTuple):
    """A quantity of each batch, summarised over k stretches of iterations; all arrays have shape (k,)."""

    iterations: np.ndarray
    """The mean iteration of each stretch."""
    mean: np.ndarray
    low: np.ndarray
    """The 5th percentile of the batches of a stretch."""
    high: np.ndarray
    """The 95th percentile."""


def band(iterations: np.ndarray, values: np.ndarray, most: int = _POINTS) -> Band:
    """Summarise one value per batch, (n,), over at most `most` stretches of equal length."""
    n = len(values)
    stretches = np.array_split(np.arange(n), min(most, max(n // _STRETCH, min(n, 10))))
    parts = [values[s] for s in stretches]
    low, high = (np.array([np.percentile(part, q) for part in parts]) for q in (5, 95))
    middle = np.array([iterations[s].mean() for s in stretches])
    return Band(middle, np.array([part.mean() for part in parts]), low, high)


def mean_band(bands: Sequence[Band]) -> Band:
    """The mean of the bands of several runs of the same length."""
    return Band(*(np.mean([b[i] for b in bands], axis=0) for i in range(len(Band._fields))))


class Correlation(NamedTuple):
    """Pearson's correlation of one input of attention with the weights."""

    per_batch: float
    """Over the tasks of each batch, then averaged over batches; NaN if it is defined in no batch."""
    batches: int
    """Number of batches that are averaged."""
    skipped: int
    """Number of batches without a correlation: input or weights are constant, or the input was not logged."""
    pooled: float
    """Over the tasks of all batches together; NaN if undefined."""


class Ends(NamedTuple):
    """A quantity over the first and over the last tenth of a run, each at least one stretch of about 100 batches."""

    first: float
    last: float


class AttentionLog(NamedTuple):
    """Statistics of the attention weights of a run."""

    largest: Band
    """The largest weight in each batch."""
    smallest: Band
    """The smallest weight in each batch."""
    rank: Band
    """Rank, by weight, of the task with the largest loss after adaptation in each batch. Rank 1 is the largest weight
    and B the smallest; tasks of equal weight share the mean of their ranks."""
    correlations: dict[str, Correlation]
    """Input -> its correlation with the weights."""
    tasks: int
    """B, the number of tasks in a batch."""
    batches: int
    """Number of batches in the log."""
    by_position: float
    """Share, in [0, 1], of the weights' variance about 1/B that is explained by a task's position in its batch. It is 1
    if every position keeps its weight from batch to batch, whichever task is there. The mean of a position is over
    stretches of about 100 batches, so weights independent of position give about 1%. NaN if all weights are 1/B."""
    apart_from_position: dict[str, float]
    """Input -> its pooled correlation with the weights after the effect of position is removed: the mean of each
    position over a stretch is subtracted from the weights, and the mean of each batch from the input. It shows how the
    weights depend on the tasks even if most of their variance is due to position. NaN if undefined."""
    deviation: Ends
    """Root mean square deviation of the weights from 1/B."""
    apart_at_ends: dict[str, Ends]
    """Input -> `apart_from_position` at both ends of the run. The first is due to the random initial δ."""


def attention_log(file: Path) -> AttentionLog:
    """Summarise the attention weights in a run's tasks.jsonl, which is read once, a thousand batches at a time.

    Raises:
        RunError: the file is missing, empty or damaged.
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
    """The rank, by weight, of the task with the largest loss in each batch; rank 1 is the largest weight.

    Both arguments have shape (n, B); the result has shape (n,).
    """
    hardest = np.argmax(losses, axis=1)
    own = np.take_along_axis(weights, hardest[:, None], axis=1)
    above, same = (weights > own).sum(axis=1), (weights == own).sum(axis=1)
    ranked: np.ndarray = 1 + above + (same - 1) / 2
    return ranked


def batch_correlations(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's correlation within each batch; NaN if values or weights are constant or not finite.

    Both arguments have shape (n, B); the result has shape (n,).
    """
    with np.errstate(all="ignore"):
        constant = (np.ptp(values, axis=1) == 0) | (np.ptp(weights, axis=1) == 0)
        x, w = (side - side.mean(axis=1, keepdims=True) for side in (values, weights))
        spread = np.sqrt((x**2).sum(axis=1) * (w**2).sum(axis=1))
        r = (x * w).sum(axis=1) / spread
    r[constant | ~np.isfinite(r) | ~np.isfinite(spread)] = np.nan
    return np.asarray(r)


class _Pooled:
    """Pearson's correlation of pairs that arrive in parts, by merging moments (Chan, Golub & LeVeque 1979)."""

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
            with np.errstate(all="ignore"):  # values that overflow when squared give NaN in `value`
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
    """Sums over about 100 batches."""

    squares: float
    """Sum of the squared deviations of the weights from 1/B."""
    weights: int
    """Number of weights."""
    apart: dict[str, _Pooled]
    """Input -> its moments with the weights after the effect of position is removed."""


def _merged(parts: Sequence[_Pooled]) -> _Pooled:
    whole = _Pooled()
    for part in parts:
        whole.merge(part)
    return whole


def _chunks(file: Path) -> Iterator[tuple[list[int], dict[str, np.ndarray], np.ndarray]]:
    """Yield the iterations, inputs of attention (n, B) and weights (n, B) of at most a thousand batches at a time."""
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
                # Logs of earlier versions lack the inputs that were added later.
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
