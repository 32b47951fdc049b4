"""Conv4's loss, its gradient, and products with its Hessian, in closed form: a second-order step without autograd.

Autograd takes the derivatives of a block by dozens of passes over full-size planes, each into fresh memory. Written
out, a block needs far fewer: forward, a convolution, one pass for the statistics and one for the maxima; backward and
for the Hessian, the convolutions, two passes and a scatter. Everything else happens after the pooling, on a quarter of
the values. The arithmetic of a single block is in block.py; this file chains the blocks.

A block maps x to z. P picks the maxima. The sign s of γ is folded into the convolution, so that γ ≥ 0: then halving
commutes with the norm and with ReLU, and can come first. Per channel:

    y = conv(x, W)      μ, v = mean and variance of y over its M places      r = (v + ε)^(-1/2)
    p = P y             ŷ = r (y − μ),  q = r (p − μ)                        z = max(γ q + β, 0)

1. Gradient, from δ = ∂L/∂z:  e = δ [z > 0],  S₀ = Σ e,  S₁ = Σ e q;  ∂L/∂β = S₀,  ∂L/∂γ = S₁,
   ∂L/∂y = γ r (Pᵀ e − (S₀ + S₁ ŷ) / M)                                                       (1)
2. Hessian times a direction (Pearlmutter, Fast Exact Multiplication by the Hessian, 1994): every quantity of the
   forward pass and of step 1 is differentiated along the direction, which a dot marks. This costs about two gradients:
   T₀ = Σ ẏ,  T₁ = Σ ŷ ẏ,  ṙ = −r² T₁ / M,  q̇ = r (P ẏ − (T₀ + q T₁) / M),  and (1) by the product rule.
   Neither ŷ nor q is ever formed: both are affine in y and p, so they become factors per channel.

A convolution's bias cancels in the norm: its derivatives are exactly zero, where autograd returns rounding errors. In
its place the convolution gets the bias that makes μ vanish, which is known before y is (`_centring` in block.py). The
maxima and the signs of z count as constants, as in autograd. If γ is zero, every place is a maximum. Autograd picks a
different maximum than this file would, which changes ∂L/∂γ; so that case is left to autograd (`fits`).

Legend: B tasks, n images each, C channels; a place is a position (image, row, column) of a plane. The tasks stand side
by side in the channels: only the head joins channels, and a convolution in groups keeps tasks apart. Planes are
(n, B·C, H, W), channels-last in memory. Full-size planes are made and read in slices of a few images, so that the next
pass finds them in the processor's cache. If no Hessian product follows, the first block's planes are recomputed instead
of stored: they are the largest and, with few input channels, the cheapest. Vectors of one number a channel are NumPy
arrays, because PyTorch would spend more time on each operation than on its arithmetic.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from metaheed.errors import ConfigError
from metaheed.networks.closed_form.block import (
    Block,
    Shape,
    Slope,
    backward_dots,
    block_forward,
    block_gradient,
    empty_plane,
    forward_dots,
    named,
    numbers,
)
from metaheed.networks.closed_form.recognition import Part, as_built, unchanged
from metaheed.networks.conv4 import Conv4
from metaheed.networks.losses import mean_cross_entropy
from metaheed.types import Params


class Tape(NamedTuple):
    """What `gradient` keeps for `hessian_product`."""

    blocks: list[Block]
    slopes: list[Slope]
    features: Tensor
    p: Tensor  # probabilities
    dlogits: Tensor


class ClosedForm:
    """Conv4's derivatives with respect to all of its parameters; nothing is kept from call to call."""

    def __init__(self, module: Conv4) -> None:
        blocks: list[Any] = [block for block in module.body if isinstance(block, nn.Sequential)]
        self._parts = [*map(Part.of, module.modules())]
        self.names = frozenset(name for name, _ in module.named_parameters())
        self._shapes = [
            Shape(f"body.{i}", block.conv.stride[0], hasattr(block, "pool"), block.norm.eps)
            for i, block in enumerate(blocks)
        ]
        self._mean_plane = len(module.body) > len(blocks)

    @property
    def applies(self) -> bool:
        """Whether calling the module would compute the same.

        It would if the module is as it was when this object was made, without hooks (global ones included) and with its
        own forward.
        """
        for_all = nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        return not for_all and unchanged(self._parts)

    def fits(self, params: Params, x: Tensor) -> bool:
        """Whether the closed form holds for these values: no γ is zero, and every norm has several places to average
        over.

        It also returns False for errors that PyTorch explains itself: a norm over one place, or images with another
        number of channels.

        Raises:
            ConfigError: the network was built for images of another size.
        """
        if x.shape[-3] != params[f"{self._shapes[0].name}.conv.weight"].shape[-3]:
            return False
        count, *size = x.shape[-4], *x.shape[-2:]
        places = []
        for shape in self._shapes:
            size = [(side - 1) // shape.stride + 1 for side in size]
            places.append(count * size[0] * size[1])
            if shape.pool:
                size = [side // 2 for side in size]
        self.check_size(params, x, size)
        gains = (numbers(params[f"{shape.name}.norm.weight"]) for shape in self._shapes)
        return all(number > 1 and bool(np.all(gain)) for number, gain in zip(places, gains, strict=True))

    def check_size(self, params: Params, x: Tensor, size: Sequence[int]) -> None:
        """Raise ConfigError if the network was built for images of another size.

        Args:
            params, x: as for `fits`.
            size: (height, width) of a plane after the last block.
        """
        places = 1 if self._mean_plane else size[0] * size[1]
        expected = params["head.weight"].shape[-1] // params[f"{self._shapes[-1].name}.conv.weight"].shape[-4]
        if places != expected:
            raise ConfigError(
                f"images of {x.shape[-2]}×{x.shape[-1]} pixels leave {places} places after the network's last block, "
                f"but its head was built for {expected}: resize the images, or build the network for this size"
            )

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """(B, n, N) from parameters (B, …) and images (B, n, C, H, W)."""
        return self._forward(params, x, keep="none")[1]

    def gradient(
        self, params: Params, x: Tensor, y: Tensor, names: tuple[str, ...] | None = None, keep: bool = False
    ) -> tuple[Params, Tensor, Tensor, Tape | None]:
        """∇L of each task's mean cross-entropy, L (B,), the logits (B, n, N), and the tape if it is to be kept.

        Args:
            params: φ of each task, all parameters, (B, …).
            x, y: images (B, n, C, H, W) and labels (B, n).
            names: the parameters whose gradient is wanted; all if None.
            keep: keep the tape for `hessian_product`, which costs its memory.
        """
        features, logits, blocks = self._forward(params, x, keep="all" if keep else "upper")
        loss = mean_cross_entropy(logits, y)
        p = torch.softmax(logits, 2)
        dlogits = p.scatter_add(2, y.unsqueeze(2), p.new_full((*y.shape, 1), -1.0)).div_(y.shape[1])
        found: Params = {"head.weight": dlogits.mT @ features, "head.bias": dlogits.sum(1)}
        slopes: list[Slope] = []
        dz = self._from_features(dlogits @ params["head.weight"], blocks[-1].z)
        wanted = [keep or names is None or any(n.startswith(s.name) for n in names) for s in self._shapes]
        lowest = wanted.index(True) if any(wanted) else len(blocks)
        for index in range(len(blocks) - 1, lowest - 1, -1):
            shape = self._shapes[index]
            block = blocks[index] if keep else blocks.pop()  # frees its planes as soon as possible
            dz, slope, dweight = block_gradient(shape, block, dz, inward=index > lowest, keep=keep)
            found |= named(shape, block, dweight, slope.S1, slope.S0)
            slopes.insert(0, slope)
        gradient = {name: found[name] for name in (params if names is None else names)}
        return gradient, loss, logits, Tape(blocks, slopes, features, p, dlogits) if keep else None

    def hessian_product(self, params: Params, tape: Tape, direction: Params) -> Params:
        """∇²L of each task times a direction, from the tape of `gradient` at the same φ.

        Args:
            params: φ, (B, …).
            tape: kept by `gradient`; it is not changed.
            direction: of φ, (B, …); it is zero for parameters that are not in it.
        """
        direction = {n: direction[n] if n in direction else torch.zeros_like(p) for n, p in params.items()}
        z_dot: Tensor | None = None
        dots = []
        for shape, block in zip(self._shapes, tape.blocks, strict=True):
            dots.append(forward_dots(shape, block, z_dot, direction))
            z_dot = dots[-1].z
        head, head_dot = params["head.weight"], direction["head.weight"]
        features, p, dlogits = tape.features, tape.p, tape.dlogits
        features_dot = self._to_features(dots[-1].z, len(head))
        logits_dot = features_dot @ head.mT + features @ head_dot.mT + direction["head.bias"].unsqueeze(1)
        dlogits_dot = p * (logits_dot - (p * logits_dot).sum(2, keepdim=True)) / p.shape[1]
        found: Params = {
            "head.weight": dlogits_dot.mT @ features + dlogits.mT @ features_dot,
            "head.bias": dlogits_dot.sum(1),
        }
        dz_dot = self._from_features(dlogits_dot @ head + dlogits @ head_dot, tape.blocks[-1].z)
        for index in range(len(dots) - 1, -1, -1):
            shape, block = self._shapes[index], tape.blocks[index]
            dz_dot, dweight, dgain, dbeta = backward_dots(shape, block, tape.slopes[index], dots.pop(), dz_dot)
            found |= named(shape, block, dweight, dgain, dbeta)
        return {name: found[name] for name in params}

    def _forward(
        self, params: Params, x: Tensor, keep: Literal["none", "upper", "all"]
    ) -> tuple[Tensor, Tensor, list[Block]]:
        """Features, logits, and the blocks (an empty list with keep "none").

        Args:
            params, x: as for `gradient`.
            keep: whose full-size planes are kept: of no block, of the upper ones (all but the first), or of all.
        """
        blocks: list[Block] = []
        head = params["head.weight"]
        B, n, C, *size = x.shape
        z = empty_plane(head, n, B * C, *size)
        z.view(n, B, C, *size).copy_(x.transpose(0, 1))
        for shape in self._shapes:
            stored = keep == "all" or (keep == "upper" and bool(blocks))
            block = block_forward(shape, params, z, stored, alone=keep == "none")
            z = block.z
            if keep != "none":
                blocks.append(block)
        features = self._to_features(z, B)
        return features, torch.baddbmm(params["head.bias"].unsqueeze(1), features, head.mT), blocks

    def _to_features(self, z: Tensor, B: int) -> Tensor:
        """The last plane z as features (B, n, F)."""
        n, _, *size = z.shape
        if self._mean_plane:
            return z.mean((2, 3)).view(n, B, -1).transpose(0, 1)
        return z.view(n, B, -1, *size).transpose(0, 1).flatten(2)

    def _from_features(self, cotangent: Tensor, z: Tensor) -> Tensor:
        """A cotangent of the features as one of the plane z."""
        B, n, _ = cotangent.shape
        _, channels, *size = z.shape
        if self._mean_plane:
            each = (cotangent / (size[0] * size[1]))[:, :, :, None, None]
        else:
            each = cotangent.view(B, n, channels // B, *size)
        plane = empty_plane(z, *z.shape)
        plane.view(n, B, channels // B, *size).copy_(each.transpose(0, 1))
        return plane


_Kind = TypeVar("_Kind", bound=ClosedForm)


def closed_form(module: nn.Module, kind: type[_Kind] = ClosedForm) -> _Kind | None:  # type: ignore[assignment]
    """The closed form of a network that is Conv4 as it was built, with all its parameters learned; else None."""
    if type(module) is not Conv4 or not all(p.requires_grad for p in module.parameters()):
        return None
    blocks = [part for part in module.body if isinstance(part, nn.Sequential)]
    rest = [part for part in module.body if not isinstance(part, nn.Sequential)]
    usual = all(map(as_built, blocks)) and [*module.body] == blocks + rest
    usual = usual and [repr(part) for part in rest] in ([], [repr(nn.AdaptiveAvgPool2d(1))])
    return kind(module) if usual and type(module.head) is nn.Linear and module.head.bias is not None else None
