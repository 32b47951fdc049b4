"""Reptile. Nichol, Achiam, Schulman: On First-Order Meta-Learning Algorithms, 2018 (arXiv 1803.02999).

The starting point of gradient descent, moved towards where gradient descent ends: no derivative of a derivative.

1. φ⁰ = θ.
2. T times: φ ← φ − α ∇_φ L(φ), L the mean cross-entropy on the support set. The task is judged by the query loss at φᵀ.
3. In training, T times more: φ ← φ − α ∇_φ L*(φ), L* the mean cross-entropy on the query set, as further mini-batches.
4. The meta-gradient is (θ − φ)/α, the sum of all these gradients, which the outer step takes as any other
   (algorithm 1 with the update of section 2 handed to an optimiser such as Adam).
"""

from torch import Tensor, nn

from metaheed.config import ReptileConfig
from metaheed.learners.learner import Estimate, NetworkLearner
from metaheed.types import Episode, Params


class Reptile(NetworkLearner):
    """Learner whose θ are the backbone's parameters under their own names.

    Deviations from the paper: a task's images are divided into support and query set, which are the mini-batches of its
    first and its last T steps (there: mini-batches drawn from all of them); inner steps are plain gradient descent
    (there: Adam without momentum); and batch norm uses batch statistics everywhere.

    Args:
        backbone: any network from images to logits; see `Backbone` for what is converted and refused.
        adaptation_steps: T.
        fast_lr: α.

    Raises:
        ConfigError: a setting out of its bounds, or a backbone that cannot be adapted.
    """

    elementwise = True

    def __init__(
        self,
        backbone: nn.Module,
        adaptation_steps: int = ReptileConfig.adaptation_steps,
        fast_lr: float = ReptileConfig.fast_lr,
    ) -> None:
        ReptileConfig(adaptation_steps=adaptation_steps, fast_lr=fast_lr)  # checks the bounds
        super().__init__(backbone, adaptation_steps)
        self.fast_lr = fast_lr

    @property
    def has_exact_gradient(self) -> bool:
        """No: the meta-gradient is a sum of gradients, and not the derivative of the query loss."""
        return False

    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """φᵀ after T gradient steps on the support set."""
        return self._descend(self.initial(meta), support_x, support_y, self.adaptation_steps)

    def estimate(self, meta: Params, episode: Episode) -> Estimate:
        """The meta-gradient (θ − φ)/α of one task, and the query loss at φᵀ."""
        adapted = self.adapt(meta, episode.support_x, episode.support_y)
        slope, loss, logits = self.loss_gradient(adapted, episode.query_x, episode.query_y)
        after = {name: p - self.fast_lr * slope[name] for name, p in adapted.items()}
        after = self._descend(after, episode.query_x, episode.query_y, self.adaptation_steps - 1)
        gradient = {name: (start - after[name]) / self.fast_lr for name, start in self.initial(meta).items()}
        return Estimate(gradient, slope, loss, logits)

    def _descend(self, adapted: Params, x: Tensor, y: Tensor, steps: int) -> Params:
        for _ in range(steps):
            adapted = self.descend(adapted, self.fast_lr, x, y, first_order=True)
        return adapted
