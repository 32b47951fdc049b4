"""MetaLSTM's update in closed form against its formulas, which test_contract holds against PyTorch's own LSTM cell."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaheed.learners import Conv4, MetaLSTM
from metaheed.learners import meta_lstm_update as learned_update
from metaheed.learners.meta_lstm_update import State, by_formula, in_closed_form
from metaheed.outer import task_gradient, vectorized
from metaheed.types import Params
from tests.conftest import make_batch, task

Update = Callable[[Params, Tensor, Tensor, State], State]
B, D = 2, 75


def inputs(H: int, tasks: tuple[int, ...] = (B,)) -> tuple[Params, Tensor, Tensor, State]:
    rng = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*tasks, *shape, generator=rng, dtype=torch.float64)

    meta = {"lstm.weight_ih": drawn(4 * H, 4), "lstm.weight_hh": drawn(4 * H, H)}
    meta |= {"lstm.bias_ih": drawn(4 * H), "lstm.bias_hh": drawn(4 * H)}
    for gate in ("forget_gate", "input_gate"):
        meta |= {f"{gate}.weight": drawn(1, H + 2), f"{gate}.bias": drawn(1)}
    g = drawn(1, D) * 10.0 ** torch.arange(-6, 3).repeat(D)[:D]  # both branches of the preprocessing
    g[..., 5] = 0.0
    state = State(drawn(1, D), drawn(H, D), drawn(H, D), drawn(1, D), drawn(1, D))
    return meta, drawn(1, 1).exp(), g, state


def slopes(update: Update, H: int, steps: int, tasks: tuple[int, ...], seen: tuple[str, ...]) -> tuple[State, Params]:
    """After some steps, the state and the slopes of a sum over parts of it with respect to everything."""
    meta, loss, g, state = inputs(H, tasks)
    leaves = {**meta, **state._asdict()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    for _ in range(steps):
        state = update(meta, loss, g, state)
    weights = torch.Generator().manual_seed(4)
    total = torch.zeros((), dtype=torch.float64)
    for name in seen:
        part = getattr(state, name)
        total = total + (part * torch.randn(part.shape, generator=weights, dtype=torch.float64)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return state, dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("block", [1, 4 * 7 * 8 * 32, 1 << 20], ids=["16 columns", "ragged", "all at once"])
@pytest.mark.parametrize("H", [1, 7])
@pytest.mark.parametrize("tasks", [(), (B,)], ids=["one task", "two"])
@pytest.mark.parametrize("seen", [("c",), ("m", "take"), State._fields], ids=["c", "m and take", "all"])
def test_the_closed_form_is_the_formulas(
    seen: tuple[str, ...], tasks: tuple[int, ...], H: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_update, "_BLOCK_BYTES", block)
    state, found = slopes(in_closed_form, H, 3, tasks, seen)
    expected_state, expected = slopes(by_formula, H, 3, tasks, seen)
    for ours, theirs in zip(state, expected_state, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-9, atol=1e-11)
    assert all(slope.any() for slope in found.values())


def test_it_can_be_differentiated_twice() -> None:
    meta, loss, g, state = inputs(2, (1,))
    g, state = g[..., :4], State(*(part[..., :4].contiguous() for part in state))
    leaves = {**meta, **state._asdict()}

    def outcome(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(leaves, values, strict=True))
        before = State(**{name: given.pop(name) for name in State._fields})
        return tuple(in_closed_form(given, loss, g, before))

    values = tuple(leaf.detach().requires_grad_() for leaf in leaves.values())
    assert torch.autograd.gradcheck(outcome, values)
    assert torch.autograd.gradgradcheck(outcome, values)


@pytest.mark.parametrize("tasks", [(), (1,), (B,)], ids=["one task", "a batch of one", "two"])
@pytest.mark.parametrize("tied", [False, True], ids=["own gates", "one tensor for both gates"])
def test_derivatives_of_several_steps_up_to_the_third(tied: bool, tasks: tuple[int, ...]) -> None:
    """A later state depends on the weights itself: nothing may be counted twice."""

    def derivatives(update: Update) -> list[dict[str, Tensor]]:
        meta, loss, g, state = inputs(2, tasks)
        leaves = {**meta, **state._asdict()}
        if tied:
            for name in ("weight", "bias"):
                meta[f"input_gate.{name}"] = meta[f"forget_gate.{name}"]
                del leaves[f"input_gate.{name}"]
        for leaf in leaves.values():
            leaf.requires_grad_()
        for _ in range(3):
            state = update(meta, loss, g, state)
        value, found = state.c.square().sum(), []
        for _ in range(3):
            slopes = torch.autograd.grad(value, list(leaves.values()), create_graph=True, materialize_grads=True)
            found.append(dict(zip(leaves, slopes, strict=True)))
            value = sum((slope.square().sum() for slope in slopes), torch.zeros((), dtype=torch.float64)).sqrt()
        return found

    for ours, theirs in zip(derivatives(in_closed_form), derivatives(by_formula), strict=True):
        for name, slope in theirs.items():
            torch.testing.assert_close(ours[name], slope, rtol=1e-9, atol=1e-10)
            assert slope.any()


@pytest.mark.parametrize("moving", ["forget_gate.weight", "input_gate.bias", "lstm.bias_hh", "c", "take"])
@pytest.mark.parametrize("tasks", [(), (B,)], ids=["one task", "two"])
def test_one_leaf_alone_may_move(moving: str, tasks: tuple[int, ...]) -> None:
    def derivatives(update: Update) -> list[Tensor]:
        meta, loss, g, state = inputs(2, tasks)
        leaf = {**meta, **state._asdict()}[moving].requires_grad_()
        for _ in range(2):
            state = update(meta, loss, g, state)
        total = sum((part.square().sum() for part in state if part.requires_grad), torch.zeros((), dtype=torch.float64))
        (first,) = torch.autograd.grad(total, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        return [first, second]

    for ours, theirs in zip(derivatives(in_closed_form), derivatives(by_formula), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
        assert theirs.any()


@pytest.mark.parametrize("tasks", [(), (B,)], ids=["one task", "two"])
def test_many_vectors_at_once(tasks: tuple[int, ...]) -> None:
    def products(update: Update) -> tuple[Tensor, ...]:
        meta, loss, g, state = inputs(2, tasks)
        leaves = [*meta.values(), *state]
        for leaf in leaves:
            leaf.requires_grad_()
        for _ in range(2):
            state = update(meta, loss, g, state)
        vectors = torch.randn(3, *state.c.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return torch.autograd.grad(state.c, leaves, vectors, is_grads_batched=True)

    for ours, theirs in zip(products(in_closed_form), products(by_formula), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_what_is_not_seen_may_be_infinite() -> None:
    def slope(update: Update) -> Tensor:
        meta, loss, g, state = inputs(2)
        state.c[0, 0, 0] = torch.inf
        weight = meta["lstm.weight_ih"].requires_grad_()
        return torch.autograd.grad(update(meta, loss, g, state).h.sum(), weight)[0]

    torch.testing.assert_close(slope(in_closed_form), slope(by_formula))
    assert slope(by_formula).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_another_type_take_the_formulas(dtype: torch.dtype) -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(dtype)

    learner = MetaLSTM(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), Half()), adaptation_steps=2)
    meta = learner.init(torch.Generator().manual_seed(0))
    gradient, _ = task_gradient(learner, meta, task(make_batch(1, 3, 1, 2, (1, 4, 4), torch.float32), 0))
    assert all(leaf.isfinite().all() for leaf in gradient.values())
    assert gradient["initial.1.weight"].any()


def test_nothing_that_was_given_is_changed() -> None:
    meta, loss, g, state = inputs(3)
    given = [*meta.values(), loss, g, *state]
    before = [leaf.clone() for leaf in given]
    for leaf in meta.values():
        leaf.requires_grad_()
    after = in_closed_form(meta, loss, g, state)
    first = torch.autograd.grad(after.c.sum(), list(meta.values()), retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(after.c.sum(), list(meta.values()), allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_adaptation_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = MetaLSTM(Conv4(3, (1, 16, 16), hidden=4), adaptation_steps=2)
    meta = learner.init(torch.Generator().manual_seed(0))
    batch = make_batch(2, 3, 1, 2, (1, 16, 16), torch.float32)
    expected, _ = vectorized(learner)(meta, batch)
    calls = []

    def by_formula_instead(*given: Any) -> State:
        calls.append(given)
        return by_formula(*given)

    monkeypatch.setattr("metaheed.learners.meta_lstm.in_closed_form", by_formula_instead)
    found, _ = vectorized(learner)(meta, batch)
    assert len(calls) == 2
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-3, atol=1e-5)
