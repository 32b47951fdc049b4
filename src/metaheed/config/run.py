"""A whole run: its five groups of settings, and the algorithms by name."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from metaheed.config.checks import require
from metaheed.config.episodes import EpisodeConfig
from metaheed.config.learners import LEARNERS, LearnerConfig, MAMLConfig, MetaSGDConfig
from metaheed.config.presets import preset
from metaheed.config.rules import RULES, AttendedConfig, EquityConfig, RuleConfig
from metaheed.config.training import OuterConfig, TrainingConfig
from metaheed.errors import option, unknown


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
            require(
                not self.rule.faithful_to_release or type(self.learner) in (MAMLConfig, MetaSGDConfig),
                "faithful_to_release",
                self.rule.faithful_to_release,
                f"the released code has this leak for maml and metasgd only, not for {self.learner.name}: leave it out",
            )
        if isinstance(self.rule, EquityConfig):
            require(
                self.learner.has_start or self.rule.equity_losses in ("auto", "adapted"),
                "equity_losses",
                self.rule.equity_losses,
                f"before adaptation {self.learner.name} finds all tasks alike: use adapted",
            )

    def check_ways(self, ways: int, named: str = "ways") -> None:
        """Raise ConfigError, naming the setting, if the learner cannot be judged on tasks of so many ways."""
        most = self.episodes.ways
        require(
            ways <= most or self.learner.any_ways,
            named,
            ways,
            f"{self.learner.name}'s head has one output for each of the {most} training classes: "
            f"use at most {most}, or train with more {option('ways')} (or protonet, which takes any number)",
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


ALGORITHMS: dict[str, tuple[str, str, str]] = {
    name: (learner, rule, description)
    for learner, kind in LEARNERS.items()
    for rule, (name, description) in vars(kind).get("algorithms", {}).items()
} | {
    name: (learner, rule, description)
    for rule, kind in RULES.items()
    for learner, (name, description) in vars(kind).get("algorithms", {}).items()
}
"""Algorithm name -> (learner, rule, description), as the learners and the rules state them."""


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


def configure(algorithm: str, **settings: Any) -> RunConfig:
    """The config of an algorithm with the settings given, by the names they have on the command line.

        configure("ta-maml", data="omniglot", data_root="data", ways=20, shots=1, attention_lr=1e-4)

    Args:
        algorithm: a key of ALGORITHMS.
        settings: fields of any of the config's five groups.

    Raises:
        ConfigError: no algorithm or setting has that name, or a setting is out of its bounds.
    """
    preset_by = {name: settings[name] for name in ("data", "ways", "shots") if name in settings}
    config = default_config(algorithm, **preset_by)
    groups = {group.name: {f.name for f in fields(getattr(config, group.name))} for group in fields(config)}
    for name in settings:
        if not any(name in names for names in groups.values()):
            raise unknown(f"setting of {algorithm}", name, sorted(set().union(*groups.values())))
    changed = {
        group: replace(getattr(config, group), **{n: v for n, v in settings.items() if n in names})
        for group, names in groups.items()
    }
    return replace(config, **changed)
