"""The peers: each in a file of its own, written as its own examples are.

A file offers `build(algorithm, setting)` -> `Peer`.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.entry import Entry
from benchmarks.settings import Setting
from benchmarks.tasks import stream
from metaheed.types import Episode, Params


class Peer(NamedTuple):
    """A peer's training loop."""

    step: Callable[[Episode], None]
    """One outer iteration on a batch; the meta-gradient stays in the parameters' .grad."""
    parameters: Mapping[str, nn.Parameter]
    """θ by the names of `tasks.start`."""
    divisor: int = 1
    """What .grad is divided by to be the mean over tasks: B where the peer's examples sum."""


def build(name: str, setting: Setting, algorithm: str) -> Entry:
    """The entry of benchmarks/peers/NAME.py.

    Raises:
        ImportError: the peer is not installed.
    """
    peer: Peer = importlib.import_module(f"benchmarks.peers.{name}").build(algorithm, setting)
    train = stream(setting, "train")

    def gradient() -> tuple[Params, torch.Tensor]:
        found = {}
        for parameter, p in peer.parameters.items():
            if p.grad is None:
                raise ValueError(f"{name} left no gradient at {parameter}")
            found[parameter] = p.grad / peer.divisor
        return found, torch.full((setting.tasks,), 1 / setting.tasks)

    return Entry(lambda t: peer.step(train(t)), gradient)
