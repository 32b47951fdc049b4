"""Outer optimisers as pure pairs (init, step): θ and the state go in, the next ones come out.

The step may be differentiated with respect to the gradient it is given; that is how δ learns through it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metaheed.errors import ConfigError
from metaheed.trees import global_norm
from metaheed.types import Params

OptState = Params
"""The optimiser's tensors by name; empty for one that remembers nothing."""


class OuterOptimizer(NamedTuple):
    """A pure optimiser."""

    init: Callable[[Params], OptState]
    """θ -> the state before the first step."""
    step: Callable[[Params, OptState, Params], tuple[Params, OptState]]
    """(θ, state, gradient) -> (θ', state')."""


def sgd(lr: float) -> OuterOptimizer:
    """θ' = θ − lr · gradient.

    Raises:
        ConfigError: lr is not a finite number above 0.
    """
    _check_rate(lr)

    def step(meta: Params, state: OptState, gradient: Params) -> tuple[Params, OptState]:
        return {name: p - lr * gradient[name] for name, p in meta.items()}, state

    return OuterOptimizer(lambda meta: {}, step)


def adam(lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> OuterOptimizer:
    """Adam (Kingma & Ba, ICLR 2015, algorithm 1, with ε added to √v̂ as there and in torch.optim.Adam).

    Where the second moment is zero after the step (gradient and memory both zero: a bias before batch norm, a dead
    unit) the derivative of the step with respect to the gradient is taken as zero. Plain autograd gives NaN there, and
    the one-sided limit is of the order 1/ε.

    Raises:
        ConfigError: lr or eps is not a finite number above 0, or a decay is outside [0, 1).
    """
    _check_rate(lr)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 < eps < math.inf):
        raise ConfigError(
            f"adam with beta1 {beta1}, beta2 {beta2}, eps {eps}: decays lie in [0, 1), eps above 0, finite"
        )

    def init(meta: Params) -> OptState:
        device = next(iter(meta.values())).device
        moments = {f"{m}.{name}": torch.zeros_like(p) for m in ("mean", "square") for name, p in meta.items()}
        return {"count": torch.zeros((), dtype=torch.int64, device=device), **moments}

    def step(meta: Params, state: OptState, gradient: Params) -> tuple[Params, OptState]:
        count = state["count"] + 1
        # In float64 and then rounded: 1 − β₂ᵗ loses three digits in float32 at the first steps.
        steps = count.to(torch.float64)
        correction1 = 1 - torch.pow(torch.full_like(steps, beta1), steps)
        correction2 = 1 - torch.pow(torch.full_like(steps, beta2), steps)

        def of_entries(p: Tensor, g: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dead = beta2 * square + (1 - beta2) * g.detach().square() == 0
            g = torch.where(dead, g.detach(), g)
            mean = beta1 * mean + (1 - beta1) * g
            square = beta2 * square + (1 - beta2) * g.square()
            # The square root is taken of 1 where it would be of 0: its infinite slope must not meet a zero.
            root = torch.where(dead, torch.zeros_like(square), torch.where(dead, 1.0, square).sqrt())
            denominator = root / correction2.sqrt().to(p.dtype) + eps
            return p - (lr / correction1).to(p.dtype) * mean / denominator, mean, square

        def moment(which: str) -> Params:
            return {name: state[f"{which}.{name}"] for name in meta}

        trees = (meta, {name: gradient[name] for name in meta}, moment("mean"), moment("square"))
        after, mean, square = _end_to_end(of_entries, trees)
        moments = {
            f"{m}.{name}": leaf for m, tree in (("mean", mean), ("square", square)) for name, leaf in tree.items()
        }
        return after, {"count": count, **moments}

    return OuterOptimizer(init, step)


def _end_to_end(function: Callable[..., tuple[Tensor, ...]], trees: Sequence[Params]) -> list[Params]:
    """An elementwise function of trees, applied to all leaves laid end to end: an operation each, not one a leaf."""
    like = trees[0]
    if len({(leaf.dtype, leaf.device) for tree in trees for leaf in tree.values()}) > 1:
        each = [function(*(tree[name] for tree in trees)) for name in like]
        return [dict(zip(like, column, strict=True)) for column in zip(*each, strict=True)]
    sizes = [leaf.numel() for leaf in like.values()]
    values = function(*(torch.cat([tree[name].reshape(-1) for name in like]) for tree in trees))
    copied = torch.ops.aten.split_with_sizes_copy  # each leaf has memory of its own
    return [
        {name: part.view_as(like[name]) for name, part in zip(like, copied(value, sizes), strict=True)}
        for value in values
    ]


def clipped(optimizer: OuterOptimizer, max_norm: float) -> OuterOptimizer:
    """The optimiser on g · c/max(‖g‖, c): the combined gradient clipped to the Euclidean norm c over all parameters.

    Raises:
        ConfigError: max_norm is not a finite number above 0.
    """
    if not (math.isfinite(max_norm) and max_norm > 0):
        raise ConfigError(f"the clipping norm is {max_norm!r}, but it must be a finite number above 0")

    def step(meta: Params, state: OptState, gradient: Params) -> tuple[Params, OptState]:
        scale = max_norm / global_norm(gradient).clamp(min=max_norm)
        return optimizer.step(meta, state, {name: g * scale for name, g in gradient.items()})

    return OuterOptimizer(optimizer.init, step)


def _check_rate(lr: float) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"the learning rate is {lr!r}, but it must be a finite number above 0")
