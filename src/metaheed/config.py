"""Every setting of a run, its default and its bounds: the only home of a default.

A `RunConfig` is five groups: which episodes, which learner, which batch rule, which outer step, which training loop.
The command line is generated from these classes (each field's explanation is its help text), a run's config.yaml holds
one, and constructors elsewhere read their defaults from here.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from metaheed.errors import ConfigError, unknown


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"--{name.replace('_', '-')} is {value!r}, but {rule}")


def _check_types(config: Any) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is ClassVar:
            continue
        value = getattr(config, name)
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not any(_is(value, kind) for kind in allowed):
            _require(False, name, value, f"it must be {_describe(hint)}")


def _is(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _describe(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    plain = {int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "none"}
    return plain.get(hint) or str(hint.__name__.lower())


def _at_least(config: Any, bound: int, *names: str, most: int = 10**9) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value >= bound, name, value, f"it must be at least {bound}")
        _require(value is None or value <= most, name, value, f"it must be at most {most}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(
            value is None or (math.isfinite(value) and value > 0),
            name,
            value,
            "it must be a finite number above 0",
        )


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """Which images, and how tasks are made of them."""

    data: str = "glyphs"
    """Data set: glyphs (built in, needs no files), omniglot, cifar-fs."""
    data_root: Path | None = None
    """Folder that holds the published files, itself or in their customary subfolder (omniglot/, cifar-100-python/);
    glyphs needs none."""
    ways: int = 5
    """N, classes in a training task."""
    shots: int = 1
    """K, support images per class in a training task."""
    queries: int = 15
    """Q, query images per class in a training task."""
    test_ways: int | None = None
    """N in validation and test tasks; none: as in training. With a head of fixed size it may not exceed --ways."""
    test_shots: int | None = None
    """K in validation and test tasks; none: as in training."""
    test_queries: int | None = None
    """Q in validation and test tasks; none: as in training."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 2, "ways", "test_ways")
        _at_least(self, 1, "shots", "queries", "test_shots", "test_queries")

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
    backbone: str = "conv4-32"
    """Network: conv4-32, conv4-64, conv4-64-strided (Finn et al.'s for Omniglot), or module:Class, called as
    Class(ways, image_shape) with image_shape = (channels, height, width)."""
    backbone_path: Path | None = None
    """Folder in which the module of module:Class is looked for first; none: the current one. Recorded, so that the
    run can be continued from anywhere."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(bool(self.backbone), "backbone", self.backbone, "it must name a network")


@dataclass(frozen=True, kw_only=True)
class MAMLConfig(LearnerConfig):
    """MAML's settings."""

    name: ClassVar[str] = "maml"
    adaptation_steps: int = 5
    """T, gradient steps on the support set, the same in training and test."""
    fast_lr: float = 0.1
    """α, the rate of those steps."""
    first_order: bool = False
    """Drop the second derivatives (FOMAML)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "adaptation_steps")
        _positive(self, "fast_lr")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "attention_lr")


@dataclass(frozen=True, kw_only=True)
class OuterConfig:
    """The outer step on θ."""

    meta_batch_size: int = 4
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
    execution: Literal["auto", "looped", "vectorized"] = "auto"
    """How the tasks of a batch are run: one after another, or vectorised over tasks; auto: looped on a CPU, vectorised
    on CUDA."""
    chunk_size: int | None = None
    """Tasks at once under the vectorised execution; none: the whole meta-batch."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (needs the extra metaheed[tensorboard])."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 0, "seed", most=2**63 - 1)
        _at_least(self, 1, "iterations", "val_every", "val_tasks", "checkpoint_every", "chunk_size")
        _at_least(self, 1, "threads", most=10_000)
        _require(
            self.chunk_size is None or self.execution != "looped",
            "chunk_size",
            self.chunk_size,
            "the looped execution has no chunks: leave it out, or set --execution vectorized",
        )


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
        ways = self.episodes.ways
        test_ways = self.episodes.test_shape[0]
        _require(
            test_ways <= ways,
            "test_ways",
            test_ways,
            f"{self.learner.name}'s head has one output for each of the {ways} training classes: "
            f"use at most {ways}, or train with more --ways",
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
class EvaluationConfig:
    """How a trained run is judged."""

    tasks: int = 300
    """Frozen tasks to judge on."""
    split: Literal["test", "val"] = "test"
    """Whose classes."""
    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint chosen on validation, or the newest."""
    episode_seed: int = 0
    """Which frozen tasks; the same number gives every run the same ones."""
    ways: int | None = None
    """N; none: the run's own test setting."""
    shots: int | None = None
    """K; none: the run's own test setting."""
    queries: int | None = None
    """Q; none: the run's own test setting."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 2, "tasks", "ways")
        _at_least(self, 0, "episode_seed", most=2**63 - 1)
        _at_least(self, 1, "shots", "queries")


LEARNERS: dict[str, type[LearnerConfig]] = {c.name: c for c in (MAMLConfig,)}
RULES: dict[str, type[RuleConfig]] = {c.name: c for c in (UniformConfig, AttendedConfig)}
ALGORITHMS: dict[str, tuple[str, str, str]] = {
    "maml": ("maml", "uniform", "MAML (Finn et al. 2017): every task weighs the same."),
    "ta-maml": ("maml", "attended", "Task-attended MAML (Aimen et al. 2021): an attention module weighs the tasks."),
}
"""Algorithm name -> (learner, rule, description)."""


def default_config(algorithm: str) -> RunConfig:
    """The config of an algorithm with every default.

    Raises:
        ConfigError: no algorithm has that name.
    """
    if algorithm not in ALGORITHMS:
        raise unknown("algorithm", algorithm, ALGORITHMS)
    learner, rule, _ = ALGORITHMS[algorithm]
    return RunConfig(learner=LEARNERS[learner](), rule=RULES[rule]())


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
        result[f.name] = str(value) if isinstance(value, Path) else value
    return result


def from_dict(values: Any) -> RunConfig:
    """The inverse of `to_dict` for a RunConfig.

    Raises:
        ConfigError: a group or field is missing, unknown, or out of its bounds.
    """
    groups = dict(_mapping(values, "config"))
    algorithm = groups.pop("algorithm", None)
    learner = dict(_mapping(groups.pop("learner", None), "learner"))
    rule = dict(_mapping(groups.pop("rule", None), "rule"))
    kinds: dict[str, type[Any]] = {"episodes": EpisodeConfig, "outer": OuterConfig, "training": TrainingConfig}
    for name in groups:
        if name not in kinds:
            raise unknown("group of the config", str(name), [*kinds, "algorithm", "learner", "rule"])
    config = RunConfig(
        learner=_build(_named(LEARNERS, "learner", learner), learner, "learner"),
        rule=_build(_named(RULES, "rule", rule), rule, "rule"),
        **{name: _build(kind, groups.get(name), name) for name, kind in kinds.items()},
    )
    if algorithm != config.algorithm:
        raise ConfigError(f"config: algorithm is {algorithm!r}, but its learner and rule make {config.algorithm!r}")
    return config


def _named(known: dict[str, Any], what: str, values: dict[str, Any]) -> Any:
    name = str(values.pop("name", None))
    if name not in known:
        raise unknown(what, name, known)
    return known[name]


def _mapping(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{what} is {values!r}, but it must be a mapping of names to values")
    return values


def _build(kind: type[Any], values: Any, what: str) -> Any:
    values = dict(_mapping(values, what))
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for name, value in values.items():
        if name not in names:
            raise unknown(f"field of {what}", str(name), names)
        if isinstance(value, str) and Path in (hints[name], *typing.get_args(hints[name])):
            values[name] = Path(value)
    return kind(**values)
