"""ProtoNet. Snell, Swersky, Zemel: Prototypical Networks for Few-shot Learning, NeurIPS 2017.

Adaptation is one closed formula: a class is the mean of its embedded support images; a query belongs to the nearest.

1. θ = the embedding f, the backbone without its head.
2. c_k = mean of f(x) over the support images of class k (eq. 1).
3. φ = f with a linear head: softmax over −‖f(x) − c_k‖² is softmax over 2 c_k · f(x) − ‖c_k‖² (section 2.4), so the
   head's rows are 2 c_k and its biases −‖c_k‖². φ⁰ has a zero head: every class alike, L⁰ = ln N.
"""

import copy

import torch
from torch import Tensor, nn

from metaheed.config import ProtoNetConfig
from metaheed.errors import ConfigError, option
from metaheed.learners.learner import NetworkLearner
from metaheed.networks.derivatives import transformed
from metaheed.networks.functional import Backbone
from metaheed.types import Params


class ProtoNet(NetworkLearner):
    """Learner whose θ are the parameters of the backbone's body under their own names.

    A class without support images (in a task of fewer ways than the head has) is never predicted. θ does not depend on
    N: a learner whose backbone was built for more ways takes the same θ.

    Deviation from the paper: batch norm uses batch statistics everywhere, those of the support set and of the query set
    separately.

    Args:
        backbone: a network from images to logits whose last operation is a linear head over features (n, D); see
            `Backbone` for what is converted and refused. The head gives N and is replaced.
        head: the name of the head's module; the last registered module that has parameters of its own if None.

    Raises:
        ConfigError: the backbone cannot be used, or its head is not linear. In `adapt`: the logits are not the head's
            output, or (on a CPU) there are labels outside 0..N-1.
    """

    def __init__(self, backbone: nn.Module, head: str | None = ProtoNetConfig.head) -> None:
        ProtoNetConfig(head=head)
        plain = Backbone(backbone)
        self.head = plain.find_head(head)
        linear = plain.module.get_submodule(self.head)
        if not isinstance(linear, nn.Linear) or not self.head:
            raise ConfigError(
                f"ProtoNet replaces the network's linear head, but {self.head or 'the network'!r} is "
                f"{type(linear).__name__}: name a torch.nn.Linear inside the network with {option('head')}"
            )
        self.ways, self.features = linear.out_features, linear.in_features
        head_names = plain.names_of(self.head)
        self.body = tuple(name for name in plain.names if name not in head_names)
        if not self.body:
            raise ConfigError("the backbone has nothing to learn besides its head, which ProtoNet replaces")
        self._plain = plain  # draws the body's initial values as every other learner does
        # The new head has a bias, whether or not the old one had. Its values come from φ, so none are drawn.
        headed = copy.deepcopy(plain.module)
        replaced = headed.get_submodule(self.head)
        new_head: nn.Module = nn.utils.skip_init(nn.Linear, self.features, self.ways)  # type: ignore[no-untyped-call]
        for name in [n for n, part in headed.named_modules(remove_duplicate=False) if part is replaced]:
            headed.set_submodule(name, new_head)
        super().__init__(headed)

    def init(self, generator: torch.Generator) -> Params:
        """θ: the body of our own backbones is redrawn from the generator; a user's keeps its present weights."""
        drawn = self._plain.init(generator)
        return {name: drawn[name] for name in self.body}

    def initial(self, meta: Params) -> Params:
        """φ⁰: the embedding with a zero head."""
        like = next(iter(meta.values()))
        return self._with_head(meta, like.new_zeros(self.ways, self.features), like.new_zeros(self.ways))

    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """φ: the embedding, with the head that follows from the prototypes (step 3)."""
        z = self.backbone.head_input(self.initial(meta), support_x, self.head)
        if z.dim() != 2:
            raise ConfigError(
                f"ProtoNet needs features (n, {self.features}) before the head {self.head!r}, but they are "
                f"{tuple(z.shape)}: flatten them before it"
            )
        if not transformed() and support_y.device.type == "cpu":
            outside = support_y[(support_y < 0) | (support_y >= self.ways)]
            if len(outside):
                raise ConfigError(
                    f"there are labels outside 0..{self.ways - 1} such as {outside[0].item()}, but the network has "
                    f"{self.ways} ways: number the classes of a task from 0, or build the network for more ways"
                )
        member = (support_y.unsqueeze(1) == torch.arange(self.ways, device=z.device)).to(z.dtype)  # (N·K, N)
        count = member.sum(0)
        c = (member.T @ z) / count.clamp(min=1).unsqueeze(1)  # (N, D)
        never_predicted = torch.finfo(z.dtype).min / 2
        return self._with_head(meta, 2 * c, torch.where(count > 0, -c.square().sum(1), never_predicted))

    def _with_head(self, meta: Params, weight: Tensor, bias: Tensor) -> Params:
        return {**meta, f"{self.head}.weight": weight, f"{self.head}.bias": bias}
