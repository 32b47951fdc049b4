"""What a learner is: the way one task is adapted, apart from how tasks are combined."""

import functools
import os
import threading
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vjp

from metaheed.errors import ConfigError, unknown
from metaheed.learners.closed_form import ClosedForm, closed_form, mean_cross_entropy
from metaheed.learners.closed_form_cuda import ClosedFormCUDA
from metaheed.learners.conversion import (
    converted,
    copied,
    with_parametrised_classes,
    without_parametrised_classes,
)
from metaheed.learners.derivatives import Step, detached, many_vectors, needs_graph, recomputed, transformed
from metaheed.learners.examination import Findings, examine
from metaheed.types import Params


class Learner(Protocol):
    """One task's adaptation as pure functions of the meta-parameters θ.

    Shapes: support_x (N·K, C, H, W), support_y (N·K,), x (n, C, H, W), logits (n, N).
    """

    def init(self, generator: torch.Generator) -> Params:
        """Draw θ."""
        ...

    def initial(self, meta: Params) -> Params:
        """φ⁰, the base parameters before adaptation."""
        ...

    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """φᵀ, the base parameters after adaptation; the same function in training and test."""
        ...

    def predict(self, adapted: Params, x: Tensor) -> Tensor:
        """Logits of base parameters φ."""
        ...


def task_loss(learner: Learner, adapted: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats (0-d) and the logits (n, N) it was computed from, at base parameters φ.

    Of a batch of tasks where `takes_batches`: (B,) and (B, n, N).
    """
    logits = learner.predict(adapted, x)
    return mean_cross_entropy(logits, y), logits


def has_closed_form(learner: Learner) -> bool:
    """Whether its own arithmetic is elementwise in the parameters, and its network known in closed form."""
    if not isinstance(learner, NetworkLearner) or not _is_elementwise(type(learner)):  # type: ignore[arg-type]
        return False
    return learner.network is not None and learner.network.known is not None


@functools.cache
def _is_elementwise(kind: type) -> bool:
    """Whether a class of learners says so of its arithmetic, or inherits all arithmetic from one that does.

    A subclass that only adds to a learner (a constructor, a method of another name) computes as that one does. One that
    replaces a part of it may do anything, and has to say `elementwise = True` itself.
    """
    for place, ancestor in enumerate(kind.__mro__):
        if "elementwise" in vars(ancestor):
            replaced = {name for later in kind.__mro__[:place] for name in vars(later) if hasattr(ancestor, name)}
            return bool(vars(ancestor)["elementwise"]) and not {n for n in replaced if not n.startswith("__")}
    return False


def takes_batches(learner: Learner, meta: Params, x: Tensor) -> bool:
    """Whether the learner's functions also work on many tasks at once: every argument with a leading axis of tasks.

    So they do where it has a closed form, and that applies to these tensors.

    Args:
        learner: a subclass of ours that replaces a part of it counts as unknown, unless it says `elementwise = True`.
        meta: θ, without that axis.
        x: images (B, n, C, H, W).
    """
    if x.dim() != 5 or not has_closed_form(learner):
        return False
    assert isinstance(learner, NetworkLearner)
    assert learner.network is not None
    fast = learner.network.closed_form(start := learner.initial(meta), x)
    return fast is not None and fast.applies and fast.fits(start, x)


def loss_gradient(
    learner: Learner, at: Params, x: Tensor, y: Tensor, names: Sequence[str] | None = None
) -> tuple[Params, Tensor, Tensor]:
    """∇L of the mean cross-entropy on a set of images at base parameters φ, L (0-d), and the logits (n, N).

    With `names`, the gradient with respect to these parameters only. The gradient is differentiable. Where the
    learner's network has a closed form (see `closed_form.py`) that is used, else autograd; they agree to rounding.
    """
    network = learner.network if isinstance(learner, NetworkLearner) else None
    fast = None if network is None else network.closed_form(at, x)
    if fast is None:
        return _general_gradient(learner, at, x, y, names)
    wanted = tuple(at if names is None else names)
    if x.dim() == 4:  # one task
        result = loss_gradient(
            learner, {n: p.unsqueeze(0) for n, p in at.items()}, x.unsqueeze(0), y.unsqueeze(0), names
        )
        gradient, loss, logits = result
        return {n: g.squeeze(0) for n, g in gradient.items()}, loss.squeeze(0), logits.squeeze(0)
    if not needs_graph(at):
        return fast.gradient(at, x, y, wanted)[:3]
    loss, logits, *leaves = _ClosedGradient.apply(learner, fast, tuple(at), wanted, x, y, *at.values())  # type: ignore[no-untyped-call]
    return dict(zip(wanted, leaves, strict=True)), loss, logits


def _general_gradient(
    learner: Learner, at: Params, x: Tensor, y: Tensor, names: Sequence[str] | None
) -> tuple[Params, Tensor, Tensor]:
    if isinstance(learner, NetworkLearner) and not learner.backbone.is_examined:
        learner.backbone.examine(at, x)  # here, where no transform hides it
    moving = at if names is None else {name: at[name] for name in names}
    gradient, (loss, logits) = grad_and_value(lambda p: task_loss(learner, {**at, **p}, x, y), has_aux=True)(moving)
    return gradient, loss, logits


class _ClosedGradient(torch.autograd.Function):
    """`loss_gradient` as one node of autograd's graph; backward is one product with the Hessian."""

    @staticmethod
    def forward(ctx, learner, fast, names, wanted, x, y, *leaves):  # type: ignore[no-untyped-def]
        at = dict(zip(names, leaves, strict=True))
        gradient, loss, logits, ctx.tape = fast.gradient(at, x, y, wanted, keep=True)
        ctx.learner, ctx.fast, ctx.names, ctx.wanted = learner, fast, names, wanted
        ctx.save_for_backward(x, y, *leaves)
        ctx.set_materialize_grads(False)
        return loss, logits, *gradient.values()

    @staticmethod
    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        x, y, *leaves = ctx.saved_tensors
        at = dict(zip(ctx.names, leaves, strict=True))
        loss, logits, *directions = cotangents
        if torch.is_grad_enabled() or loss is not None or logits is not None or many_vectors(cotangents):
            # Third derivatives, or those of the loss itself, or many vectors at once: autograd's.
            def function(at):  # type: ignore[no-untyped-def]
                return _task_by_task(ctx.learner, at, x, y, ctx.wanted)

            value, pull = vjp(function, at)  # type: ignore[misc]  # torch's annotation covers its has_aux form too
            given = tuple(
                torch.zeros_like(v) if cotangent is None else cotangent
                for v, cotangent in zip(value, cotangents, strict=True)
            )
            pulled = pull(given)[0]
        else:
            direction = {n: d for n, d in zip(ctx.wanted, directions, strict=True) if d is not None}
            pulled = _hessian_product(ctx, at, x, y, direction)
        return None, None, None, None, None, None, *(pulled[name] for name in ctx.names)


def _task_by_task(learner: Learner, at: Params, x: Tensor, y: Tensor, wanted: Sequence[str]) -> tuple[Tensor, ...]:
    """Losses (B,), logits, and the wanted gradients one after another, of a batch by autograd.

    Not by vmap: PyTorch 2.13's derivative of a vmapped gradient of convolutions is wrong.
    """
    tasks = range(len(y))
    each = [_general_gradient(learner, {n: p[i] for n, p in at.items()}, x[i], y[i], wanted) for i in tasks]
    gradients, losses, logits = zip(*each, strict=True)
    return torch.stack(losses), torch.stack(logits), *(torch.stack([g[name] for g in gradients]) for name in wanted)


def _hessian_product(ctx: Any, at: Params, x: Tensor, y: Tensor, direction: Params) -> Params:
    tape, ctx.tape = ctx.tape, None  # its memory is free for the next step's
    if tape is None:  # a second time through the same graph
        tape = ctx.fast.gradient(at, x, y, keep=True)[3]
    product: Params = ctx.fast.hessian_product(at, tape, direction)
    return product


def descend(
    learner: Learner,
    adapted: Params,
    rate: float,
    x: Tensor,
    y: Tensor,
    names: Sequence[str] | None = None,
    first_order: bool = False,
) -> Params:
    """φ − α ∇L(φ) of the mean cross-entropy on a set of images; with `names`, these parameters alone move.

    With `first_order` the gradient counts as a constant. On a CUDA device in closed form the arithmetic on all
    parameters starts one kernel and not one a parameter, and so does that of the step's derivative, which is one node
    of autograd's graph: v ← v − α ∇²L v.
    """
    at = detached(adapted) if first_order else adapted
    # A rate that is a tensor may be learned: then it is a part of the graph.
    simple = x.dim() == 5 and isinstance(rate, float | int)
    network = learner.network if isinstance(learner, NetworkLearner) and simple else None
    in_kernels = network is not None and isinstance(network.known_at(x), ClosedFormCUDA)
    fast = network.closed_form(at, x) if network is not None and in_kernels else None
    if fast is None:
        gradient, _, _ = loss_gradient(learner, at, x, y, names)
        return {n: p - rate * gradient[n] if n in gradient else p for n, p in adapted.items()}
    wanted = tuple(at if names is None else names)
    if needs_graph(at):
        after = _ClosedStep.apply(learner, fast, rate, tuple(at), wanted, x, y, *at.values())  # type: ignore[no-untyped-call]
    else:
        slopes = fast.gradient(at, x, y, wanted)[0]
        after = torch._foreach_add([adapted[n] for n in wanted], [slopes[n] for n in wanted], alpha=-rate)
    return {**adapted, **dict(zip(wanted, after, strict=True))}


class _ClosedStep(torch.autograd.Function):
    """`descend` for many tasks as one node: see `_ClosedGradient`."""

    @staticmethod
    def forward(ctx, learner, fast, rate, names, wanted, x, y, *leaves):  # type: ignore[no-untyped-def]
        at = dict(zip(names, leaves, strict=True))
        gradient, _, _, ctx.tape = fast.gradient(at, x, y, wanted, keep=True)
        ctx.learner, ctx.fast, ctx.rate, ctx.names, ctx.wanted = learner, fast, rate, names, wanted
        ctx.save_for_backward(x, y, *leaves)
        after = torch._foreach_add([at[n] for n in wanted], [gradient[n] for n in wanted], alpha=-rate)
        return tuple(after)

    @staticmethod
    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        x, y, *leaves = ctx.saved_tensors
        at = dict(zip(ctx.names, leaves, strict=True))
        if torch.is_grad_enabled() or many_vectors(cotangents):  # third derivatives, or many vectors at once

            def function(at):  # type: ignore[no-untyped-def]
                _, _, *gradient = _task_by_task(ctx.learner, at, x, y, ctx.wanted)
                return tuple(at[n] - ctx.rate * g for n, g in zip(ctx.wanted, gradient, strict=True))

            pulled = vjp(function, at)[1](cotangents)[0]
        else:
            slopes = torch._foreach_mul(cotangents, -ctx.rate)
            pulled = _hessian_product(ctx, at, x, y, dict(zip(ctx.wanted, slopes, strict=True)))
            moved = torch._foreach_add([pulled[n] for n in ctx.wanted], cotangents)
            pulled = {**pulled, **dict(zip(ctx.wanted, moved, strict=True))}
        return None, None, None, None, None, None, None, *(pulled[name] for name in ctx.names)


def place_constants(learner: Learner, device: torch.device) -> None:
    """Move what the learner's network holds besides its parameters to where it will be called."""
    backbone = getattr(learner, "backbone", None)
    if isinstance(backbone, Backbone):
        backbone.place_constants(device)


def below(prefix: str, tree: Params) -> Params:
    """The entries whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): leaf for name, leaf in tree.items() if name.startswith(prefix)}


class _ForkSafeLock:
    """A lock that its thread may take again; in a process that was forked meanwhile it is free."""

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

    The module is copied; the caller's own stays as it is. A network of the user's own is looked at once more when it is
    first called (see `examination.py`). Calls from several threads wait for one another, since parameters are put into
    the module while it runs; a network in closed form does not need that.

    Args:
        module: any network from images (n, C, H, W) to logits (n, N); see `conversion.py` for what is converted, with a
            warning, and what is refused. Parameters with requires_grad=False stay constants of the module.

    Raises:
        ConfigError: the network cannot be adapted. At the first call: it does not return logits, or writes into its
            parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = converted(module)
        self.known = closed_form(self.module)
        """The network's closed form, if it is one of those that have one."""
        self.known_on_cuda = closed_form(self.module, ClosedFormCUDA)
        """The same on a CUDA device."""
        # While a call runs, other tensors stand in the module; so who looks into it takes the lock, or looked before.
        self._names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        self._findings: Findings | None = None
        self._lock = _ForkSafeLock()

    def __getstate__(self) -> dict[str, Any]:
        made_again = ("_lock", "known", "known_on_cuda")  # a closed form holds on to the module's parts
        with self._lock:
            module = without_parametrised_classes(self.module)
        return {**{name: value for name, value in vars(self).items() if name not in made_again}, "module": module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=_ForkSafeLock())
        with_parametrised_classes(self.module)
        self.known, self.known_on_cuda = closed_form(self.module), closed_form(self.module, ClosedFormCUDA)

    @property
    def names(self) -> list[str]:
        """The names of the parameters that are learned, in order."""
        return [*self._names]

    def find_head(self, name: str | None) -> str:
        """The name of the head's module; none given: of the last module registered that has parameters of its own.

        Raises:
            ConfigError: there is no module of that name, or it has no parameters.
        """
        owners: list[str] = [n for n, part in self.module.named_modules() if [*part.parameters(recurse=False)]]
        owners = [
            n.split(".parametrizations.")[0] for n in owners
        ]  # a parametrised layer's own parameters lie below it
        if name is None:
            return owners[-1]
        modules = [n for n, _ in self.module.named_modules(remove_duplicate=False) if n]
        if name not in modules:
            raise unknown("head", name, modules)
        if not [*self.module.get_submodule(name).parameters()]:
            raise ConfigError(f"head {name!r} has no parameters: those that have are {', '.join(owners)}")
        # A module that is registered under two names has its parameters under the first.
        first: str = next(n for n, part in self.module.named_modules() if part is self.module.get_submodule(name))
        return first

    def into_head(self, params: Params, x: Tensor, head: str) -> Tensor:
        """What the network hands to its head on the way from images to logits.

        Raises:
            ConfigError: the module called head is not the network's last operation.
        """
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
                f"the network's logits are not what its module {head!r} puts out, so that is not its head: name the "
                "head's module with --head (in Python: head=...); if this is it, return its output as it is"
            )
        return seen[-1][0]

    def names_of(self, module: str) -> set[str]:
        """The names of the learned parameters inside a module ("" is the whole network)."""
        with self._lock:
            inside = {id(p) for p in self.module.get_submodule(module).parameters()}
            named = {name: id(p) for name, p in self.module.named_parameters()}
        return {name for name in self._names if named[name] in inside}

    def init(self, generator: torch.Generator) -> Params:
        """The parameters: redrawn by the module's own `redraw(generator)` where it has one, else its present values.

        One of our own networks that was given other weights than those it was made with keeps them.
        """
        redraw = getattr(self.module, "redraw", None)
        with self._lock:
            if redraw is not None and not getattr(self.module, "was_given_weights", False):
                redraw(generator)
            learned = dict(self.module.named_parameters())
            return {name: learned[name].detach().clone() for name in self.names}

    def hold(self, params: Params) -> None:
        """Put these values into the module itself, for those who look inside it; calls do not use them."""
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
        """Logits (n, N) in the parameters' dtype."""
        if not needs_graph(params) and (fast := self.closed_form(params, x)) is not None:
            if x.dim() == 5:
                return fast.logits(params, x)
            return fast.logits({n: p.unsqueeze(0) for n, p in params.items()}, x.unsqueeze(0)).squeeze(0)
        self.examine(params, x)
        like = next(iter(params.values()))
        with self._lock:
            return self._call(params, self._constants(like), x.to(like.dtype))

    def _call(self, params: Params, constants: Params, x: Tensor) -> Tensor:
        with self._lock:
            logits: Tensor = functional_call(self.module, {**constants, **params}, (x,))
        return logits

    @property
    def is_ours(self) -> bool:
        """Whether the network is one of this package's own, as it was built."""
        return self.known is not None and self.known.applies

    @property
    def is_examined(self) -> bool:
        """Whether `examine` has looked."""
        return self._findings is not None

    def examine(self, params: Params, x: Tensor) -> None:
        """Look at a network of the user's own, once, where no transform of torch.func is at work (which hides it).

        Args:
            params: φ.
            x: images (n, C, H, W).

        Raises:
            ConfigError: as the class says.
        """
        if self.is_examined or transformed() or torch.compiler.is_compiling() or set(params) != set(self.names):
            return
        if self.is_ours:
            return
        with self._lock:
            like = next(iter(params.values()))
            self._findings = examine(self.module, self._call, params, self._constants(like), x.to(like.dtype))

    def closed_form(self, params: Params, x: Tensor) -> ClosedForm | None:
        """The network's derivatives without autograd, where they are known and apply to these very tensors."""
        fast = self.known_at(x)
        if fast is None or not ordinary_tensors([x, *params.values()]) or x.requires_grad or set(params) != fast.names:
            return None
        # Many tasks at once have no other form to fall back to: `takes_batches` has asked about network and shapes.
        return fast if x.dim() == 5 or (fast.applies and fast.fits(params, x)) else None

    def known_at(self, x: Tensor) -> ClosedForm | None:
        """The closed form for the device that images lie on, if there is one."""
        return self.known_on_cuda if x.device.type == "cuda" else self.known

    def place_constants(self, device: torch.device) -> None:
        """Move frozen parameters and buffers to where the network is called, lest every call copy them there."""
        for part in self.module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(device)
            for p in part.parameters(recurse=False):
                if not p.requires_grad:
                    p.data = p.data.to(device)

    def _constants(self, like: Tensor) -> Params:
        """Frozen parameters and buffers, where they must follow the parameters to their device and dtype."""
        frozen = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        constants = {**frozen, **dict(self.module.named_buffers())}
        written = self._findings.written if self._findings is not None else frozenset()
        return {
            n: c.to(like.device, like.dtype if c.is_floating_point() else c.dtype, copy=n in written)
            for n, c in constants.items()
        }


def ordinary_tensors(tensors: Sequence[Tensor]) -> bool:
    """Whether these are ordinary tensors on a CPU, or on one CUDA device, and nothing transforms what is computed from
    them.
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
    """`ordinary_tensors`, and on a CPU."""
    return tensors[-1].device.type == "cpu" and ordinary_tensors(tensors)


class NetworkLearner:
    """What learners on a backbone share: θ and φ are its parameters under their own names unless a learner says else.

    Args:
        backbone: any network from images to logits; see `Backbone` for what is converted and refused.
        adaptation_steps: T.
        recompute: compute each inner step again in the reverse pass instead of keeping its graph.
    """

    elementwise: ClassVar[bool] = False
    """Whether the learner itself treats each parameter's entries alike, so that an axis before them changes nothing."""

    def __init__(self, backbone: nn.Module, adaptation_steps: int = 1, recompute: bool = False) -> None:
        self.backbone = Backbone(backbone)
        self.adaptation_steps = adaptation_steps
        self.recompute = recompute

    @property
    def has_exact_gradient(self) -> bool:
        """Whether the meta-gradient is the whole derivative of the query loss; not where derivatives are dropped."""
        return True

    @property
    def network(self) -> Backbone | None:
        """The backbone, if predictions are its logits and nothing more."""
        return self.backbone if type(self).predict is NetworkLearner.predict else None

    def init(self, generator: torch.Generator) -> Params:
        """θ: our own backbones redrawn from the generator, a user's with the weights it has."""
        return self.backbone.init(generator)

    def initial(self, meta: Params) -> Params:
        """φ⁰ = θ."""
        return meta

    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """φᵀ; each learner says how."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it adapts")

    def predict(self, adapted: Params, x: Tensor) -> Tensor:
        """Logits (n, N) at φ."""
        return self.backbone(adapted, x)

    def module(self, params: Params) -> nn.Module:
        """A plain `nn.Module` that holds these parameters, for saving, exporting and use in other libraries.

        Its parameters have the names of the network that the learner was made of. Batch norm uses the statistics of the
        batch it is given, as it does here.

        Args:
            params: θ, of which the module computes φ⁰ (the network before adaptation), or the φ of a task.

        Raises:
            ConfigError: they are neither.
        """
        is_adapted = set(params) == set(self.backbone.names)
        return self.backbone.filled(params if is_adapted else self.initial(params))

    def hold(self, meta: Params) -> None:
        """Put φ⁰ into the network inside, for those who look there; the learner itself never does."""
        self.backbone.hold(self.initial(meta))

    def steps(self, step: Step, meta: Params, state: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """T times state ← step(θ, state, support set)."""
        for _ in range(self.adaptation_steps):
            if self.recompute:
                state = recomputed(step, meta, state, support_x, support_y)
            else:
                state = step(meta, state, support_x, support_y)
        return state
