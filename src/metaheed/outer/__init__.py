"""The outer level: per-task gradients, how they are executed, weighted and turned into the next θ."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from metaheed.config import (
    AttendedConfig,
    EquityConfig,
    ExecutionName,
    LossSoftmaxConfig,
    OuterConfig,
    ReplayedConfig,
    RunConfig,
    SequentialConfig,
    TrainingConfig,
    Uniform2BConfig,
    UniformConfig,
)
from metaheed.errors import ConfigError
from metaheed.learners.base import Learner, NetworkLearner, has_closed_form
from metaheed.outer.attention import (
    FEATURES,
    TaskAttention,
    attention_features,
    stack_gradients,
    weight_gradient,
    weighted_sum,
)
from metaheed.outer.equity import equity_coefficients, inequality
from metaheed.outer.gradients import (
    Execution,
    T,
    adapted_outcome,
    initial_gradient,
    initial_outcome,
    looped,
    map_looped,
    map_threaded,
    map_vectorized,
    plain_gradient,
    task_gradient,
    threaded,
    vectorized,
)
from metaheed.outer.optimizers import OptState, OuterOptimizer, adam, clipped, sgd
from metaheed.outer.processes import AVAILABLE as PROCESSES_AVAILABLE
from metaheed.outer.processes import Workers
from metaheed.outer.rules import (
    OuterState,
    Rule,
    StepRecord,
    Tools,
    attended,
    equity,
    loss_softmax,
    replayed,
    sequential,
    uniform,
    uniform_2b,
)
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
    "equity",
    "equity_coefficients",
    "inequality",
    "initial_gradient",
    "initial_outcome",
    "looped",
    "loss_softmax",
    "map_looped",
    "map_threaded",
    "map_vectorized",
    "pick_execution",
    "plain_gradient",
    "replayed",
    "sequential",
    "sgd",
    "stack_gradients",
    "task_gradient",
    "threaded",
    "uniform",
    "uniform_2b",
    "vectorized",
    "weight_gradient",
    "weighted_sum",
]


def build_optimizer(config: OuterConfig) -> OuterOptimizer:
    """The outer optimiser that a config describes."""
    optimizer = {"adam": adam, "sgd": sgd}[config.meta_optimizer](config.meta_lr)
    return optimizer if config.clip_norm is None else clipped(optimizer, config.clip_norm)


def build_rule(config: RunConfig, generator: torch.Generator, logged: Tensor | None = None) -> Rule:
    """The batch rule that a config describes.

    Args:
        config: the run's.
        generator: draws what the rule starts from.
        logged: (iterations, B), the weights to replay; needed by `replayed` only.
    """
    rule, outer = config.rule, config.outer
    match rule:
        case UniformConfig():
            return uniform()
        case Uniform2BConfig():
            return uniform_2b()
        case SequentialConfig():
            return sequential()
        case LossSoftmaxConfig():
            return loss_softmax(rule.loss_temperature)
        case EquityConfig():
            losses = rule.equity_losses
            if losses == "auto":
                losses = "query" if config.learner.has_start else "adapted"
            return equity(rule.equity_lambda, rule.equity_index, rule.equity_parameter, losses)
        case AttendedConfig():
            attention = TaskAttention(
                outer.meta_batch_size,
                rule.attention_architecture,
                rule.attention_standardize,
                generator=generator,
                omit=rule.attention_omit,
            )
            delta_step = adam(rule.attention_lr)
            return attended(attention, delta_step, outer.meta_lr, rule.attention_jacobian, rule.attention_reuse_probe)
        case ReplayedConfig() if logged is not None:
            return replayed(logged, config.training.seed)
    raise ConfigError(f"no rule is built from {type(rule).__name__}")


_POOLS: weakref.WeakKeyDictionary[Learner, Workers] = weakref.WeakKeyDictionary()


def build_execution(
    config: TrainingConfig, device: torch.device, learner: Learner, function: Callable[[Learner, Params, Episode], T]
) -> Execution[T]:
    """How function(learner, θ, task) is run over the tasks of a batch: as configured, or by device and network.

    Under the execution "processes" all functions of a learner share its workers.
    """
    workers = config.threads or torch.get_num_threads()
    module = learner.backbone.module if isinstance(learner, NetworkLearner) else None
    own_network = not type(module).__module__.startswith("metaheed.")
    match pick_execution(config.execution, device, config.threads, own_network, has_closed_form(learner)):
        case "looped":
            return map_looped(partial(function, learner))
        case "threaded":
            return map_threaded(learner, function, workers)
        case "vectorized":
            return map_vectorized(learner, function, config.chunk_size)
        case "processes":
            pool = _POOLS.get(learner)
            if pool is None or pool.workers != workers:
                pool = _POOLS[learner] = Workers(learner, workers)
            return partial(pool.map, function)


def pick_execution(
    name: ExecutionName,
    device: torch.device,
    threads: int | None,
    own_network: bool = False,
    closed_form: bool = True,
) -> Literal["looped", "threaded", "vectorized", "processes"]:
    """The execution behind a configured name. What auto is:

    - on CUDA: vectorized;
    - on one thread of a CPU: vectorized where learner and network have a closed form, else looped;
    - on several: processes where they have one (on Linux; elsewhere vectorized), threaded for the rest of our own
      networks, and looped for a user's: see `threaded` on what threads ask of it.
    """
    if name != "auto":
        return name
    if device.type != "cpu":
        return "vectorized"
    several = (threads or torch.get_num_threads()) > 1
    if closed_form and not own_network:
        return "processes" if several and PROCESSES_AVAILABLE else "vectorized"
    return "threaded" if several and not own_network else "looped"
