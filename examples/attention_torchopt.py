"""Task attention in a MAML loop of TorchOpt 0.7.3, written as its examples/few-shot/maml_omniglot.py.

That loop AVERAGES: torch.mean(torch.stack(losses)). The weighted sum replaces the mean; learning rates stay.
"""

import torch
import torchopt
from tasks import FAST_LR, META_LR, STEPS, accuracy, collate, run, split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metaheed.outer import TaskAttention, stack_gradients, weight_gradient, weighted_sum
from metaheed.types import Episode, Params, TaskInfo


def query(net: nn.Module, task: Episode) -> tuple[Tensor, TaskInfo]:
    """The query loss after adaptation, with its graph to θ, and what attention sees of the task."""
    theta, inner_opt = torchopt.extract_state_dict(net, by="reference"), torchopt.MetaSGD(net, lr=FAST_LR)
    initial_loss = cross_entropy(net(task.query_x), task.query_y).detach()
    for _ in range(STEPS):
        inner_opt.step(cross_entropy(net(task.support_x), task.support_y))
    logits = net(task.query_x)
    loss = cross_entropy(logits, task.query_y)
    norm = nn.utils.get_total_norm(torch.autograd.grad(loss, net.parameters(), retain_graph=True))
    torchopt.recover_state_dict(net, theta)
    return loss, TaskInfo(loss.detach(), accuracy(logits, task.query_y), initial_loss, norm)


def stacked(net: nn.Module, attention: TaskAttention, batch: Episode) -> tuple[Tensor, Params]:
    """All graphs alive at once: the weights enter the loss."""
    losses, infos = zip(*(query(net, task) for task in split(batch)), strict=True)
    weights = attention(collate(infos))
    task_grads = stack_gradients([torch.autograd.grad(loss, net.parameters(), retain_graph=True) for loss in losses])
    (weights.detach() * torch.stack(losses)).sum().backward()
    return weights, task_grads


def freed(net: nn.Module, attention: TaskAttention, batch: Episode) -> tuple[Tensor, Params]:
    """One graph at a time: the weights combine the tasks' gradients."""
    infos, grads = [], []
    for task in split(batch):
        loss, info = query(net, task)
        infos.append(info)
        grads.append(torch.autograd.grad(loss, net.parameters()))
    weights, task_grads = attention(collate(infos)), stack_gradients(grads)
    for p, g in zip(net.parameters(), weighted_sum(weights.detach(), task_grads).values(), strict=True):
        p.grad = g
    return weights, task_grads


def attend(net: nn.Module, weights: Tensor, task_grads: Params, probe: Episode) -> None:
    """δ's gradient: how the probe loss at the new θ answers to the weights. Nothing of it reaches θ."""
    grads = stack_gradients([torch.autograd.grad(query(net, task)[0], net.parameters()) for task in split(probe)])
    G = {name: g.mean(0) for name, g in grads.items()}
    weights.backward(weight_gradient(task_grads, G, lambda G: {name: -META_LR * g for name, g in G.items()}))


if __name__ == "__main__":
    run(attend, stacked, freed)
