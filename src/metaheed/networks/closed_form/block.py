"""A block of convolution, batch norm, ReLU and pooling on a CPU: its gradient, and the gradient's derivative.

The formulas, the symbols and the legend of shapes are those of cpu.py. Variables are called after the symbols: dz is
∂L/∂z, and q_dot is q̇. A task's channels follow those of the task before, so a vector has B·C entries.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metaheed.types import Params

_aten = torch.ops.aten

_SLICE_BYTES = 1 << 22
"""Size of a slice of a full-size plane: the fastest that was measured, about a core's second-level cache."""
_SUMS_AT_ONCE = 2048
"""Entries of a row that sums run over side by side; they fit into a core's first-level cache."""
_ROWS_AT_ONCE = 64
"""Rows added one by one in float32; 512 would triple the error of z on images with a constant background."""


class Shape(NamedTuple):
    """What determines a block, apart from its parameters."""

    name: str
    stride: int
    pool: bool
    eps: float


class Block(NamedTuple):
    """What a block's forward pass keeps; the symbols are those of cpu.py."""

    x: Tensor
    weight: Tensor  # s W
    bias: Tensor  # of the convolution; it makes the mean of y zero up to rounding
    sign: np.ndarray | None  # s; None if it is 1 everywhere
    gain: np.ndarray  # s γ
    mean: np.ndarray  # what is left of y's mean
    r: np.ndarray
    y: list[Tensor]  # slices; empty if they are to be recomputed
    places: list[Tensor | None]  # the maxima's positions in each flat slice; None without pooling
    p: Tensor
    z: Tensor
    rows: int  # images in a slice
    M: int

    def slices(self, *planes: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Tuples of the slices of these planes, slice by slice."""
        if len(self.x) <= self.rows:
            return iter([planes])
        count = -(-len(self.x) // self.rows)
        return zip(*((None,) * count if p is None else torch.split(p, self.rows) for p in planes), strict=True)


class Slope(NamedTuple):
    """What a block's gradient keeps for the Hessian product."""

    e: Tensor
    S0: np.ndarray
    S1: np.ndarray
    dy: list[Tensor]


class _Dots(NamedTuple):
    """The derivatives of a block's forward pass along the direction."""

    x: Tensor | None  # None in the first block: images do not move
    weight: Tensor
    gain: np.ndarray
    y: list[Tensor]
    T0: np.ndarray
    T1: np.ndarray
    q: Tensor
    z: Tensor


def block_forward(shape: Shape, params: Params, x: Tensor, keep: bool, alone: bool) -> Block:
    """The block's output and what the reverse pass needs.

    Args:
        shape: the block's.
        params: all parameters, (B, …).
        x: the block's input.
        keep: keep the full-size planes.
        alone: there is no reverse pass, so z may take p's memory.
    """
    W, gain, beta = _parameters(shape, params)
    sign = np.where(gain < 0, -1, 1).astype(gain.dtype) if np.any(gain < 0) else None
    weight = _signed(W, sign)
    gain = np.abs(gain)
    n, C = len(x), len(gain)  # the channels of all tasks
    height, width = ((side - 1) // shape.stride + 1 for side in x.shape[2:])
    slices = -(-n * C * height * width * x.element_size() // _SLICE_BYTES)
    rows = -(-n // slices)
    p = empty_plane(x, n, C, height // 2, width // 2) if shape.pool else empty_plane(x, n, C, height, width)
    bias = _centring(shape, x, weight)
    kept: list[Tensor] = []
    places: list[Tensor | None] = []
    sums = []
    y = place = None
    for first in range(0, n, rows):
        del y, place  # so that their memory, which is still in the cache, is used again
        part, slot = (x, p) if n <= rows else (x[first : first + rows], p[first : first + rows])
        y, place = _planes(shape, part, weight, bias, slot, keep)
        sums.append(_moments(y))
        if keep:
            kept.append(y)
            places.append(place)
    M = n * height * width
    rest, square = np.sum(sums, axis=0) / M
    variance = np.maximum(square - rest**2, 0)
    # What is left of the mean is usually the kernel's rounding error; if it is larger, the centring was inexact.
    rest[np.abs(rest) < 128 * np.finfo(gain.dtype).eps * np.sqrt(variance)] = 0
    mean = rest.astype(gain.dtype)
    r = (1 / np.sqrt(variance + shape.eps)).astype(gain.dtype)
    scale = gain * r
    z = p if alone else empty_plane(p, *p.shape)
    shift, slope = _c(beta - scale * mean), _c(scale)
    # Slice by slice, so that the second operation finds the first one's result in the cache.
    for part, out in zip(torch.split(p, rows), torch.split(z, rows), strict=True):
        torch.addcmul(shift, part, slope, out=out).relu_()
    return Block(x, weight, bias, sign, gain, mean, r, kept, places, p, z, rows, M)


def _centring(shape: Shape, x: Tensor, weight: Tensor) -> Tensor:
    """Minus the mean of conv(x, W), (C,): that mean is W times the mean of what each tap of the convolution sees.

    As the convolution's bias it costs no pass over the planes, and the sums of squares that follow do not cancel.
    Otherwise a constant background would shift all places alike by a rounding error, and ReLUs and maxima would flip.
    """
    n, channels, height, width = x.shape
    B = _groups(x, weight)
    # On flat memory, because PyTorch needs forty times as long for this mean of channels-last planes.
    image = _flat(x).view(n, -1).mean(0).view(height * width, channels)
    seen = (_taps(height, width, shape.stride) @ image.double()).view(9, B, -1)
    weights = weight.permute(0, 2, 3, 1).reshape(B, -1, 9 * channels // B)
    return -torch.bmm(weights.double(), seen.transpose(0, 1).reshape(B, -1, 1)).view(-1).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _taps(height: int, width: int, stride: int) -> Tensor:
    """(9, H·W) float64: the share of a 3×3 convolution's places at which a tap sees a pixel; the border sees zeros."""
    lines = []
    for side in (height, width):
        places = np.arange(0, side, stride)
        pixels = places + np.arange(-1, 2)[:, None]  # seen by the 3 taps
        lines.append((pixels[:, :, None] == np.arange(side)).mean(1))
    return torch.from_numpy(np.einsum("ih,jw->ijhw", *lines).reshape(9, -1))


def _planes(
    shape: Shape, x: Tensor, weight: Tensor, bias: Tensor, p: Tensor, locate: bool
) -> tuple[Tensor, Tensor | None]:
    """y of a slice; p is filled in place.

    With `locate`, also the positions of the maxima in the slice's flat memory; None without pooling.
    """
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


def block_gradient(shape: Shape, block: Block, dz: Tensor, inward: bool, keep: bool) -> tuple[Tensor, Slope, Tensor]:
    """∂L/∂x (empty unless `inward`), what `backward_dots` needs, and ∂L/∂(s W).

    Args:
        shape, block: the block, and what its forward pass kept.
        dz: ∂L/∂z, whose memory is overwritten.
        inward: compute ∂L/∂x.
        keep: keep what the Hessian product needs.
    """
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
        # Without a Hessian product y is not needed again, so ∂L/∂y takes its memory.
        dy = torch.addcmul(_c(offset), y, _c(slope), out=None if keep else y)
        _add_at(dy, place, part)
        into.pull(dy, x, block.weight, k)
        if keep and inward:  # images do not move, so the first block's ∂L/∂y is not needed again
            kept.append(dy)
    return into.dx, Slope(e, S0, S1, kept), into.dweight


def forward_dots(shape: Shape, block: Block, x_dot: Tensor | None, direction: Params) -> _Dots:
    """The derivatives of the block's forward pass along a direction of its parameters and its input."""
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


def backward_dots(
    shape: Shape, block: Block, slope: Slope, dots: _Dots, dz_dot: Tensor
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """The derivatives of ∂L/∂x (empty in the first block), ∂L/∂(s W), ∂L/∂(s γ) and ∂L/∂β along the direction.

    The memory of `dz_dot` and of the planes in `dots` is overwritten.
    """
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
    """Accumulates the vector-Jacobian products of a block's convolution, slice by slice."""

    def __init__(self, shape: Shape, block: Block, inward: bool) -> None:
        self._shape, self._block, self._inward = shape, block, inward
        self._whole = len(block.x) <= block.rows
        self.dx = torch.empty_like(block.x) if inward and not self._whole else block.x.new_empty(0)
        self.dweight: Tensor = None  # type: ignore[assignment]  # the first slice sets it

    def pull(self, dy: Tensor, x: Tensor, weight: Tensor, k: int, again: bool = False) -> None:
        """Add the products of slice k to dweight, and write them into dx; with `again`, add them to dx."""
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


def _parameters(shape: Shape, params: Params) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """A block's W, γ and β, with the tasks side by side in the channels."""
    gamma, beta = (numbers(params[f"{shape.name}.norm.{which}"]) for which in ("weight", "bias"))
    return params[f"{shape.name}.conv.weight"].flatten(0, 1), gamma, beta


def numbers(vector: Tensor) -> np.ndarray:
    """A vector of one number a channel as a NumPy array, the tasks side by side."""
    return vector.detach().numpy().reshape(-1)


def _signed(weight: Tensor, sign: np.ndarray | None) -> Tensor:
    """s W, channels-last."""
    return _channels_last(weight if sign is None else weight * torch.from_numpy(sign[:, None, None, None]))


def _groups(x: Tensor, weight: Tensor) -> int:
    """The number of tasks, which are groups of the convolution."""
    return x.shape[1] // weight.shape[1]


def named(shape: Shape, block: Block, dweight: Tensor, dgain: np.ndarray, dbeta: np.ndarray) -> Params:
    """A block's gradient by the names of its parameters."""
    B, sign = _groups(block.x, block.weight), block.sign
    if sign is not None:
        dweight, dgain = dweight * torch.from_numpy(sign[:, None, None, None]), dgain * sign
    # Copies: if the tape held a result itself, it would keep its own graph alive.
    dgain, dbeta = dgain.reshape(B, -1).copy(), dbeta.reshape(B, -1).copy()
    return {
        f"{shape.name}.conv.weight": dweight.view(*dgain.shape, *dweight.shape[1:]),
        f"{shape.name}.conv.bias": torch.zeros(dgain.shape, dtype=dweight.dtype, device=dweight.device),
        f"{shape.name}.norm.weight": torch.from_numpy(dgain),
        f"{shape.name}.norm.bias": torch.from_numpy(dbeta),
    }


def _sums(a: Tensor, b: Tensor, mean: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per channel Σ a and Σ a r (b − mean), in one pass, by the backward kernel of batch norm."""
    _, product, total = _aten.native_batch_norm_backward(
        a, b, None, None, None, torch.from_numpy(mean), torch.from_numpy(r), True, 0.0, [False, True, True]
    )
    return total.numpy(), product.numpy()


def _sliced_sums(block: Block, a: Tensor, b: Tensor, mean: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`_sums` slice by slice: the kernel sums in the planes' own precision, which is too low for long sums."""
    parts = [_sums(a_slice, b_slice, mean, r) for a_slice, b_slice in block.slices(a, b)]
    if len(parts) == 1:
        return parts[0]
    total, product = (np.sum(sums, axis=0, dtype=np.float64).astype(r.dtype) for sums in zip(*parts, strict=True))
    return total, product


def _moments(y: Tensor) -> np.ndarray:
    """Per channel Σ y and Σ y², (2, C) float64, in one pass.

    The kernel adds one float32 after another. Reshape so that several positions of a channel look like separate
    channels, and sum at most _ROWS_AT_ONCE rows a call.
    """
    C, flat = y.shape[1], _flat(y)
    M = y.numel() // C
    # The positions that share a row; in most cases their number divides M.
    together = min(1 << (M // _ROWS_AT_ONCE).bit_length(), max(1, _SUMS_AT_ONCE // C))
    columns = together * C
    whole = y.numel() // columns * columns
    moments = _squares(flat[:whole].view(-1, columns), C)
    return moments if whole == y.numel() else moments + _squares(flat[whole:].view(-1, C), C)


def _squares(rows: Tensor, C: int) -> np.ndarray:
    """The moments of rows that each hold several positions of C channels."""
    dtype = np.float32 if rows.dtype == torch.float32 else np.float64
    zeros, ones = np.zeros(rows.shape[1], dtype), np.ones(rows.shape[1], dtype)
    moments = np.zeros((2, C))
    for part in torch.split(rows, _ROWS_AT_ONCE):
        for moment, found in zip(moments, _sums(part, part, zeros, ones), strict=True):
            moment += found.reshape(-1, C).sum(0, dtype=np.float64)
    return moments


def _add_at(plane: Tensor, place: Tensor | None, values: Tensor) -> None:
    """Add values to a plane at these positions of its flat memory; at every position if None."""
    if place is None:
        plane += values
    else:
        _flat(plane).scatter_add_(0, place, _flat(values))


@functools.lru_cache(maxsize=64)
def _corners(n: int, channels: int, places: int) -> Tensor:
    """The offset of each channel of each image in a slice's flat memory, (n, C, 1, 1)."""
    images, planes = (torch.arange(count, device="cpu") for count in (n, channels))
    return (images[:, None] * (places * channels) + planes)[:, :, None, None]


def _c(vector: np.ndarray) -> Tensor:
    """A vector (C,) as (C, 1, 1), to be broadcast with planes."""
    return torch.from_numpy(vector[:, None, None])


def _flat(plane: Tensor) -> Tensor:
    """The memory of a channels-last plane as one vector."""
    return plane.as_strided((plane.numel(),), (1,))


def empty_plane(like: Tensor, *size: int) -> Tensor:
    """An uninitialised channels-last plane of this size."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _channels_last(plane: Tensor) -> Tensor:
    """The plane in channels-last layout by its strides, even if a size of 1 would allow other strides."""
    _, C, height, width = plane.shape
    there = plane.stride() == (C * height * width, 1, width * C, C)
    return plane if there else empty_plane(plane, *plane.shape).copy_(plane)
