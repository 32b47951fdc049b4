"""Recognises the networks that have a closed form: those that are `Conv4`, unchanged since they were built.

A closed form skips the modules' own code. So anything that a user may have changed in them is compared before each use.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

from torch import nn


def _of_norm(norm: dict[str, Any]) -> tuple[Any, ...]:
    """The settings of a batch norm."""
    return norm["eps"], norm["track_running_stats"], *norm["_buffers"].values()


# Named functions and no lambdas, so that a learner can be pickled.
_SETTINGS: dict[type[nn.Module], Callable[[dict[str, Any]], Any]] = {
    nn.Conv2d: itemgetter("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: _of_norm,
    nn.MaxPool2d: itemgetter("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
    nn.AdaptiveAvgPool2d: itemgetter("output_size"),
}
"""Module type -> a function of its attributes: the settings that determine its result beside its parameters."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_METHODS = ("forward", "_conv_forward", "_check_input_dim", "_call_impl")
"""Methods of a module's class, which a user may have replaced in an instance."""


class Part(NamedTuple):
    """A module as it was when the closed form was made; compared at every step, so the comparison must be quick."""

    module: nn.Module
    kind: type[nn.Module]
    inside: tuple[tuple[str, nn.Module | None], ...]
    read: Callable[[dict[str, Any]], Any]
    settings: Any

    @classmethod
    def of(cls, module: nn.Module) -> "Part":
        """The module as it is now."""
        read: Callable[[dict[str, Any]], Any] = _SETTINGS.get(type(module), _nothing)
        return cls(module, type(module), (*module._modules.items(),), read, read(module.__dict__))


def _nothing(attributes: dict[str, Any]) -> None:
    """The settings of a module that has none."""


def unchanged(parts: list[Part]) -> bool:
    """Whether all modules are as they were, with all parameters learned and without hooks or replaced methods."""
    for module, kind, inside, read, settings in parts:
        attributes = module.__dict__  # reading them here is quicker than through nn.Module's __getattr__
        if type(module) is not kind or (*attributes["_modules"].items(),) != inside or read(attributes) != settings:
            return False
        if any(attributes[hooks] for hooks in _HOOKS) or any(method in attributes for method in _METHODS):
            return False
        for parameter in attributes["_parameters"].values():
            if parameter is None or not parameter.requires_grad:
                return False
    return True


def as_built(block: nn.Sequential) -> bool:
    """Whether a block consists of the convolution, norm, pooling and ReLU that Conv4 builds it from."""
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
