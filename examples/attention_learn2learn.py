"""Task attention in a MAML loop of learn2learn 0.2.0, written as its examples/vision/maml_omniglot.py.

That loop AVERAGES: backward once a task, then p.grad.mul_(1 / tasks). Leave that line out: the weights sum to 1.
"""

import torch
from learn2learn.algorithms.maml import MAML
from tasks import FAST_LR, META_LR, STEPS, accuracy, collate, network, run, split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metaheed.outer import TaskAttention, stack_gradients, weight_gradient, weighted_sum
from metaheed.types import Episode, Params, TaskInfo


def query(maml: MAML, task: Episode) -> tuple[Tensor, TaskInfo]:
    """The query loss after adaptation, with its graph to θ, and what attention sees of the task."""
    learner = maml.clone()
    initial_loss = cross_entropy(learner(task.query_x), task.query_y).detach()
    for _ in range(STEPS):
        learner.adapt(cross_entropy(learner(task.support_x), task.support_y))
    logits = learner(task.query_x)
    loss = cross_entropy(logits, task.query_y)
    norm = nn.utils.get_total_norm(torch.autograd.grad(loss, learner.parameters(), retain_graph=True))
    return loss, TaskInfo(loss.detach(), accuracy(logits, task.query_y), initial_loss, norm)


def stacked(maml: MAML, attention: TaskAttention, batch: Episode) -> tuple[Tensor, Params]:
    """All graphs alive at once: the weights enter the loss."""
    losses, infos = zip(*(query(maml, task) for task in split(batch)), strict=True)
    weights = attention(collate(infos))
    task_grads = stack_gradients([torch.autograd.grad(loss, maml.parameters(), retain_graph=True) for loss in losses])
    (weights.detach() * torch.stack(losses)).sum().backward()
    return weights, task_grads


def freed(maml: MAML, attention: TaskAttention, batch: Episode) -> tuple[Tensor, Params]:
    """One graph at a time: the weights combine the tasks' gradients."""
    infos, grads = [], []
    for task in split(batch):
        loss, info = query(maml, task)
        infos.append(info)
        grads.append(torch.autograd.grad(loss, maml.parameters()))
    weights, task_grads = attention(collate(infos)), stack_gradients(grads)
    for p, g in zip(maml.parameters(), weighted_sum(weights.detach(), task_grads).values(), strict=True):
        p.grad = g
    return weights, task_grads


def attend(maml: MAML, weights: Tensor, task_grads: Params, probe: Episode) -> None:
    """δ's gradient: how the probe loss at the new θ answers to the weights. Nothing of it reaches θ."""
    grads = stack_gradients([torch.autograd.grad(query(maml, task)[0], maml.parameters()) for task in split(probe)])
    G = {name: g.mean(0) for name, g in grads.items()}
    weights.backward(weight_gradient(task_grads, G, lambda G: {name: -META_LR * g for name, g in G.items()}))


if __name__ == "__main__":
    run(attend, stacked, freed, build=lambda: MAML(network(), lr=FAST_LR))
