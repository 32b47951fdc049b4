"""The toy problem of the paper's Fig. 1: outer steps after every task, compared with steps on the whole meta-batch.

There are four tasks, each a two-class problem in the plane. Labels are drawn with probability σ(w*·x), so the best
parameters w of a task are exactly its w*. A MetaLSTM is trained on meta-batches of all four tasks in a random order,
once under the rule `sequential` (MetaLSTM) and once under `uniform` (MetaLSTM++). Its start c_0, two numbers, is
recorded after every outer step.
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from metaheed.config import MetaLSTMConfig, OuterConfig, ToyConfig
from metaheed.files.writing import check_writable, write_whole
from metaheed.learners import MetaLSTM
from metaheed.outer import (
    OuterOptimizer,
    OuterState,
    Rule,
    Tools,
    build_optimizer,
    looped,
    sequential,
    uniform,
)
from metaheed.running.statistics import interval
from metaheed.studies.figures import trajectory_figure
from metaheed.types import Episode, Params

OPTIMA = ((2.0, 2.0), (-1.0, 2.5), (2.5, -1.0), (-1.5, -1.5))
"""The best parameters of each task."""
_START = (-2.5, 3.5)
_EXAMPLES = 40  # in a support set, and in a query set
RULES: dict[str, tuple[Callable[[], Rule], int]] = {"MetaLSTM": (sequential, 1), "MetaLSTM++": (uniform, len(OPTIMA))}
"""Algorithm -> (its rule, the factor of its β). One step on the mean of B gradients moves as far as B steps on one
gradient each if its rate is B times as large."""


class Plane(nn.Module):
    """A linear classifier of points x (n, 2) into two classes, with the logits (0, w·x)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(_START))

    def forward(self, x: Tensor) -> Tensor:
        """The logits (n, 2) of the points x (n, 2)."""
        score = x @ self.w
        return torch.stack([torch.zeros_like(score), score], dim=1)


class Trajectory(NamedTuple):
    """The path of the two meta-parameters c_0 in training."""

    points: list[tuple[float, float]]
    """c_0 at the start and after every outer step, which MetaLSTM makes for each task and MetaLSTM++ for each batch."""
    path_length: float
    """Sum of the lengths of all outer steps."""
    displacement: float
    """Distance from start to end."""
    last_task_bias: float
    """How much nearer c_0 came to the optimum of the meta-batch's last task than with the tasks in reverse order; mean
    over all meta-batches."""
    last_task_bias_half_width: float
    """Half-width of its 95% interval over meta-batches."""


def toy(out: str | Path, config: ToyConfig) -> dict[str, Trajectory]:
    """Train with both rules, write trajectories.png and toy.json into `out`, and return algorithm -> trajectory.

    Raises:
        RunError: `out` cannot be written.
    """
    out = Path(out)
    check_writable(out / "toy.json")
    found = {name: follow(rule(), config, factor) for name, (rule, factor) in RULES.items()}
    trajectory_figure({name: t.points for name, t in found.items()}, OPTIMA, out / "trajectories.png")
    numbers = {name: t._asdict() for name, t in found.items()}
    write_whole(out / "toy.json", (json.dumps({"optima": OPTIMA, **numbers}) + "\n").encode())
    return found


def follow(rule: Rule, config: ToyConfig, factor: float = 1) -> Trajectory:
    """Train under `rule` with `factor` times the config's β; the meta-batches are the same for every rule."""
    learner = MetaLSTM(Plane())
    meta = learner.init(torch.Generator().manual_seed(config.seed))
    points = [_point(meta)]
    outer = OuterConfig(
        meta_lr=factor * config.meta_lr, meta_optimizer=config.meta_optimizer, clip_norm=MetaLSTMConfig.clip_norm
    )
    step = build_optimizer(outer)

    def followed(theta: Params, state: Params, gradient: Params) -> tuple[Params, Params]:
        theta, state = step.step(theta, state, gradient)
        points.append(_point(theta))
        return theta, state

    optimizer = OuterOptimizer(step.init, followed)
    gradients = looped(learner)
    batches = draw_batches(config.iterations, config.seed)
    # Neither rule uses probe batches or gradients before adaptation.
    tools = Tools(gradients, _never, optimizer, lambda t: batches[t][0], _never)
    state = OuterState(meta, optimizer.init(meta), rule.init(meta))
    biases = []
    for t, (tasks, last) in enumerate(batches):
        reverse = Tools(gradients, _never, step, {t: Episode(*(part.flip(0) for part in tasks))}.__getitem__, _never)
        otherwise, _ = rule.step(state, t, reverse)
        state, _ = rule.step(state, t, tools)
        biases.append(math.dist(_point(otherwise.meta), OPTIMA[last]) - math.dist(points[-1], OPTIMA[last]))
    bias, half_width = interval(biases)
    return Trajectory(
        points,
        path_length=sum(math.dist(a, b) for a, b in itertools.pairwise(points)),
        displacement=math.dist(points[0], points[-1]),
        last_task_bias=bias,
        last_task_bias_half_width=half_width,
    )


def draw_batches(count: int, seed: int) -> list[tuple[Episode, int]]:
    """Meta-batches of every task once, in a random order and with new points; with each, the index of its last task."""
    generator = torch.Generator().manual_seed(seed)
    optima = torch.tensor(OPTIMA)  # (B, 2)

    def draw(order: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.randn(len(optima), _EXAMPLES, 2, generator=generator)
        share = torch.sigmoid((x @ optima[order].unsqueeze(2)).squeeze(2))
        return x, torch.bernoulli(share, generator=generator).long()

    orders = [torch.randperm(len(optima), generator=generator) for _ in range(count)]
    return [(Episode(*draw(order), *draw(order)), int(order[-1])) for order in orders]


def _never(*_: object) -> NoReturn:
    raise AssertionError("the toy's rules have no use for this")


def _point(meta: Params) -> tuple[float, float]:
    x, y = meta["initial.w"].tolist()
    return x, y
