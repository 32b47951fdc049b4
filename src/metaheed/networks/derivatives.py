"""Derivatives of functions of parameter trees, under the transforms of torch.func and under plain autograd alike.

Legend: a tree is a dict of tensors by name (`Params`); a cotangent has the shape of the value that it belongs to.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import vjp, vmap

from metaheed.types import Params

T = TypeVar("T")

Step = Callable[[Params, Params, Tensor, Tensor], Params]
"""(θ, state, support_x, support_y) -> the next state, of the same names."""


def transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, vjp, …) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def many_vectors(cotangents: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass gets many vectors at once (`is_grads_batched`).

    Operations with an `out` argument refuse them, and `transformed` does not see them.
    """
    return any(d is not None and torch._C._functorch.is_legacy_batchedtensor(d) for d in cotangents)


def needs_graph(tree: Params) -> bool:
    """Whether autograd is to record operations on these tensors."""
    return torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tree.values())


def detached(tree: Params) -> Params:
    """The same values as constants."""
    return {name: leaf.detach() for name, leaf in tree.items()}


def ordinary(tensor: Tensor) -> Tensor:
    """The same values; a copy if they were made under torch.inference_mode, where autograd cannot record."""
    return tensor.clone() if tensor.is_inference() else tensor


def value_and_pullback(function: Callable[[Params], T], at: Params) -> tuple[T, Callable[[T], Params]]:
    """function(at), and its vector-Jacobian product there: a cotangent of the value -> a cotangent of `at`."""
    value, pull = vjp(function, at)  # type: ignore[misc]  # torch's annotation covers its has_aux form too

    def pullback(cotangent: T) -> Params:
        (result,) = pull(cotangent)
        return dict(result)

    return value, pullback


def recorded(function: Callable[[Params], Params], at: Params) -> tuple[Params, Callable[[Params], Params]]:
    """As `value_and_pullback`, but the pullback can be called only once, and frees the graph as it goes.

    It uses plain autograd, whose graph can contain the closed forms; under a transform of torch.func, that of
    torch.func.
    """
    if transformed() or needs_graph(at):
        return value_and_pullback(function, at)  # derivatives of the derivatives may be wanted
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in at.items()}
    with torch.enable_grad():
        value = function(leaves)

    def pullback(cotangent: Params) -> Params:
        moved = [name for name, leaf in value.items() if leaf.requires_grad]
        if not moved:
            return {name: torch.zeros_like(leaf) for name, leaf in at.items()}
        found = torch.autograd.grad(
            [value[name] for name in moved],
            list(leaves.values()),
            [cotangent[name] for name in moved],
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(leaves, found, strict=True))

    return detached(value), pullback


_Names = tuple[tuple[str, ...], tuple[str, ...]]
"""The names of θ's leaves and of the state's."""


def recomputed(step: Step, meta: Params, state: Params, support_x: Tensor, support_y: Tensor) -> Params:
    """step(θ, state, support set), of which only the inputs are kept: the reverse pass computes the step again.

    The graph is kept nevertheless if a derivative with respect to the images, or a forward-mode derivative, is wanted.
    """
    if not transformed() and not needs_graph({**meta, **state}):
        return step(meta, state, support_x, support_y)
    if support_x.requires_grad or torch.autograd.forward_ad._current_level >= 0:
        return step(meta, state, support_x, support_y)
    names, leaves = (tuple(meta), tuple(state)), (*meta.values(), *state.values())
    values = _Recomputed.apply(step, names, support_x, support_y, *leaves)  # type: ignore[no-untyped-call]
    return dict(zip(state, values, strict=True))


class _Recomputed(torch.autograd.Function):
    """A step of which only the inputs are kept."""

    @staticmethod
    def forward(step, names, x, y, *leaves):  # type: ignore[no-untyped-def]
        return _values(step, names, x, y, *leaves)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.step, ctx.names, x, y, *leaves = inputs
        ctx.save_for_backward(x, y, *leaves)

    @staticmethod
    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        x, y, *leaves = ctx.saved_tensors
        pull = _Pullback.apply if transformed() else _pulled_back
        return None, None, None, None, *pull(ctx.step, ctx.names, x, y, *cotangents, *leaves)

    @staticmethod
    def vmap(info, in_dims, step, names, x, y, *leaves):  # type: ignore[no-untyped-def]
        return vmap(partial(_values, step, names), in_dims=in_dims[2:])(x, y, *leaves), (0,) * len(names[1])


def _values(step: Step, names: _Names, x: Tensor, y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    # Return a view: an unchanged input must not be returned as the saved tensor itself.
    """The leaves of the step's result."""
    return tuple(v.view_as(v) for v in step(*_trees(names, leaves), x, y).values())


def _pulled_back(step: Step, names: _Names, x: Tensor, y: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    """Maps cotangents of a step's values, followed by its inputs, to the cotangents of its inputs."""
    cotangents, leaves = given[: len(names[1])], given[len(names[1]) :]

    def function(given: Params) -> Params:
        return step(*_trees(names, tuple(given[str(k)] for k in range(len(leaves)))), x, y)

    # The leaves are numbered, because a name may occur in both trees.
    _, pull = recorded(function, {str(k): leaf for k, leaf in enumerate(leaves)})
    pulled = pull(dict(zip(names[1], cotangents, strict=True)))
    return tuple(pulled[str(k)] for k in range(len(leaves)))


class _Pullback(torch.autograd.Function):
    """`_pulled_back` in the form that torch.func's transforms need."""

    @staticmethod
    def forward(step, names, x, y, *given):  # type: ignore[no-untyped-def]
        return _pulled_back(step, names, x, y, *given)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        raise NotImplementedError("recomputed steps have no third derivative under torch.func: set recompute=False")

    @staticmethod
    def vmap(info, in_dims, step, names, x, y, *given):  # type: ignore[no-untyped-def]
        pulled = vmap(partial(_pulled_back, step, names), in_dims=in_dims[2:])(x, y, *given)
        return pulled, (0,) * len(pulled)


def _trees(names: _Names, leaves: tuple[Tensor, ...]) -> tuple[Params, Params]:
    """θ and the state, put together from their leaves."""
    first = len(names[0])
    return dict(zip(names[0], leaves[:first], strict=True)), dict(zip(names[1], leaves[first:], strict=True))
