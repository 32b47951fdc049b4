"""Batch rules on a fake learner whose gradients one can check by hand: g_i = θ − target_i."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from metaheed.errors import ConfigError, NonFiniteTaskError
from metaheed.outer import (
    OuterState,
    Rule,
    StepRecord,
    TaskAttention,
    Tools,
    adam,
    attended,
    clipped,
    loss_softmax,
    replayed,
    sequential,
    sgd,
    uniform,
)
from metaheed.rules.equity import equity
from metaheed.types import Episode, Params, TaskInfo


def batch(*targets: float) -> Episode:
    column = torch.tensor(targets, dtype=torch.float64)
    return Episode(column, column, column, column)


def gradients(meta: Params, tasks: Episode) -> tuple[Params, TaskInfo]:
    difference = meta["x"] - tasks.query_x
    loss = difference.square() / 2
    return {"x": difference}, TaskInfo(loss, torch.zeros_like(loss), loss + 1, difference.abs())


def one_step(rule: Rule, *targets: float, at: float = 0.0, lr: float = 0.5) -> tuple[OuterState, StepRecord]:
    def initial(meta: Params, tasks: Episode) -> tuple[Params, torch.Tensor]:
        return {"x": torch.full_like(tasks.query_x, 3.0)}, tasks.query_x

    tools = Tools(gradients, initial, sgd(lr), lambda t: batch(*targets), lambda t: batch(*targets))
    meta = {"x": torch.tensor(at, dtype=torch.float64)}
    return rule.step(OuterState(meta, {}, rule.init(meta)), 0, tools)


def test_uniform() -> None:
    assert float(one_step(uniform(), 1, 2, 6)[0].meta["x"]) == 0.5 * 3


ANY_RULE: dict[str, Callable[[], Rule]] = {
    "uniform": uniform,
    "sequential": sequential,
    "loss-softmax": loss_softmax,
    "equity": lambda: equity(2.0, "theil"),
    "attended": lambda: attended(TaskAttention(3), adam(0.1), 0.5),
    "attended through Adam": lambda: attended(TaskAttention(3), adam(0.1), 0.5, jacobian="optimizer"),
}


@pytest.mark.parametrize("name", ANY_RULE)
def test_inference_mode_changes_no_step(name: str) -> None:
    def steps() -> OuterState:
        torch.manual_seed(0)
        rule, outer = ANY_RULE[name](), clipped(adam(0.5), 0.25)
        meta = {"x": torch.tensor(0.0, dtype=torch.float64)}
        state = OuterState(meta, outer.init(meta), rule.init(meta))

        def initial(meta: Params, tasks: Episode) -> tuple[Params, torch.Tensor]:
            return {"x": torch.full_like(tasks.query_x, 3.0)}, tasks.query_x

        tools = Tools(gradients, initial, outer, lambda t: batch(1, 2, 6), lambda t: batch(3, 1, 9))
        for t in range(2):
            state, _ = rule.step(state, t, tools)
        return state

    expected = steps()
    with torch.inference_mode():
        found = steps()
    for ours, theirs in ((found.meta, expected.meta), (found.rule, expected.rule)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[leaf], theirs[leaf]) for leaf in theirs)


def test_sequential_over_three_tasks() -> None:
    after, record = one_step(sequential(), 1, 2, 3)
    # 0 -> half-way to 1 -> half-way to 2 -> half-way to 3
    assert float(after.meta["x"]) == 2.125
    assert record.info.query_loss.tolist() == [1 / 2, 1.5**2 / 2, 1.75**2 / 2]
    assert record.weights.tolist() == [1, 1, 1]


def test_sequential_names_the_task_that_failed() -> None:
    def failing(meta: Params, tasks: Episode) -> tuple[Params, TaskInfo]:
        if float(tasks.query_x[0]) == 2:
            raise NonFiniteTaskError("loss", 1, "training")
        return gradients(meta, tasks)

    meta = {"x": torch.zeros((), dtype=torch.float64)}
    tools = Tools(failing, failing, sgd(0.1), lambda t: batch(1, 2, 3), lambda t: batch(1))  # type: ignore[arg-type]
    with pytest.raises(NonFiniteTaskError, match=r"loss of task 2 of the training batch"):
        sequential().step(OuterState(meta, {}, {}), 0, tools)


def test_equity_by_hand() -> None:
    after, _ = one_step(equity(2.0, "gini"), 1, 3)
    # I = (b−a)/(2(a+b)): ∂a = −b/(a+b)² = −3/16, ∂b = a/(a+b)² = 1/16; slopes are 3 each.
    penalty = 2.0 * 3.0 * (-3 / 16 + 1 / 16)
    assert float(after.meta["x"]) == pytest.approx(-0.5 * (-2 + penalty))


def test_softmax_of_loss_by_hand() -> None:
    _, record = one_step(loss_softmax(2.0), 1, 3)
    assert float(record.weights[1] / record.weights[0]) == pytest.approx(
        torch.exp(torch.tensor((4.5 - 0.5) / 2)).item()
    )


def test_replayed_weights_are_permuted() -> None:
    logged = torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 200, dtype=torch.float64)
    rule = replayed(logged, seed=1)
    info = gradients({"x": torch.zeros((), dtype=torch.float64)}, batch(1, 2, 3, 4))
    tools = Tools(lambda m, b: info, None, sgd(0.1), batch, batch)  # type: ignore[arg-type]  # no initial gradients
    meta = {"x": torch.zeros((), dtype=torch.float64)}
    seen = torch.stack([rule.step(OuterState(meta, {}, {}), t, tools)[1].weights for t in range(200)])
    assert torch.equal(seen.sort(1, descending=True).values, logged)
    assert float((seen.mean(0) - 0.25).abs().max()) < 0.05, "no task is favoured"
    again = torch.stack([replayed(logged, 1).step(OuterState(meta, {}, {}), t, tools)[1].weights for t in range(5)])
    assert torch.equal(again, seen[:5])


def test_the_leak_of_the_release_by_hand() -> None:
    lr = 0.5
    attention = TaskAttention(tasks=2, generator=torch.Generator().manual_seed(0)).double()
    tools = Tools(gradients, None, sgd(lr), lambda t: batch(1, 3), lambda t: batch(5, 7))  # type: ignore[arg-type]  # no initial gradients
    meta = {"x": torch.zeros((), dtype=torch.float64)}
    after = {}
    for leak in (False, True):
        rule = attended(attention, sgd(0.1), lr, release_leak=leak)
        state, record = rule.step(OuterState(meta, {}, rule.init(meta)), 0, tools)
        after[leak] = state
    w = record.weights
    pull = -float(w[0] * 1 + w[1] * 3)  # Σ w_i g_i at θ = 0
    ahead = -lr * pull
    assert float(after[False].meta["x"]) == pytest.approx(ahead)
    assert float(after[True].meta["x"]) == pytest.approx(-lr * (pull + (ahead - 5) + (ahead - 7)))
    # With SGD the look-ahead is the real step of an honest θ', so δ is moved alike.
    for name, delta in after[False].rule.items():
        torch.testing.assert_close(after[True].rule[name], delta)
    moved = [n for n, d in after[True].rule.items() if not torch.equal(d, rule.init(meta)[n])]
    assert moved


def test_bad_settings_are_refused() -> None:
    others: tuple[dict[str, Any], ...] = ({"reuse_probe": True}, {"jacobian": "optimizer"})
    for other in others:
        with pytest.raises(ConfigError, match=r"with faithful_to_release leave it"):
            attended(TaskAttention(tasks=2), adam(0.1), 0.1, release_leak=True, **other)
    with pytest.raises(ConfigError, match=r"equity_lambda is -1"):
        equity(-1.0)
    with pytest.raises(ConfigError, match=r"unknown index of inequality|equity_index"):
        equity(1.0, "thiel")
    with pytest.raises(ConfigError, match=r"gini has no parameter"):
        equity(1.0, "gini", 2.0)
    with pytest.raises(ConfigError, match=r"loss_temperature is 0"):
        loss_softmax(0.0)
    with pytest.raises(ConfigError, match=r"tasks=B"):
        attended(TaskAttention(architecture="equivariant"), adam(0.1), 0.1, reuse_probe=True)
