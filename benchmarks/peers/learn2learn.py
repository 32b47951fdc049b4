"""learn2learn, as its examples/vision/maml_miniimagenet.py: a clone a task, backward once a task, then the mean."""

import torch
from learn2learn.algorithms.maml import MAML
from torch.nn.functional import cross_entropy

from benchmarks.peers import Peer
from benchmarks.settings import FAST_LR, META_LR, Setting
from benchmarks.tasks import network
from metaheed.types import Episode


def build(algorithm: str, setting: Setting) -> Peer:
    net = network(setting)
    maml = MAML(net, lr=FAST_LR, first_order=algorithm == "fomaml")
    meta_opt = torch.optim.Adam(maml.parameters(), META_LR)

    def step(batch: Episode) -> None:
        meta_opt.zero_grad()
        total_loss = total_accuracy = 0.0
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            learner = maml.clone()
            for _ in range(setting.steps):
                learner.adapt(cross_entropy(learner(support_x), support_y))
            logits = learner(query_x)
            loss = cross_entropy(logits, query_y)
            torch.autograd.backward(loss)
            total_loss += loss.item()
            total_accuracy += (logits.argmax(1) == query_y).float().mean().item()
        for p in maml.parameters():
            p.grad.data.mul_(1.0 / setting.tasks)
        meta_opt.step()

    return Peer(step, dict(net.named_parameters()))
