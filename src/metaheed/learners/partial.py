"""ANIL and BOIL: MAML whose inner steps move one part of the network only.

ANIL. Raghu, Raghu, Bengio, Vinyals: Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML,
ICLR 2020: the head adapts, the body is reused as it is.
BOIL. Oh, Yoo, Kim, Yun: BOIL: Towards Representation Change for Few-shot Learning, ICLR 2021: the body adapts, the head
stays.

1. φ⁰ = θ, of which m is the part that moves (ANIL: the head; BOIL: the rest).
2. T times: m ← m − α ∇_m L(φ), L the mean cross-entropy on the support set; the other part stays at θ.
3. θ, both parts of it, is judged by the query loss at φᵀ, differentiated through all of 2.

With `first_order` the gradients of step 2 count as constants in step 3.
"""

import torch
from torch import Tensor, nn

from metaheed.config import ANILConfig, BOILConfig
from metaheed.errors import ConfigError
from metaheed.learners.base import Backbone, detached, support_gradient
from metaheed.types import Params


class _Partial:
    """What ANIL and BOIL share: everything but which names move."""

    def __init__(
        self,
        backbone: Backbone,
        moves_head: bool,
        adaptation_steps: int,
        fast_lr: float,
        first_order: bool,
        head: str | None,
    ) -> None:
        self.backbone = backbone
        self.adaptation_steps = adaptation_steps
        self.fast_lr = fast_lr
        self.first_order = first_order
        self.head = backbone.find_head(head)
        self._unsure = head is None  # a guess, to be checked when the network is first run
        of_head = backbone.names_of(self.head)
        self.moving = tuple(name for name in backbone.names if (name in of_head) == moves_head)
        if not self.moving:
            raise ConfigError(
                f"the backbone's head {self.head!r} has no parameter that learns: there is nothing for ANIL to adapt"
                if moves_head
                else "the backbone has a head and nothing else that learns: there is no body for BOIL to adapt"
            )

    def init(self, generator: torch.Generator) -> Params:
        """θ: our own backbones redrawn from the generator, a user's with the weights it has."""
        return self.backbone.init(generator)

    def initial(self, meta: Params) -> Params:
        """φ⁰ = θ."""
        return meta

    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """φᵀ after T gradient steps of the moving part on the support set."""
        adapted = self.initial(meta)
        if self._unsure:
            self.backbone.into_head(adapted, support_x, self.head)
            self._unsure = False
        for _ in range(self.adaptation_steps):
            at = detached(adapted) if self.first_order else adapted
            gradient, _ = support_gradient(self, at, support_x, support_y, self.moving)
            adapted = {n: p - self.fast_lr * gradient[n] if n in gradient else p for n, p in adapted.items()}
        return adapted

    def predict(self, adapted: Params, x: Tensor) -> Tensor:
        """Logits (n, N) at φ."""
        return self.backbone(adapted, x)


class ANIL(_Partial):
    """MAML that adapts the head only; θ are the backbone's parameters under their own names.

    Args:
        backbone: any network from images to logits; see `Backbone` for what is converted and refused.
        adaptation_steps: T.
        fast_lr: α.
        first_order: drop second derivatives.
        head: the name of the head's module; none: the last module registered that has parameters of its own, if the
            first task shows that the logits come out of it.

    Raises:
        ConfigError: a setting out of its bounds, a backbone that cannot be adapted, or no module of that name.
    """

    def __init__(
        self,
        backbone: nn.Module,
        adaptation_steps: int = ANILConfig.adaptation_steps,
        fast_lr: float = ANILConfig.fast_lr,
        first_order: bool = ANILConfig.first_order,
        head: str | None = ANILConfig.head,
    ) -> None:
        ANILConfig(adaptation_steps=adaptation_steps, fast_lr=fast_lr, first_order=first_order, head=head)
        super().__init__(Backbone(backbone), True, adaptation_steps, fast_lr, first_order, head)


class BOIL(_Partial):
    """MAML that adapts the body only; θ are the backbone's parameters under their own names.

    Args:
        backbone, adaptation_steps, fast_lr, first_order, head: as for ANIL.

    Raises:
        ConfigError: as for ANIL; also where the backbone is a head and nothing else.
    """

    def __init__(
        self,
        backbone: nn.Module,
        adaptation_steps: int = BOILConfig.adaptation_steps,
        fast_lr: float = BOILConfig.fast_lr,
        first_order: bool = BOILConfig.first_order,
        head: str | None = BOILConfig.head,
    ) -> None:
        BOILConfig(adaptation_steps=adaptation_steps, fast_lr=fast_lr, first_order=first_order, head=head)
        super().__init__(Backbone(backbone), False, adaptation_steps, fast_lr, first_order, head)
