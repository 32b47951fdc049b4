"""The gradient of a network's loss, in closed form if the network has one and otherwise by autograd.

Legend: B tasks, n images, N ways. Images are (n, C, H, W) for one task and (B, n, C, H, W) for many; then labels,
parameters and results have a leading B too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp

from metaheed.networks.closed_form.cuda import ClosedFormCUDA
from metaheed.networks.derivatives import detached, many_vectors, needs_graph
from metaheed.networks.losses import Predict, predicted_loss
from metaheed.types import Params

if TYPE_CHECKING:
    from metaheed.networks.functional import Backbone


def predicted_gradient(
    predict: Predict, at: Params, x: Tensor, y: Tensor, names: Sequence[str] | None = None
) -> tuple[Params, Tensor, Tensor]:
    """∇L of the mean cross-entropy at φ, L (0-d), and the logits (n, N), by autograd; the gradient is differentiable.

    Args:
        predict: (φ, x) -> logits.
        at: φ.
        x: images (n, C, H, W).
        y: their labels (n,).
        names: the parameters that the gradient is taken with respect to; all if None.
    """
    moving = at if names is None else {name: at[name] for name in names}
    gradient, (loss, logits) = grad_and_value(lambda p: predicted_loss(predict, {**at, **p}, x, y), has_aux=True)(
        moving
    )
    return gradient, loss, logits


def loss_gradient(
    network: "Backbone", at: Params, x: Tensor, y: Tensor, names: Sequence[str] | None = None
) -> tuple[Params, Tensor, Tensor]:
    """`predicted_gradient` for a network, in closed form if it has one (`closed_form/`); the two agree to rounding.

    For many tasks every argument has a leading axis of tasks, and so have the results.
    """
    fast = network.closed_form(at, x)
    if fast is None:
        return _by_autograd(network, at, x, y, names)
    wanted = tuple(at if names is None else names)
    if x.dim() == 4:  # one task
        result = loss_gradient(
            network, {n: p.unsqueeze(0) for n, p in at.items()}, x.unsqueeze(0), y.unsqueeze(0), names
        )
        gradient, loss, logits = result
        return {n: g.squeeze(0) for n, g in gradient.items()}, loss.squeeze(0), logits.squeeze(0)
    if not needs_graph(at):
        return fast.gradient(at, x, y, wanted)[:3]
    loss, logits, *leaves = _ClosedGradient.apply(network, fast, tuple(at), wanted, x, y, *at.values())  # type: ignore[no-untyped-call]
    return dict(zip(wanted, leaves, strict=True)), loss, logits


def fused_step(
    network: "Backbone",
    adapted: Params,
    rate: float | Tensor,
    x: Tensor,
    y: Tensor,
    names: Sequence[str] | None = None,
    first_order: bool = False,
) -> Params | None:
    """A gradient step φ − α ∇L(φ) on many tasks, in CUDA kernels that start once for all parameters, not once for each.

    Its derivative is one node of autograd's graph: v ← v − α ∇²L v. The arguments are those of
    `NetworkLearner.descend`.

    Returns:
        φ after the step; None if there is no such form: on another device, for a single task, for a learned rate, or
        for a network without a closed form.
    """
    if x.dim() != 5 or not isinstance(rate, float | int) or not isinstance(network.closed_form_for(x), ClosedFormCUDA):
        return None  # a rate that is a tensor may be learned, and then belongs to the graph
    at = detached(adapted) if first_order else adapted
    fast = network.closed_form(at, x)
    if fast is None:
        return None
    wanted = tuple(at if names is None else names)
    if needs_graph(at):
        after = _ClosedStep.apply(network, fast, rate, tuple(at), wanted, x, y, *at.values())  # type: ignore[no-untyped-call]
    else:
        slopes = fast.gradient(at, x, y, wanted)[0]
        after = torch._foreach_add([adapted[n] for n in wanted], [slopes[n] for n in wanted], alpha=-rate)
    return {**adapted, **dict(zip(wanted, after, strict=True))}


def _by_autograd(
    network: "Backbone", at: Params, x: Tensor, y: Tensor, names: Sequence[str] | None
) -> tuple[Params, Tensor, Tensor]:
    network.examine(at, x)  # a transform of torch.func would hide what the network does
    return predicted_gradient(network, at, x, y, names)


class _ClosedGradient(torch.autograd.Function):
    """`loss_gradient` as one node of autograd's graph; its backward is one product with the Hessian."""

    @staticmethod
    def forward(ctx, network, fast, names, wanted, x, y, *leaves):  # type: ignore[no-untyped-def]
        at = dict(zip(names, leaves, strict=True))
        gradient, loss, logits, ctx.tape = fast.gradient(at, x, y, wanted, keep=True)
        ctx.network, ctx.fast, ctx.names, ctx.wanted = network, fast, names, wanted
        ctx.save_for_backward(x, y, *leaves)
        ctx.set_materialize_grads(False)
        return loss, logits, *gradient.values()

    @staticmethod
    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        x, y, *leaves = ctx.saved_tensors
        at = dict(zip(ctx.names, leaves, strict=True))
        loss, logits, *directions = cotangents
        if torch.is_grad_enabled() or loss is not None or logits is not None or many_vectors(cotangents):
            # Autograd computes third derivatives, those of the loss itself, and those for many vectors at once.
            def function(at):  # type: ignore[no-untyped-def]
                return _task_by_task(ctx.network, at, x, y, ctx.wanted)

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


def _task_by_task(network: "Backbone", at: Params, x: Tensor, y: Tensor, wanted: Sequence[str]) -> tuple[Tensor, ...]:
    """Losses (B,), logits (B, n, N) and the wanted gradients of a batch by autograd, one task after another.

    vmap is not used, because PyTorch 2.13's derivative of a vmapped gradient of convolutions is wrong.
    """
    tasks = range(len(y))
    each = [_by_autograd(network, {n: p[i] for n, p in at.items()}, x[i], y[i], wanted) for i in tasks]
    gradients, losses, logits = zip(*each, strict=True)
    return torch.stack(losses), torch.stack(logits), *(torch.stack([g[name] for g in gradients]) for name in wanted)


def _hessian_product(ctx: Any, at: Params, x: Tensor, y: Tensor, direction: Params) -> Params:
    """The product of the Hessian with a direction, from the tape that forward kept."""
    tape, ctx.tape = ctx.tape, None  # frees its memory for the next step's tape
    if tape is None:  # backward is called a second time
        tape = ctx.fast.gradient(at, x, y, keep=True)[3]
    product: Params = ctx.fast.hessian_product(at, tape, direction)
    return product


class _ClosedStep(torch.autograd.Function):
    """`fused_step` as one node of autograd's graph; see `_ClosedGradient`."""

    @staticmethod
    def forward(ctx, network, fast, rate, names, wanted, x, y, *leaves):  # type: ignore[no-untyped-def]
        at = dict(zip(names, leaves, strict=True))
        gradient, _, _, ctx.tape = fast.gradient(at, x, y, wanted, keep=True)
        ctx.network, ctx.fast, ctx.rate, ctx.names, ctx.wanted = network, fast, rate, names, wanted
        ctx.save_for_backward(x, y, *leaves)
        after = torch._foreach_add([at[n] for n in wanted], [gradient[n] for n in wanted], alpha=-rate)
        return tuple(after)

    @staticmethod
    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        x, y, *leaves = ctx.saved_tensors
        at = dict(zip(ctx.names, leaves, strict=True))
        if torch.is_grad_enabled() or many_vectors(cotangents):  # third derivatives, or many vectors at once

            def function(at):  # type: ignore[no-untyped-def]
                _, _, *gradient = _task_by_task(ctx.network, at, x, y, ctx.wanted)
                return tuple(at[n] - ctx.rate * g for n, g in zip(ctx.wanted, gradient, strict=True))

            pulled = vjp(function, at)[1](cotangents)[0]
        else:
            slopes = torch._foreach_mul(cotangents, -ctx.rate)
            pulled = _hessian_product(ctx, at, x, y, dict(zip(ctx.wanted, slopes, strict=True)))
            moved = torch._foreach_add([pulled[n] for n in ctx.wanted], cotangents)
            pulled = {**pulled, **dict(zip(ctx.wanted, moved, strict=True))}
        return None, None, None, None, None, None, None, *(pulled[name] for name in ctx.names)
