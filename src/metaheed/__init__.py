"""Few-shot meta-learning in which the tasks of a meta-batch are weighted by a learned attention module."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metaheed.learners import Learner
    from metaheed.types import Params

__version__ = "0.1.0"

__all__ = ["load"]


def load(
    run: str | Path, checkpoint: str = "best", ways: int | None = None, trust: bool = False
) -> "tuple[Learner, Params]":
    """A trained run as (learner, meta), for one's own loops; needs no data.

        learner, meta = metaheed.load("runs/omniglot-5way1shot-ta-maml-seed0")
        adapted = learner.adapt(meta, support_x, support_y)
        logits = learner.predict(adapted, query_x)

    Args:
        run: the run folder.
        checkpoint: "best" (on validation) or "last".
        ways: N of the tasks to come, where that may be any number (ProtoNet); none: as in training.
        trust: let the code of a network run that the run folder names, is not one of ours, and was not allowed before:
            say so only of code that you know.

    Raises:
        RunError: not a run, no such checkpoint, or one whose parameters are not those of the run's network.
        ConfigError: more ways than the learner allows; or the network's code would run and is not allowed.
    """
    from metaheed.running.load import load as load_run  # here, so that importing metaheed does not import torch

    return load_run(run, checkpoint, ways, trust)
