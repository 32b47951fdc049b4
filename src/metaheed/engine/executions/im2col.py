"""The tasks of a meta-batch as one program, with convolutions as matrix products over patches (im2col); made for CUDA.

`torch.func.vmap` turns a convolution over tasks into a grouped one, for which kernels differ widely in speed. Here it
becomes a batched matrix product instead. Which is faster depends on the network and its size.

Legend: n images of C×H×W, O filters of k×l pixels, output of H'×W'.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from metaheed.engine.executions.basic import Execution, T
from metaheed.types import Episode, Params


def map_im2col(per_task: Callable[[Params, Episode], T], chunk_size: int | None = None) -> Execution[T]:
    """As `map_vectorized`, with every two-dimensional convolution computed as a matrix product over patches.

    A layer then needs k·l times the memory of its input. It agrees with the other executions to rounding for any
    network.
    """

    def run(meta: Params, batch: Episode) -> T:
        with Im2col():
            result: T = vmap(partial(per_task, meta), chunk_size=chunk_size)(batch)
        return result

    return run


class Im2col(TorchFunctionMode):
    """Inside this context, `torch.conv2d` (and so `nn.Conv2d`) is `patch_convolution` for the calls that it covers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = _conv2d(*args, **(kwargs or {})) if func is torch.conv2d else None
        return func(*args, **(kwargs or {})) if result is None else result


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """torch.conv2d, with its argument names; None for the kinds that `patch_convolution` does not cover."""
    if groups != 1 or _pair(dilation) != (1, 1) or isinstance(padding, str) or input.dim() != 4:
        return None
    return patch_convolution(input, weight, bias, _pair(stride), _pair(padding))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def patch_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """A convolution of x (n, C, H, W) with weight (O, C, k, l), as matrix products over patches: (n, O, H', W').

    It can be differentiated any number of times, and vectorised over tasks by `torch.func.vmap`.
    """
    geometry = _Geometry((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]), stride, padding)
    patches: Tensor = _Unfold.apply(x, geometry)  # type: ignore[no-untyped-call]
    product = torch.bmm(weight.flatten(1).expand(len(x), -1, -1), patches)
    if bias is not None:
        product = product + bias.unsqueeze(1)
    return product.view(*product.shape[:2], *geometry.output)


class _Geometry(NamedTuple):
    """The sizes that determine a convolution: (height, width) each."""

    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def output(self) -> tuple[int, int]:
        height, width = (
            (side + 2 * pad - k) // step + 1
            for side, k, step, pad in zip(self.image, self.kernel, self.stride, self.padding, strict=True)
        )
        return height, width


class _Unfold(torch.autograd.Function):
    """Images (n, C, H, W) to patches (n, C·k·l, H'·W'); its adjoint is `_Fold`.

    `F.unfold` has a derivative and a rule for vmap too, but on CUDA it starts a kernel for every image. Here one copy
    of a strided view reads all images.
    """

    @staticmethod
    def forward(x: Tensor, geometry: _Geometry) -> Tensor:
        kernel, stride, (down, across) = geometry[1:]
        padded = F.pad(x, (across, across, down, down))
        patches = padded.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])  # (n, C, H', W', k, l), a view
        return patches.permute(0, 1, 4, 5, 2, 3).reshape(len(x), -1, math.prod(geometry.output))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None]:
        return _Fold.apply(grad, ctx.geometry), None  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, geometry: _Geometry) -> tuple[Tensor, int]:
        return _tasks_as_images(_Unfold, in_dims[0], x, geometry)


class _Fold(torch.autograd.Function):
    """Patches (n, C·k·l, H'·W') to images (n, C, H, W): each pixel is the sum over the patches that contain it."""

    @staticmethod
    def forward(patches: Tensor, geometry: _Geometry) -> Tensor:
        _, kernel, stride, padding = geometry
        return F.fold(patches, geometry.image, kernel, padding=padding, stride=stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None]:
        return _Unfold.apply(grad, ctx.geometry), None  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, geometry: _Geometry) -> tuple[Tensor, int]:
        return _tasks_as_images(_Fold, in_dims[0], x, geometry)


def _tasks_as_images(function: Any, tasks_at: int | None, x: Tensor, geometry: _Geometry) -> tuple[Tensor, int]:
    """Apply a function of images to the images of all tasks, as if they belonged to one task."""
    assert tasks_at is not None  # vmap calls this rule only for arguments with an axis of tasks
    x = x.movedim(tasks_at, 0)
    return function.apply(x.flatten(0, 1), geometry).unflatten(0, x.shape[:2]), 0
