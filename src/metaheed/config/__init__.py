"""Every setting of a run, its default and its bounds: the only home of a default.

A `RunConfig` is five groups: which episodes, which learner, which batch rule, which outer step, which training loop.
The command line is generated from these classes (each field's explanation is its help text), a run's config.yaml holds
one, and constructors elsewhere read their defaults from here.
"""

from metaheed.config.checks import checked, unchecked
from metaheed.config.episodes import EpisodeConfig, EvaluationConfig, FreezeConfig
from metaheed.config.learners import (
    LEARNERS,
    ANILConfig,
    BOILConfig,
    LearnerConfig,
    MAMLConfig,
    MetaLSTMConfig,
    MetaSGDConfig,
    ProtoNetConfig,
    ReptileConfig,
)
from metaheed.config.presets import PRESETS, Preset, preset
from metaheed.config.rules import (
    EQUITY_PARAMETERS,
    RULES,
    AttendedConfig,
    EquityConfig,
    LossSoftmaxConfig,
    ReplayedConfig,
    RuleConfig,
    SequentialConfig,
    Uniform2BConfig,
    UniformConfig,
    WorstCaseConfig,
    check_equity_parameter,
)
from metaheed.config.run import ALGORITHMS, RunConfig, configure, default_config, default_pair
from metaheed.config.studies import ReportConfig, ReproduceConfig, SearchConfig, ToyConfig
from metaheed.config.training import CHUNKED, TASKS_AT_ONCE, ExecutionName, OuterConfig, TrainingConfig, TrialConfig
from metaheed.config.values import build, from_dict, to_dict

__all__ = [
    "ALGORITHMS",
    "CHUNKED",
    "EQUITY_PARAMETERS",
    "LEARNERS",
    "PRESETS",
    "RULES",
    "TASKS_AT_ONCE",
    "ANILConfig",
    "AttendedConfig",
    "BOILConfig",
    "EpisodeConfig",
    "EquityConfig",
    "EvaluationConfig",
    "ExecutionName",
    "FreezeConfig",
    "LearnerConfig",
    "LossSoftmaxConfig",
    "MAMLConfig",
    "MetaLSTMConfig",
    "MetaSGDConfig",
    "OuterConfig",
    "Preset",
    "ProtoNetConfig",
    "ReplayedConfig",
    "ReportConfig",
    "ReproduceConfig",
    "ReptileConfig",
    "RuleConfig",
    "RunConfig",
    "SearchConfig",
    "SequentialConfig",
    "ToyConfig",
    "TrainingConfig",
    "TrialConfig",
    "Uniform2BConfig",
    "UniformConfig",
    "WorstCaseConfig",
    "build",
    "check_equity_parameter",
    "checked",
    "configure",
    "default_config",
    "default_pair",
    "from_dict",
    "preset",
    "to_dict",
    "unchecked",
]
