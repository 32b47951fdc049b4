"""TorchOpt, as its examples/few-shot/maml_omniglot.py: MetaSGD inside, all tasks' losses stacked, one backward."""

import torch
import torchopt
from torch.nn.functional import cross_entropy

from benchmarks.peers import Peer
from benchmarks.settings import FAST_LR, META_LR, Setting
from benchmarks.tasks import network
from metaheed.types import Episode


def build(algorithm: str, setting: Setting) -> Peer:
    net = network(setting)
    parameters = dict(net.named_parameters())
    meta_opt = torch.optim.Adam(net.parameters(), lr=META_LR)
    inner_opt = torchopt.MetaSGD(net, lr=FAST_LR)

    def step(batch: Episode) -> None:
        losses, accuracies = [], []
        meta_opt.zero_grad()
        net_state = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        optim_state = torchopt.extract_state_dict(inner_opt, by="reference")
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            for _ in range(setting.steps):
                inner_opt.step(cross_entropy(net(support_x), support_y))
            logits = net(query_x)
            losses.append(cross_entropy(logits, query_y))
            accuracies.append((logits.argmax(dim=1) == query_y).float().mean().item())
            torchopt.recover_state_dict(net, net_state)
            torchopt.recover_state_dict(inner_opt, optim_state)
        loss = torch.mean(torch.stack(losses))
        torch.autograd.backward(loss)
        meta_opt.step()
        loss.item()

    return Peer(step, parameters)
