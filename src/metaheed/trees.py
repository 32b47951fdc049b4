"""Functions of trees of tensors by dotted names: parameters, and gradients of them."""

import torch
from torch import Tensor

from metaheed.types import Params


def below(prefix: str, tree: Params) -> Params:
    """The entries whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): leaf for name, leaf in tree.items() if name.startswith(prefix)}


def above(prefix: str, tree: Params) -> Params:
    """The entries with `prefix` before each name: the inverse of `below`."""
    return {f"{prefix}{name}": leaf for name, leaf in tree.items()}


def global_norm(tree: Params, tasks: tuple[int, ...] = ()) -> Tensor:
    """Euclidean norm over all leaves, 0-d; its derivative where everything is zero is zero.

    With `tasks` (B,): of leaves with a leading B, (B,).
    """
    # Summed in float64: squares of large float32 entries overflow long before their root does.
    square = torch.stack([leaf.double().square().reshape(*tasks, -1).sum(-1) for leaf in tree.values()]).sum(0)
    positive = square > 0
    norm = torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
    return norm.to(next(iter(tree.values())).dtype)
