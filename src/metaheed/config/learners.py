"""Settings of the learners, one class a learner, and the table of them all."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from metaheed.config.checks import at_least, check_types, positive, require
from metaheed.config.presets import USUAL

Algorithms = Mapping[str, tuple[str, str]]
"""The other half of a pair of learner and rule -> the pair's (name, description)."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How one task is adapted: what all learners share."""

    name: ClassVar[str]
    algorithms: ClassVar[Algorithms] = {}
    """The algorithms that this learner makes with a rule: rule -> (name, description)."""
    clip_norm: ClassVar[float | None] = None
    """What --clip-norm is unless it is given."""
    has_start: ClassVar[bool] = True
    """Whether the loss before adaptation tells tasks apart."""
    has_closed_form: ClassVar[bool] = True
    """Whether it can be computed in closed form with one of our own networks."""
    any_ways: ClassVar[bool] = False
    """Whether θ serves tasks of any number of ways; else the network's head has one output for each training class."""
    backbone: str = "conv4-32"
    """Network: conv4-32, conv4-64, conv4-64-strided (that of Finn et al. for Omniglot), or your own as module:Class,
    which is called as Class(ways, image_shape) with image_shape = (channels, height, width)."""
    backbone_path: Path | None = None
    """Folder in which the module of module:Class is looked for first; the current folder if not given. It is recorded,
    so that the run can be continued from any folder."""
    init_from: Path | None = None
    """Start from these weights instead of random ones: a .safetensors file, or a run folder, whose best checkpoint is
    taken. A head for another number of classes starts at random. The weights are copied into the run folder."""

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.backbone), "backbone", self.backbone, "it must name a network")

    def from_anywhere(self) -> Self:
        """The same, its paths absolute, so that a run can be gone on with from any folder."""
        start, folder = self.init_from, self.backbone_path
        if ":" in self.backbone:
            folder = (folder or Path()).expanduser().absolute()
        return dataclasses.replace(self, backbone_path=folder, init_from=start and start.expanduser().absolute())

    def own_settings(self) -> dict[str, Any]:
        """The settings beside the backbone: the keyword arguments of the learner's constructor."""
        shared = {f.name for f in dataclasses.fields(LearnerConfig)}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in shared}


@dataclass(frozen=True, kw_only=True)
class MAMLConfig(LearnerConfig):
    """MAML's settings."""

    name: ClassVar[str] = "maml"
    algorithms: ClassVar[Algorithms] = {
        "uniform": ("maml", "MAML (Finn et al. 2017): every task weighs the same."),
        "equity": ("taml", "TAML (Jamal & Qi 2019): MAML with a penalty on the inequality of the tasks' losses."),
        "attended": ("ta-maml", "Task-attended MAML (Aimen et al. 2021): an attention module weighs the tasks."),
    }
    adaptation_steps: int = USUAL.adaptation_steps
    """T, the number of gradient steps on the support set, the same in training and test."""
    fast_lr: float = 0.1
    """α, the learning rate of the adaptation steps."""
    first_order: bool = False
    """Drop the second derivatives (FOMAML)."""
    recompute: bool = False
    """Compute each adaptation step again in the reverse pass instead of storing it, so that memory does not grow with
    T. The results are the same; each step takes one more gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "adaptation_steps")
        positive(self, "fast_lr")


@dataclass(frozen=True, kw_only=True)
class ANILConfig(MAMLConfig):
    """ANIL's settings: MAML's, adapting the head only."""

    name: ClassVar[str] = "anil"
    algorithms: ClassVar[Algorithms] = {
        "uniform": ("anil", "ANIL (Raghu et al. 2020): MAML that adapts the head only."),
        "attended": ("ta-anil", "Task-attended ANIL."),
    }
    head: str | None = None
    """Name of the head's module in the network; the last registered module with parameters if not given."""


@dataclass(frozen=True, kw_only=True)
class BOILConfig(ANILConfig):
    """BOIL's settings: MAML's, adapting everything but the head."""

    name: ClassVar[str] = "boil"
    algorithms: ClassVar[Algorithms] = {
        "uniform": ("boil", "BOIL (Oh et al. 2021): MAML that adapts the body only."),
        "attended": ("ta-boil", "Task-attended BOIL."),
    }


@dataclass(frozen=True, kw_only=True)
class MetaSGDConfig(MAMLConfig):
    """MetaSGD's settings: MAML's, every parameter at a learned rate of its own."""

    name: ClassVar[str] = "metasgd"
    algorithms: ClassVar[Algorithms] = {
        "uniform": ("metasgd", "MetaSGD (Li et al. 2017): MAML with a learned rate for every parameter."),
        "attended": ("ta-metasgd", "Task-attended MetaSGD."),
    }
    fast_lr: float = MAMLConfig.fast_lr
    """Value at which the learned rate of every parameter starts."""


@dataclass(frozen=True, kw_only=True)
class MetaLSTMConfig(LearnerConfig):
    """MetaLSTM's settings. `default_config` and the command line clip the outer gradient with it (--clip-norm 0.25)."""

    name: ClassVar[str] = "metalstm"
    algorithms: ClassVar[Algorithms] = {
        "sequential": ("metalstm", "MetaLSTM (Ravi & Larochelle 2017): a learned optimiser, a step a task."),
        "uniform": ("metalstm++", "MetaLSTM++ (Aimen et al. 2021): MetaLSTM trained on whole meta-batches."),
        "attended": ("ta-metalstm++", "Task-attended MetaLSTM++."),
    }
    clip_norm: ClassVar[float | None] = 0.25
    adaptation_steps: int = USUAL.adaptation_steps
    """T, the number of steps of the learned optimiser on the support set, the same in training and test."""
    hidden_size: int = 20
    """H, the number of hidden units of the lower LSTM."""
    forget_bias: tuple[float, float] = (4.0, 5.0)
    """Bounds between which the forget gate's bias is drawn."""
    input_bias: tuple[float, float] = (-5.0, -4.0)
    """Bounds between which the input gate's bias is drawn."""
    recompute: bool = False
    """Compute each adaptation step again in the reverse pass instead of storing it, so that memory does not grow with
    T. The results are the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "adaptation_steps", "hidden_size")
        for name in ("forget_bias", "input_bias"):
            low, high = getattr(self, name)
            require(
                math.isfinite(low) and math.isfinite(high) and low <= high,
                name,
                (low, high),
                "it must be two finite numbers, the lower one first",
            )


@dataclass(frozen=True, kw_only=True)
class ProtoNetConfig(LearnerConfig):
    """ProtoNet's settings: nothing to set but which layer is replaced."""

    name: ClassVar[str] = "protonet"
    algorithms: ClassVar[Algorithms] = {
        "uniform": ("protonet", "ProtoNet (Snell et al. 2017): the nearest class mean of the embeddings."),
        "attended": ("ta-protonet", "Task-attended ProtoNet."),
    }
    has_start: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = False
    any_ways: ClassVar[bool] = True
    head: str | None = None
    """Name of the head's module in the network; the last registered module with parameters if not given."""


@dataclass(frozen=True, kw_only=True)
class ReptileConfig(LearnerConfig):
    """Reptile's settings."""

    name: ClassVar[str] = "reptile"
    algorithms: ClassVar[Algorithms] = {
        "uniform": ("reptile", "Reptile (Nichol et al. 2018): θ moves towards where gradient descent on a task ends."),
    }
    adaptation_steps: int = USUAL.adaptation_steps
    """T, gradient steps on the support set, the same in training and test; in training T more follow on the query
    set."""
    fast_lr: float = 0.1
    """α, the rate of those steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "adaptation_steps")
        positive(self, "fast_lr")


LEARNERS: dict[str, type[LearnerConfig]] = {
    c.name: c
    for c in (
        MAMLConfig,
        MetaSGDConfig,
        MetaLSTMConfig,
        ANILConfig,
        BOILConfig,
        ProtoNetConfig,
        ReptileConfig,
    )
}
"""Every learner by name."""
