"""An independent reference: plain float64 autograd through the whole adaptation, sharing no code with the package."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metaheed.types import Episode, Params


def maml_query_loss(
    network: nn.Module, meta: Params, episode: Episode, steps: int, rate: float, first_order: bool = False
) -> tuple[Tensor, Params]:
    """The query loss after `steps` gradient steps, and the adapted parameters, with the graph to `meta`."""
    phi = dict(meta)
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(network, phi, (episode.support_x,)), episode.support_y)
        grads = torch.autograd.grad(loss, list(phi.values()), create_graph=not first_order, allow_unused=True)
        phi = {n: p if g is None else p - rate * g for (n, p), g in zip(phi.items(), grads, strict=True)}
    return F.cross_entropy(functional_call(network, phi, (episode.query_x,)), episode.query_y), phi


def with_grad(meta: Params) -> Params:
    return {name: p.detach().clone().requires_grad_() for name, p in meta.items()}


def gradient(value: Tensor, at: Params) -> Params:
    return dict(zip(at, torch.autograd.grad(value, list(at.values()), retain_graph=True), strict=True))


def assert_close(a: Params, b: Params, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.allclose(a[name], b[name], rtol=rtol, atol=atol), (
            f"{name}: {float((a[name] - b[name]).abs().max())} apart at {float(b[name].abs().max())}"
        )
