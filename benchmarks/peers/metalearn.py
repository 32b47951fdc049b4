"""parallel-metalearn, as its README and main.py: MAML_Model, InnerSGD, and MAML.step once an iteration.

Batch norm is its own layer, as in its CNN2D4L_Backbone. With PyTorch's, its vmap backend is faster, but wrong by a
percent (see torch_func.py).
"""

import torch
from metalearn.algorithms import MAML
from metalearn.inner_optimizers import InnerSGD
from metalearn.loss import CategoricalAccuracy, CrossEntropy
from metalearn.model_wrappers import MAML_Model
from metalearn.nn_models.basic_layers import BatchNorm
from torch import Tensor, nn

from benchmarks.peers import Peer
from benchmarks.settings import FAST_LR, HIDDEN, META_LR, Setting
from benchmarks.tasks import network
from metaheed.types import Episode


class _Part(nn.Module):
    """Its models' forward takes flags (training, num_step)."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor, **flags: object) -> Tensor:
        result: Tensor = self.inside(x)
        return result


def build(algorithm: str, setting: Setting, backend: str) -> Peer:
    net = network(setting)
    body, head = net.get_submodule("body"), net.get_submodule("head")
    for block in body.children():
        own = BatchNorm(HIDDEN, track_running_stats=False)
        own.load_state_dict(block.get_submodule("norm").state_dict())
        block.add_module("norm", own)
    model = MAML_Model(backbone=_Part(body), head=_Part(head))
    meta_opt = torch.optim.Adam(model.parameters(), lr=META_LR)
    inner_opt = InnerSGD(
        initial_fast_weights=model.get_fast_weights(),
        inner_lr=FAST_LR,
        learn_lr=False,
        first_order=algorithm == "fomaml",
        max_inner_steps=setting.steps,
    )
    maml = MAML(
        model=model,
        optimizer=meta_opt,
        inner_optimizer=inner_opt,
        support_loss_fn=CrossEntropy(metric_fn=CategoricalAccuracy()),
        inner_steps=setting.steps,
        chunk_size=setting.tasks,
        backend=backend,
        device=torch.device("cpu"),
    )

    def step(batch: Episode) -> None:
        labels = [{"labels": y} for y in (batch.support_y, batch.query_y)]
        maml.step(iter([(batch.support_x, labels[0], batch.query_x, labels[1])]), training=True)

    return Peer(step, dict(net.named_parameters()))
