"""MAML. Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017.

The meta-parameters are the starting point of a task's own gradient descent: they are good when a few steps from them
solve a new task.

1. φ⁰ = θ.
2. T times: φ ← φ − α ∇_φ L(φ), L the mean cross-entropy on the support set.
3. θ is judged by the query loss at φᵀ, differentiated through all of 2.

With `first_order` the gradients of step 2 count as constants in step 3 (FOMAML, section 5.2).
"""

from torch import Tensor, nn

from metaheed.config import MAMLConfig
from metaheed.learners.learner import NetworkLearner
from metaheed.types import Params


class MAML(NetworkLearner):
    """Learner whose θ are the backbone's parameters under their own names.

    Deviation from the paper: batch norm uses batch statistics everywhere (as its authors' code does).

    Args:
        backbone: any network from images to logits; see `Backbone` for what is converted and refused.
        adaptation_steps: T.
        fast_lr: α.
        first_order: drop second derivatives.
        recompute: keep memory flat in T, for more time; the results are the same.

    Raises:
        ConfigError: a setting out of its bounds, or a backbone that cannot be adapted.
    """

    elementwise = True
    moving: tuple[str, ...] | None = None
    """The parameters that step 2 moves; all if None."""

    def __init__(
        self,
        backbone: nn.Module,
        adaptation_steps: int = MAMLConfig.adaptation_steps,
        fast_lr: float = MAMLConfig.fast_lr,
        first_order: bool = MAMLConfig.first_order,
        recompute: bool = MAMLConfig.recompute,
    ) -> None:
        MAMLConfig(adaptation_steps=adaptation_steps, fast_lr=fast_lr, first_order=first_order)  # checks the bounds
        super().__init__(backbone, adaptation_steps, recompute)
        self.fast_lr = fast_lr
        self.first_order = first_order

    @property
    def has_exact_gradient(self) -> bool:
        """Whether second derivatives are kept."""
        return not self.first_order

    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """φᵀ after T gradient steps on the support set."""
        return self.steps(self._step, meta, self.initial(meta), support_x, support_y)

    def _step(self, meta: Params, adapted: Params, support_x: Tensor, support_y: Tensor) -> Params:
        return self.descend(adapted, self.fast_lr, support_x, support_y, self.moving, self.first_order)
