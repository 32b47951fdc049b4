"""TAML: a penalty on the inequality of the tasks' losses."""

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
    """TAML (Jamal & Qi, CVPR 2019): θ' = outer step on the gradient of (1/B) Σ_i L_i*ᵀ + λ I({ℓ_i}).

    1. g_i, the meta-gradients, and h_i = ∇_θ ℓ_i, ℓ_i the loss of task i before adaptation.
    2. c_i = ∂I/∂ℓ_i. The gradient is Σ_i (g_i/B + λ c_i h_i): no joint graph is needed.

    Deviation from the paper: the mean of the losses stands beside λ, not their sum, so the paper's λ is B times ours.

    Args:
        strength: λ.
        index, parameter: of `inequality`.
        losses: ℓ_i at φ⁰ on the query set (the paper's formula) or the support set; adapted: ℓ_i = L_i*ᵀ, h_i = g_i.

    Raises:
        ConfigError: a setting out of its bounds.
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
