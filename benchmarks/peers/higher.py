"""higher, as its examples/maml-omniglot.py: a functional copy a task, backward once a task, summed."""

import higher
import torch
from torch.nn.functional import cross_entropy

from benchmarks.peers import Peer
from benchmarks.settings import FAST_LR, META_LR, Setting
from benchmarks.tasks import network
from metaheed.types import Episode


def build(algorithm: str, setting: Setting) -> Peer:
    net = network(setting)
    meta_opt = torch.optim.Adam(net.parameters(), lr=META_LR)

    def step(batch: Episode) -> None:
        inner_opt = torch.optim.SGD(net.parameters(), lr=FAST_LR)
        losses, accuracies = [], []
        meta_opt.zero_grad()
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            with higher.innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
                for _ in range(setting.steps):
                    diffopt.step(cross_entropy(fnet(support_x), support_y))
                logits = fnet(query_x)
                loss = cross_entropy(logits, query_y)
                losses.append(loss.detach())
                accuracies.append((logits.argmax(dim=1) == query_y).sum().item() / len(query_y))
                torch.autograd.backward(loss)
        meta_opt.step()

    return Peer(step, dict(net.named_parameters()), setting.tasks)
