"""The uniform rule: the ordinary meta-update (algorithm 2).

Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017. Every task has the
same weight. Deviation from the paper: the gradients are averaged, not summed, so that the meta learning rate means the
same for every size of the meta-batch.

1. g_i = ∇_θ L_i*(φ_iᵀ) for every task i of training batch t.
2. θ' = outer step on Σ_i g_i / B.
"""

from metaheed.rules.rule import Rule, uniform_weights, weighted


def uniform() -> Rule:
    """θ' = outer step on Σ_i g_i / B: the mean of the tasks' gradients."""
    return weighted(lambda t, info: uniform_weights(info))
