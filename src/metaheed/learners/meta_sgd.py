"""MetaSGD. Li, Zhou, Chen, Li: Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017 (arXiv 1707.09835).

MAML that learns, beside the starting point, a rate for every single parameter: the inner step's length and direction.

1. θ = {φ⁰, α}, α of φ⁰'s shapes, of either sign.
2. T times: φ ← φ − α ∘ ∇_φ L(φ), L the mean cross-entropy on the support set (eq. 3).
3. Both are judged by the query loss at φᵀ, differentiated through all of 2.

With `first_order` the gradients of step 2 count as constants in step 3; α is learned all the same.
"""

import torch
from torch import Tensor

from metaheed.learners.maml import MAML
from metaheed.networks.derivatives import detached
from metaheed.trees import below
from metaheed.types import Params


class MetaSGD(MAML):
    """Learner whose θ are `initial.NAME` and `fast_lr.NAME` for each of the backbone's parameters NAME.

    Deviations from the paper: α starts as a constant (there: drawn uniformly), T may exceed 1, and batch norm uses
    batch statistics everywhere.

    Args:
        backbone: any network from images to logits; see `Backbone` for what is converted and refused.
        adaptation_steps: T.
        fast_lr: where every α starts.
        first_order: drop second derivatives.
        recompute: keep memory flat in T, for more time; the results are the same.

    Raises:
        ConfigError: a setting out of its bounds, or a backbone that cannot be adapted.
    """

    elementwise = True

    def init(self, generator: torch.Generator) -> Params:
        """θ: φ⁰ as MAML's θ at the same seed, every α the constant."""
        start = super().init(generator)
        return {f"initial.{n}": p for n, p in start.items()} | {
            f"fast_lr.{n}": torch.full_like(p, self.fast_lr) for n, p in start.items()
        }

    def initial(self, meta: Params) -> Params:
        """φ⁰."""
        return below("initial.", meta)

    def _step(self, meta: Params, adapted: Params, support_x: Tensor, support_y: Tensor) -> Params:
        rates = below("fast_lr.", meta)
        at = detached(adapted) if self.first_order else adapted
        gradient, _, _ = self.loss_gradient(at, support_x, support_y)
        return {name: p - rates[name] * gradient[name] for name, p in adapted.items()}
