"""Functions of trees: dicts of tensors by dotted name, which hold parameters or gradients of them."""

import torch
from torch import Tensor

from metaheed.types import Params


def below(prefix: str, tree: Params) -> Params:
    """The entries whose name begins with `prefix`, under their name without it."""
    return {name.removeprefix(prefix): leaf for name, leaf in tree.items() if name.startswith(prefix)}


def above(prefix: str, tree: Params) -> Params:
    """All entries, with `prefix` put before each name: the inverse of `below`."""
    return {f"{prefix}{name}": leaf for name, leaf in tree.items()}


def global_norm(tree: Params, tasks: tuple[int, ...] = ()) -> Tensor:
    """Euclidean norm over all leaves, 0-d. Where every entry is zero, its derivative is zero.

    With `tasks` = (B,) the leaves have a leading axis B, and the result is (B,), one norm a task.
    """
    # Summed in float64: squares of large float32 entries overflow long before their root does.
    square = torch.stack([leaf.double().square().reshape(*tasks, -1).sum(-1) for leaf in tree.values()]).sum(0)
    positive = square > 0
    norm = torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
    return norm.to(next(iter(tree.values())).dtype)
