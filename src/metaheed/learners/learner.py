"""The interface of learners: how one task is adapted. How tasks are combined is the rules' business.

`Learner` is the protocol; `NetworkLearner` is what the learners on a backbone share.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from metaheed.networks.derivatives import Step, detached, recomputed
from metaheed.networks.functional import Backbone
from metaheed.networks.loss_gradient import fused_step, predicted_gradient
from metaheed.networks.loss_gradient import loss_gradient as loss_gradient_of_network
from metaheed.networks.losses import predicted_loss
from metaheed.types import Episode, Params


class Learner(Protocol):
    """One task's adaptation as pure functions of the meta-parameters θ.

    Shapes: support_x (N·K, C, H, W), support_y (N·K,), x (n, C, H, W), logits (n, N).
    """

    def init(self, generator: torch.Generator) -> Params:
        """Draw θ."""
        ...

    def initial(self, meta: Params) -> Params:
        """φ⁰, the base parameters before adaptation."""
        ...

    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """φᵀ, the base parameters after adaptation; the same function in training and test."""
        ...

    def predict(self, adapted: Params, x: Tensor) -> Tensor:
        """Logits (n, N) at base parameters φ."""
        ...


class Estimate(NamedTuple):
    """What a learner finds out about one task in training."""

    gradient: Params
    """g, the task's meta-gradient: θ's names, shapes and dtype."""
    slope: Params
    """∇_φ L*(φᵀ), whose norm attention sees."""
    loss: Tensor
    """L*(φᵀ), the mean query cross-entropy after adaptation, 0-d."""
    logits: Tensor
    """(n, N), of the query images at φᵀ."""


@runtime_checkable
class OwnEstimate(Protocol):
    """A learner whose meta-gradient is another than the derivative of the query loss, and that computes it itself."""

    def estimate(self, meta: Params, episode: Episode) -> Estimate:
        """What training needs to know of one task; θ is a constant in it. The engine runs it over the meta-batch."""
        ...


def task_loss(learner: Learner, adapted: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy in nats (0-d) at base parameters φ, and the logits (n, N) that it was computed from.

    For a batch of tasks, which the learner must support (`takes_batches`), they are (B,) and (B, n, N).
    """
    return predicted_loss(learner.predict, adapted, x, y)


def loss_gradient(learner: Learner, at: Params, x: Tensor, y: Tensor) -> tuple[Params, Tensor, Tensor]:
    """∇L of the mean cross-entropy on a set of images at base parameters φ, L (0-d), and the logits (n, N)."""
    if isinstance(learner, NetworkLearner):
        return learner.loss_gradient(at, x, y)
    return predicted_gradient(learner.predict, at, x, y)


def place_constants(learner: Learner, device: torch.device) -> None:
    """Move the learner's buffers and frozen parameters to the device where its network will be called."""
    backbone = getattr(learner, "backbone", None)
    if isinstance(backbone, Backbone):
        backbone.place_constants(device)


class NetworkLearner:
    """What learners on a backbone share. Unless a learner says otherwise, θ and φ are the backbone's parameters.

    Args:
        backbone: any network from images to logits; see `Backbone` for what is converted and refused.
        adaptation_steps: T.
        recompute: compute each inner step again in the reverse pass instead of keeping its graph.
    """

    elementwise: ClassVar[bool] = False
    """Whether the learner's own arithmetic treats all entries of a parameter alike, so that a leading axis of tasks
    before them changes nothing.
    """

    def __init__(self, backbone: nn.Module, adaptation_steps: int = 1, recompute: bool = False) -> None:
        self.backbone = Backbone(backbone)
        self.adaptation_steps = adaptation_steps
        self.recompute = recompute

    @property
    def has_exact_gradient(self) -> bool:
        """Whether the meta-gradient is the full derivative of the query loss; False if parts of it are dropped."""
        return True

    @property
    def network(self) -> Backbone | None:
        """The backbone, if predictions are just its logits; None if the learner computes them otherwise."""
        return self.backbone if type(self).predict is NetworkLearner.predict else None

    def init(self, generator: torch.Generator) -> Params:
        """θ: our own backbones are redrawn from the generator, a user's network keeps its present weights."""
        return self.backbone.init(generator)

    def initial(self, meta: Params) -> Params:
        """φ⁰ = θ."""
        return meta

    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """φᵀ; every learner defines it."""
        raise NotImplementedError(f"{type(self).__name__} must define adapt(meta, support_x, support_y)")

    def predict(self, adapted: Params, x: Tensor) -> Tensor:
        """Logits (n, N) at φ."""
        return self.backbone(adapted, x)

    def loss_gradient(
        self, at: Params, x: Tensor, y: Tensor, names: Sequence[str] | None = None
    ) -> tuple[Params, Tensor, Tensor]:
        """∇L of the mean cross-entropy on a set of images at base parameters φ, L (0-d), and the logits (n, N).

        The gradient is differentiable.

        Args:
            at: φ.
            x: images (n, C, H, W).
            y: their labels (n,).
            names: the parameters that the gradient is taken with respect to; all if None.
        """
        if self.network is not None:
            return loss_gradient_of_network(self.network, at, x, y, names)
        self.backbone.examine(at, x)  # a transform of torch.func would hide what the network does
        return predicted_gradient(self.predict, at, x, y, names)

    def descend(
        self,
        adapted: Params,
        rate: float | Tensor,
        x: Tensor,
        y: Tensor,
        names: Sequence[str] | None = None,
        first_order: bool = False,
    ) -> Params:
        """A gradient step on the mean cross-entropy of a set of images: φ − α ∇L(φ).

        Args:
            adapted: φ.
            rate: α.
            x: images (n, C, H, W).
            y: their labels (n,).
            names: the parameters that move; all if None.
            first_order: count the gradient as a constant.
        """
        if self.network is not None:
            stepped = fused_step(self.network, adapted, rate, x, y, names, first_order)
            if stepped is not None:
                return stepped
        at = detached(adapted) if first_order else adapted
        gradient, _, _ = self.loss_gradient(at, x, y, names)
        return {n: p - rate * gradient[n] if n in gradient else p for n, p in adapted.items()}

    def module(self, params: Params) -> nn.Module:
        """A plain `nn.Module` that holds these parameters, for saving, exporting and use in other libraries.

        Its parameters have the names of the network that the learner was built on. Batch norm uses the statistics of
        the batch that it is given, as it does here.

        Args:
            params: θ, for which the module computes the network before adaptation (φ⁰), or the φ of a task.

        Raises:
            ConfigError: they are neither.
        """
        is_adapted = set(params) == set(self.backbone.names)
        return self.backbone.filled(params if is_adapted else self.initial(params))

    def write_into_module(self, meta: Params) -> None:
        """Write φ⁰ into the network inside, for users who look there; the learner itself does not use it."""
        self.backbone.write_into_module(self.initial(meta))

    def steps(self, step: Step, meta: Params, state: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """The state after T times state ← step(θ, state, support set)."""
        for _ in range(self.adaptation_steps):
            if self.recompute:
                state = recomputed(step, meta, state, support_x, support_y)
            else:
                state = step(meta, state, support_x, support_y)
        return state
