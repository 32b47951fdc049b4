"""Every setting of a run, its default and its bounds: the only home of a default.

A `RunConfig` is five groups: which episodes, which learner, which batch rule, which outer step, which training loop.
The command line is generated from these classes (each field's explanation is its help text), a run's config.yaml holds
one, and constructors elsewhere read their defaults from here.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from metaheed.errors import ConfigError, shown, unknown
from metaheed.trust import Named

_checking = ContextVar("checking", default=True)
_LARGEST = 10**300  # of a whole number where any number is meant: larger ones are no float


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Let configs be created with settings out of their bounds, for `checked` to find afterwards.

    For parsers that would wrap an error raised in a constructor into one of their own.
    """
    token = _checking.set(False)
    try:
        yield
    finally:
        _checking.reset(token)


def checked(config: Any) -> Any:
    """The same config, and every config inside it, built anew.

    Raises:
        ConfigError: a setting is out of its bounds.
    """
    inside = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{n: checked(v) for n, v in inside.items() if dataclasses.is_dataclass(v)})


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition and _checking.get():
        raise ConfigError(f"--{name.replace('_', '-')} is {shown(value)}, but {rule}")


def _check_types(config: Any) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is ClassVar:
            continue
        value = getattr(config, name)
        if isinstance(value, str) and Path in (kinds := _alternatives(hint)) and str not in kinds:
            value = Path(value)  # a path may be given as a string everywhere
            object.__setattr__(config, name, value)
        if not any(_is(value, kind) for kind in _alternatives(hint)):
            _require(False, name, value, f"it must be {_describe(hint)}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    # `Literal[...] | None` is of another class than `int | None`.
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _is(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
        return whole or isinstance(value, float)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            return isinstance(value, tuple) and all(_is(v, kinds[0]) for v in value)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is, value, kinds))
    return isinstance(value, kind)


def _describe(hint: Any) -> str:
    if len(_alternatives(hint)) > 1:
        return " or ".join(map(_describe, _alternatives(hint)))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[-1] is Ellipsis:
        return f"values, each {_describe(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is tuple:
        return f"{len(typing.get_args(hint))} values, each {_describe(typing.get_args(hint)[0])}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "none"}
    return plain.get(hint) or str(hint.__name__.lower())


def _at_least(config: Any, bound: int, *names: str, most: int = 10**9) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value >= bound, name, value, f"it must be at least {bound}")
        _require(value is None or value <= most, name, value, f"it must be at most {most}")


def _check_folder(config: "EpisodeConfig | FreezeConfig") -> None:
    _at_least(config, 8, "image_size", most=1024)
    _at_least(config, 0, "split_seed", most=2**63 - 1)
    for name, what in (("image_size", "images of its own size"), ("split_seed", "a split of its own")):
        value = getattr(config, name)
        _require(
            value is None or config.data == "folder",
            name,
            value,
            f"{config.data} has {what}: leave it out, or use --data folder",
        )


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(
            value is None or (math.isfinite(value) and value > 0),
            name,
            value,
            "it must be a finite number above 0",
        )


class Preset(NamedTuple):
    """The paper's numbers for one data set and setting."""

    adaptation_steps: int = 5
    """T."""
    meta_batch_size: int = 4
    """B."""
    queries: int = 15
    """Q. On Omniglot both 15 and Q = K are customary; 15 is taken, which its 20 drawings just allow at K = 5."""


_USUAL = Preset()
_IMAGES = {(5, 1): _USUAL, (5, 5): _USUAL, (10, 1): _USUAL, (10, 5): _USUAL._replace(adaptation_steps=2)}
_DRAWINGS = _USUAL._replace(meta_batch_size=16)
PRESETS: dict[str, dict[tuple[int, int], Preset]] = {
    "miniimagenet": _IMAGES,
    "tieredimagenet": _IMAGES,
    "cifar-fs": _IMAGES,
    "fc100": _IMAGES,
    **dict.fromkeys(("omniglot", "omniglot-vinyals"), dict.fromkeys(((5, 1), (5, 5), (20, 1), (20, 5)), _DRAWINGS)),
}
"""Data set -> (ways, shots) -> preset: the cells of the paper's Tables 1 and 2, and by analogy those that it lacks."""


def preset(data: str, ways: int, shots: int) -> Preset:
    """The paper's preset; for a setting it lacks, that of the data set's first one; for other data, the usual one."""
    cells = PRESETS.get(data, {})
    return cells.get((ways, shots), next(iter(cells.values()), _USUAL))


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """Which images, and how tasks are made of them."""

    folder_image_size: ClassVar[int] = 84
    folder_split_seed: ClassVar[int] = 0
    folder_shares: ClassVar[tuple[float, float]] = (0.16, 0.20)  # of the classes, for val and test: miniImageNet's
    data: str = "glyphs"
    """Data set: glyphs (built in, needs no files), miniimagenet, tieredimagenet, cifar-fs, fc100, omniglot (the paper's
    split), omniglot-vinyals (another split of it), or folder (pictures of one's own)."""
    data_root: Path | None = None
    """Folder that holds the published files, or what 'metaheed data prepare' made of them, itself or in their customary
    subfolder (omniglot/, cifar-100-python/); for folder: the folder, zip or tar of pictures. glyphs needs none."""
    image_size: int | None = None
    """Pixels a side to which the pictures of --data folder are resized; none: 84. Other data sets have their own."""
    split_seed: int | None = None
    """Seed by which the classes of --data folder are divided into train, val and test where neither its layout nor
    lists beside it divide them; none: 0."""
    ways: int = 5
    """N, classes in a training task."""
    shots: int = 1
    """K, support images per class in a training task."""
    queries: int = _USUAL.queries
    """Q, query images per class in a training task."""
    test_ways: int | None = None
    """N in validation and test tasks; none: as in training. It may not exceed --ways, except with ProtoNet, whose
    head has no fixed size."""
    test_shots: int | None = None
    """K in validation and test tasks; none: as in training."""
    test_queries: int | None = None
    """Q in validation and test tasks; none: as in training."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 2, "ways", "test_ways")
        _at_least(self, 1, "shots", "queries", "test_shots", "test_queries")
        _check_folder(self)

    @property
    def train_shape(self) -> tuple[int, int, int]:
        """(ways, shots, queries) of training tasks."""
        return self.ways, self.shots, self.queries

    @property
    def test_shape(self) -> tuple[int, int, int]:
        """(ways, shots, queries) of validation and test tasks."""
        return (
            self.ways if self.test_ways is None else self.test_ways,
            self.shots if self.test_shots is None else self.test_shots,
            self.queries if self.test_queries is None else self.test_queries,
        )


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How one task is adapted: what all learners share."""

    name: ClassVar[str]
    clip_norm: ClassVar[float | None] = None
    """What --clip-norm is unless it is given."""
    has_start: ClassVar[bool] = True
    """Whether the loss before adaptation tells tasks apart."""
    has_closed_form: ClassVar[bool] = True
    """Whether it can be computed in closed form with one of our own networks."""
    any_ways: ClassVar[bool] = False
    """Whether θ serves tasks of any number of ways; else the network's head has one output for each training class."""
    backbone: str = "conv4-32"
    """Network: conv4-32, conv4-64, conv4-64-strided (Finn et al.'s for Omniglot), or module:Class, called as
    Class(ways, image_shape) with image_shape = (channels, height, width)."""
    backbone_path: Path | None = None
    """Folder in which the module of module:Class is looked for first; none: the current one. Recorded, so that the
    run can be continued from anywhere."""
    init_from: Path | None = None
    """Start from these weights instead of drawn ones: a .safetensors file, or a run folder (its best checkpoint). A
    head of another number of classes is drawn anew. The weights are copied into the run folder."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(bool(self.backbone), "backbone", self.backbone, "it must name a network")

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
    adaptation_steps: int = _USUAL.adaptation_steps
    """T, gradient steps on the support set, the same in training and test."""
    fast_lr: float = 0.1
    """α, the rate of those steps."""
    first_order: bool = False
    """Drop the second derivatives (FOMAML)."""
    recompute: bool = False
    """Compute each adaptation step again in the reverse pass instead of keeping it: memory does not grow with T. The
    results are the same; it takes one more gradient a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "adaptation_steps")
        _positive(self, "fast_lr")


@dataclass(frozen=True, kw_only=True)
class ANILConfig(MAMLConfig):
    """ANIL's settings: MAML's, adapting the head only."""

    name: ClassVar[str] = "anil"
    head: str | None = None
    """Name of the head's module in the network; none: the last one registered that has parameters."""


@dataclass(frozen=True, kw_only=True)
class BOILConfig(ANILConfig):
    """BOIL's settings: MAML's, adapting everything but the head."""

    name: ClassVar[str] = "boil"


@dataclass(frozen=True, kw_only=True)
class MetaSGDConfig(MAMLConfig):
    """MetaSGD's settings: MAML's, every parameter at a learned rate of its own."""

    name: ClassVar[str] = "metasgd"
    fast_lr: float = MAMLConfig.fast_lr
    """Where the learned rate of every parameter starts."""


@dataclass(frozen=True, kw_only=True)
class MetaLSTMConfig(LearnerConfig):
    """MetaLSTM's settings. `default_config` and the command line clip the outer gradient with it (--clip-norm 0.25)."""

    name: ClassVar[str] = "metalstm"
    clip_norm: ClassVar[float | None] = 0.25
    adaptation_steps: int = _USUAL.adaptation_steps
    """T, steps of the learned optimiser on the support set, the same in training and test."""
    hidden_size: int = 20
    """H, hidden units of the lower LSTM."""
    forget_bias: tuple[float, float] = (4.0, 5.0)
    """Bounds between which the forget gate's bias is drawn."""
    input_bias: tuple[float, float] = (-5.0, -4.0)
    """Bounds between which the input gate's bias is drawn."""
    recompute: bool = False
    """Compute each adaptation step again in the reverse pass instead of keeping it: memory does not grow with T. The
    results are the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "adaptation_steps", "hidden_size")
        for name in ("forget_bias", "input_bias"):
            low, high = getattr(self, name)
            _require(
                math.isfinite(low) and math.isfinite(high) and low <= high,
                name,
                (low, high),
                "it must be two finite numbers, the lower one first",
            )


@dataclass(frozen=True, kw_only=True)
class ProtoNetConfig(LearnerConfig):
    """ProtoNet's settings: nothing to set but which layer is replaced."""

    name: ClassVar[str] = "protonet"
    has_start: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = False
    any_ways: ClassVar[bool] = True
    head: str | None = None
    """Name of the head's module in the network; none: the last one registered that has parameters."""


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """How the tasks of a meta-batch are combined: what all rules share."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        _check_types(self)


@dataclass(frozen=True, kw_only=True)
class UniformConfig(RuleConfig):
    """Every task weighs 1/B; nothing to set."""

    name: ClassVar[str] = "uniform"


@dataclass(frozen=True, kw_only=True)
class Uniform2BConfig(RuleConfig):
    """Control: uniform over the training and the probe batch, as many tasks as attention sees; nothing to set."""

    name: ClassVar[str] = "uniform-2b"


@dataclass(frozen=True, kw_only=True)
class SequentialConfig(RuleConfig):
    """An outer step after every task; nothing to set."""

    name: ClassVar[str] = "sequential"


EQUITY_PARAMETERS: dict[str, float | None] = {
    "theil": None,
    "generalized-entropy": 2.0,
    "atkinson": 0.5,
    "gini": None,
    "log-variance": None,
}
"""Index of inequality -> its parameter unless one is given; none: it has none."""


@dataclass(frozen=True, kw_only=True)
class EquityConfig(RuleConfig):
    """The mean loss plus λ times the inequality of the tasks' losses (TAML)."""

    name: ClassVar[str] = "equity"
    equity_lambda: float = 0.1
    """λ, the weight of the inequality. The mean of the losses stands beside it, not the sum as in the TAML paper, so
    that paper's λ is B times this one."""
    equity_index: Literal["theil", "generalized-entropy", "atkinson", "gini", "log-variance"] = "theil"
    """The index of inequality."""
    equity_parameter: float | None = None
    """a of generalized-entropy (none: 2), ε of atkinson (none: 0.5); the others have none."""
    equity_losses: Literal["auto", "query", "support", "adapted"] = "auto"
    """Whose inequality: losses before adaptation on the query or the support set, or query losses after it. auto:
    query; adapted for ProtoNet, which before adaptation finds all tasks alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            math.isfinite(self.equity_lambda) and self.equity_lambda >= 0,
            "equity_lambda",
            self.equity_lambda,
            "it must be a finite number of at least 0",
        )
        check_equity_parameter(self.equity_index, self.equity_parameter)


def check_equity_parameter(index: str, parameter: float | None) -> None:
    """Raise ConfigError unless the index exists and takes that parameter (none: its own)."""
    if index not in EQUITY_PARAMETERS:
        raise unknown("index of inequality", index, EQUITY_PARAMETERS)
    if parameter is None:
        return
    takes = EQUITY_PARAMETERS[index] is not None
    _require(takes, "equity_parameter", parameter, f"{index} has no parameter: leave it out")
    _require(math.isfinite(parameter), "equity_parameter", parameter, "it must be a finite number")
    _require(index != "atkinson" or parameter > 0, "equity_parameter", parameter, "atkinson's ε must be above 0")


@dataclass(frozen=True, kw_only=True)
class LossSoftmaxConfig(RuleConfig):
    """Control: tasks are weighted by the softmax of their query losses, the hard ones most."""

    name: ClassVar[str] = "loss-softmax"
    loss_temperature: float = 1.0
    """τ in softmax(L*ᵀ/τ): the larger, the more alike the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "loss_temperature")


@dataclass(frozen=True, kw_only=True)
class ReplayedConfig(RuleConfig):
    """Control: the weights that an attended run logged, permuted over the tasks of each batch."""

    name: ClassVar[str] = "replayed"
    replay: Path | None = None
    """Run folder of the attended run: of the same learner, tasks, seed and meta-batch size, and of at least as many
    iterations. Needed; the weights are copied into the run folder, so resuming it needs nothing else."""


@dataclass(frozen=True, kw_only=True)
class AttendedConfig(RuleConfig):
    """Tasks are weighted by the attention module; its settings."""

    name: ClassVar[str] = "attended"
    attention_lr: float = 1e-3
    """γ, the rate of Adam on the attention parameters δ."""
    attention_architecture: Literal["paper", "equivariant"] = "paper"
    """paper: tied to the meta-batch size and to the order of tasks; equivariant: neither."""
    attention_jacobian: Literal["sgd", "optimizer"] = "sgd"
    """Through what δ's gradient is taken: an SGD look-ahead at the meta rate (the authors'), or the real outer step."""
    attention_standardize: bool = False
    """Standardise each attention input over the tasks of the batch."""
    attention_omit: Literal["grad_norm", "query_loss", "query_accuracy", "loss_ratio"] | None = None
    """An input that attention does not get to see (a control)."""
    attention_reuse_probe: bool = False
    """Probe with the batch that the next iteration trains on, which then has its gradients already: attention at nearly
    no cost. The paper draws a batch of its own instead."""
    faithful_to_release: bool = False
    """Repeat, in an idealised form, a defect of the code that the authors released: the look-ahead on which the probe
    batch is judged stays connected to θ, so that θ descends the summed loss of that batch as well, and training sees
    2B tasks an iteration. It is not the whole released step, which also adapts the probe tasks one after another on a
    shared copy. For maml and metasgd only: the released TA-MetaLSTM++ has no such leak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "attention_lr")
        for name, other in (("attention_reuse_probe", False), ("attention_jacobian", "sgd")):
            value = getattr(self, name)
            _require(
                not self.faithful_to_release or value == other,
                name,
                value,
                f"the released code has no such thing: with --faithful-to-release leave it {other}",
            )


@dataclass(frozen=True, kw_only=True)
class OuterConfig:
    """The outer step on θ."""

    meta_batch_size: int = _USUAL.meta_batch_size
    """B, tasks in a meta-batch."""
    meta_lr: float = 1e-3
    """β, the rate of the outer step."""
    meta_optimizer: Literal["adam", "sgd"] = "adam"
    """The outer optimiser."""
    clip_norm: float | None = None
    """Clip the combined gradient to this Euclidean norm before the outer step; none: do not."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 1, "meta_batch_size")
        _positive(self, "meta_lr", "clip_norm")


ExecutionName = Literal["auto", "looped", "threaded", "vectorized", "processes", "im2col", "streamed"]
CHUNKED = ("vectorized", "im2col")
"""Executions that can run a part of the meta-batch at a time."""
TASKS_AT_ONCE = 4
"""In closed form, in a process. More side by side save nothing and take memory."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop."""

    iterations: int = 5000
    """Outer steps in all (the paper: 55,000)."""
    seed: int = 0
    """Decides θ's and δ's start and every training task; evaluation tasks are the same for all seeds."""
    out: Path | None = None
    """Run folder; none: runs/DATA-NwayKshot-ALGORITHM-seedSEED."""
    val_every: int = 500
    """Iterations between validations; one more follows the last iteration."""
    val_tasks: int = 300
    """Frozen validation tasks; the checkpoint with their best mean accuracy is kept as best."""
    checkpoint_every: int = 100
    """Iterations between checkpoints; the newest two are kept."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    threads: int | None = None
    """CPU threads; none: PyTorch's choice, which is then recorded, for the sums' order depends on it."""
    execution: ExecutionName = "auto"
    """How the tasks of a batch are run: looped, one after another; threaded, each on one of --threads threads;
    vectorized, as one program; processes, on as many as there are tasks and --threads, each vectorized (Linux, CPU);
    im2col, vectorized with products of patch matrices; streamed, each on a CUDA stream of its own. auto: on CUDA
    vectorized; on a CPU processes where learner and network have a closed form, threaded for ProtoNet, looped for a
    network of one's own or one task.
    Printed at the start."""
    chunk_size: int | None = None
    """Tasks at once under the executions vectorized (auto's choice where this is given) and im2col; none: the whole
    meta-batch, but a few on a CPU where learner and network have a closed form."""
    log_initial_loss: bool = False
    """Log every task's loss before adaptation also under rules that do not need it (all but attended): a forward pass
    of the query set more for each task."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Make the steps in blocks, on the device alone, captured in a CUDA graph; auto: on CUDA. A network that cannot be
    captured is trained step by step, with a notice. on without CUDA: the same blocks without a graph, the same bits."""
    block: int = 100
    """Captured iterations between two looks at the device, at most: what is logged in between is logged then. A block
    ends at each validation and checkpoint, too; the results are the same at any number."""
    tf32: bool = False
    """Let CUDA round what it multiplies to TF32's 10 bits: faster, and less exact than float32. No effect on a CPU."""
    check_gradient: bool = True
    """Before training on a network of one's own, compare the meta-gradient of one small task with finite differences in
    float64, which finds operations whose derivatives are wrong. It takes a few passes over eight images."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (needs the extra metaheed[tensorboard])."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 0, "seed", most=2**63 - 1)
        _at_least(self, 1, "iterations", "val_every", "val_tasks", "checkpoint_every", "chunk_size")
        _at_least(self, 1, "threads", "block", most=10_000)
        _require(
            self.chunk_size is None or self.execution in ("auto", *CHUNKED),
            "chunk_size",
            self.chunk_size,
            f"the {self.execution} execution has no chunks: leave it out, or set --execution vectorized",
        )


@dataclass(frozen=True, kw_only=True)
class TrialConfig(TrainingConfig):
    """The training loop of each trial of a search: what is meant otherwise there."""

    iterations: int = 5000
    """Outer steps of each trial."""
    seed: int = 0
    """Training seed, the same in every trial: θ's and δ's start and the training tasks are then the same, too."""
    out: Path | None = None
    """Study folder; none: runs/search-DATA-NwayKshot-ALGORITHM."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    episodes: EpisodeConfig = field(default_factory=EpisodeConfig)
    """Which images, and how tasks are made of them."""
    learner: LearnerConfig
    """How one task is adapted."""
    rule: RuleConfig
    """How the tasks of a meta-batch are combined."""
    outer: OuterConfig = field(default_factory=OuterConfig)
    """The outer step on θ."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The training loop."""

    def __post_init__(self) -> None:
        self.check_ways(self.episodes.test_shape[0], "test_ways")
        if isinstance(self.rule, AttendedConfig):
            _require(
                not self.rule.faithful_to_release or type(self.learner) in (MAMLConfig, MetaSGDConfig),
                "faithful_to_release",
                self.rule.faithful_to_release,
                f"the released code has this leak for maml and metasgd only, not for {self.learner.name}: leave it out",
            )
        if isinstance(self.rule, EquityConfig):
            _require(
                self.learner.has_start or self.rule.equity_losses in ("auto", "adapted"),
                "equity_losses",
                self.rule.equity_losses,
                f"before adaptation {self.learner.name} finds all tasks alike: use adapted",
            )

    def check_ways(self, ways: int, option: str = "ways") -> None:
        """Raise ConfigError, naming the option, if the learner cannot be judged on tasks of so many ways."""
        most = self.episodes.ways
        _require(
            ways <= most or self.learner.any_ways,
            option,
            ways,
            f"{self.learner.name}'s head has one output for each of the {most} training classes: "
            f"use at most {most}, or train with more --ways (or protonet, which takes any number)",
        )

    @property
    def algorithm(self) -> str:
        """The name of this pair of learner and rule: a key of ALGORITHMS, or RULE-LEARNER for one without a name."""
        for name, (learner, rule, _) in ALGORITHMS.items():
            if (learner, rule) == (self.learner.name, self.rule.name):
                return name
        return f"{self.rule.name}-{self.learner.name}"

    @property
    def run_name(self) -> str:
        """The default folder name under runs/."""
        e = self.episodes
        return f"{e.data}-{e.ways}way{e.shots}shot-{self.algorithm}-seed{self.training.seed}"


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Which frozen tasks are written to a file."""

    data: str = EpisodeConfig.data
    """Data set."""
    data_root: Path | None = None
    """Folder that holds its files, as in training."""
    image_size: int | None = None
    """Of --data folder, as in training."""
    split_seed: int | None = None
    """Of --data folder, as in training."""
    split: Literal["test", "val"] = "test"
    """Whose classes."""
    ways: int = EpisodeConfig.ways
    """N, classes in a task."""
    shots: int = EpisodeConfig.shots
    """K, support images per class."""
    queries: int = EpisodeConfig.queries
    """Q, query images per class."""
    tasks: int = 300
    """How many."""
    episode_seed: int = 0
    """Which; the same number gives the same ones, those that evaluate draws included."""
    with_images: bool = False
    """Put the images that the tasks use into the file, so that whoever reads it needs no data set."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 2, "tasks", "ways")
        _at_least(self, 0, "episode_seed", most=2**63 - 1)
        _at_least(self, 1, "shots", "queries")
        _check_folder(self)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a trained run is judged."""

    tasks: int | None = None
    """Frozen tasks to judge on; none: 300, or all of --episodes."""
    split: Literal["test", "val"] | None = None
    """Whose classes; none: test, or those of --episodes."""
    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint chosen on validation, or the newest."""
    episode_seed: int | None = None
    """Which frozen tasks; the same number gives every run the same ones. None: 0, or those of --episodes."""
    ways: int | None = None
    """N; none: the run's own test setting. At another one (of --shots and --queries, too) the result is in a file
    like result-5way5shot15query.json, and result.json is left alone."""
    shots: int | None = None
    """K; none: the run's own test setting."""
    queries: int | None = None
    """Q; none: the run's own test setting."""
    data: str | None = None
    """Another data set than the run was trained on (cross-domain). Its images are made of the run's size and channels,
    and standardised as in training; the result is written to result-on-DATA.json. None: the run's own."""
    episodes: Path | None = None
    """A file of frozen tasks, written by 'metaheed data episodes'; it decides data set, split, N, K, Q and tasks."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 2, "tasks", "ways")
        _at_least(self, 0, "episode_seed", most=2**63 - 1)
        _at_least(self, 1, "shots", "queries")
        if self.episodes is not None:
            for name in ("data", "split", "ways", "shots", "queries", "tasks", "episode_seed"):
                value = getattr(self, name)
                _require(value is None, name, value, f"--episodes {self.episodes} decides it: leave it out")


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Which runs of an experiment are made, and how."""

    only: tuple[str, ...] = ()
    """Words that choose: data sets (miniimagenet, cifar-fs), settings (5way1shot), algorithms (ta-maml), toy (of the
    figures), or whole recipes by name. Words of one kind add up, different kinds narrow each other. None: every cell on
    the paper's own data sets; cifar-fs and fc100 must be named."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds, a run each. With several the seed is the unit of every comparison."""
    iterations: int | None = None
    """Outer steps of every run; none: the recipe's (the paper's 55,000). Runs that have fewer are trained on."""
    tasks: int = FreezeConfig.tasks
    """Frozen test tasks that every run is judged on (the paper: 300)."""
    out: Path = Path("runs/reproduce")
    """Folder of the runs, their logs and the report."""
    data_root: Path | None = None
    """Folder that holds the data sets, as in training."""
    recipes: Path | None = None
    """A folder of recipes of one's own instead of the package's: all in it whose algorithm the experiment has."""
    jobs: int | None = None
    """Runs trained at a time; none: one a GPU, or as many as there are cores for --threads each."""
    threads: int | None = None
    """CPU threads of each run; none: the cores divided by --jobs, which without it is one run a core. A run that is
    continued keeps its own."""
    device: str = "auto"
    """cpu, cuda:N, or auto: every GPU in turn where there are some (also: cuda), else the CPU."""
    trust: bool = False
    """Let the code of networks run that recipes of one's own name, where you have not allowed it before."""
    dry_run: bool = False
    """Only list the runs, what each still needs, and for how long it would keep this machine busy."""

    def __post_init__(self) -> None:
        _check_types(self)
        for seed in self.seeds:
            _require(0 <= seed < 2**63, "seeds", seed, "a seed must be a whole number of at least 0, below 2**63")
        _require(bool(self.seeds), "seeds", self.seeds, "there must be one")
        _require(len({*self.seeds}) == len(self.seeds), "seeds", self.seeds, "each must be named once")
        _at_least(self, 1, "iterations")
        _at_least(self, 2, "tasks")
        _at_least(self, 1, "jobs", "threads", most=10_000)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Which configurations are tried, and where the study is kept. The ranges are those of every algorithm: what one
    does not have is drawn for it and not used, so that the same seed draws all algorithms the same. They stand for
    --fast-lr, --meta-lr, --attention-lr and --equity-lambda, which cannot be given."""

    trials: int = 30
    """Configurations in all, those of all workers together; may be raised later."""
    sampler: Literal["random", "tpe"] = "random"
    """random: each trial log-uniform, a function of --search-seed and the trial's number alone, so that several workers
    draw what one would; tpe: learns from the trials that are finished (Optuna's multivariate TPE)."""
    pruner: Literal["none", "halving"] = "none"
    """halving: stop trials early by successive halving on their validation accuracy. Stopped ones count as trials."""
    halving_factor: int = 3
    """η of --pruner halving: at each rung about one trial in η goes on, for η times the iterations."""
    halving_start: int | None = None
    """Iterations to the first rung of --pruner halving; none: a tenth of --iterations. A rung is judged at the first
    validation (--val-every) that gets there."""
    storage: str | None = None
    """Database that holds the study, as an SQLAlchemy URL: workers that name the same one, on any machine, work on one
    study. None: the SQLite file study.db in the study folder."""
    study: str | None = None
    """Name of the study in the database; none: search-DATA-NwayKshot-ALGORITHM."""
    search_seed: int = 0
    """Decides what is drawn."""
    lost_after: int = 120
    """Seconds without a sign of life after which a trial is taken over by another worker. On one machine, the end of a
    process is seen at once."""
    fast_lr_range: tuple[float, float] = (1e-2, 5e-1)
    """α, log-uniform (MetaSGD: where every learned rate starts). The same number twice fixes it."""
    meta_lr_range: tuple[float, float] = (1e-4, 1e-2)
    """β, log-uniform."""
    attention_lr_range: tuple[float, float] = (1e-4, 1e-2)
    """γ, log-uniform."""
    equity_lambda_range: tuple[float, float] = (1e-2, 1.0)
    """λ, log-uniform."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 1, "trials", "halving_start", "lost_after", most=10**6)
        _at_least(self, 2, "halving_factor", most=100)
        _at_least(self, 0, "search_seed", most=2**63 - 1)
        for name in ("storage", "study"):
            _require(getattr(self, name) != "", name, "", "it must not be empty")
        for name, (low, high) in self.ranges.items():
            _require(
                0 < low <= high < math.inf,
                f"{name}_range",
                (low, high),
                "it must be two finite numbers above 0, the lower one first",
            )

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Field of the learner, rule or outer step -> the bounds between which it is drawn."""
        return {
            "fast_lr": self.fast_lr_range,
            "meta_lr": self.meta_lr_range,
            "attention_lr": self.attention_lr_range,
            "equity_lambda": self.equity_lambda_range,
        }


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """MetaLSTM against MetaLSTM++ on four problems of two parameters."""

    iterations: int = 150
    """Meta-batches."""
    meta_lr: float = 1.0
    """β, the rate of MetaLSTM's outer step; MetaLSTM++ has B times that, making one step where MetaLSTM makes B."""
    meta_optimizer: Literal["sgd", "adam"] = "sgd"
    """The outer optimiser. SGD shows each task's own pull; Adam's momentum averages over the tasks before it."""
    seed: int = 0
    """Decides the points, the order of tasks and the start of the learned optimiser."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 2, "iterations")
        _at_least(self, 0, "seed", most=10**12)
        _positive(self, "meta_lr")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What a report shows beside what it finds."""

    thresholds: tuple[float, ...] = ()
    """Validation accuracies in % for which it is shown how long each algorithm took to them; none: 5 points and 1 point
    below the best of the counterpart without attention."""
    toy: bool = True
    """Draw figure 1; the toy is computed, in half a minute, where none of the folders holds one that 'metaheed toy'
    wrote."""

    def __post_init__(self) -> None:
        _check_types(self)
        inside = all(0 < threshold <= 100 for threshold in self.thresholds)
        _require(inside, "thresholds", self.thresholds, "each must be a percentage above 0 and at most 100")


LEARNERS: dict[str, type[LearnerConfig]] = {
    c.name: c for c in (MAMLConfig, ANILConfig, BOILConfig, MetaSGDConfig, MetaLSTMConfig, ProtoNetConfig)
}
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
    )
}
ALGORITHMS: dict[str, tuple[str, str, str]] = {
    "maml": ("maml", "uniform", "MAML (Finn et al. 2017): every task weighs the same."),
    "taml": ("maml", "equity", "TAML (Jamal & Qi 2019): MAML with a penalty on the inequality of the tasks' losses."),
    "ta-maml": ("maml", "attended", "Task-attended MAML (Aimen et al. 2021): an attention module weighs the tasks."),
    "metasgd": ("metasgd", "uniform", "MetaSGD (Li et al. 2017): MAML with a learned rate for every parameter."),
    "ta-metasgd": ("metasgd", "attended", "Task-attended MetaSGD."),
    "metalstm": ("metalstm", "sequential", "MetaLSTM (Ravi & Larochelle 2017): a learned optimiser, a step a task."),
    "metalstm++": ("metalstm", "uniform", "MetaLSTM++ (Aimen et al. 2021): MetaLSTM trained on whole meta-batches."),
    "ta-metalstm++": ("metalstm", "attended", "Task-attended MetaLSTM++."),
    "anil": ("anil", "uniform", "ANIL (Raghu et al. 2020): MAML that adapts the head only."),
    "ta-anil": ("anil", "attended", "Task-attended ANIL."),
    "boil": ("boil", "uniform", "BOIL (Oh et al. 2021): MAML that adapts the body only."),
    "ta-boil": ("boil", "attended", "Task-attended BOIL."),
    "protonet": ("protonet", "uniform", "ProtoNet (Snell et al. 2017): the nearest class mean of the embeddings."),
    "ta-protonet": ("protonet", "attended", "Task-attended ProtoNet."),
}
"""Algorithm name -> (learner, rule, description)."""


def default_config(
    algorithm: str,
    data: str = EpisodeConfig.data,
    ways: int = EpisodeConfig.ways,
    shots: int = EpisodeConfig.shots,
) -> RunConfig:
    """The config of an algorithm with every default, T, B and Q being the preset of the data set and setting.

    Raises:
        ConfigError: no algorithm has that name.
    """
    if algorithm not in ALGORITHMS:
        raise unknown("algorithm", algorithm, ALGORITHMS)
    learner, rule, _ = ALGORITHMS[algorithm]
    return default_pair(learner, rule, data, ways, shots)


def default_pair(
    learner: str,
    rule: str,
    data: str = EpisodeConfig.data,
    ways: int = EpisodeConfig.ways,
    shots: int = EpisodeConfig.shots,
) -> RunConfig:
    """As `default_config`, of any learner with any rule."""
    for what, name, known in (("learner", learner, LEARNERS), ("rule", rule, RULES)):
        if name not in known:
            raise unknown(what, name, known)
    paper, kind = preset(data, ways, shots), LEARNERS[learner]
    steps: dict[str, Any] = {"adaptation_steps": paper.adaptation_steps} if hasattr(kind, "adaptation_steps") else {}
    return RunConfig(
        episodes=EpisodeConfig(data=data, ways=ways, shots=shots, queries=paper.queries),
        learner=kind(**steps),
        rule=RULES[rule](),
        outer=OuterConfig(meta_batch_size=paper.meta_batch_size, clip_norm=kind.clip_norm),
    )


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain values for YAML; learner and rule carry their name."""
    result: dict[str, Any] = {}
    if isinstance(config, RunConfig):
        result["algorithm"] = config.algorithm
    elif isinstance(config, LearnerConfig | RuleConfig):
        result["name"] = config.name
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        if isinstance(value, Path | Named):
            value = str(value)
        result[f.name] = list(value) if isinstance(value, tuple) else value
    return result


def from_dict(values: Any) -> RunConfig:
    """The inverse of `to_dict` for a RunConfig. A network of another than ours is marked as named by a file.

    Raises:
        ConfigError: a group or field is missing, unknown, or out of its bounds.
    """
    groups = dict(_mapping(values, "config"))
    algorithm = groups.pop("algorithm", None)
    learner = dict(_mapping(groups.pop("learner", None), "learner"))
    rule = dict(_mapping(groups.pop("rule", None), "rule"))
    if isinstance(learner.get("backbone"), str) and ":" in learner["backbone"]:
        learner["backbone"] = Named(learner["backbone"])
    kinds: dict[str, type[Any]] = {"episodes": EpisodeConfig, "outer": OuterConfig, "training": TrainingConfig}
    for name in groups:
        if name not in kinds:
            raise unknown("group of the config", str(name), [*kinds, "algorithm", "learner", "rule"])
    config = RunConfig(
        learner=build(_named(LEARNERS, "learner", learner), learner, "learner"),
        rule=build(_named(RULES, "rule", rule), rule, "rule"),
        **{name: build(kind, groups.get(name), name) for name, kind in kinds.items()},
    )
    if algorithm != config.algorithm:
        raise ConfigError(
            f"config: algorithm is {shown(algorithm)}, but its learner and rule make {config.algorithm!r}"
        )
    return config


def _named(known: dict[str, Any], what: str, values: dict[str, Any]) -> Any:
    name = str(values.pop("name", None))
    if name not in known:
        raise unknown(what, name, known)
    return known[name]


def _mapping(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{what} is {shown(values)}, but it must be a mapping of names to values")
    return values


def build(kind: type[Any], values: Any, what: str) -> Any:
    """A config of that class from plain values, the inverse of `to_dict`.

    Raises:
        ConfigError: a field is unknown, missing, or out of its bounds.
    """
    values = dict(_mapping(values, what))
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for name, value in values.items():
        if name not in names:
            raise unknown(f"field of {what}", str(name), names)
        if isinstance(value, str) and Path in (hints[name], *typing.get_args(hints[name])):
            values[name] = Path(value)
        if isinstance(value, list) and typing.get_origin(hints[name]) is tuple:
            values[name] = tuple(value)
    return kind(**values)
