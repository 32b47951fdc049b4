"""Makes a copy of a network fit for adaptation: what is refused, what is converted, and what is frozen.

An adapted network must be a pure function of its parameters and its images: the same task gives the same logits, in
training and in test, whatever was computed before. And its second derivatives must be right, because meta-gradients
consist of them. Most networks that break one of these rules can be mended, which is done here:

1. Refused: what cannot be mended (wrappers that hide the network, dropout, tied or uninitialised parameters).
2. Converted: batch norm with running statistics to batch statistics; weight norm to plain operations, because the
   second derivative of PyTorch's fused one is wrong.
3. Frozen: the singular vectors of spectral norm, which every forward pass would otherwise change.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm as _OldSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as _OldWeightNorm

from metaheed.errors import ConfigError, warn


def converted(module: nn.Module) -> nn.Module:
    """A copy of the network that can be adapted; the caller's own stays as it is. A warning tells of every change.

    Args:
        module: maps images (n, C, H, W) to logits (n, N).

    Raises:
        ConfigError: the network cannot be adapted; the message says why, and what to do.
    """
    refuse(module)
    network = copied(module).train()
    changes = {
        "running statistics of {} are replaced by batch statistics, on a copy of the network": _use_batch_statistics,
        "weight norm of {} is computed by plain operations on a copy of the network, because the second derivative of "
        "PyTorch's fused operation is wrong": _use_plain_weight_norm,
        "the singular vectors of the spectral norm of {} are kept as they are, on a copy of the network: each forward "
        "pass would change them, and the same task would get other logits every time": _freeze_spectral_norm,
    }
    for message, change in changes.items():
        # The parametrisations of a layer are modules inside it.
        names = [name.split(".parametrizations")[0] for name, part in network.named_modules() if change(part)]
        if names:  # a layer may have two normed tensors
            warn(message.format(", ".join(n or "the network" for n in dict.fromkeys(names))))
    return network


def copied(module: nn.Module) -> nn.Module:
    """A deep copy. Tensors that a forward pass left in the network with their history are copied as plain values.

    Raises:
        ConfigError: the network holds something that cannot be copied.
    """
    left = [tensor for part in module.modules() for tensor in _tensors(vars(part)) if _has_history(tensor)]
    try:
        return copy.deepcopy(module, {id(tensor): _plain(tensor) for tensor in left})
    except Exception as error:  # a user's object may refuse to be copied with any exception
        raise ConfigError(
            f"the backbone ({type(module).__name__}) cannot be copied ({type(error).__name__}: {error}): learners work "
            "on a copy of the network, so remove from it what copy.deepcopy refuses"
        ) from error


def without_parametrised_classes(module: nn.Module) -> nn.Module:
    """A copy that can be pickled.

    PyTorch makes a class of its own for every parametrised layer, which pickle cannot find by name. The copy's layers
    have their original classes.
    """
    plain = copied(module)
    for part in plain.modules():
        if parametrize.is_parametrized(part):
            part.__class__ = type(part).__bases__[0]
            # weight_norm's hook for older checkpoints is a local function, which cannot be pickled.
            hooks: dict[int, Any] = part._load_state_dict_pre_hooks
            for key in [k for k, hook in hooks.items() if "weight_norm" in getattr(hook.hook, "__qualname__", "")]:
                del hooks[key]
    return plain


def with_parametrised_classes(module: nn.Module) -> nn.Module:
    """The module, with its parametrised classes restored: the inverse of `without_parametrised_classes`."""
    for part in module.modules():
        lists = part._modules.get("parametrizations")
        names = [*lists] if isinstance(lists, nn.ModuleDict) else []
        if names and not all(isinstance(getattr(type(part), name, None), property) for name in names):
            parametrize._inject_new_class(part)
            for name in names:
                parametrize._inject_property(part, name)
    return module


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in a value and, to some depth, in the dicts, lists, tuples and sets in it."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for inside in value.values():
            yield from _tensors(inside, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for inside in value:
            yield from _tensors(inside, depth - 1)


def _has_history(tensor: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or not tensor.is_leaf


def _plain(tensor: Tensor) -> Tensor:
    """A copy of the values, without transforms and history."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.detach().clone()


def refuse(module: nn.Module) -> None:
    """Refuse a network that cannot be adapted and cannot be converted.

    Raises:
        ConfigError: says why, and what to do.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"the backbone is {module!r}, but it must be a torch.nn.Module (an instance, not a class)")
    for name, part in module.named_modules():
        _refuse_wrapper(name, part)
    _refuse_ties(module)
    for name, p in module.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ConfigError(f"backbone parameter {name!r} has no shape yet: run the network once before passing it")
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError("the backbone has no parameter with requires_grad=True: there is nothing to learn")
    for name, part in module.named_modules():
        # _DropoutNd has a rate called p; attention and recurrent layers have one called dropout.
        rate = part.p if isinstance(part, nn.modules.dropout._DropoutNd) else getattr(part, "dropout", 0.0)
        if isinstance(rate, float | int) and rate > 0:
            raise ConfigError(
                f"backbone module {name!r} has dropout {rate}: adaptation must be the same function in training and "
                "test, so set its rate to 0 or remove it"
            )


def _refuse_wrapper(name: str, part: nn.Module) -> None:
    what = f"backbone module {name!r}" if name else "the backbone"
    path = f"network.{name}" if name else "network"
    if isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ConfigError(
            f"{what} is a {type(part).__name__}, which spreads one batch over devices: hand over the module inside it, "
            f"{path}.module"
        )
    if isinstance(part, torch.jit.ScriptModule):
        raise ConfigError(
            f"{what} is a scripted or traced module, which cannot be called with other parameters than its own: hand "
            "over the Python module that it was made of"
        )
    if hasattr(part, "_orig_mod"):  # torch.compile's wrapper, whose class is private
        raise ConfigError(
            f"{what} is compiled by torch.compile, which cannot be differentiated twice: hand over the module inside "
            f"it, {path}._orig_mod"
        )


def _refuse_ties(module: nn.Module) -> None:
    """Refuse one tensor under two names, unless it is one module that is registered under two names."""
    seen: dict[int, str] = {}
    for prefix, part in module.named_modules():  # each module once, however many names it has
        for local, p in part.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{local}" if prefix else local
            if id(p) in seen:
                raise ConfigError(
                    f"backbone parameters {seen[id(p)]!r} and {name!r} are one tied tensor, which cannot be adapted "
                    "under two names: give each its own, or use the shared one through a single module"
                )
            seen[id(p)] = name


def _use_batch_statistics(part: nn.Module) -> bool:
    if not isinstance(part, nn.modules.batchnorm._NormBase) or not part.track_running_stats:
        return False
    part.track_running_stats = False
    part.running_mean = part.running_var = part.num_batches_tracked = None
    return True


def _normed(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """v · g/‖v‖, with the norm over all axes except `dim`; −1 means over all axes, as it does in PyTorch."""
    axes = [axis for axis in range(v.dim()) if axis != dim]
    return v * (g / v.square().sum(axes, keepdim=dim != -1).sqrt())


class PlainWeightNorm(_WeightNorm):
    """The module of `torch.nn.utils.parametrizations.weight_norm`, by plain operations, whose derivatives are right.

    Salimans, Kingma: Weight Normalization, NeurIPS 2016, eq. 2. In PyTorch 2.13 the second derivative of
    `torch._weight_norm` is wrong: it fails `torch.autograd.gradgradcheck`, which these operations pass.
    """

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        """The weight from its lengths g and its directions v."""
        return _normed(weight_v, weight_g, self.dim)


class PlainOldWeightNorm(_OldWeightNorm):
    """The same for the older `torch.nn.utils.weight_norm`, a hook before the layer's forward pass."""

    def compute_weight(self, module: nn.Module) -> Tensor:
        """The weight from the layer's lengths g and directions v."""
        return _normed(getattr(module, f"{self.name}_v"), getattr(module, f"{self.name}_g"), self.dim)


def _use_plain_weight_norm(part: nn.Module) -> bool:
    found = False
    for child_name, child in part.named_children():  # the child is in the layer's list of parametrisations
        # A subclass that computes something else is not converted; the check of the meta-gradient will judge it.
        if isinstance(child, _WeightNorm) and type(child).forward is _WeightNorm.forward:
            part.register_module(child_name, PlainWeightNorm(child.dim))
            found = True
    for key, hook in part._forward_pre_hooks.items():
        if isinstance(hook, _OldWeightNorm) and type(hook).compute_weight is _OldWeightNorm.compute_weight:
            part._forward_pre_hooks[key] = PlainOldWeightNorm(hook.name, hook.dim)
            found = True
    return found


def _freeze_spectral_norm(part: nn.Module) -> bool:
    hooks = [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, _OldSpectralNorm)]
    moving = [norm for norm in [part, *hooks] if isinstance(norm, _SpectralNorm | _OldSpectralNorm)]
    for norm in moving:
        norm.n_power_iterations = 0
    return bool(moving)
