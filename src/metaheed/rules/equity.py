"""TAML, the equity rule. Jamal, Qi: Task Agnostic Meta-Learning for Few-Shot Learning, CVPR 2019.

The meta-objective is the mean of the tasks' losses plus a penalty on how unequal the losses are, so that θ is not
biased towards some of the tasks.

1. g_i = ∇_θ L_i*(φ_iᵀ), the meta-gradients of training batch t.
2. h_i = ∇_θ ℓ_i, with ℓ_i the loss of task i before adaptation.
3. c_i = ∂I/∂ℓ_i for the index of inequality I({ℓ_i}) (inequality.py).
4. θ' = outer step on Σ_i (g_i/B + λ c_i h_i), which is the gradient of (1/B) Σ_i L_i*ᵀ + λ I({ℓ_i}). By the chain
   rule it needs one gradient a task, and no graph that joins the tasks.
"""

from typing import Literal

from metaheed.config import EquityConfig
from metaheed.rules.attention import weighted_sum
from metaheed.rules.inequality import cross_entropy_coefficients
from metaheed.rules.rule import OuterState, Rule, StepRecord, Tools, uniform_weights


def equity(
    strength: float = EquityConfig.equity_lambda,
    index: str = EquityConfig.equity_index,
    parameter: float | None = EquityConfig.equity_parameter,
    losses: Literal["query", "support", "adapted"] = "query",
) -> Rule:
    """θ' = outer step on the gradient of (1/B) Σ_i L_i*ᵀ + λ I({ℓ_i}): the mean loss and a penalty on inequality.

    Deviation from the paper: the mean of the losses stands beside λ, not their sum, so the paper's λ is B times ours.

    Args:
        strength: λ.
        index: the index of inequality I, a key of EQUITY_PARAMETERS.
        parameter: the index's parameter; the index's own default if None.
        losses: which ℓ_i are to be equal. "query": the query loss at φ⁰ (the paper's formula); "support": the support
            loss at φ⁰; "adapted": the query loss at φᵀ, so that ℓ_i = L_i*ᵀ and h_i = g_i.

    Raises:
        ConfigError: a setting is out of its bounds.
    """
    EquityConfig(equity_lambda=strength, equity_index=index, equity_parameter=parameter, equity_losses=losses)  # type: ignore[arg-type]  # checked there

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        batch = tools.train(t)
        task_grads, info = tools.cheapest_gradients(state.meta, batch)
        if losses == "adapted":
            slopes, values = task_grads, info.query_loss
        else:
            judged = batch if losses == "query" else batch._replace(query_x=batch.support_x, query_y=batch.support_y)
            slopes, values = tools.initial_gradients(state.meta, judged)
        weights = uniform_weights(info)
        mean = weighted_sum(weights, task_grads)
        penalty = weighted_sum(strength * cross_entropy_coefficients(values, index, parameter), slopes)
        combined = {name: mean[name] + penalty[name] for name in mean}
        meta, optimizer = tools.optimizer.step(state.meta, state.optimizer, combined)
        return OuterState(meta, optimizer, state.rule), StepRecord(info, weights)

    return Rule(lambda meta: {}, step)
