"""Which modules have a closed form: those of `Conv4`, unchanged since they were built."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

from torch import nn


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


class Part(NamedTuple):
    """A module as it was when a closed form was made; it is asked for at every step, so by comparisons alone."""

    module: nn.Module
    kind: type[nn.Module]
    inside: tuple[tuple[str, nn.Module | None], ...]
    read: Callable[[dict[str, Any]], Any]
    settings: Any

    @classmethod
    def of(cls, module: nn.Module) -> "Part":
        read: Callable[[dict[str, Any]], Any] = _SETTINGS.get(type(module), _nothing)
        return cls(module, type(module), (*module._modules.items(),), read, read(module.__dict__))


def _nothing(attributes: dict[str, Any]) -> None:
    """Of a module that has no settings."""


def unchanged(parts: list[Part]) -> bool:
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


def as_built(block: nn.Sequential) -> bool:
    """Whether a block is the convolution, norm, ReLU and pooling that Conv4 was built of."""
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
