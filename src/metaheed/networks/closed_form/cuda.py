"""Conv4's closed form on a CUDA device: the formulas of `cpu.py`, in kernels of our own.

On a GPU a plane is too large for any cache, and a single operation too short to be worth a start of its own. So a
kernel does everything that can be done to a value while it has it: a convolution's kernel also sums what the norm needs
of its result, or takes the result through the ReLU and sums what the norm's derivative needs. All tasks go through a
kernel together, each with its own weights. A block takes three kernels forward (convolution with moments, their totals,
pooling with norm and ReLU), four or five backward (totals, ∂L/∂y, the weight's gradient in two steps, the input's
gradient into the block below) and eight for the Hessian. The host reads nothing in between.

Two things differ from `cpu.py`. The sign of γ is not folded into the convolution: maxima are taken of γ y, and if γ is
zero the first place of a window is taken, as in PyTorch. And nothing is centred beforehand: moments are taken about the
mean of a block of places, and joined in float64.

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
"""The most channels for which a program can hold a weight's gradient."""
_MOST_PLACES = 1 << 21
"""The most places in a plane of all images of a task: one program adds up their partial sums."""
_MOST_FEATURES = 1 << 14
"""The most features of an image: one program computes their logits."""
_WORKS: dict[torch.device, bool] = {}
"""What `works_on` has found."""


def works_on(device: torch.device) -> bool:
    """Whether a kernel can be built and run on a device. It is tried once; if it fails, a warning says why.

    Triton must be installed (PyTorch's builds for CUDA on Linux include it), find a C compiler, and support the device.

    Raises:
        torch.OutOfMemoryError: memory ran out, which says nothing about the kernels.
    """
    if device not in _WORKS:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # nothing can be tried during a capture
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
    except Exception as error:  # Triton may raise anything; autograd computes the same
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
    """What a block's forward pass keeps; the symbols are those of `cpu.py`."""

    x: Tensor
    weight: Tensor  # (B, 9, C, O)
    gain: Tensor
    norm: Tensor  # μ and r
    y: Tensor
    z: Tensor
    q: Tensor
    place: Tensor


class _Slope(NamedTuple):
    """What a block's gradient keeps for the Hessian product."""

    e: Tensor
    S: Tensor
    dy: Tensor
    turned: Tensor | None  # the block's weight; None in the first block


class _Dots(NamedTuple):
    """The derivatives of a block's forward pass along the direction."""

    x: Tensor | None  # None in the first block: images do not move
    weight: Tensor
    gain: Tensor
    y: Tensor
    T: Tensor
    q: Tensor


class _Tape(NamedTuple):
    """What `gradient` keeps for `hessian_product`."""

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
        """Whether the kernels run on this device and support these shapes; they are right for all values."""
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
            block = blocks[index] if keep else blocks.pop()  # frees its planes as soon as possible
            dy = kernels.spread(block.y, e, block.place, block.norm, block.gain, S)
            # A copy is kept, because the caller may change the result.
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
        """Features, logits, and the blocks if they are to be kept."""
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
    """A context that makes the tensor's device the current one, on which kernels start."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def _parameters(name: str, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """A block's W with the taps first (B, 9, C, O), γ and β; W is not copied if `copies_for_kernels` laid it out so."""
    weight = params[f"{name}.conv.weight"].permute(0, 3, 4, 2, 1).flatten(1, 2).contiguous()
    return weight, params[f"{name}.norm.weight"].contiguous(), params[f"{name}.norm.bias"].contiguous()


def copies_for_kernels(tree: Params, tasks: int) -> Params:
    """θ for each of so many tasks, with leaves (B, …).

    The weights of convolutions are laid out in memory as the kernels need them; φ, computed from them, then is too.
    """

    def copied(p: Tensor) -> Tensor:
        return p.expand(tasks, *p.shape).contiguous()

    return {
        n: copied(p.permute(2, 3, 1, 0)).permute(0, 4, 3, 1, 2) if p.dim() == 4 else copied(p) for n, p in tree.items()
    }


def _to_features(z: Tensor) -> Tensor:
    """The last plane z (B, n, H, W, C) as features (B, n, C·H·W)."""
    return z.permute(0, 1, 4, 2, 3).flatten(2)


def _to_plane(cotangent: Tensor, like: Tensor) -> Tensor:
    """A cotangent of the features as one of a plane like `like`."""
    B, n, h, w, C = like.shape
    return cotangent.view(B, n, C, h, w).permute(0, 1, 3, 4, 2).contiguous()


def _named(name: str, dweight: Tensor, S: Tensor) -> Params:
    """A block's gradient by the names of its parameters."""
    B, _, C, O = dweight.shape  # noqa: E741
    return {
        f"{name}.conv.weight": dweight.view(B, 3, 3, C, O).permute(0, 4, 3, 1, 2),
        f"{name}.conv.bias": torch.zeros_like(S[0]),
        f"{name}.norm.weight": S[1],
        f"{name}.norm.bias": S[0],
    }
