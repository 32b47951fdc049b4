"""ANIL and BOIL: MAML whose inner steps move only one part of the network.

ANIL. Raghu, Raghu, Bengio, Vinyals: Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML,
ICLR 2020: the head adapts, the body is reused as it is.
BOIL. Oh, Yoo, Kim, Yun: BOIL: Towards Representation Change for Few-shot Learning, ICLR 2021: the body adapts, the head
stays.

1. φ⁰ = θ. Let m be the part of φ that moves (ANIL: the head; BOIL: the body, which is everything else).
2. T times: m ← m − α ∇_m L(φ), L the mean cross-entropy on the support set; the other part stays at θ.
3. All of θ, both parts, is judged by the query loss at φᵀ, differentiated through all of 2.

With `first_order` the gradients of step 2 count as constants in step 3.
"""

from torch import Tensor, nn

from metaheed.config import ANILConfig, BOILConfig
from metaheed.errors import ConfigError
from metaheed.learners.maml import MAML
from metaheed.types import Params


class _Partial(MAML):
    """What ANIL and BOIL share: MAML whose inner steps move either the head or all the rest."""

    moving: tuple[str, ...]

    def __init__(self, backbone: nn.Module, config: ANILConfig, moves_head: bool) -> None:
        super().__init__(backbone, config.adaptation_steps, config.fast_lr, config.first_order, config.recompute)
        self.head = self.backbone.find_head(config.head)
        self._head_is_guessed = config.head is None  # checked when the network is first run
        head_names = self.backbone.names_of(self.head)
        self.moving = tuple(name for name in self.backbone.names if (name in head_names) == moves_head)
        if not self.moving:
            raise ConfigError(
                f"the backbone's head {self.head!r} has no parameter that learns: there is nothing for ANIL to adapt"
                if moves_head
                else "the backbone has a head and nothing else that learns: there is no body for BOIL to adapt"
            )

    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """φᵀ after T gradient steps of the moving part on the support set."""
        if self._head_is_guessed:
            self.backbone.head_input(self.initial(meta), support_x, self.head)
            self._head_is_guessed = False
        return super().adapt(meta, support_x, support_y)


class ANIL(_Partial):
    """MAML that adapts only the head; θ are the backbone's parameters under their own names.

    Args:
        backbone: any network from images to logits; see `Backbone` for what is converted and refused.
        adaptation_steps: T.
        fast_lr: α.
        first_order: drop second derivatives.
        recompute: keep memory flat in T, for more time; the results are the same.
        head: the name of the head's module. If None, it is the last registered module that has parameters of its own;
            the first task checks that the logits are its output.

    Raises:
        ConfigError: a setting is out of its bounds, the backbone cannot be adapted, or there is no module of that name.
    """

    elementwise = True

    def __init__(
        self,
        backbone: nn.Module,
        adaptation_steps: int = ANILConfig.adaptation_steps,
        fast_lr: float = ANILConfig.fast_lr,
        first_order: bool = ANILConfig.first_order,
        recompute: bool = ANILConfig.recompute,
        head: str | None = ANILConfig.head,
    ) -> None:
        given = ANILConfig(
            adaptation_steps=adaptation_steps, fast_lr=fast_lr, first_order=first_order, head=head, recompute=recompute
        )
        super().__init__(backbone, given, moves_head=True)


class BOIL(_Partial):
    """MAML that adapts only the body; θ are the backbone's parameters under their own names.

    Args:
        backbone, adaptation_steps, fast_lr, first_order, recompute, head: as for ANIL.

    Raises:
        ConfigError: as for ANIL; also if the backbone is a head and nothing else.
    """

    elementwise = True

    def __init__(
        self,
        backbone: nn.Module,
        adaptation_steps: int = BOILConfig.adaptation_steps,
        fast_lr: float = BOILConfig.fast_lr,
        first_order: bool = BOILConfig.first_order,
        recompute: bool = BOILConfig.recompute,
        head: str | None = BOILConfig.head,
    ) -> None:
        given = BOILConfig(
            adaptation_steps=adaptation_steps, fast_lr=fast_lr, first_order=first_order, head=head, recompute=recompute
        )
        super().__init__(backbone, given, moves_head=False)
