"""Indices of inequality over the losses of a meta-batch (Jamal, Qi: Task Agnostic Meta-Learning, CVPR 2019).

Legend: M tasks with losses ℓ_i ≥ 0 and mean ℓ̄; x_i = ℓ_i/ℓ̄.

    theil                   (1/M) Σ x_i ln x_i
    generalized-entropy a   Σ (x_i^a − 1) / (M a (a−1));  a→1: Theil;  a→0: −(1/M) Σ ln x_i
    atkinson ε              1 − ((1/M) Σ x_i^{1−ε})^{1/(1−ε)};  ε→1: 1 − (Π x_i)^{1/M}
    gini                    Σ_i Σ_j |ℓ_i − ℓ_j| / (2 M Σ ℓ_i)
    log-variance            (1/M) Σ (ln ℓ_i − mean ln ℓ)²

All are 0 if the losses are equal, and none changes if all losses are multiplied by the same number.
"""

import math

import torch
from torch import Tensor
from torch.func import grad

from metaheed.config import EQUITY_PARAMETERS, EquityConfig, check_equity_parameter


def inequality(losses: Tensor, index: str = EquityConfig.equity_index, parameter: float | None = None) -> Tensor:
    """I({ℓ_i}), 0-d in the losses' dtype; differentiable. It is computed in float64.

    Logarithms and powers need positive losses: a loss below 1e-12, or below 1e-12 of the mean, is replaced by that
    floor.

    Args:
        losses: (M,), not negative.
        index: a key of EQUITY_PARAMETERS.
        parameter: a of generalized-entropy, ε > 0 of atkinson; the index's own default if None.

    Raises:
        ConfigError: the index is unknown, or does not take the parameter.
        ValueError: the losses are not floating-point numbers of shape (M,), M ≥ 1, or one is negative.
    """
    check_equity_parameter(index, parameter)
    if losses.dim() != 1 or not len(losses) or not losses.is_floating_point():
        raise ValueError(f"losses are {losses.dtype} {tuple(losses.shape)}, but they must be floating-point (M,)")
    if bool((losses.detach() < 0).any()):
        raise ValueError("a loss is negative, but inequality is defined for losses of at least 0")
    return _inequality(losses.double(), index, parameter).to(losses.dtype)


def equity_coefficients(
    losses: Tensor, index: str = EquityConfig.equity_index, parameter: float | None = None
) -> Tensor:
    """c_i = ∂I/∂ℓ_i, (M,): how the inequality changes with each loss. Arguments and errors as for `inequality`.

    For a loss below the floor it is the derivative at the floor. It is limited to the largest number of the losses'
    dtype.
    """
    inequality(losses, index, parameter)  # for its checks
    return cross_entropy_coefficients(losses, index, parameter)


def cross_entropy_coefficients(losses: Tensor, index: str, parameter: float | None) -> Tensor:
    """`equity_coefficients` without its checks, for losses that cannot be negative and settings that have been checked.

    No validation and so no host synchronisation: safe in a CUDA graph.
    """
    coefficients: Tensor = grad(_inequality)(losses.detach().double(), index, parameter)
    largest = torch.finfo(losses.dtype).max
    return coefficients.clamp(-largest, largest).to(losses.dtype)


def _inequality(losses: Tensor, index: str, parameter: float | None) -> Tensor:
    return _index(_floored(losses), index, EQUITY_PARAMETERS[index] if parameter is None else parameter)


def _floored(losses: Tensor) -> Tensor:
    floor = (1e-12 * losses.detach().mean()).clamp(min=1e-12)
    return losses + (floor - losses).clamp(min=0).detach()  # clamping the losses would make the derivative zero


def _index(losses: Tensor, index: str, parameter: float | None) -> Tensor:
    x = losses / losses.mean()
    if index == "gini":
        return (x.unsqueeze(0) - x.unsqueeze(1)).abs().mean() / 2
    if index == "log-variance":
        return (x.log() - x.log().mean()).square().mean()
    if index == "theil":
        return _generalized_entropy(x, 1.0)
    assert parameter is not None  # the remaining two indices have a parameter
    return _generalized_entropy(x, parameter) if index == "generalized-entropy" else _atkinson(x, parameter)


def _generalized_entropy(x: Tensor, a: float) -> Tensor:
    log = x.log()
    if a == 1:
        return (x * log).mean()
    if a == 0:
        return -log.mean()
    # Since Σ (x_i − 1) = 0, both numerators equal Σ (x_i^a − 1). Each is accurate near one of the limits a → 1, a → 0.
    numerator = x * torch.expm1((a - 1) * log) if a > 0.5 else torch.expm1(a * log)
    return numerator.mean() / (a * (a - 1))


def _atkinson(x: Tensor, epsilon: float) -> Tensor:
    k, log = 1 - epsilon, x.log()
    if k == 0:
        return -torch.expm1(log.mean())
    if abs(k) < 0.5:  # near the limit, where plain powers would cancel
        mean = torch.log1p(torch.expm1(k * log).mean()) / k
    else:  # far from it, where plain powers may overflow
        mean = (torch.logsumexp(k * log, 0) - math.log(len(x))) / k
    return -torch.expm1(mean)
