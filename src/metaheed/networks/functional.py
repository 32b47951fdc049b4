"""`Backbone`: a network as a pure function of its parameters.

Legend: n images of one task are (n, C, H, W), those of B tasks (B, n, C, H, W); φ then has a leading B in every leaf.
"""

import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaheed.errors import ConfigError, option, unknown
from metaheed.networks.closed_form.cpu import ClosedForm, closed_form
from metaheed.networks.closed_form.cuda import ClosedFormCUDA
from metaheed.networks.conversion import (
    converted,
    copied,
    with_parametrised_classes,
    without_parametrised_classes,
)
from metaheed.networks.derivatives import needs_graph, transformed
from metaheed.networks.examination import Findings, examine
from metaheed.types import Params


class _ForkSafeLock:
    """A lock that its owner may take again (reentrant), and that is free in a forked process."""

    def __init__(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():  # the thread that held it at the fork does not exist here
            self._lock, self._process = threading.RLock(), os.getpid()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _fill(module: nn.Module, params: Params) -> None:
    """Write values into a module's parameters."""
    learned = dict(module.named_parameters())
    with torch.no_grad():
        for name, p in params.items():
            learned[name].copy_(p)


class Backbone:
    """A network as a pure function of its parameters, for learners to build on.

    The module is copied; the caller's own stays as it is. A user's network is examined when it is first called (see
    `examination.py`). Parameters are put into the module while it runs, so calls from several threads wait for one
    another. Closed forms do not need that.

    Args:
        module: any network from images (n, C, H, W) to logits (n, N). See `conversion.py` for what is converted, with a
            warning, and what is refused. Parameters with requires_grad=False stay constants of the module.

    Raises:
        ConfigError: the network cannot be adapted. In the first call: it does not return logits, or it writes into its
            parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = converted(module)
        self.closed_form_on_cpu = closed_form(self.module)
        """The network's closed form on a CPU; None if it has none."""
        self.closed_form_on_cuda = closed_form(self.module, ClosedFormCUDA)
        """Its closed form on a CUDA device; None if it has none."""
        # During a call the module holds other tensors. So its names are read now, and later access takes the lock.
        self._names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        self._findings: Findings | None = None
        self._lock = _ForkSafeLock()

    def __getstate__(self) -> dict[str, Any]:
        made_again = (
            "_lock",
            "closed_form_on_cpu",
            "closed_form_on_cuda",
        )  # a closed form holds on to the module's parts
        with self._lock:
            module = without_parametrised_classes(self.module)
        return {**{name: value for name, value in vars(self).items() if name not in made_again}, "module": module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=_ForkSafeLock())
        with_parametrised_classes(self.module)
        self.closed_form_on_cpu, self.closed_form_on_cuda = (
            closed_form(self.module),
            closed_form(self.module, ClosedFormCUDA),
        )

    @property
    def names(self) -> list[str]:
        """The names of the learned parameters, in order."""
        return [*self._names]

    def find_head(self, name: str | None) -> str:
        """The name of the head's module; if `name` is None, the last registered module that has parameters of its own.

        Raises:
            ConfigError: there is no module of that name, or it has no parameters.
        """
        owners: list[str] = [n for n, part in self.module.named_modules() if [*part.parameters(recurse=False)]]
        # The parameters of a parametrised layer lie in modules inside it.
        owners = [n.split(".parametrizations.")[0] for n in owners]
        if name is None:
            return owners[-1]
        modules = [n for n, _ in self.module.named_modules(remove_duplicate=False) if n]
        if name not in modules:
            raise unknown("head", name, modules)
        if not [*self.module.get_submodule(name).parameters()]:
            raise ConfigError(f"head {name!r} has no parameters: those that have are {', '.join(owners)}")
        # The parameters of a module that is registered under two names have the first of them.
        first: str = next(n for n, part in self.module.named_modules() if part is self.module.get_submodule(name))
        return first

    def head_input(self, params: Params, x: Tensor, head: str) -> Tensor:
        """The features that the network passes to its head; for a batch of tasks, those of the first task.

        Raises:
            ConfigError: the module called `head` is not the network's last operation.
        """
        if x.dim() == 5:
            params, x = {name: p[0] for name, p in params.items()}, x[0]
        seen: list[tuple[Tensor, Tensor, int]] = []

        def note(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            inputs = [*given, *named.values()]
            if inputs and isinstance(output, Tensor):
                seen.append((inputs[0], output, output._version))

        with self._lock:  # the calls of other threads must not be noted
            hook = self.module.get_submodule(head).register_forward_hook(note, with_kwargs=True)
            try:
                logits = self(params, x)
            finally:
                hook.remove()
        if not seen or seen[-1][1] is not logits or seen[-1][2] != logits._version:
            raise ConfigError(
                f"the network's logits are not the output of its module {head!r}, so that is not its head: name the "
                f"head's module with {option('head')}, or return that module's output unchanged"
            )
        return seen[-1][0]

    def names_of(self, module: str) -> set[str]:
        """The names of the learned parameters inside a module; "" is the whole network."""
        with self._lock:
            inside = {id(p) for p in self.module.get_submodule(module).parameters()}
            named = {name: id(p) for name, p in self.module.named_parameters()}
        return {name for name in self._names if named[name] in inside}

    def init(self, generator: torch.Generator) -> Params:
        """The initial parameters: redrawn by the module's `redraw(generator)` if it has that method, else its present
        values.

        One of our own networks keeps its weights if it was given other ones than those of its initialisation.
        """
        redraw = getattr(self.module, "redraw", None)
        with self._lock:
            if redraw is not None and not getattr(self.module, "was_given_weights", False):
                redraw(generator)
            learned = dict(self.module.named_parameters())
            return {name: learned[name].detach().clone() for name in self.names}

    def write_into_module(self, params: Params) -> None:
        """Write these values into the module itself, for users who look inside it; calls do not use them."""
        with self._lock:
            _fill(self.module, {name: params[name] for name in self.names})

    def filled(self, params: Params) -> nn.Module:
        """A copy of the module with these parameters, on their device and in their dtype.

        Raises:
            ConfigError: they are not the network's parameters.
        """
        with self._lock:
            module = copied(self.module)
        expected = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
        found = {name: tuple(p.shape) for name, p in params.items()}
        if expected != found:
            wrong = min(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            raise ConfigError(
                f"these are not the network's parameters: {wrong!r} is {found.get(wrong, 'absent')} here and "
                f"{expected.get(wrong, 'absent')} in the network"
            )
        like = next(iter(params.values()))
        module = module.to(like.device, like.dtype)
        _fill(module, params)
        return module

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Logits (n, N) in the parameters' dtype; (B, n, N) for a batch of tasks."""
        if not needs_graph(params) and (fast := self.closed_form(params, x)) is not None:
            if x.dim() == 5:
                return fast.logits(params, x)
            return fast.logits({n: p.unsqueeze(0) for n, p in params.items()}, x.unsqueeze(0)).squeeze(0)
        self.examine(params, x)
        like = next(iter(params.values()))
        with self._lock:
            return self._call(params, self._constants(like), x.to(like.dtype))

    def _call(self, params: Params, constants: Params, x: Tensor) -> Tensor:
        """Call the module itself; one call at a time."""
        with self._lock:
            logits: Tensor = functional_call(self.module, {**constants, **params}, (x,))
        return logits

    @property
    def is_ours(self) -> bool:
        """Whether the network is one of this package's own, unchanged since it was built."""
        return self.closed_form_on_cpu is not None and self.closed_form_on_cpu.applies

    @property
    def is_examined(self) -> bool:
        """Whether `examine` has examined the network."""
        return self._findings is not None

    def examine(self, params: Params, x: Tensor) -> None:
        """Examine a user's network, once. Nothing is done under a transform of torch.func, which would hide what it
        does.

        Args:
            params: φ.
            x: images (n, C, H, W).

        Raises:
            ConfigError: see the class.
        """
        if self.is_examined or transformed() or torch.compiler.is_compiling() or set(params) != set(self.names):
            return
        if self.is_ours:
            return
        with self._lock:
            like = next(iter(params.values()))
            self._findings = examine(self.module, self._call, params, self._constants(like), x.to(like.dtype))

    def closed_form(self, params: Params, x: Tensor) -> ClosedForm | None:
        """The network's closed form if it has one that applies to these tensors, else None."""
        fast = self.closed_form_for(x)
        if fast is None or not ordinary_tensors([x, *params.values()]) or x.requires_grad or set(params) != fast.names:
            return None
        # Batched calls have no fallback; `takes_batches` has checked network and shapes.
        return fast if x.dim() == 5 or (fast.applies and fast.fits(params, x)) else None

    def closed_form_for(self, x: Tensor) -> ClosedForm | None:
        """The closed form for the device of these images, or None; whether it applies is not checked."""
        return self.closed_form_on_cuda if x.device.type == "cuda" else self.closed_form_on_cpu

    def place_constants(self, device: torch.device) -> None:
        """Move frozen parameters and buffers to this device, so that calls there need not copy them."""
        for part in self.module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(device)
            for p in part.parameters(recurse=False):
                if not p.requires_grad:
                    p.data = p.data.to(device)

    def _constants(self, like: Tensor) -> Params:
        """Frozen parameters and buffers, on the device and in the dtype of the parameters."""
        frozen = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        constants = {**frozen, **dict(self.module.named_buffers())}
        written = self._findings.written if self._findings is not None else frozenset()
        return {
            n: c.to(like.device, like.dtype if c.is_floating_point() else c.dtype, copy=n in written)
            for n, c in constants.items()
        }


def ordinary_tensors(tensors: Sequence[Tensor]) -> bool:
    """Whether these are ordinary tensors, all on a CPU or all on one CUDA device, and are computed with in the ordinary
    way.

    That is: no transform of torch.func, no autocast, no forward-mode derivatives, and no torch.compile.
    """
    dtype, device = tensors[-1].dtype, tensors[-1].device
    if device.type not in ("cpu", "cuda") or transformed() or torch.is_autocast_enabled(device.type):
        return False
    if torch.autograd.forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return False
    return (
        dtype in (torch.float32, torch.float64)
        and all(type(t) in (Tensor, nn.Parameter) and t.device == device and t.layout == torch.strided for t in tensors)
        and all(t.dtype == dtype for t in tensors[1:])
    )


def ordinary_on_cpu(tensors: Sequence[Tensor]) -> bool:
    """Whether these are `ordinary_tensors` on a CPU."""
    return tensors[-1].device.type == "cpu" and ordinary_tensors(tensors)
