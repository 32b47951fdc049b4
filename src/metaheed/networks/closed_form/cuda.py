"""Conv4's closed form on a CUDA device: the formulas of `cpu.py`, in kernels of our own.

There a plane is too large for any cache, and an operation too short to be started by itself. So everything that can be
done to a value while it is at hand is: a convolution's kernel also sums what the norm needs of its result, or takes the
result through the ReLU and sums what the norm's derivative needs. All tasks go through a kernel together, each with its
own weights. Per block: forward three kernels (convolution with moments, their totals, pooling with norm and ReLU),
backward four or five (totals, ∂L/∂y, the weight's gradient in two steps, the input's gradient into the block below),
Hessian eight. There is nothing in between that the host has to look at.

Unlike `cpu.py`, the sign of γ is not folded into the convolution: maxima are taken of γ y, and where γ is zero
the first place of a window, as PyTorch does. And nothing is centred beforehand: moments are taken about the mean of a
block of places, and joined in float64.

Legend: as in `kernels.py`.
"""

import contextlib
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaheed.networks.closed_form.cpu import ClosedForm
from metaheed.types import Params

_MOST_CHANNELS = 64
"""Whose weight's gradient a program can hold."""
_MOST_PLACES = 1 << 21
"""Of a plane of all images of a task: their partial sums are added by one program."""
_MOST_FEATURES = 1 << 14
"""Of an image, which one program takes to the logits."""


_WORKS: dict[torch.device, bool] = {}


def works_on(device: torch.device) -> bool:
    """Whether a kernel can be built and run on a device; tried once, and where it cannot a warning says so.

    Triton must be there (PyTorch's builds for CUDA on Linux bring it along), find a C compiler, and know the device.

    Raises:
        torch.OutOfMemoryError: which says nothing of the kernels.
    """
    if device not in _WORKS:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # where nothing can be tried
        _WORKS[device] = _tried_on(device)
    return _WORKS[device]


def _tried_on(device: torch.device) -> bool:
    try:
        from metaheed.networks.closed_form import kernels

        with torch.cuda.device(device):
            logits, label = torch.zeros(1, 1, 2, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device)
            kernels.cross_entropy(logits, label)
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton's parts raise: autograd computes the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"metaheed's own CUDA kernels do not run here ({reason}): networks are differentiated by autograd, which "
            "takes several times as long. The kernels need Triton, a C compiler (gcc or clang) and a GPU that Triton "
            "supports",
            stacklevel=3,
        )
        return False
    return True


class _Block(NamedTuple):
    """What a block's forward pass leaves behind; symbols as in `cpu.py`."""

    x: Tensor
    weight: Tensor  # (B, 9, C, O)
    gain: Tensor
    norm: Tensor  # μ and r
    y: Tensor
    z: Tensor
    q: Tensor
    place: Tensor


class _Slope(NamedTuple):
    """What a block's gradient leaves behind."""

    e: Tensor
    S: Tensor
    dy: Tensor
    turned: Tensor | None  # the block's weight; none: the lowest


class _Dots(NamedTuple):
    """Derivatives of a block's forward pass along the direction."""

    x: Tensor | None  # none: images do not move
    weight: Tensor
    gain: Tensor
    y: Tensor
    T: Tensor
    q: Tensor


class _Tape(NamedTuple):
    """What `gradient` leaves behind for `hessian_product`."""

    blocks: list[_Block]
    slopes: list[_Slope]
    features: Tensor
    p: Tensor  # probabilities
    dlogits: Tensor


class ClosedFormCUDA(ClosedForm):
    """The same derivatives in float32, by kernels in Triton."""

    @property
    def _kernels(self) -> ModuleType:
        from metaheed.networks.closed_form import kernels  # needs Triton

        return kernels

    def fits(self, params: Params, x: Tensor) -> bool:
        """Whether the kernels run on this device and cover these shapes; what the numbers are, they take care of."""
        head = params["head.weight"]
        if head.dtype != torch.float32 or self._mean_plane or (x.is_cuda and not works_on(x.device)):
            return False
        count, *size = x.shape[-4], *x.shape[-2:]
        channels = x.shape[-3]
        for shape in self._shapes:
            wide, seen = params[f"{shape.name}.conv.weight"].shape[-4:-2]
            places = count * size[0] * size[1]
            if not shape.pool or shape.stride != 1 or seen != channels or max(wide, seen) > _MOST_CHANNELS:
                return False
            if not 1 < places <= _MOST_PLACES or min(size) < 2:
                return False
            channels, size = wide, [side // 2 for side in size]
        self.check_size(params, x, size)
        return bool(head.shape[-1] <= _MOST_FEATURES)

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """See `ClosedForm`."""
        with _on(x):
            return self._up(params, x, keep=False)[1]

    def gradient(
        self, params: Params, x: Tensor, y: Tensor, names: tuple[str, ...] | None = None, keep: bool = False
    ) -> tuple[Params, Tensor, Tensor, Any]:
        """See `ClosedForm`."""
        with _on(x):
            return self._gradient(params, x, y, names, keep)

    def _gradient(
        self, params: Params, x: Tensor, y: Tensor, names: tuple[str, ...] | None, keep: bool
    ) -> tuple[Params, Tensor, Tensor, _Tape | None]:
        kernels = self._kernels
        features, logits, blocks = self._up(params, x, keep=True)
        losses, p, dlogits = kernels.cross_entropy(logits, y)
        found: Params = {"head.weight": dlogits.mT @ features, "head.bias": dlogits.sum(1)}
        wanted = [keep or names is None or any(n.startswith(s.name) for n in names) for s in self._shapes]
        lowest = wanted.index(True) if any(wanted) else len(blocks)
        slopes: list[_Slope] = []
        top = blocks[-1]
        e, S = kernels.slope(_to_plane(dlogits @ params["head.weight"], top.z), top.z, top.q)
        del top
        for index in range(len(blocks) - 1, lowest - 1, -1):
            block = blocks[index] if keep else blocks.pop()  # its planes are freed as soon as may be
            dy = kernels.spread(block.y, e, block.place, block.norm, block.gain, S)
            # What is handed out is not what is kept: whoever changes the one must not change the other.
            found |= _named(self._shapes[index].name, kernels.weight_gradient(block.x, dy), S.clone() if keep else S)
            turned = kernels.turned(block.weight) if index > lowest else None
            if keep:
                slopes.insert(0, _Slope(e, S, dy, turned))
            if turned is not None:
                below = blocks[index - 1]
                e, S = kernels.convolve(dy, turned, transposed=True, then="slope", beside=(below.z, below.q))
        gradient = {name: found[name] for name in (params if names is None else names)}
        tape = _Tape(blocks, slopes, features, p, dlogits) if keep else None
        return gradient, losses.mean(1), logits, tape

    def hessian_product(self, params: Params, tape: Any, direction: Params) -> Params:
        """See `ClosedForm`."""
        with _on(tape.features):
            return self._hessian_product(params, tape, direction)

    def _hessian_product(self, params: Params, tape: _Tape, direction: Params) -> Params:
        kernels = self._kernels
        direction = {n: direction[n] if n in direction else torch.zeros_like(p) for n, p in params.items()}
        dots: list[_Dots] = []
        z_dot: Tensor | None = None
        for shape, block in zip(self._shapes, tape.blocks, strict=True):
            weight, gain, shift = _parameters(shape.name, direction)
            x_dot, second = z_dot, None if z_dot is None else (z_dot, block.weight)
            y_dot, T = kernels.convolve(block.x, weight, second, then="dots", beside=(block.y,), norm=block.norm)
            z_dot, q_dot = kernels.pool_dots(
                y_dot, block.z, block.q, block.place, block.norm, block.gain, (gain, shift), T
            )
            dots.append(_Dots(x_dot, weight, gain, y_dot, T, q_dot))
        assert z_dot is not None  # there is a block
        head, head_dot = params["head.weight"], direction["head.weight"]
        features, p, dlogits = tape.features, tape.p, tape.dlogits
        features_dot = _to_features(z_dot)
        logits_dot = kernels.head(features_dot, head, direction["head.bias"], (features, head_dot))
        dlogits_dot = p * (logits_dot - (p * logits_dot).sum(2, keepdim=True)) / p.shape[1]
        found: Params = {
            "head.weight": dlogits_dot.mT @ features + dlogits.mT @ features_dot,
            "head.bias": dlogits_dot.sum(1),
        }
        top = tape.blocks[-1]
        dz_dot = _to_plane(dlogits_dot @ head + dlogits @ head_dot, top.z)
        e_dot, S_dot = kernels.slope(dz_dot, top.z, top.q, (tape.slopes[-1].e, dots[-1].q))
        for index in range(len(dots) - 1, -1, -1):
            block, slope, dot = tape.blocks[index], tape.slopes[index], dots.pop()
            dy_dot = kernels.spread(
                block.y, slope.e, block.place, block.norm, block.gain, slope.S, (dot.y, e_dot, dot.gain, dot.T, S_dot)
            )
            second = None if dot.x is None else (dot.x, slope.dy)
            found |= _named(self._shapes[index].name, kernels.weight_gradient(block.x, dy_dot, second), S_dot)
            if index:
                below = tape.blocks[index - 1]
                e_dot, S_dot = kernels.convolve(
                    *(dy_dot, slope.turned, (slope.dy, kernels.turned(dot.weight))),
                    transposed=True,
                    then="slope_dot",
                    beside=(below.z, below.q, tape.slopes[index - 1].e, dots[-1].q),
                )
        return {name: found[name] for name in params}

    def _up(self, params: Params, x: Tensor, keep: bool) -> tuple[Tensor, Tensor, list[_Block]]:
        """Features, logits, and if they are to be kept the blocks."""
        kernels = self._kernels
        blocks: list[_Block] = []
        z = kernels.as_source(x.to(params["head.weight"].dtype))
        for shape in self._shapes:
            weight, gain, shift = _parameters(shape.name, params)
            source = z
            y, norm = kernels.convolve(source, weight, eps=shape.eps)
            z, q, place = kernels.pool(y, norm, gain, shift, keep)
            if keep:
                blocks.append(_Block(source, weight, gain, norm, y, z, q, place))
        features = _to_features(z)
        return features, kernels.head(features, params["head.weight"], params["head.bias"]), blocks


@contextlib.contextmanager
def _on(tensor: Tensor) -> Iterator[None]:
    """Kernels start on the current device, which need not be the tensor's."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def _parameters(name: str, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """A block's W, taps first (B, 9, C, O): no copy where it lies so in memory (`copies`); γ and β."""
    weight = params[f"{name}.conv.weight"].permute(0, 3, 4, 2, 1).flatten(1, 2).contiguous()
    return weight, params[f"{name}.norm.weight"].contiguous(), params[f"{name}.norm.bias"].contiguous()


def copies_for_kernels(tree: Params, tasks: int) -> Params:
    """θ for each of so many tasks; weights of convolutions lie in memory as the kernels want them, and so will φ."""

    def copied(p: Tensor) -> Tensor:
        return p.expand(tasks, *p.shape).contiguous()

    return {
        n: copied(p.permute(2, 3, 1, 0)).permute(0, 4, 3, 1, 2) if p.dim() == 4 else copied(p) for n, p in tree.items()
    }


def _to_features(z: Tensor) -> Tensor:
    return z.permute(0, 1, 4, 2, 3).flatten(2)


def _to_plane(cotangent: Tensor, like: Tensor) -> Tensor:
    B, n, h, w, C = like.shape
    return cotangent.view(B, n, C, h, w).permute(0, 1, 3, 4, 2).contiguous()


def _named(name: str, dweight: Tensor, S: Tensor) -> Params:
    B, _, C, O = dweight.shape  # noqa: E741
    return {
        f"{name}.conv.weight": dweight.view(B, 3, 3, C, O).permute(0, 4, 3, 1, 2),
        f"{name}.conv.bias": torch.zeros_like(S[0]),
        f"{name}.norm.weight": S[1],
        f"{name}.norm.bias": S[0],
    }
