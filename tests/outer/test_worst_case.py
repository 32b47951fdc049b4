"""TR-MAML's weights against a projection found by bisection, and its limits."""

import pytest
import torch

from metaheed.errors import ConfigError
from metaheed.outer import OuterState, Tools, sgd, worst_case
from metaheed.rules.worst_case import onto_simplex
from metaheed.types import Episode, Params, TaskInfo


def by_bisection(values: torch.Tensor) -> torch.Tensor:
    """The projection onto the simplex: max(v − τ, 0) for the τ at which that sums to 1, which is searched for."""
    low, high = float(values.min()) - 1, float(values.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (values - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (values - low).clamp(min=0)


@pytest.mark.parametrize("size", [1, 2, 5, 40])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_projection(size: int, scale: float) -> None:
    values = scale * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    found = onto_simplex(values)
    torch.testing.assert_close(found, by_bisection(values), rtol=1e-9, atol=1e-9)
    assert found.min() >= 0
    assert found.sum().item() == pytest.approx(1)


def _weights(losses: list[float], ascent_rate: float) -> tuple[torch.Tensor, Params]:
    """The weights that the rule gives to tasks of these losses whose gradients are the unit vectors, and its θ'."""
    count = len(losses)
    loss = torch.tensor(losses, dtype=torch.float64)
    info = TaskInfo(loss, torch.zeros_like(loss), torch.zeros_like(loss), torch.zeros_like(loss))
    gradients = {"w": torch.eye(count, dtype=torch.float64)}
    nothing = torch.empty(0)
    batch = Episode(nothing, nothing, nothing, nothing)
    tools = Tools(
        lambda meta, _: (gradients, info), lambda *_: (gradients, loss), sgd(1.0), lambda t: batch, lambda t: batch
    )
    meta = {"w": torch.zeros(count, dtype=torch.float64)}
    state, record = worst_case(ascent_rate).step(OuterState(meta, sgd(1.0).init(meta), {}), 0, tools)
    return record.weights, state.meta


def test_the_outer_step_is_on_the_weighted_gradients() -> None:
    weights, after = _weights([1.0, 2.0, 1.5], 0.3)
    # By hand: 1/3 + 0.3 ℓ = (0.6333, 0.9333, 0.7833), whose sum exceeds 1 by 1.35, 0.45 for each of the three.
    torch.testing.assert_close(weights, torch.tensor([0.55, 1.45, 1.0], dtype=torch.float64) / 3)
    torch.testing.assert_close(after["w"], -weights)


def test_a_large_rate_is_the_worst_task_and_a_small_one_the_mean() -> None:
    assert _weights([1.0, 2.0, 1.5], 1e3)[0].tolist() == [0, 1, 0]
    torch.testing.assert_close(_weights([1.0, 2.0, 1.5], 1e-9)[0], torch.full((3,), 1 / 3, dtype=torch.float64))


def test_equal_losses_weigh_the_same() -> None:
    torch.testing.assert_close(_weights([0.7] * 4, 5.0)[0], torch.full((4,), 0.25, dtype=torch.float64))


def test_a_rate_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="ascent"):
        worst_case(0.0)
