"""The worst case over tasks. Collins, Mokhtari, Shakkottai: Task-Robust Model-Agnostic Meta-Learning, NeurIPS 2020.

TR-MAML minimises the largest of the tasks' losses instead of their mean: min_θ max_p Σ_i p_i L_i*(φ_iᵀ), p a
distribution over tasks.

1. g_i and L_i*(φ_iᵀ) of the tasks of the meta-batch.
2. p = Π(1/B + η L*), a step of gradient ascent on p from the uniform distribution, projected onto the simplex.
3. θ' = outer step on Σ_i p_i g_i (steps 2 and 3 are those of algorithm 1).

The larger η, the fewer tasks have a weight; far above the differences between losses, the worst one alone.
"""

import torch
from torch import Tensor

from metaheed.config import WorstCaseConfig
from metaheed.rules.rule import Rule, uniform_weights, weighted


def worst_case(ascent_rate: float = WorstCaseConfig.ascent_rate) -> Rule:
    """TR-MAML's outer step on one meta-batch.

    Deviation from the paper: there p belongs to a fixed set of tasks and is kept from step to step; here the tasks of
    every meta-batch are new, so that p begins at 1/B in each step.

    Args:
        ascent_rate: η, the rate of the step on p.

    Raises:
        ConfigError: η is not a finite number above 0.
    """
    WorstCaseConfig(ascent_rate=ascent_rate)
    return weighted(lambda t, info: onto_simplex(uniform_weights(info) + ascent_rate * info.query_loss))


def onto_simplex(values: Tensor) -> Tensor:
    """The nearest point with no negative entry and sum 1, (B,), to values (B,).

    Source: Duchi, Shalev-Shwartz, Singer, Chandra: Efficient Projections onto the l1-Ball, ICML 2008, figure 1.
    """
    ordered = values.sort(descending=True).values
    count = torch.arange(1, len(values) + 1, device=values.device, dtype=values.dtype)
    thresholds = (ordered.cumsum(0) - 1) / count
    last = (ordered > thresholds).sum() - 1
    return (values - thresholds.gather(0, last.reshape(1))).clamp(min=0)
