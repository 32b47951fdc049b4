"""iteryne, as the manual training loop of its README: a clone a task, backward once a task, summed."""

import torch
from iteryne import MAML, MetaSGD
from torch.nn.functional import cross_entropy

from benchmarks.peers import Peer
from benchmarks.settings import FAST_LR, META_LR, Setting
from benchmarks.tasks import network
from metaheed.types import Episode


def build(algorithm: str, setting: Setting) -> Peer:
    net = network(setting)
    kind = MetaSGD if algorithm == "metasgd" else MAML
    maml = kind(net, inner_lr=FAST_LR, inner_steps=setting.steps, first_order=algorithm == "fomaml")
    meta_opt = torch.optim.Adam(maml.parameters(), lr=META_LR)

    def step(batch: Episode) -> None:
        meta_opt.zero_grad()
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            learner = maml.clone()
            for _ in range(maml.inner_steps):
                learner.adapt(cross_entropy(learner(support_x), support_y))
            torch.autograd.backward(cross_entropy(learner(query_x), query_y))
        meta_opt.step()

    parameters = dict(net.named_parameters())
    if isinstance(maml, MetaSGD):
        rates = {name: maml.lrs[name.replace(".", "__")] for name in parameters}
        parameters = {f"initial.{n}": p for n, p in parameters.items()} | {f"fast_lr.{n}": p for n, p in rates.items()}
    return Peer(step, parameters, setting.tasks)
