"""Intervals and tests of mean accuracies."""

import math
from collections.abc import Sequence

import numpy as np


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and the half-width 1.96·s/√n of its 95% interval, s the sample standard deviation; infinite for n = 1."""
    array = np.asarray(values, dtype=np.float64)
    half_width = 1.96 * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.inf
    return float(array.mean()), float(half_width)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95% Student interval, n at least 2."""
    n = len(values)
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), t_quantile(0.975, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)


def t_test(values: Sequence[float]) -> float:
    """Two-sided p-value of Student's one-sample test that the mean is zero, n at least 2."""
    n = len(values)
    array = np.asarray(values, dtype=np.float64)
    mean, error = abs(float(array.mean())), float(array.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return 0.0 if mean else 1.0
    return 2 * (1 - t_cdf(mean / error, n - 1))


def t_quantile(p: float, freedom: int) -> float:
    """The p-quantile (0.5 ≤ p < 1) of Student's t with whole degrees of freedom, by bisection of `t_cdf`."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, freedom: int) -> float:
    """P(T ≤ t) for t ≥ 0: Abramowitz & Stegun 26.7.3 (odd) and 26.7.4 (even degrees of freedom)."""
    angle = math.atan(t / math.sqrt(freedom))
    term, total = 1.0, 0.0
    first = 1 if freedom % 2 else 0
    if first:
        term = math.cos(angle)
    for k in range(first, freedom - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    central = 2 / math.pi * (angle + math.sin(angle) * total) if first else math.sin(angle) * total
    return 0.5 + central / 2
