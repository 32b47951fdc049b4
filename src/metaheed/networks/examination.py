"""Examines a network by a few forward passes: its output, what it writes into, what it remembers, what it hides.

Every network of a user's own is examined once, on the first images that it is given. Our own networks do not need it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaheed.errors import ConfigError, brief, warn
from metaheed.networks.conversion import copied
from metaheed.types import Params


class Findings(NamedTuple):
    """What the examination found."""

    written: frozenset[str]
    """The buffers and frozen parameters that the forward pass writes into."""


def check_logits(logits: Any, images: int, ways: int | None = None, device: torch.device | None = None) -> None:
    """Check that a network returned one tensor of logits.

    Args:
        logits: what the network returned for `images` images.
        images: n.
        ways: N, if it is known.
        device: the device of the images; not checked if None.

    Raises:
        ConfigError: it is not a plain, dense floating-point tensor of shape (n, N) on that device.
    """
    if type(logits) is not Tensor:
        held = ""
        if isinstance(logits, tuple | list):
            held = f" of {len(logits)} values: return the one that holds the logits"
        elif isinstance(logits, Mapping) or hasattr(logits, "logits"):
            held = ": return the tensor of logits that it holds"
        elif isinstance(logits, Tensor):
            held = ", a subclass of Tensor: return logits.as_subclass(torch.Tensor)"
        raise ConfigError(
            f"the backbone returns a {type(logits).__name__}{held}. It must return one torch.Tensor, of shape "
            f"({images}, {ways or 'ways'}) for {images} images"
        )
    if logits.is_nested or logits.layout != torch.strided:
        raise ConfigError("the backbone returns a sparse or nested tensor, but logits must be a dense one")
    if device is not None and logits.device != device:
        raise ConfigError(
            f"the backbone's images and parameters lie on {device}, but its output on {logits.device}: return it "
            f"on {device}"
        )
    if logits.dim() != 2 or logits.shape[0] != images or (ways is not None and logits.shape[1] != ways):
        raise ConfigError(
            f"the backbone: {images} images give an output of shape {tuple(logits.shape)}, but it must be "
            f"({images}, {ways or 'ways'}): one logit a class"
        )
    if not logits.is_floating_point():
        raise ConfigError(f"the backbone returns values of type {logits.dtype}, but logits must be floating-point")


def examine(
    module: nn.Module, call: Callable[[Params, Params, Tensor], Any], params: Params, constants: Params, x: Tensor
) -> Findings:
    """Run the network, and a copy of it with other inputs first, and examine both results.

    The caller's tensors and the random state stay as they are.

    Args:
        module: the network, for the names of its parts.
        call: (parameters, constants, images) -> what the network returns.
        params: the learned parameters.
        constants: its buffers and frozen parameters.
        x: images (n, C, H, W).

    Raises:
        ConfigError: it does not return logits, it writes into its own parameters, or its logits depend on earlier
            calls.
    """
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        handed = {name: c.detach().clone() for name, c in constants.items()}
        other = copied(module)
        _seed(x.device)
        logits = call(leaves, handed, x.detach().clone())
        check_logits(logits, len(x), device=x.device)
        overwritten = [name for name, leaf in leaves.items() if not _same(leaf, params[name])]
        if overwritten:
            raise ConfigError(
                f"the backbone writes into its parameters {', '.join(overwritten)} during its forward pass, so one "
                "task would change the meta-parameters for all: compute with a changed copy of them instead"
            )
        hidden = _hidden(module, leaves, logits)
        _refuse_memory(other, params, constants, x, logits.detach())
    if hidden:
        warn(
            f"the network uses {', '.join(hidden)} in a way that PyTorch does not see (a plain Python list or dict, a "
            "lambda or a bound method made in __init__, a module that is not registered): there it keeps its first "
            "values, is never adapted and never learns. Use it as self.NAME in forward, or hold it in an "
            "nn.ParameterList or nn.ModuleList",
        )
    written = frozenset(name for name, c in constants.items() if handed[name]._version or not _same(handed[name], c))
    if written:
        warn(
            f"the network writes into {', '.join(sorted(written))} during its forward pass, which would give the "
            "same task other logits every time: so every pass begins from the values that they have now"
        )
    return Findings(written)


def _seed(device: torch.device) -> None:
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def _refuse_memory(module: nn.Module, params: Params, constants: Params, x: Tensor, expected: Tensor) -> None:
    """Refuse a network that keeps something of a call in a plain attribute and uses it in the next.

    Args:
        module: an unused copy, which is called with other parameters and images first.
        params, constants, x: the inputs for which the network returned `expected` in its first call.
        expected: logits.
    """

    def logits(scale: float, images: Tensor) -> Tensor:
        handed = {name: p.detach() * scale for name, p in params.items()}
        handed |= {name: c.detach().clone() for name, c in constants.items()}
        _seed(x.device)
        with torch.no_grad():
            result: Tensor = functional_call(module, handed, (images,))
        return result

    before = _attributes(module)
    try:
        logits(0.9, 0.5 * x.detach().flip(-1))
        kept = [name for name, value in _attributes(module).items() if before.get(name) != value]
        after = logits(1.0, x.detach().clone())
    except Exception as error:  # a function stored in a module may refer to the original network
        warn(
            "whether the network keeps something from one call to the next could not be tried on a copy of it "
            f"({type(error).__name__}: {brief(str(error))})"
        )
        return
    # On a GPU rounding may differ from call to call.
    coarse = min(1000 * torch.finfo(expected.dtype).eps, 0.01) * expected.nan_to_num().abs().amax()
    if after.shape != expected.shape or bool(((after - expected).nan_to_num().abs() > coarse).any()):
        where = f" in {', '.join(kept)}" if kept else ""
        raise ConfigError(
            "the backbone gives the same images different logits after a call with other images: it keeps something "
            f"of a call{where} and uses it in the next, or is random. Compute it anew in each forward pass; if it is "
            "to stay the same, hold it in a buffer (register_buffer) that is filled before the network is handed over"
        )


def _attributes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (identity, version) of all that the modules hold besides parameters, buffers and modules."""
    return {
        f"{prefix}.{name}" if prefix else name: (id(value), value._version if isinstance(value, Tensor) else 0)
        for prefix, part in module.named_modules()
        for name, value in vars(part).items()
        if not (name.startswith("_") and name in _OF_TORCH)
    }


_OF_TORCH = {*vars(nn.Module())}


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN counting as 0."""
    return torch.equal(one.nan_to_num(), other.nan_to_num()) if one.is_floating_point() else torch.equal(one, other)


def _hidden(module: nn.Module, leaves: Params, logits: Tensor) -> list[str]:
    """The names of learning tensors in the logits' history that were not given to the network by name."""
    given = {id(leaf) for leaf in leaves.values()}
    found: dict[int, Tensor] = {}
    waiting, seen = [logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only leaves of the graph have one
        if variable is not None and id(variable) not in given:
            found[id(variable)] = variable
        waiting += [before for before, _ in node.next_functions]
    return [_name(module, variable) for variable in found.values()]


def _name(module: nn.Module, variable: Tensor) -> str:
    # A lambda may refer to the original network, whose parameters have the values that the copy's had at first.
    for name, p in module.named_parameters():
        if p is variable or (p.shape == variable.shape and torch.equal(p.detach().cpu(), variable.detach().cpu())):
            return name
    return f"a parameter of shape {tuple(variable.shape)}"
