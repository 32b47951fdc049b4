"""The network, the start and the batches that every entry is given: the same bits in every process."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.settings import FAST_LR, HIDDEN, Setting
from metaheed.types import Episode, Params

BATCHES = 2
"""Batches of a stream that are kept in memory; step t takes batch t modulo this."""


def network(setting: Setting, inplace: bool = False) -> nn.Module:
    """Conv4 as it is commonly written: four blocks of convolution, batch norm, ReLU and 2×2 max-pooling, and a head.

    Its names (body.I.conv, body.I.norm, head) are those that all meta-gradients are given by.
    """
    channels, height, width = setting.image_shape
    body = nn.Sequential()
    for index in range(4):
        block = nn.Sequential()
        block.add_module("conv", nn.Conv2d(HIDDEN if index else channels, HIDDEN, 3, padding=1))
        block.add_module("norm", nn.BatchNorm2d(HIDDEN, track_running_stats=False))
        block.add_module("relu", nn.ReLU(inplace))
        block.add_module("pool", nn.MaxPool2d(2))
        body.append(block)
    net = nn.Sequential()
    net.add_module("body", body)
    net.add_module("flatten", nn.Flatten())
    net.add_module("head", nn.Linear(HIDDEN * (height // 16) * (width // 16), setting.ways))
    net.load_state_dict(_draw_network(net))
    return net


def _draw_network(net: nn.Module) -> Params:
    """A start from which the meta-gradient is large but tame, so that float32 gets it right to four digits and more.

    Larger convolutions (which batch norm undoes, but not the length of their steps) and a smaller head than Glorot's:
    from his, one ReLU that rounding switches may move the meta-gradient by a percent. Norms and biases stand off their
    customary 1 and 0, so that no gradient is zero by chance.
    """
    generator = torch.Generator().manual_seed(1)
    drawn = {}
    for name, p in net.state_dict().items():
        if p.dim() > 1:
            glorot = nn.init.xavier_uniform_(torch.empty_like(p), generator=generator)
            drawn[name] = (3.0 if "conv" in name else 0.1) * glorot
        else:
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            drawn[name] = centre + 0.1 * torch.randn(p.shape, generator=generator)
    return drawn


def start(setting: Setting, algorithm: str, lstm_hidden: int = 20) -> Params:
    """θ that training starts from, float32: the network's parameters and what the algorithm learns beside them."""
    theta = {name: p.detach().clone() for name, p in network(setting).named_parameters()}
    if algorithm not in ("metasgd", "metalstm++"):
        return theta
    inner = {f"initial.{name}": p for name, p in theta.items()}
    if algorithm == "metasgd":
        return inner | {f"fast_lr.{name}": torch.full_like(p, FAST_LR) for name, p in theta.items()}
    H, generator = lstm_hidden, torch.Generator().manual_seed(2)
    shapes = {
        "lstm.weight_ih": (4 * H, 4),
        "lstm.weight_hh": (4 * H, H),
        "lstm.bias_ih": (4 * H,),
        "lstm.bias_hh": (4 * H,),
        "forget_gate.weight": (1, H + 2),
        "forget_gate.bias": (1,),
        "input_gate.weight": (1, H + 2),
        "input_gate.bias": (1,),
    }
    centres = {"forget_gate.bias": 4.5, "input_gate.bias": -4.5}
    return inner | {
        name: centres.get(name, 0.0) + torch.empty(shape).uniform_(-0.01, 0.01, generator=generator)
        for name, shape in shapes.items()
    }


def stream(setting: Setting, name: str) -> Callable[[int], Episode]:
    """t -> batch t (every field with a leading B), ready in memory: a mark for each class, and noise."""
    batches = [_batch(setting, zlib.crc32(f"{name}{index}".encode()) + setting.seed) for index in range(BATCHES)]
    return lambda t: batches[t % BATCHES]


def _batch(setting: Setting, seed: int) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    lead = (setting.tasks, setting.ways)
    marks = torch.randn(*lead, 1, *setting.image_shape, generator=generator)

    def draw(each: int) -> tuple[Tensor, Tensor]:
        x = 2 * marks + torch.randn(*lead, each, *setting.image_shape, generator=generator)
        return x.flatten(1, 2), torch.arange(setting.ways).repeat_interleave(each).repeat(setting.tasks, 1)

    return Episode(*draw(setting.shots), *draw(setting.queries))
