"""The outer level: per-task gradients, how they are executed, weighted and turned into the next θ."""

from collections.abc import Callable
from typing import Literal

import torch

from metaheed.config import AttendedConfig, OuterConfig, RuleConfig, TrainingConfig, UniformConfig
from metaheed.errors import ConfigError
from metaheed.outer.attention import (
    FEATURES,
    TaskAttention,
    attention_features,
    stack_gradients,
    weight_gradient,
    weighted_sum,
)
from metaheed.outer.gradients import (
    Execution,
    T,
    adapted_outcome,
    initial_gradient,
    initial_outcome,
    looped,
    map_looped,
    map_vectorized,
    task_gradient,
    vectorized,
)
from metaheed.outer.optimizers import OptState, OuterOptimizer, adam, clipped, sgd
from metaheed.outer.rules import OuterState, Rule, StepRecord, Tools, attended, uniform
from metaheed.types import Episode, Params

__all__ = [
    "FEATURES",
    "Execution",
    "OptState",
    "OuterOptimizer",
    "OuterState",
    "Rule",
    "StepRecord",
    "TaskAttention",
    "Tools",
    "adam",
    "adapted_outcome",
    "attended",
    "attention_features",
    "build_execution",
    "build_optimizer",
    "build_rule",
    "clipped",
    "initial_gradient",
    "initial_outcome",
    "looped",
    "map_looped",
    "map_vectorized",
    "pick_execution",
    "sgd",
    "stack_gradients",
    "task_gradient",
    "uniform",
    "vectorized",
    "weight_gradient",
    "weighted_sum",
]


def build_optimizer(config: OuterConfig) -> OuterOptimizer:
    """The outer optimiser that a config describes."""
    optimizer = {"adam": adam, "sgd": sgd}[config.meta_optimizer](config.meta_lr)
    return optimizer if config.clip_norm is None else clipped(optimizer, config.clip_norm)


def build_rule(config: RuleConfig, outer: OuterConfig, generator: torch.Generator) -> Rule:
    """The batch rule that a config describes; `generator` draws what it starts from."""
    if isinstance(config, UniformConfig):
        return uniform()
    if isinstance(config, AttendedConfig):
        attention = TaskAttention(
            outer.meta_batch_size, config.attention_architecture, config.attention_standardize, generator=generator
        )
        return attended(attention, adam(config.attention_lr), outer.meta_lr, config.attention_jacobian)
    raise ConfigError(f"no rule is built from {type(config).__name__}")


def build_execution(
    config: TrainingConfig, device: torch.device, per_task: Callable[[Params, Episode], T]
) -> Execution[T]:
    """How the tasks of a batch are run: as configured, or by device."""
    if pick_execution(config.execution, device) == "looped":
        return map_looped(per_task)
    return map_vectorized(per_task, config.chunk_size)


def pick_execution(
    name: Literal["auto", "looped", "vectorized"], device: torch.device
) -> Literal["looped", "vectorized"]:
    """The execution behind a configured name: auto is looped on a CPU, which gains little from vectorising."""
    if name == "auto":
        return "looped" if device.type == "cpu" else "vectorized"
    return name
