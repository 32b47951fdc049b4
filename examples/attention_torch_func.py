"""Task attention in a MAML loop of torch.func, as PyTorch's functorch/examples/maml_omniglot/*-transforms.py.

That loop SUMS over tasks: losses.sum().backward(). Weights sum to 1: to keep its steps, scale meta_lr by TASKS (SGD).
"""

from tasks import FAST_LR, META_LR, STEPS, Slopes, accuracy, collate, run, split
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp, vmap
from torch.nn.functional import cross_entropy

from metaheed.outer import TaskAttention, stack_gradients, weight_gradient, weighted_sum
from metaheed.types import Episode, Params, TaskInfo


def query(theta: Params, net: nn.Module, task: Episode) -> tuple[Tensor, TaskInfo]:
    """The query loss after adaptation, and what attention sees of the task."""

    def loss_at(phi: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional_call(net, phi, (x,))
        return cross_entropy(logits, y), logits

    phi = theta
    for _ in range(STEPS):
        step, _ = grad(loss_at, has_aux=True)(phi, task.support_x, task.support_y)
        phi = {name: p - FAST_LR * step[name] for name, p in phi.items()}
    v, (loss, logits) = grad_and_value(loss_at, has_aux=True)(phi, task.query_x, task.query_y)
    initial_loss = loss_at(theta, task.query_x, task.query_y)[0]
    norm = nn.utils.get_total_norm(v.values(), foreach=False)  # vmap knows no foreach
    return loss, TaskInfo(loss, accuracy(logits, task.query_y), initial_loss, norm)


def stacked(net: nn.Module, attention: TaskAttention, batch: Episode) -> tuple[Tensor, Slopes]:
    """All tasks as one program: the weights enter the loss. No task's own gradient is formed, here or for δ."""
    theta = {name: p.detach().clone() for name, p in net.named_parameters()}  # meta_opt steps in place
    losses, info = vmap(query, (None, None, 0))(dict(net.named_parameters()), net, batch)
    weights = attention(info)
    (weights.detach() * losses).sum().backward()
    return weights, lambda u: jvp(lambda p: vmap(query, (None, None, 0))(p, net, batch)[0], (theta,), (u,))[1]


def freed(net: nn.Module, attention: TaskAttention, batch: Episode) -> tuple[Tensor, Slopes]:
    """One task at a time: the weights combine the tasks' gradients."""
    theta = {name: p.detach() for name, p in net.named_parameters()}
    grads, infos = zip(*(grad(query, has_aux=True)(theta, net, task) for task in split(batch)), strict=True)
    weights, task_grads = attention(collate(infos)), stack_gradients(grads)
    for name, g in weighted_sum(weights.detach(), task_grads).items():
        net.get_parameter(name).grad = g
    return weights, lambda u: weight_gradient(task_grads, u, lambda u: u)


def attend(net: nn.Module, weights: Tensor, slopes: Slopes, probe: Episode) -> None:
    """δ's gradient: how the probe loss at the new θ answers to the weights. Nothing of it reaches θ."""
    theta = {name: p.detach() for name, p in net.named_parameters()}
    G = grad(lambda p: vmap(query, (None, None, 0))(p, net, probe)[0].mean())(theta)
    weights.backward(slopes({name: -META_LR * g for name, g in G.items()}))


if __name__ == "__main__":
    run(attend, stacked, freed)
