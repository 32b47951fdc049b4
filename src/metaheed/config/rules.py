"""Settings of the batch rules, one class a rule, and the table of them all."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from metaheed.config.checks import check_types, positive, require
from metaheed.config.learners import Algorithms
from metaheed.errors import option, unknown


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """How the tasks of a meta-batch are combined: what all rules share."""

    name: ClassVar[str]
    algorithms: ClassVar[Algorithms] = {}
    """The algorithms that this rule makes with a learner: learner -> (name, description)."""

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def batches(self) -> int:
        """How many meta-batches of tasks an iteration takes gradients of."""
        return 1

    def updates(self, meta_batch_size: int) -> int:
        """How many outer steps an iteration makes."""
        return 1


@dataclass(frozen=True, kw_only=True)
class UniformConfig(RuleConfig):
    """Every task weighs 1/B; nothing to set."""

    name: ClassVar[str] = "uniform"


@dataclass(frozen=True, kw_only=True)
class Uniform2BConfig(RuleConfig):
    """Control: uniform over the training and the probe batch, as many tasks as attention sees; nothing to set."""

    name: ClassVar[str] = "uniform-2b"

    @property
    def batches(self) -> int:
        """The training batch and the probe batch."""
        return 2


@dataclass(frozen=True, kw_only=True)
class SequentialConfig(RuleConfig):
    """An outer step after every task; nothing to set."""

    name: ClassVar[str] = "sequential"

    def updates(self, meta_batch_size: int) -> int:
        """One after every task."""
        return meta_batch_size


EQUITY_PARAMETERS: dict[str, float | None] = {
    "theil": None,
    "generalized-entropy": 2.0,
    "atkinson": 0.5,
    "gini": None,
    "log-variance": None,
}
"""Index of inequality -> its parameter unless one is given; None if the index has no parameter."""


@dataclass(frozen=True, kw_only=True)
class EquityConfig(RuleConfig):
    """The mean loss plus λ times the inequality of the tasks' losses (TAML)."""

    name: ClassVar[str] = "equity"
    equity_lambda: float = 0.1
    """λ, the weight of the inequality. It is added to the mean of the losses; the TAML paper adds it to their sum, so
    the λ of that paper is B times this one."""
    equity_index: Literal["theil", "generalized-entropy", "atkinson", "gini", "log-variance"] = "theil"
    """The index of inequality."""
    equity_parameter: float | None = None
    """The parameter of the index: a of generalized-entropy (2 if not given) or ε of atkinson (0.5 if not given). The
    other indices have none."""
    equity_losses: Literal["auto", "query", "support", "adapted"] = "auto"
    """The losses whose inequality is meant. query or support: losses on that set before adaptation; adapted: query
    losses after adaptation; auto: query, but adapted for ProtoNet, whose losses before adaptation are all alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            math.isfinite(self.equity_lambda) and self.equity_lambda >= 0,
            "equity_lambda",
            self.equity_lambda,
            "it must be a finite number of at least 0",
        )
        check_equity_parameter(self.equity_index, self.equity_parameter)


def check_equity_parameter(index: str, parameter: float | None) -> None:
    """Raise ConfigError unless the index exists and takes that parameter; None stands for its default."""
    if index not in EQUITY_PARAMETERS:
        raise unknown("index of inequality", index, EQUITY_PARAMETERS)
    if parameter is None:
        return
    takes = EQUITY_PARAMETERS[index] is not None
    require(takes, "equity_parameter", parameter, f"{index} has no parameter: leave it out")
    require(math.isfinite(parameter), "equity_parameter", parameter, "it must be a finite number")
    require(index != "atkinson" or parameter > 0, "equity_parameter", parameter, "atkinson's ε must be above 0")


@dataclass(frozen=True, kw_only=True)
class LossSoftmaxConfig(RuleConfig):
    """Control: tasks are weighted by the softmax of their query losses, the hard ones most."""

    name: ClassVar[str] = "loss-softmax"
    loss_temperature: float = 1.0
    """τ in softmax(L*ᵀ/τ): the larger it is, the more alike are the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "loss_temperature")


@dataclass(frozen=True, kw_only=True)
class ReplayedConfig(RuleConfig):
    """Control: the weights that an attended run logged, permuted over the tasks of each batch."""

    name: ClassVar[str] = "replayed"
    replay: Path | None = None
    """Run folder of the attended run, which must have the same learner, tasks, seed and meta-batch size, and at least
    as many iterations. Required. The weights are copied into the run folder, so resuming needs nothing else."""


@dataclass(frozen=True, kw_only=True)
class AttendedConfig(RuleConfig):
    """Tasks are weighted by the attention module; its settings."""

    name: ClassVar[str] = "attended"
    attention_lr: float = 1e-3
    """γ, the learning rate of Adam on the attention parameters δ."""
    attention_architecture: Literal["paper", "equivariant"] = "paper"
    """Network of the attention module. paper: the paper's, which is tied to the meta-batch size and to the order of the
    tasks; equivariant: permutation-equivariant, which is tied to neither."""
    attention_jacobian: Literal["sgd", "optimizer"] = "sgd"
    """The step through which the gradient of δ is taken. sgd: an SGD look-ahead at the meta rate, as the authors do;
    optimizer: the real outer step."""
    attention_standardize: bool = False
    """Standardise each attention input over the tasks of the batch."""
    attention_omit: Literal["grad_norm", "query_loss", "query_accuracy", "loss_ratio"] | None = None
    """Hide this input from the attention module (a control). All inputs are seen if not given."""
    attention_reuse_probe: bool = False
    """Use the next iteration's training batch as the probe batch: its gradients are then already computed, and
    attention costs almost nothing. The paper draws a separate probe batch."""
    faithful_to_release: bool = False
    """Repeat, in an idealised form, a defect of the code that the authors released: the look-ahead stays connected to
    θ, so that θ also descends the summed loss of the probe batch, and training sees 2B tasks in each iteration. The
    released code also adapts the probe tasks one after another on a shared copy, which is not repeated. For maml and
    metasgd only; the released TA-MetaLSTM++ has no such leak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "attention_lr")
        for name, other in (("attention_reuse_probe", False), ("attention_jacobian", "sgd")):
            value = getattr(self, name)
            require(
                not self.faithful_to_release or value == other,
                name,
                value,
                f"the released code has no such thing: with {option('faithful_to_release')} leave it {other}",
            )

    @property
    def batches(self) -> int:
        """The training batch and the probe batch, which with reuse is the next iteration's training batch."""
        return 1 if self.attention_reuse_probe else 2


@dataclass(frozen=True, kw_only=True)
class WorstCaseConfig(RuleConfig):
    """Tasks are weighted by how far they are from the best case: the larger a task's loss, the more it weighs."""

    name: ClassVar[str] = "worst-case"
    algorithms: ClassVar[Algorithms] = {
        "maml": ("tr-maml", "TR-MAML (Collins et al. 2020): the worst case over tasks instead of their mean."),
    }
    ascent_rate: float = 1.0
    """η, the rate of the ascent step that moves weight from tasks of small to tasks of large query loss. The larger it
    is, the nearer are the weights to the worst task alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "ascent_rate")


RULES: dict[str, type[RuleConfig]] = {
    c.name: c
    for c in (
        UniformConfig,
        SequentialConfig,
        EquityConfig,
        AttendedConfig,
        Uniform2BConfig,
        LossSoftmaxConfig,
        ReplayedConfig,
        WorstCaseConfig,
    )
}
"""Every rule by name."""
