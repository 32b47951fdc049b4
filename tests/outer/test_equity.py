import math

import pytest
import torch

from metaheed.config import EQUITY_PARAMETERS
from metaheed.errors import ConfigError
from metaheed.outer import equity_coefficients, inequality
from tests.reference import index_of_inequality

CASES: list[tuple[str, float | None]] = [
    *((index, None) for index in EQUITY_PARAMETERS),
    *(("generalized-entropy", a) for a in (-1.0, 0.0, 0.3, 0.999, 1.0, 1.001, 3.0)),
    *(("atkinson", e) for e in (0.1, 0.999, 1.0, 1.001, 1.6, 4.0)),
]
LOSSES = torch.tensor([0.4, 1.7, 0.9, 2.2, 0.05], dtype=torch.float64)


@pytest.mark.parametrize(("index", "parameter"), CASES)
def test_values_and_coefficients(index: str, parameter: float | None) -> None:
    torch.testing.assert_close(
        inequality(LOSSES, index, parameter), index_of_inequality(LOSSES, index, parameter), rtol=1e-10, atol=1e-11
    )
    at = LOSSES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(index_of_inequality(at, index, parameter), at)
    torch.testing.assert_close(equity_coefficients(LOSSES, index, parameter), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("index", "parameter"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_losses_have_none(index: str, parameter: float | None, dtype: torch.dtype) -> None:
    losses = torch.full((4,), 1.3, dtype=dtype)
    assert abs(float(inequality(losses, index, parameter))) < 1e-6
    assert float(equity_coefficients(losses, index, parameter).abs().max()) < 1e-6
    assert inequality(losses, index, parameter).dtype == dtype


@pytest.mark.parametrize(("index", "parameter"), CASES)
def test_a_common_factor_is_not_seen(index: str, parameter: float | None) -> None:
    torch.testing.assert_close(inequality(7.5 * LOSSES, index, parameter), inequality(LOSSES, index, parameter))


@pytest.mark.parametrize("limit", [("generalized-entropy", 0.0), ("generalized-entropy", 1.0), ("atkinson", 1.0)])
@pytest.mark.parametrize("away", [1e-4, -1e-4, 1e-8, -1e-8, 1e-13])
def test_limits_are_reached_without_cancellation(limit: tuple[str, float], away: float) -> None:
    index, at = limit
    near, there = inequality(LOSSES, index, at + away), inequality(LOSSES, index, at)
    torch.testing.assert_close(near, there, rtol=5 * abs(away) + 1e-12, atol=0)
    torch.testing.assert_close(
        equity_coefficients(LOSSES, index, at + away),
        equity_coefficients(LOSSES, index, at),
        rtol=200 * abs(away) + 1e-10,
        atol=1e-12,
    )


def test_known_values() -> None:
    two = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert float(inequality(two, "gini")) == 0.25
    assert float(inequality(two, "theil")) == pytest.approx((0.5 * math.log(0.5) + 1.5 * math.log(1.5)) / 2)
    assert float(inequality(two, "generalized-entropy")) == pytest.approx(0.125)  # half the squared variation
    assert float(inequality(two, "atkinson", 1.0)) == pytest.approx(1 - math.sqrt(3) / 2)
    assert float(inequality(two, "log-variance")) == pytest.approx((math.log(3) / 2) ** 2)


@pytest.mark.parametrize(("index", "parameter"), CASES)
def test_a_loss_of_zero_stays_finite(index: str, parameter: float | None) -> None:
    for dtype in (torch.float32, torch.float64):
        for values in ([0.0, 1.0, 2.0], [1e-30, 1.0, 1e3], [0.0, 0.0]):
            losses = torch.tensor(values, dtype=dtype)
            assert math.isfinite(float(inequality(losses, index, parameter)))
            assert bool(torch.isfinite(equity_coefficients(losses, index, parameter)).all())


@pytest.mark.parametrize(("index", "parameter"), CASES)
def test_losses_of_nothing_are_equal(index: str, parameter: float | None) -> None:
    for value in (0.0, 1e-40):
        for tasks in range(1, 65):
            c = equity_coefficients(torch.full((tasks,), value), index, parameter)
            assert float(c.abs().max()) < 1e-2


@pytest.mark.parametrize(("index", "parameter"), [("gini", None), ("generalized-entropy", 2.0)])
def test_a_loss_of_zero_has_its_one_sided_derivative(index: str, parameter: float | None) -> None:
    losses, h = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), 1e-6
    moved = losses + torch.tensor([h, 0, 0], dtype=torch.float64)
    slope = (inequality(moved, index, parameter) - inequality(losses, index, parameter)) / h
    assert float(equity_coefficients(losses, index, parameter)[0]) == pytest.approx(float(slope), rel=1e-4)


@pytest.mark.parametrize("epsilon", [2.0, 10.0])
def test_float32_is_as_exact_as_it_can_be(epsilon: float) -> None:
    losses = torch.tensor([1e-8, 1.0, 2.0, 1e3])
    exact = equity_coefficients(losses.double(), "atkinson", epsilon)
    torch.testing.assert_close(equity_coefficients(losses, "atkinson", epsilon).double(), exact, rtol=1e-6, atol=1e-12)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown index of inequality 'thiel': did you mean 'theil'"):
        inequality(LOSSES, "thiel")
    with pytest.raises(ConfigError, match=r"theil has no parameter"):
        inequality(LOSSES, "theil", 1.0)
    with pytest.raises(ConfigError, match=r"must be above 0"):
        inequality(LOSSES, "atkinson", 0.0)
    with pytest.raises(ValueError, match=r"must be floating-point"):
        inequality(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"negative"):
        equity_coefficients(torch.tensor([1.0, -1.0]))
