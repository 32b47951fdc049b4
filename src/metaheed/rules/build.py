"""Rules and outer optimisers from their configs."""

import torch
from torch import Tensor

from metaheed.config import (
    AttendedConfig,
    EquityConfig,
    LossSoftmaxConfig,
    OuterConfig,
    ReplayedConfig,
    RunConfig,
    SequentialConfig,
    Uniform2BConfig,
    UniformConfig,
    WorstCaseConfig,
)
from metaheed.errors import ConfigError
from metaheed.rules.attended import attended
from metaheed.rules.attention import TaskAttention
from metaheed.rules.controls import loss_softmax, replayed, uniform_2b
from metaheed.rules.equity import equity
from metaheed.rules.optimizers import OuterOptimizer, adam, clipped, sgd
from metaheed.rules.rule import Rule
from metaheed.rules.sequential import sequential
from metaheed.rules.uniform import uniform
from metaheed.rules.worst_case import worst_case


def build_optimizer(config: OuterConfig) -> OuterOptimizer:
    """The outer optimiser that a config describes."""
    optimizer = {"adam": adam, "sgd": sgd}[config.meta_optimizer](config.meta_lr)
    return optimizer if config.clip_norm is None else clipped(optimizer, config.clip_norm)


def build_rule(config: RunConfig, generator: torch.Generator, logged: Tensor | None = None) -> Rule:
    """The batch rule that a config describes.

    Args:
        config: the run's config.
        generator: draws the initial values of the rule's own parameters.
        logged: (iterations, B), the weights to replay; only `replayed` needs it.

    Raises:
        ConfigError: there is no rule for this config, or `replayed` is given no weights.
    """
    rule = config.rule
    match rule:
        case UniformConfig():
            return uniform()
        case Uniform2BConfig():
            return uniform_2b()
        case SequentialConfig():
            return sequential()
        case LossSoftmaxConfig():
            return loss_softmax(rule.loss_temperature)
        case WorstCaseConfig():
            return worst_case(rule.ascent_rate)
        case EquityConfig():
            return _equity(rule, config)
        case AttendedConfig():
            return _attended(rule, config, generator)
        case ReplayedConfig() if logged is not None:
            return replayed(logged, config.training.seed)
    raise ConfigError(f"no rule is built from {type(rule).__name__}")


def _equity(rule: EquityConfig, config: RunConfig) -> Rule:
    losses = rule.equity_losses
    if losses == "auto":
        losses = "query" if config.learner.has_start else "adapted"
    return equity(rule.equity_lambda, rule.equity_index, rule.equity_parameter, losses)


def _attended(rule: AttendedConfig, config: RunConfig, generator: torch.Generator) -> Rule:
    attention = TaskAttention(
        config.outer.meta_batch_size,
        rule.attention_architecture,
        rule.attention_standardize,
        generator=generator,
        omit=rule.attention_omit,
    )
    return attended(
        attention,
        adam(rule.attention_lr),
        config.outer.meta_lr,
        rule.attention_jacobian,
        rule.attention_reuse_probe,
        rule.faithful_to_release,
    )
