"""The limit: how fast a step could be on this machine if it did nothing but what it must.

Necessary work, counted in closed form. A convolution (or the head, a matrix product) of n images is c floating point
operations, a multiplication and an addition being two; batch norm, ReLU, pooling and the loss are not counted.

- forward: c
- gradient: c for the weights and c for the input; the first layer's input is images and needs none
- the vector-Hessian product through one inner step: forward and gradient are bilinear, and each of their operations has
  two adjoints, so twice as much as both; of the first layer only those two are needed that lead to its weights

MAML's step is per task T times (forward, gradient, product) on the support set, forward and gradient on the query set.

Bytes are a model: element-wise operators fused into their neighbours, nothing kept in caches from one operator to the
next. A block of n images with input I, convolution output A and pooled output P then moves

- forward: reads I, writes A; reads A once its statistics are known, writes P
- gradient: reads A and P's gradient, writes A's; reads that and I for the weights, writes I's gradient
- the product: twice both

The limit is the larger of FLOPs over the measured peak and bytes over the measured bandwidth: both may overlap.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.settings import HIDDEN, Setting

_LSTM_HIDDEN = 20
_FLOAT = 4


class Machine(NamedTuple):
    """The measured peak rates of the machine."""

    flops: float
    """Floating point operations a second of a large float32 matrix product."""
    bandwidth: float
    """Bytes a second read and written by a copy far larger than the caches."""


class Work(NamedTuple):
    """Necessary work: floating point operations and bytes moved."""

    flops: float
    bytes: float

    def times(self, factor: float) -> "Work":
        """The work multiplied by a factor."""
        return Work(self.flops * factor, self.bytes * factor)

    def plus(self, *others: "Work") -> "Work":
        """The sum."""
        return Work(self.flops + sum(o.flops for o in others), self.bytes + sum(o.bytes for o in others))

    def seconds(self, machine: Machine) -> float:
        """The least time."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


class _Layer(NamedTuple):
    operations: int  # of its convolution or matrix product, for one image
    read: int  # elements of an image's input
    made: int  # of the convolution's output
    passed: int  # of what the block hands on


def conv_flops(images: int, inputs: int, outputs: int, kernel: int, height: int, width: int) -> int:
    """Floating point operations of a convolution with a height × width output, with padding counted as image."""
    return 2 * images * outputs * height * width * inputs * kernel**2


def _layers(setting: Setting) -> list[_Layer]:
    channels, height, width = setting.image_shape
    layers = []
    for _ in range(4):
        operations = conv_flops(1, channels, HIDDEN, 3, height, width)
        pooled = HIDDEN * (height // 2) * (width // 2)
        layers.append(_Layer(operations, channels * height * width, HIDDEN * height * width, pooled))
        channels, height, width = HIDDEN, height // 2, width // 2
    features = channels * height * width
    return [*layers, _Layer(2 * features * setting.ways, features, setting.ways, setting.ways)]


def forward(setting: Setting, images: int) -> Work:
    """Logits of n images."""
    layers = _layers(setting)
    moved = sum(x.read + 2 * x.made + x.passed for x in layers)
    return Work(sum(x.operations for x in layers), _FLOAT * moved).times(images)


def backward(setting: Setting, images: int) -> Work:
    """The gradient with respect to all parameters, after the forward pass."""
    layers = _layers(setting)
    moved = sum(x.made + x.passed + x.made + x.made + 2 * x.read for x in layers) - layers[0].read
    return Work(2 * sum(x.operations for x in layers) - layers[0].operations, _FLOAT * moved).times(images)


def product(setting: Setting, images: int) -> Work:
    """The vector-Hessian product, after forward and gradient."""
    both = forward(setting, images).plus(backward(setting, images)).times(2)
    return both._replace(flops=both.flops - 2 * images * _layers(setting)[0].operations)


def _lstm(setting: Setting) -> Work:
    """MetaLSTM's learned optimiser over one task's T steps: forward and gradient over all D coordinates."""
    channels, H = setting.image_shape[0], _LSTM_HIDDEN
    blocks = 9 * HIDDEN * (channels + 3 * HIDDEN) + 4 * 3 * HIDDEN
    D = blocks + (_layers(setting)[-1].read + 1) * setting.ways
    inside, gates = 2 * D * 4 * H * H, 2 * 2 * D * (H + 2)
    # The loss and the gradient that the cell reads are constants: no gradient with respect to them.
    per_step = 2 * (2 * D * 4 * H * 4) + 3 * (inside + gates)
    return Work(setting.steps * per_step, 0)


def step_work(setting: Setting, algorithm: str) -> Work:
    """The necessary work of one outer iteration."""
    support, query = setting.ways * setting.shots, setting.ways * setting.queries
    inner = forward(setting, support).plus(backward(setting, support))
    outer = forward(setting, query).plus(backward(setting, query))
    if algorithm not in ("fomaml", "metalstm++"):
        inner = inner.plus(product(setting, support))
    task = outer.plus(inner.times(setting.steps))
    if algorithm == "metalstm++":
        task = task.plus(_lstm(setting))
    if algorithm == "ta-maml":  # the probe batch; what attention sees of a training task is its start's query loss
        task = task.times(2).plus(forward(setting, query))
    if algorithm == "ta-maml-reuse":
        task = task.plus(forward(setting, query))
    return task.times(setting.tasks)


def measure(size: int = 2048, megabytes: int = 256, *, seconds: float) -> Machine:
    """The best of as many repetitions as fit in the time each may take."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    source = torch.ones(megabytes * 2**20 // _FLOAT)
    target = torch.empty_like(source)
    return Machine(
        2 * size**3 / _fastest(lambda: torch.mm(a, b), seconds),
        2 * source.numel() * _FLOAT / _fastest(lambda: target.copy_(source), seconds),
    )


def _fastest(work: Callable[[], object], seconds: float) -> float:
    work()
    times: list[float] = []
    while sum(times) < seconds:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
