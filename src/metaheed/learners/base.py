"""What a learner is: the way one task is adapted, apart from how tasks are combined."""

import copy
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from metaheed.errors import ConfigError, unknown
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
    """Mean cross-entropy in nats (0-d) and the logits (n, N) it was computed from, at base parameters φ."""
    logits = learner.predict(adapted, x)
    return F.cross_entropy(logits, y), logits


def support_gradient(
    learner: Learner, at: Params, x: Tensor, y: Tensor, names: Sequence[str] | None = None
) -> tuple[Params, Tensor]:
    """∇L of the mean cross-entropy on a support set at base parameters φ, and L (0-d).

    Differentiable; with `names`, the gradient with respect to these parameters only.
    """
    moving = at if names is None else {name: at[name] for name in names}
    gradient, (loss, _) = grad_and_value(lambda p: task_loss(learner, {**at, **p}, x, y), has_aux=True)(moving)
    return gradient, loss


def detached(tree: Params) -> Params:
    """The same values as constants."""
    return {name: leaf.detach() for name, leaf in tree.items()}


def below(prefix: str, tree: Params) -> Params:
    """The entries whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): leaf for name, leaf in tree.items() if name.startswith(prefix)}


class Backbone:
    """A network as a pure function of its parameters, for learners to build on.

    The module is copied; the caller's own stays as it is.

    Args:
        module: any network from images (n, C, H, W) to logits (n, N). Batch norm with running statistics is converted
            to batch statistics (with a warning), for a task's adaptation must not write into shared buffers. Parameters
            with requires_grad=False stay constants of the module.

    Raises:
        ConfigError: the module has active dropout, tied or uninitialised parameters, or none that can be trained.
    """

    def __init__(self, module: nn.Module) -> None:
        _refuse(module)
        self.module = copy.deepcopy(module).train()
        converted = [name for name, part in self.module.named_modules() if _use_batch_statistics(part)]
        if converted:
            warnings.warn(
                f"running statistics of {', '.join(converted)} are made batch statistics, on a copy of the network",
                stacklevel=3,
            )

    @property
    def names(self) -> list[str]:
        """The names of the parameters that are learned, in order."""
        return [name for name, p in self.module.named_parameters() if p.requires_grad]

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
        modules = [n for n, _ in self.module.named_modules() if n]
        if name not in modules:
            raise unknown("head", name, modules)
        if not [*self.module.get_submodule(name).parameters()]:
            raise ConfigError(f"head {name!r} has no parameters: those that have are {', '.join(owners)}")
        return name

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
        return {name for name in self.names if not module or name.startswith(f"{module}.")}

    def init(self, generator: torch.Generator) -> Params:
        """The parameters: redrawn by the module's own `redraw(generator)` where it has one, else its present values."""
        redraw = getattr(self.module, "redraw", None)
        if redraw is not None:
            redraw(generator)
        learned = dict(self.module.named_parameters())
        return {name: learned[name].detach().clone() for name in self.names}

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Logits (n, N) in the parameters' dtype."""
        like = next(iter(params.values()))
        logits: Tensor = functional_call(self.module, {**self._constants(like), **params}, (x.to(like.dtype),))
        return logits

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
        return {n: c.to(like.device, like.dtype if c.is_floating_point() else c.dtype) for n, c in constants.items()}


def _refuse(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise ConfigError(f"the backbone is {module!r}, but it must be a torch.nn.Module (an instance, not a class)")
    seen: dict[int, str] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ConfigError(f"backbone parameter {name!r} has no shape yet: run the network once before passing it")
        if id(p) in seen:
            raise ConfigError(
                f"backbone parameters {seen[id(p)]!r} and {name!r} are one tied tensor, which cannot be adapted "
                "under two names: give each its own, or use the shared one through a single module"
            )
        seen[id(p)] = name
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError("the backbone has no parameter with requires_grad=True: there is nothing to learn")
    for name, part in module.named_modules():
        # _DropoutNd holds p; attention and recurrent layers hold a number called dropout.
        rate = part.p if isinstance(part, nn.modules.dropout._DropoutNd) else getattr(part, "dropout", 0.0)
        if isinstance(rate, float | int) and rate > 0:
            raise ConfigError(
                f"backbone module {name!r} has dropout {rate}: adaptation must be the same function in training and "
                "test, so set its rate to 0 or remove it"
            )


def _use_batch_statistics(part: nn.Module) -> bool:
    if not isinstance(part, nn.modules.batchnorm._NormBase) or not part.track_running_stats:
        return False
    part.track_running_stats = False
    part.running_mean = part.running_var = part.num_batches_tracked = None
    return True
