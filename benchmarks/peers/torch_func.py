"""torch.func, as PyTorch's functorch/examples/maml_omniglot/maml-omniglot-transforms.py: all tasks by vmap, summed.

One thing differs: there, backward() is called on the losses that vmap returns. With PyTorch 2.13's batch norm that
gives a wrong meta-gradient, by a percent and in float64 too: in the gradient of a norm's weight, computed inside vmap,
the statistics count as constants to a derivative taken outside. So here the meta-gradient is taken inside.
"""

import functools

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from benchmarks.peers import Peer
from benchmarks.settings import FAST_LR, META_LR, Setting
from benchmarks.tasks import network
from metaheed.types import Episode, Params


def build(algorithm: str, setting: Setting) -> Peer:
    net = network(setting, inplace=True)
    meta_opt = torch.optim.Adam(net.parameters(), lr=META_LR)

    def step(batch: Episode) -> None:
        meta_opt.zero_grad()
        params = {name: p.detach() for name, p in net.named_parameters()}
        loss_for_task = functools.partial(_loss_for_task, net, setting.steps)
        per_task = grad_and_value(loss_for_task, has_aux=True)
        gradients, (losses, accuracies) = vmap(per_task, in_dims=(None, 0, 0, 0, 0))(params, *batch)
        for name, p in net.named_parameters():
            p.grad = gradients[name].sum(0)
        meta_opt.step()
        (losses.sum() / setting.tasks).item(), (accuracies.sum() / setting.tasks).item()

    return Peer(step, dict(net.named_parameters()), setting.tasks)


def _loss_for_task(
    net: nn.Module, steps: int, params: Params, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
) -> tuple[Tensor, Tensor]:
    buffers = dict(net.named_buffers())

    def compute_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(net, (params, buffers), x), y)

    for _ in range(steps):
        gradient = grad(compute_loss)(params, support_x, support_y)
        params = {name: params[name] - FAST_LR * g for name, g in gradient.items()}
    logits = functional_call(net, (params, buffers), query_x)
    return cross_entropy(logits, query_y), (logits.argmax(dim=1) == query_y).sum() / len(query_y)
