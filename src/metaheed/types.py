"""The values that all parts exchange, and the legend of shapes.

Legend: N ways, K shots, Q queries per class, B tasks in a meta-batch; an image is C×H×W.
A *batched* Episode or TaskInfo has a leading axis B in every field. Batched Params hold one gradient a task and have
that axis in every leaf.
"""

from typing import NamedTuple

from torch import Tensor

Params = dict[str, Tensor]
"""Parameters, or gradients of them, by the dotted names that `nn.Module.named_parameters` gives."""


class Episode(NamedTuple):
    """One task: a support set to adapt on, and a query set to be judged on."""

    support_x: Tensor
    """(N·K, C, H, W) images to adapt on, class by class."""
    support_y: Tensor
    """(N·K,) int64 labels in [0, N)."""
    query_x: Tensor
    """(N·Q, C, H, W) images to be judged on, class by class."""
    query_y: Tensor
    """(N·Q,) int64 labels in [0, N)."""


class TaskInfo(NamedTuple):
    """The numbers of one task that attention sees, 0-d each; batched: (B,). All are in θ's dtype."""

    query_loss: Tensor
    """L*ᵀ: mean query cross-entropy after adaptation, in nats."""
    query_accuracy: Tensor
    """A*ᵀ: query accuracy after adaptation, in [0, 1]."""
    initial_loss: Tensor
    """L*⁰: mean query cross-entropy before adaptation, in nats."""
    grad_norm: Tensor
    """‖∇_φ L*(φᵀ)‖: the Euclidean norm over all adapted parameters."""
