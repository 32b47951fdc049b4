import pytest
import torch

from metaheed.errors import ConfigError
from metaheed.networks.derivatives import value_and_pullback
from metaheed.outer import adam, clipped, sgd
from metaheed.types import Params


def _params(*values: float) -> Params:
    return {"a": torch.tensor(values, dtype=torch.float64)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_is_pytorchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = {n: torch.randn(3, 2, generator=generator, dtype=dtype) for n in "ab"}
    theirs = {n: p.clone().requires_grad_() for n, p in start.items()}
    optimizer = torch.optim.Adam(theirs.values(), lr=0.02, betas=(0.8, 0.95), eps=1e-6)
    ours = adam(0.02, 0.8, 0.95, 1e-6)
    meta, state = start, ours.init(start)
    for _ in range(12):
        gradient = {n: torch.randn(3, 2, generator=generator, dtype=dtype) for n in "ab"}
        for n, p in theirs.items():
            p.grad = gradient[n].clone()
        optimizer.step()
        meta, state = ours.step(meta, state, gradient)
    for n in start:
        torch.testing.assert_close(meta[n], theirs[n].detach())


def test_steps_are_pure() -> None:
    for optimizer in (sgd(0.1), adam(0.1), clipped(adam(0.1), 0.5)):
        meta, gradient = _params(1.0, 2.0), _params(3.0, 4.0)
        state = optimizer.init(meta)
        before = {n: leaf.clone() for n, leaf in state.items()}
        first, _ = optimizer.step(meta, state, gradient)
        again, _ = optimizer.step(meta, state, gradient)
        assert torch.equal(first["a"], again["a"])
        assert torch.equal(meta["a"], torch.tensor([1.0, 2.0], dtype=torch.float64))
        assert all(torch.equal(before[n], state[n]) for n in state)


def test_sgd_by_hand() -> None:
    after, _ = sgd(0.5).step(_params(1.0, 2.0), {}, _params(4.0, -2.0))
    assert after["a"].tolist() == [-1.0, 3.0]


def test_clipping_by_hand() -> None:
    after, _ = clipped(sgd(1.0), 2.5).step(_params(0.0, 0.0), {}, _params(3.0, 4.0))
    torch.testing.assert_close(after["a"], torch.tensor([-1.5, -2.0], dtype=torch.float64))
    after, _ = clipped(sgd(1.0), 5.5).step(_params(0.0, 0.0), {}, _params(3.0, 4.0))
    assert after["a"].tolist() == [-3.0, -4.0]


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: clipped(o, 1.0)], ids=["plain", "clipped"])
@pytest.mark.parametrize("gradient", [(0.0, 0.0), (0.0, 2.0), (1e-30, 2.0)])
def test_no_nan_where_gradient_and_second_moment_are_zero(wrap, gradient) -> None:  # type: ignore[no-untyped-def]
    for dtype in (torch.float32, torch.float64):
        optimizer = wrap(adam(0.01))
        meta = {"a": torch.ones(2, dtype=dtype)}
        state = optimizer.init(meta)
        for _ in range(3):
            g = {"a": torch.tensor(gradient, dtype=dtype)}
            _, pull = value_and_pullback(lambda x: optimizer.step(meta, state, x)[0], g)  # noqa: B023  # called at once
            pulled = pull({"a": torch.ones(2, dtype=dtype)})
            assert bool(torch.isfinite(pulled["a"]).all())
            if gradient[0] == 0 or dtype == torch.float32:  # 1e-30 squared is zero in float32
                assert abs(float(pulled["a"][0])) < 1e-30  # not 1/ε; clipping passes on a trace of the other one
            meta, state = optimizer.step(meta, state, g)
            assert bool(torch.isfinite(meta["a"]).all())


def test_no_nan_where_the_second_moment_forgets_at_once() -> None:
    optimizer = adam(0.1, beta2=0.0)
    meta = _params(1.0, 1.0)
    _, state = optimizer.step(meta, optimizer.init(meta), _params(1.0, 2.0))
    _, pull = value_and_pullback(lambda x: optimizer.step(meta, state, x)[0], _params(0.0, 1.0))
    assert bool(torch.isfinite(pull(_params(1.0, 1.0))["a"]).all())


def test_clipping_survives_squares_that_overflow() -> None:
    gradient = {"a": torch.tensor([3e25, 4e25])}
    after, _ = clipped(sgd(1.0), 1.0).step({"a": torch.zeros(2)}, {}, gradient)
    torch.testing.assert_close(after["a"], torch.tensor([-0.6, -0.8]))


def test_a_coordinate_that_wakes_up_learns() -> None:
    optimizer = adam(0.01)
    meta = _params(1.0)
    state = optimizer.init(meta)
    meta, state = optimizer.step(meta, state, _params(0.0))
    assert meta["a"].tolist() == [1.0]
    meta, state = optimizer.step(meta, state, _params(2.0))
    # m̂ = 0.2/(1−0.81), v̂ = 0.004/(1−0.998001)
    assert float(meta["a"]) == pytest.approx(1 - 0.01 * (0.2 / 0.19) / ((0.004 / 0.001999) ** 0.5 + 1e-8), rel=1e-12)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_rates_are_refused(rate: float) -> None:
    for build in (sgd, adam, lambda r: clipped(sgd(1.0), r)):
        with pytest.raises(ConfigError, match=r"above 0"):
            build(rate)


def test_bad_decay_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"decays"):
        adam(0.1, beta1=1.0)
