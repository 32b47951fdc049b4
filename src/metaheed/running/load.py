"""Loading a trained run as a learner and its parameters θ, for use in one's own code."""

from pathlib import Path
from typing import Any

import torch

from metaheed.config import RunConfig
from metaheed.errors import RunError, shown
from metaheed.learners import Learner, NetworkLearner, build_learner
from metaheed.running.checkpoint import check_same_run, check_same_shapes, recorded_image_shape
from metaheed.running.folder import RunFolder
from metaheed.types import Params


def load(
    run: str | Path, checkpoint: str = "best", ways: int | None = None, trust: bool = False
) -> tuple[Learner, Params]:
    """Load a trained run as (learner, θ). The data is not needed.

    Args:
        run: the run folder.
        checkpoint: "best" (on validation) or "last".
        ways: number of classes in the tasks to come, for learners that allow any (ProtoNet); by default as in training.
        trust: allow the code of the network that the run folder names, if it is not metaheed's and not allowed yet.

    Raises:
        RunError: the folder holds no run, has no such checkpoint, or the checkpoint does not fit the run's network.
        ConfigError: the learner does not allow so many ways, or the code of its network is not allowed to run.
    """
    if checkpoint not in ("best", "last"):
        raise RunError(f"checkpoint is {shown(checkpoint)}, but it must be 'best' or 'last'")
    folder = RunFolder(Path(run))
    learner, meta, _ = load_weights(folder, folder.read_config(trust), checkpoint, ways)
    return learner, meta


def load_weights(
    folder: RunFolder, config: RunConfig, which: str, ways: int | None = None
) -> tuple[Learner, Params, dict[str, Any]]:
    """The learner, θ and the metadata of a run's checkpoint; raises as `load`."""
    meta, about = folder.read_weights(which)
    check_same_run(config, about.get("run"), f"{folder.path}'s {which} checkpoint")
    channels, height, width = recorded_image_shape(about)
    if ways is not None:
        config.check_ways(ways)
    learner = build_judged_learner(config, ways, (channels, height, width))
    check_same_shapes(learner.init(torch.Generator().manual_seed(0)), meta, f"{folder.path}'s {which} checkpoint")
    if isinstance(learner, NetworkLearner):
        learner.write_into_module(meta)  # so that whoever looks at the learner's network finds the trained weights
    return learner, meta, about


def build_judged_learner(config: RunConfig, ways: int | None, image_shape: tuple[int, int, int]) -> Learner:
    """The learner for tasks of so many ways with a run's θ; the trained one if its head has a fixed size."""
    head = config.episodes.ways if ways is None or not config.learner.any_ways else ways
    return build_learner(config.learner, head, image_shape, config.training.seed)
