"""How the CUDA kernels' tiles compare, for whoever tunes them: which tile and kind of product is best for each size.

    PYTHONPATH=src python benchmarks/tiles.py                on a CUDA device; a minute, most of it compiling

Times of (a)'s layers, support sets (5 images a task) and query sets (75), four tasks. A line a kernel, kind of product
and size: microseconds, TFLOP/s and tile of the three best. Then the error of a convolution by each kind of product,
‖y − y₆₄‖/‖y₆₄‖.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaheed.networks.closed_form import kernels

TASKS, FILTERS = 4, 32
PRODUCTS = ("ieee", "tf32x3", "tf32")
SIZES = [(channels, side, images) for channels, side in ((3, 84), (32, 42), (32, 21), (32, 10)) for images in (5, 75)]


def milliseconds(function: Callable[[], object], repetitions: int = 5) -> float:
    """Of one call, in a captured graph; the best of three."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repetitions):
            function()
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        since = time.perf_counter()
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
        times.append(100 * (time.perf_counter() - since) / repetitions)
    return min(times[1:])


def always(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def convolution(x: Tensor, weight: Tensor) -> dict[str, float]:
    """Tile -> time."""
    found = {}
    for places, warps, stages in itertools.product((32, 64, 128, 256), (2, 4, 8), (2, 3)):
        if 8 <= places * FILTERS / (32 * warps) <= 128:
            kernels._tile = always(kernels._Tile(places, warps, stages))
            found[f"{places} places, {warps} warps, {stages} stages"] = milliseconds(
                lambda: kernels.convolve(x, weight)
            )
    return found


def weight_gradient(x: Tensor, dy: Tensor) -> dict[str, float]:
    """Long sums or short -> time."""
    found = {}
    for name, small in (("16 × 32 places a sum", 0), ("2 × 32 places a sum", 1 << 40)):
        kernels._SMALL = small
        found[name] = milliseconds(lambda: kernels.weight_gradient(x, dy))
    return found


def main() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    errors: dict[str, float] = defaultdict(float)
    for products, (channels, side, images) in itertools.product(PRODUCTS, SIZES):
        kernels.precision = always(products)
        x, dy = drawn(TASKS, images, side, side, channels), drawn(TASKS, images, side, side, FILTERS)
        weight = drawn(TASKS, 9, channels, FILTERS)
        work = 2 * TASKS * images * side**2 * 9 * channels * FILTERS
        for name, found in (
            ("convolution", convolution(x, weight)),
            ("weights", weight_gradient(x, dy)),
        ):
            best = sorted(found.items(), key=lambda item: item[1])[:3]
            shown = "; ".join(f"{1e3 * ms:.1f} µs {work / ms / 1e9:.0f} TF {tile}" for tile, ms in best)
            print(f"{name:11} {products:6} {channels:2} channels {side}×{side}, {images} images: {shown}", flush=True)
        if images == 5:
            for task in range(TASKS):
                kernel = weight[task].view(3, 3, channels, FILTERS).permute(3, 2, 0, 1).double()
                exact = F.conv2d(x[task].permute(0, 3, 1, 2).double(), kernel, padding=1).permute(0, 2, 3, 1)
                y = kernels.convolve(x, weight)[0][task]
                errors[products] = max(errors[products], float((y - exact).norm() / exact.norm()))
    print("; ".join(f"error by {products}: {error:.1e}" for products, error in errors.items()))


if __name__ == "__main__":
    main()
