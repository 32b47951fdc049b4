"""Every task weighs the same."""

from metaheed.rules.rule import Rule, uniform_weights, weighted


def uniform() -> Rule:
    """θ' = outer step on Σ_i g_i / B."""
    return weighted(lambda t, info: uniform_weights(info))
