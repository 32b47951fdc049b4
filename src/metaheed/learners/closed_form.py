"""Conv4's loss, its gradient, and products with its Hessian, in closed form: a second-order step without autograd.

Autograd takes a block's derivatives through dozens of passes over its full-size planes, each into fresh memory. Written
out, a block needs of them: forward, a convolution, one pass for the statistics and one for the maxima; backward and for
the Hessian, the convolutions, two passes and a scatter. All else happens after the pooling, on a quarter of the values.

A block maps x to z. P picks the maxima: with s = sign γ folded into the convolution and γ ≥ 0, halving commutes with
the norm and with ReLU, so it can come first. Per channel:

    y = conv(x, W)      μ, v = mean and variance of y over its M places      r = (v + ε)^(-1/2)
    p = P y             ŷ = r (y − μ),  q = r (p − μ)                        z = max(γ q + β, 0)

1. Gradient, from δ = ∂L/∂z:  e = δ [z > 0],  S₀ = Σ e,  S₁ = Σ e q;  ∂L/∂β = S₀,  ∂L/∂γ = S₁,
   ∂L/∂y = γ r (Pᵀ e − (S₀ + S₁ ŷ) / M)                                                       (1)
2. Hessian times a direction (Pearlmutter, Fast Exact Multiplication by the Hessian, 1994): every quantity of the
   forward pass and of step 1 is differentiated along the direction, marked by a dot, which costs about two gradients:
   T₀ = Σ ẏ,  T₁ = Σ ŷ ẏ,  ṙ = −r² T₁ / M,  q̇ = r (P ẏ − (T₀ + q T₁) / M),  and (1) by the product rule.
   Neither ŷ nor q is ever formed: both are affine in y and p, so they end in factors per channel.

A convolution's bias cancels in the norm: its derivatives are exactly zero, where autograd returns rounding errors. In
its place the convolution is given the bias that makes μ vanish, known before y is (`_centring`). The maxima and the
signs of z count as constants, as in autograd. Where γ is zero every place is a maximum, and autograd takes another than
y's, which shows in ∂L/∂γ: that is left to autograd (`fits`).

Legend: B tasks, n images each, C channels. The tasks stand side by side in the channels: nothing but the head joins
channels, and a convolution in groups keeps tasks apart. Planes are (n, B·C, H, W), channels-last in memory. Full-size
planes are made and read in slices of a few images, for the next pass to find them in the processor's cache. Where no
Hessian is to follow, the lowest block's, the largest and for their few channels in the cheapest to convolve, are made
twice and not kept. Vectors of one number a channel are NumPy's: PyTorch would spend more on each operation than on its
arithmetic.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaheed.errors import ConfigError
from metaheed.learners.backbones import Conv4
from metaheed.types import Params

_aten = torch.ops.aten
_SLICE_BYTES = 1 << 22
"""Of a full-size plane at once: measured; about what a core's second-level cache holds."""
_SUMS_AT_ONCE = 2048
"""Numbers of a plane side by side, which fit into a core's first-level cache."""
_ROWS_AT_ONCE = 64
"""One after another in float32: 512 would triple the error of z on images with a constant background."""


class _Shape(NamedTuple):
    """What a block is, apart from its parameters."""

    name: str
    stride: int
    pool: bool
    eps: float


class _Block(NamedTuple):
    """What a block's forward pass leaves behind; symbols as above."""

    x: Tensor
    weight: Tensor  # s W
    bias: Tensor  # of the convolution, so that y's mean is zero but for rounding
    sign: np.ndarray | None  # s; none: 1 everywhere
    gain: np.ndarray  # s γ
    mean: np.ndarray  # what is left of it
    r: np.ndarray
    y: list[Tensor]  # slices; empty: to be made again
    places: list[Tensor | None]  # of the maxima, in each slice laid out flat; none: every place
    p: Tensor
    z: Tensor
    rows: int  # images in a slice
    M: int

    def slices(self, *planes: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """The planes slice by slice, side by side."""
        if len(self.x) <= self.rows:
            return iter([planes])
        count = -(-len(self.x) // self.rows)
        return zip(*((None,) * count if p is None else torch.split(p, self.rows) for p in planes), strict=True)


class _Slope(NamedTuple):
    """What a block's gradient leaves behind."""

    e: Tensor
    S0: np.ndarray
    S1: np.ndarray
    dy: list[Tensor]


class _Dots(NamedTuple):
    """Derivatives of a block's forward pass along the direction."""

    x: Tensor | None  # none: images do not move
    weight: Tensor
    gain: np.ndarray
    y: list[Tensor]
    T0: np.ndarray
    T1: np.ndarray
    q: Tensor
    z: Tensor


class Tape(NamedTuple):
    """What `gradient` leaves behind for `hessian_product`."""

    blocks: list[_Block]
    slopes: list[_Slope]
    features: Tensor
    p: Tensor  # probabilities
    dlogits: Tensor


class ClosedForm:
    """Conv4's derivatives with respect to all of its parameters; nothing is kept between calls."""

    def __init__(self, module: Conv4) -> None:
        blocks: list[Any] = [block for block in module.body if isinstance(block, nn.Sequential)]
        self._parts = [*map(_Part.of, module.modules())]
        self.names = frozenset(name for name, _ in module.named_parameters())
        self._shapes = [
            _Shape(f"body.{i}", block.conv.stride[0], hasattr(block, "pool"), block.norm.eps)
            for i, block in enumerate(blocks)
        ]
        self._mean_plane = len(module.body) > len(blocks)

    @property
    def applies(self) -> bool:
        """Whether calling the module would do nothing else: it is as it was when this was made of it, and there is no
        hook in it or for all, nor another forward.
        """
        for_all = nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        return not for_all and _unchanged(self._parts)

    def fits(self, params: Params, x: Tensor) -> bool:
        """Whether it holds for these values: no γ is zero, and every norm has more than one place to average over.

        Where a norm has one place only, or the images another number of channels, PyTorch's own refuses, and says why.

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
        gains = (_numbers(params[f"{shape.name}.norm.weight"]) for shape in self._shapes)
        return all(number > 1 and bool(np.all(gain)) for number, gain in zip(places, gains, strict=True))

    def check_size(self, params: Params, x: Tensor, size: Sequence[int]) -> None:
        """Raise ConfigError if the images are not of the size that the network was built for.

        Args:
            params, x: as for `fits`.
            size: of a plane after the last block.
        """
        places = 1 if self._mean_plane else size[0] * size[1]
        expected = params["head.weight"].shape[-1] // params[f"{self._shapes[-1].name}.conv.weight"].shape[-4]
        if places != expected:
            raise ConfigError(
                f"the images have {x.shape[-2]}×{x.shape[-1]} pixels, of which the network's last block leaves "
                f"{places} places, but its head was built for {expected}: resize the images, or build the network for "
                "this size"
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
            names: of the parameters whose gradient is wanted; none: all.
            keep: for `hessian_product`, at the price of the memory.
        """
        features, logits, blocks = self._forward(params, x, keep="all" if keep else "upper")
        loss = mean_cross_entropy(logits, y)
        p = torch.softmax(logits, 2)
        dlogits = p.scatter_add(2, y.unsqueeze(2), p.new_full((*y.shape, 1), -1.0)).div_(y.shape[1])
        found: Params = {"head.weight": dlogits.mT @ features, "head.bias": dlogits.sum(1)}
        slopes: list[_Slope] = []
        dz = self._from_features(dlogits @ params["head.weight"], blocks[-1].z)
        wanted = [keep or names is None or any(n.startswith(s.name) for n in names) for s in self._shapes]
        lowest = wanted.index(True) if any(wanted) else len(blocks)
        for index in range(len(blocks) - 1, lowest - 1, -1):
            shape = self._shapes[index]
            block = blocks[index] if keep else blocks.pop()  # its planes are freed as soon as may be
            dz, slope, dweight = _gradient(shape, block, dz, inward=index > lowest, keep=keep)
            found |= _named(shape, block, dweight, slope.S1, slope.S0)
            slopes.insert(0, slope)
        gradient = {name: found[name] for name in (params if names is None else names)}
        return gradient, loss, logits, Tape(blocks, slopes, features, p, dlogits) if keep else None

    def hessian_product(self, params: Params, tape: Tape, direction: Params) -> Params:
        """∇²L of each task times a direction, from the tape of `gradient` at the same φ.

        Args:
            params: φ, (B, …).
            tape: kept by `gradient`; it is left as it is.
            direction: of φ, (B, …); parameters that it leaves out do not move.
        """
        direction = {n: direction[n] if n in direction else torch.zeros_like(p) for n, p in params.items()}
        z_dot: Tensor | None = None
        dots = []
        for shape, block in zip(self._shapes, tape.blocks, strict=True):
            dots.append(_forward_dots(shape, block, z_dot, direction))
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
            dz_dot, dweight, dgain, dbeta = _backward_dots(shape, block, tape.slopes[index], dots.pop(), dz_dot)
            found |= _named(shape, block, dweight, dgain, dbeta)
        return {name: found[name] for name in params}

    def _forward(
        self, params: Params, x: Tensor, keep: Literal["none", "upper", "all"]
    ) -> tuple[Tensor, Tensor, list[_Block]]:
        """Features, logits, and the blocks (with keep "none": none); `keep` says whose full-size planes are kept."""
        blocks: list[_Block] = []
        head = params["head.weight"]
        B, n, C, *size = x.shape
        z = _empty(head, n, B * C, *size)
        z.view(n, B, C, *size).copy_(x.transpose(0, 1))
        for shape in self._shapes:
            stored = keep == "all" or (keep == "upper" and bool(blocks))
            block = _forward(shape, params, z, stored, alone=keep == "none")
            z = block.z
            if keep != "none":
                blocks.append(block)
        features = self._to_features(z, B)
        return features, torch.baddbmm(params["head.bias"].unsqueeze(1), features, head.mT), blocks

    def _to_features(self, z: Tensor, B: int) -> Tensor:
        n, _, *size = z.shape
        if self._mean_plane:
            return z.mean((2, 3)).view(n, B, -1).transpose(0, 1)
        return z.view(n, B, -1, *size).transpose(0, 1).flatten(2)

    def _from_features(self, cotangent: Tensor, z: Tensor) -> Tensor:
        B, n, _ = cotangent.shape
        _, channels, *size = z.shape
        if self._mean_plane:
            each = (cotangent / (size[0] * size[1]))[:, :, :, None, None]
        else:
            each = cotangent.view(B, n, channels // B, *size)
        plane = _empty(z, *z.shape)
        plane.view(n, B, channels // B, *size).copy_(each.transpose(0, 1))
        return plane


def mean_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """In nats, over the images of logits (…, n, N) and labels (…, n): (…).

    Raises:
        ConfigError: the labels are not int64 of that shape; on a CPU also: they are not in [0, N).
    """
    if not isinstance(y, Tensor):
        raise ConfigError(
            f"the labels are a {type(y).__name__}, but they must be an int64 tensor: torch.as_tensor(...)"
        )
    if y.shape != logits.shape[:-1] or y.dtype != torch.int64:
        raise ConfigError(
            f"the labels are of shape {tuple(y.shape)} and type {y.dtype}, but they must be int64 "
            f"of shape {tuple(logits.shape[:-1])}: one whole number for each image"
        )
    try:
        chosen = torch.log_softmax(logits, -1).gather(-1, y.unsqueeze(-1))
    except (RuntimeError, IndexError) as error:
        if "out of bounds" not in str(error):
            raise
        hidden = torch._C._functorch.is_functorch_wrapped_tensor(y)  # by vmap
        wrong = "" if hidden else f" such as {int(y[(y < 0) | (y >= logits.shape[-1])][0])}"
        raise ConfigError(
            f"there are labels outside 0..{logits.shape[-1] - 1}{wrong}, but the network has {logits.shape[-1]} "
            "logits: number the classes of a task from 0, or build the network for more ways"
        ) from error
    return -chosen.squeeze(-1).mean(-1)


_Kind = TypeVar("_Kind", bound=ClosedForm)


def closed_form(module: nn.Module, kind: type[_Kind] = ClosedForm) -> _Kind | None:  # type: ignore[assignment]
    """The closed form of a network that is Conv4 as it was built, all its parameters learned; else none."""
    if type(module) is not Conv4 or not all(p.requires_grad for p in module.parameters()):
        return None
    blocks = [part for part in module.body if isinstance(part, nn.Sequential)]
    rest = [part for part in module.body if not isinstance(part, nn.Sequential)]
    usual = all(map(_as_built, blocks)) and [*module.body] == blocks + rest
    usual = usual and [repr(part) for part in rest] in ([], [repr(nn.AdaptiveAvgPool2d(1))])
    return kind(module) if usual and type(module.head) is nn.Linear and module.head.bias is not None else None


def _of_norm(norm: dict[str, Any]) -> tuple[Any, ...]:
    return norm["eps"], norm["track_running_stats"], *norm["_buffers"].values()


# By functions that have names, so that a learner can be pickled.
_SETTINGS: dict[type[nn.Module], Callable[[dict[str, Any]], Any]] = {
    nn.Conv2d: itemgetter("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: _of_norm,
    nn.MaxPool2d: itemgetter("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
    nn.AdaptiveAvgPool2d: itemgetter("output_size"),
}
"""What decides what a module computes, apart from its parameters and the modules in it, out of its attributes."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_METHODS = ("forward", "_conv_forward", "_check_input_dim", "_call_impl")
"""Of a module's class, which an instance may have others of."""


class _Part(NamedTuple):
    """A module as it was when a closed form was made; it is asked for at every step, so by comparisons alone."""

    module: nn.Module
    kind: type[nn.Module]
    inside: tuple[tuple[str, nn.Module | None], ...]
    read: Callable[[dict[str, Any]], Any]
    settings: Any

    @classmethod
    def of(cls, module: nn.Module) -> "_Part":
        read: Callable[[dict[str, Any]], Any] = _SETTINGS.get(type(module), _nothing)
        return cls(module, type(module), (*module._modules.items(),), read, read(module.__dict__))


def _nothing(attributes: dict[str, Any]) -> None:
    """Of a module that has no settings."""


def _unchanged(parts: list[_Part]) -> bool:
    for module, kind, inside, read, settings in parts:
        attributes = module.__dict__  # which are quicker to come by than a module's own
        if type(module) is not kind or (*attributes["_modules"].items(),) != inside or read(attributes) != settings:
            return False
        if any(attributes[hooks] for hooks in _HOOKS) or any(method in attributes for method in _METHODS):
            return False
        for parameter in attributes["_parameters"].values():
            if parameter is None or not parameter.requires_grad:
                return False
    return True


def _as_built(block: nn.Sequential) -> bool:
    parts = dict(block.named_children())
    conv, norm, pool = parts.get("conv"), parts.get("norm"), parts.get("pool")
    names = ["conv", "norm", "pool", "relu"] if pool is not None else ["conv", "norm", "relu"]
    return (
        list(parts) == names
        and type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.padding, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and conv.padding_mode == "zeros"
        and conv.bias is not None
        and conv.stride in ((1, 1), (2, 2))
        and type(norm) is nn.BatchNorm2d
        and norm.affine
        and not norm.track_running_stats
        and (pool is None or repr(pool) == repr(nn.MaxPool2d(2)))
        and type(parts["relu"]) is nn.ReLU
    )


def _forward(shape: _Shape, params: Params, x: Tensor, keep: bool, alone: bool) -> _Block:
    """The block's output and what the reverse pass needs (alone: there is none, and p makes room for z)."""
    W, gain, beta = _parameters(shape, params)
    sign = np.where(gain < 0, -1, 1).astype(gain.dtype) if np.any(gain < 0) else None
    weight = _signed(W, sign)
    gain = np.abs(gain)
    n, C = len(x), len(gain)  # of all tasks
    height, width = ((side - 1) // shape.stride + 1 for side in x.shape[2:])
    slices = -(-n * C * height * width * x.element_size() // _SLICE_BYTES)
    rows = -(-n // slices)
    p = _empty(x, n, C, height // 2, width // 2) if shape.pool else _empty(x, n, C, height, width)
    bias = _centring(shape, x, weight)
    kept: list[Tensor] = []
    places: list[Tensor | None] = []
    sums = []
    y = place = None
    for first in range(0, n, rows):
        del y, place  # so that their memory, still in the cache, is taken again
        part, slot = (x, p) if n <= rows else (x[first : first + rows], p[first : first + rows])
        y, place = _planes(shape, part, weight, bias, slot, keep)
        sums.append(_moments(y))
        if keep:
            kept.append(y)
            places.append(place)
    M = n * height * width
    rest, square = np.sum(sums, axis=0) / M
    variance = np.maximum(square - rest**2, 0)
    # What is left of the mean is mostly the kernel's rounding; only where it is more has the centring been inexact.
    rest[np.abs(rest) < 128 * np.finfo(gain.dtype).eps * np.sqrt(variance)] = 0
    mean = rest.astype(gain.dtype)
    r = (1 / np.sqrt(variance + shape.eps)).astype(gain.dtype)
    scale = gain * r
    z = p if alone else _empty(p, *p.shape)
    shift, slope = _c(beta - scale * mean), _c(scale)
    # Slice by slice, so that the second pass finds in the cache what the first has written.
    for part, out in zip(torch.split(p, rows), torch.split(z, rows), strict=True):
        torch.addcmul(shift, part, slope, out=out).relu_()
    return _Block(x, weight, bias, sign, gain, mean, r, kept, places, p, z, rows, M)


def _centring(shape: _Shape, x: Tensor, weight: Tensor) -> Tensor:
    """Minus the mean of conv(x, W), (C,): the mean of the convolution is W times the mean of what each tap sees.

    Added by the convolution itself, it costs no pass over the planes, and the squares that are then summed cancel
    nothing: a background that is the same everywhere else shifts every place alike, and ReLUs and maxima flip.
    """
    n, channels, height, width = x.shape
    B = _groups(x, weight)
    # Laid out flat, for PyTorch takes this mean of channels-last planes forty times as long.
    image = _flat(x).view(n, -1).mean(0).view(height * width, channels)
    seen = (_taps(height, width, shape.stride) @ image.double()).view(9, B, -1)
    weights = weight.permute(0, 2, 3, 1).reshape(B, -1, 9 * channels // B)
    return -torch.bmm(weights.double(), seen.transpose(0, 1).reshape(B, -1, 1)).view(-1).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _taps(height: int, width: int, stride: int) -> Tensor:
    """(9, H·W) float64: the share of a 3×3 convolution's places whose tap falls onto a pixel; zeros surround them."""
    lines = []
    for side in (height, width):
        places = np.arange(0, side, stride)
        pixels = places + np.arange(-1, 2)[:, None]  # of 3 taps
        lines.append((pixels[:, :, None] == np.arange(side)).mean(1))
    return torch.from_numpy(np.einsum("ih,jw->ijhw", *lines).reshape(9, -1))


def _planes(
    shape: _Shape, x: Tensor, weight: Tensor, bias: Tensor, p: Tensor, locate: bool
) -> tuple[Tensor, Tensor | None]:
    """y of a slice, and where in it, laid out flat, its maxima stand (if asked to locate them); p is filled."""
    y = _channels_last(F.conv2d(x, weight, bias, shape.stride, 1, 1, _groups(x, weight)))
    if not shape.pool:
        p.copy_(y)
        return y, None
    place = torch.empty_like(p, dtype=torch.int64)
    _aten.max_pool2d_with_indices.out(y, [2, 2], [2, 2], out=p, indices=place)
    if not locate:
        return y, None
    n, C, height, width = y.shape
    return y, _flat(torch.add(_corners(n, C, height * width), place, alpha=C, out=place))


def _gradient(shape: _Shape, block: _Block, dz: Tensor, inward: bool, keep: bool) -> tuple[Tensor, _Slope, Tensor]:
    """∂L/∂x (empty unless `inward`), what `_backward_dots` needs, and ∂L/∂(s W). Takes dz's memory."""
    M, r = block.M, block.r
    e = _aten.threshold_backward.grad_input(dz, block.z, 0, grad_input=dz)
    S0, S1 = _sliced_sums(block, e, block.p, block.mean, r)
    c = block.gain * r
    slope = c * r * S1 / -M
    offset = c * S0 / -M - slope * block.mean
    ce = e * _c(c) if keep else e.mul_(_c(c))
    into = _Convolved(shape, block, inward)
    kept = []
    y = place = dy = None
    for k, (x, part) in enumerate(block.slices(block.x, ce)):
        del y, place, dy
        if block.y:
            y, place = block.y[k], block.places[k]
        else:
            y, place = _planes(shape, x, block.weight, block.bias, torch.empty_like(part), True)
        # Images do not move, so the lowest block's ∂L/∂y is not needed again; nor is y, unless for the Hessian.
        dy = torch.addcmul(_c(offset), y, _c(slope), out=None if keep else y)
        _add_at(dy, place, part)
        into.pull(dy, x, block.weight, k)
        if keep and inward:
            kept.append(dy)
    return into.dx, _Slope(e, S0, S1, kept), into.dweight


def _forward_dots(shape: _Shape, block: _Block, x_dot: Tensor | None, direction: Params) -> _Dots:
    W, gain, beta = _parameters(shape, direction)
    weight = _signed(W, block.sign)
    if block.sign is not None:
        gain = gain * block.sign
    M, r, mean = block.M, block.r, block.mean
    T0, T1 = np.zeros_like(r), np.zeros_like(r)
    q = torch.empty_like(block.p)  # P ẏ at first
    planes = []
    for k, (x, moved, slot) in enumerate(block.slices(block.x, x_dot, q)):
        y_dot = F.conv2d(x, weight, None, shape.stride, 1, 1, _groups(x, weight))
        if moved is not None:
            y_dot += F.conv2d(moved, block.weight, None, shape.stride, 1, 1, _groups(x, weight))
        y_dot = _channels_last(y_dot)
        sums = _sums(y_dot, block.y[k], mean, r)
        T0, T1 = T0 + sums[0], T1 + sums[1]
        place = block.places[k]
        if place is None:
            slot.copy_(y_dot)
        else:
            torch.index_select(_flat(y_dot), 0, place, out=_flat(slot))
        planes.append(y_dot)
    on_p = r * r * T1 / -M
    torch.addcmul(_c(r * T0 / -M - on_p * mean), q, _c(r), out=q).addcmul_(block.p, _c(on_p))
    on_p = gain * r
    z = torch.addcmul(_c(beta - on_p * mean), q, _c(block.gain)).addcmul_(block.p, _c(on_p))
    _aten.threshold_backward.grad_input(z, block.z, 0, grad_input=z)
    return _Dots(x_dot, weight, gain, planes, T0, T1, q, z)


def _backward_dots(
    shape: _Shape, block: _Block, slope: _Slope, dots: _Dots, dz_dot: Tensor
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """The derivatives of ∂L/∂x (empty in the lowest block), ∂L/∂(s W), ∂L/∂(s γ) and ∂L/∂β along the direction."""
    M, r, S0, S1, T0, T1 = block.M, block.r, slope.S0, slope.S1, dots.T0, dots.T1
    e_dot = _aten.threshold_backward.grad_input(dz_dot, block.z, 0, grad_input=dz_dot)
    S0_dot, S1_dot = _sliced_sums(block, e_dot, block.p, block.mean, r)
    S1_dot = S1_dot + _sliced_sums(block, slope.e, dots.q, np.zeros_like(r), np.ones_like(r))[1]
    # (1) is c (Pᵀ e − (S₀ + S₁ ŷ) / M) with c = γ r; the derivative of ŷ is r (ẏ − (T₀ + T₁ ŷ) / M).
    c = block.gain * r
    c_dot = dots.gain * r - block.gain * r * r * T1 / M
    on_y_dot = c * S1 * r / -M
    on_y = ((c_dot * S1 + c * S1_dot) + on_y_dot * T1) * r / -M
    offset = ((c_dot * S0 + c * S0_dot) + on_y_dot * T0) / -M - on_y * block.mean
    ce_dot = e_dot.mul_(_c(c)).addcmul_(slope.e, _c(c_dot))
    into = _Convolved(shape, block, dots.x is not None)
    for k, (x, moved, part) in enumerate(block.slices(block.x, dots.x, ce_dot)):
        y_dot = dots.y[k]
        dy_dot = torch.addcmul(_c(offset), y_dot, _c(on_y_dot), out=y_dot).addcmul_(block.y[k], _c(on_y))
        _add_at(dy_dot, block.places[k], part)
        into.pull(dy_dot, x, block.weight, k)
        if moved is not None:
            into.pull(slope.dy[k], moved, dots.weight, k, again=True)
    return into.dx, into.dweight, S1_dot, S0_dot


class _Convolved:
    """The sums that vector-Jacobian products of a block's convolution go into, slice by slice."""

    def __init__(self, shape: _Shape, block: _Block, inward: bool) -> None:
        self._shape, self._block, self._inward = shape, block, inward
        self._whole = len(block.x) <= block.rows
        self.dx = torch.empty_like(block.x) if inward and not self._whole else block.x.new_empty(0)
        self.dweight: Tensor = None  # type: ignore[assignment]  # there is a first slice

    def pull(self, dy: Tensor, x: Tensor, weight: Tensor, k: int, again: bool = False) -> None:
        """Those of slice k: into dx, or added to it if `again`; and into dweight."""
        strides, groups = [self._shape.stride] * 2, _groups(x, weight)
        dx, dweight, _ = _aten.convolution_backward(
            dy, x, weight, None, strides, [1, 1], [1, 1], False, [0, 0], groups, [self._inward, True, False]
        )
        if self.dweight is None:
            self.dweight = dweight
        else:
            self.dweight += dweight
        if not self._inward:
            return
        if self._whole and not again:
            self.dx = dx
            return
        rows = self._block.rows
        slot = self.dx if self._whole else self.dx[k * rows : (k + 1) * rows]
        if again:
            slot += dx
        else:
            slot.copy_(dx)


def _parameters(shape: _Shape, params: Params) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """A block's W, γ and β, the tasks side by side in the channels."""
    gamma, beta = (_numbers(params[f"{shape.name}.norm.{which}"]) for which in ("weight", "bias"))
    return params[f"{shape.name}.conv.weight"].flatten(0, 1), gamma, beta


def _numbers(vector: Tensor) -> np.ndarray:
    """One a channel, the tasks side by side."""
    return vector.detach().numpy().reshape(-1)


def _signed(weight: Tensor, sign: np.ndarray | None) -> Tensor:
    return _channels_last(weight if sign is None else weight * torch.from_numpy(sign[:, None, None, None]))


def _groups(x: Tensor, weight: Tensor) -> int:
    return x.shape[1] // weight.shape[1]


def _named(shape: _Shape, block: _Block, dweight: Tensor, dgain: np.ndarray, dbeta: np.ndarray) -> Params:
    B, sign = _groups(block.x, block.weight), block.sign
    if sign is not None:
        dweight, dgain = dweight * torch.from_numpy(sign[:, None, None, None]), dgain * sign
    # Copies: a tape that held a result itself would keep its own graph alive.
    dgain, dbeta = dgain.reshape(B, -1).copy(), dbeta.reshape(B, -1).copy()
    return {
        f"{shape.name}.conv.weight": dweight.view(*dgain.shape, *dweight.shape[1:]),
        f"{shape.name}.conv.bias": torch.zeros(dgain.shape, dtype=dweight.dtype, device=dweight.device),
        f"{shape.name}.norm.weight": torch.from_numpy(dgain),
        f"{shape.name}.norm.bias": torch.from_numpy(dbeta),
    }


def _sums(a: Tensor, b: Tensor, mean: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per channel Σ a and Σ a r (b − mean), in one pass: batch norm's own backward kernel."""
    _, product, total = _aten.native_batch_norm_backward(
        a, b, None, None, None, torch.from_numpy(mean), torch.from_numpy(r), True, 0.0, [False, True, True]
    )
    return total.numpy(), product.numpy()


def _sliced_sums(block: _Block, a: Tensor, b: Tensor, mean: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`_sums`, slice by slice: the kernel adds up in the planes' own precision, which long sums lose."""
    parts = [_sums(a_slice, b_slice, mean, r) for a_slice, b_slice in block.slices(a, b)]
    if len(parts) == 1:
        return parts[0]
    total, product = (np.sum(sums, axis=0, dtype=np.float64).astype(r.dtype) for sums in zip(*parts, strict=True))
    return total, product


def _moments(y: Tensor) -> np.ndarray:
    """Per channel Σ y and Σ y², (2, C) float64, in one pass.

    The kernel adds one float32 after another. It is shown several places of a channel as as many channels, and a few
    dozens of each at once.
    """
    C, flat = y.shape[1], _flat(y)
    M = y.numel() // C
    together = min(1 << (M // _ROWS_AT_ONCE).bit_length(), max(1, _SUMS_AT_ONCE // C))  # places; evenly, mostly
    columns = together * C
    whole = y.numel() // columns * columns
    moments = _squares(flat[:whole].view(-1, columns), C)
    return moments if whole == y.numel() else moments + _squares(flat[whole:].view(-1, C), C)


def _squares(rows: Tensor, C: int) -> np.ndarray:
    """The moments of rows of several places of C channels each."""
    dtype = np.float32 if rows.dtype == torch.float32 else np.float64
    zeros, ones = np.zeros(rows.shape[1], dtype), np.ones(rows.shape[1], dtype)
    moments = np.zeros((2, C))
    for part in torch.split(rows, _ROWS_AT_ONCE):
        for moment, found in zip(moments, _sums(part, part, zeros, ones), strict=True):
            moment += found.reshape(-1, C).sum(0, dtype=np.float64)
    return moments


def _add_at(plane: Tensor, place: Tensor | None, values: Tensor) -> None:
    if place is None:
        plane += values
    else:
        _flat(plane).scatter_add_(0, place, _flat(values))


@functools.lru_cache(maxsize=64)
def _corners(n: int, channels: int, places: int) -> Tensor:
    """Where in a slice, laid out flat, each image's plane of each channel begins, (n, C, 1, 1)."""
    images, planes = (torch.arange(count, device="cpu") for count in (n, channels))
    return (images[:, None] * (places * channels) + planes)[:, :, None, None]


def _c(vector: np.ndarray) -> Tensor:
    """(C,) beside planes."""
    return torch.from_numpy(vector[:, None, None])


def _flat(plane: Tensor) -> Tensor:
    """A channels-last plane's memory as it lies."""
    return plane.as_strided((plane.numel(),), (1,))


def _empty(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _channels_last(plane: Tensor) -> Tensor:
    """In that layout by its strides, also where a size of 1 leaves it open."""
    _, C, height, width = plane.shape
    there = plane.stride() == (C * height * width, 1, width * C, C)
    return plane if there else _empty(plane, *plane.shape).copy_(plane)
