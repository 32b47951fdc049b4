"""What every entry has to compute: per-task meta-gradients by plain float64 autograd; how far an entry is from them."""

from collections.abc import Mapping

import torch
from tests.reference import gradient, maml_query_loss, meta_lstm_query_loss, meta_sgd_query_loss, with_grad
from torch import Tensor

from benchmarks.settings import AUTOGRAD, FAST_LR, Setting
from benchmarks.tasks import network, start, stream
from metaheed.types import Episode, Params

LARGEST = 3e-3
"""Above it an entry counts as wrong.

Rounding alone is some 1e-6. Where it switches a ReLU or a maximum that stands at its kink, float32 is off by 1e-3,
PyTorch's own autograd included. Leaving out second derivatives is off by a half.
"""


def base_algorithm(algorithm: str) -> str:
    """The algorithm whose per-task gradients these are: attention only weighs MAML's."""
    return "maml" if algorithm.startswith("ta-") or algorithm == AUTOGRAD else algorithm


def task_gradients(setting: Setting, algorithm: str) -> Params:
    """Meta-gradients of the tasks of training batch 0 at the start, float64, leaves (B, ...)."""
    net = network(setting).double()
    grads = []
    for parts in zip(*stream(setting, "train")(0), strict=True):
        task = Episode(*(part.double() if part.is_floating_point() else part for part in parts))
        theta = with_grad({name: p.double() for name, p in start(setting, algorithm).items()})
        match base_algorithm(algorithm):
            case "maml" | "fomaml":
                loss, _ = maml_query_loss(net, theta, task, setting.steps, FAST_LR, algorithm == "fomaml")
            case "metasgd":
                loss, _ = meta_sgd_query_loss(net, theta, task, setting.steps)
            case "metalstm++":
                loss, _ = meta_lstm_query_loss(net, theta, task, setting.steps)
            case other:
                raise ValueError(f"there is no reference for {other}")
        grads.append({name: g.detach() for name, g in gradient(loss, theta).items()})
    return {name: torch.stack([g[name] for g in grads]) for name in grads[0]}


def difference(found: Mapping[str, Tensor], weights: Tensor, task_grads: Params) -> float:
    """Largest relative Euclidean distance to Σ_i w_i g_i over the groups of parameters; infinite where names differ.

    A group is a kind of parameter over all blocks (all convolutions' weights, say). Biases before batch norm are left
    out: their gradient is exactly zero, and rounding is all that is left of it.
    """
    if found.keys() != task_grads.keys() or abs(float(weights.sum()) - 1) > 1e-4:
        return float("inf")
    groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, g in task_grads.items():
        expected = torch.tensordot(weights.double(), g, 1)
        if expected.shape != found[name].shape:
            return float("inf")
        if not name.endswith("conv.bias"):
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            groups.setdefault(kind, []).append((found[name].double() - expected, expected))
    distances = []
    for pairs in groups.values():
        apart, size = (torch.cat([pair[i].flatten() for pair in pairs]).norm() for i in (0, 1))
        distances.append(float(apart / size))
    return max(d if d == d else float("inf") for d in distances)  # not a number: as far as can be
