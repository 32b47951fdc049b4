"""A trained run as a learner and its parameters, for one's own loops."""

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
    """A trained run as (learner, meta), for one's own loops; needs no data.

    Args:
        run: the run folder.
        checkpoint: "best" (on validation) or "last".
        ways: N of the tasks to come, where that may be any number (ProtoNet); none: as in training.
        trust: let the code of a network run that the run folder names, is not one of ours, and was not allowed before.

    Raises:
        RunError: not a run, no such checkpoint, or one whose parameters are not those of the run's network.
        ConfigError: more ways than the learner allows; or the network's code would run and is not allowed.
    """
    if checkpoint not in ("best", "last"):
        raise RunError(f"checkpoint is {shown(checkpoint)}, but it must be 'best' or 'last'")
    folder = RunFolder(Path(run))
    learner, meta, _ = load_weights(folder, folder.read_config(trust), checkpoint, ways)
    return learner, meta


def load_weights(
    folder: RunFolder, config: RunConfig, which: str, ways: int | None = None
) -> tuple[Learner, Params, dict[str, Any]]:
    """As `load`, with what the checkpoint says of itself."""
    meta, about = folder.read_weights(which)
    check_same_run(config, about.get("run"), f"{folder.path}'s {which} checkpoint")
    channels, height, width = recorded_image_shape(about)
    if ways is not None:
        config.check_ways(ways)
    learner = build_judged_learner(config, ways, (channels, height, width))
    check_same_shapes(learner.init(torch.Generator().manual_seed(0)), meta, f"{folder.path}'s {which} checkpoint")
    if isinstance(learner, NetworkLearner):
        learner.hold(meta)  # lest somebody who looks inside finds a network that was never trained
    return learner, meta, about


def build_judged_learner(config: RunConfig, ways: int | None, image_shape: tuple[int, int, int]) -> Learner:
    """The learner that serves tasks of so many ways with a run's θ; with a head of fixed size, the one trained."""
    head = config.episodes.ways if ways is None or not config.learner.any_ways else ways
    return build_learner(config.learner, head, image_shape, config.training.seed)
