"""Configs as plain values, as YAML files hold them, and back."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from metaheed.config.episodes import EpisodeConfig
from metaheed.config.learners import LEARNERS, LearnerConfig
from metaheed.config.rules import RULES, RuleConfig
from metaheed.config.run import RunConfig
from metaheed.config.training import OuterConfig, TrainingConfig
from metaheed.errors import ConfigError, naming_fields, shown, unknown
from metaheed.files.trust import NamedByFile


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
        if isinstance(value, Path | NamedByFile):
            value = str(value)
        result[f.name] = list(value) if isinstance(value, tuple) else value
    return result


def from_dict(values: Any) -> RunConfig:
    """The inverse of `to_dict` for a RunConfig. A network of another than ours is marked as named by a file.

    Raises:
        ConfigError: a group or field is missing, unknown, or out of its bounds.
    """
    with naming_fields():
        return _run_config(values)


def _run_config(values: Any) -> RunConfig:
    groups = dict(_mapping(values, "config"))
    algorithm = groups.pop("algorithm", None)
    learner = dict(_mapping(groups.pop("learner", None), "learner"))
    rule = dict(_mapping(groups.pop("rule", None), "rule"))
    if isinstance(learner.get("backbone"), str) and ":" in learner["backbone"]:
        learner["backbone"] = NamedByFile(learner["backbone"])
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
    with naming_fields():
        return _built(kind, values, what)


def _built(kind: type[Any], values: Any, what: str) -> Any:
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
