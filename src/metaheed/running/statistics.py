"""Confidence intervals and tests of mean accuracies.

SciPy is imported inside the functions that need it, so that importing metaheed stays quick. Only `scipy.special` is
used, because `scipy.stats`, whose `t` computes the same values, takes several times as long to import.
"""

import math
from collections.abc import Sequence

import numpy as np


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean of n values and the half-width 1.96·s/√n of its 95% interval, where s is the sample standard deviation.

    The half-width is infinite if n = 1.
    """
    array = np.asarray(values, dtype=np.float64)
    half_width = 1.96 * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.inf
    return float(array.mean()), float(half_width)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of n ≥ 2 values and the half-width of its 95% interval by Student's t distribution."""
    from scipy.special import stdtrit

    mean, error = _mean_and_error(values)
    return mean, float(stdtrit(len(values) - 1, 0.975)) * error


def t_test(values: Sequence[float]) -> float:
    """The two-sided p-value of Student's one-sample test of n ≥ 2 values against a mean of zero.

    If all values are equal, it is 1 where they are zero and 0 otherwise.
    """
    from scipy.special import stdtr

    mean, error = _mean_and_error(values)
    if error == 0:
        return 0.0 if mean else 1.0
    return 2 * float(stdtr(len(values) - 1, -abs(mean) / error))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of n ≥ 2 values and its standard error s/√n."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) / math.sqrt(len(array))
