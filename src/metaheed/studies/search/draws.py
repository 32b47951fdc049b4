"""The settings that a search varies, and how those of a trial are drawn."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from metaheed.config import RunConfig, SearchConfig

GROUPS = ("learner", "rule", "outer")
"""Groups of a run's config whose fields can be searched."""


def search_name(config: RunConfig) -> str:
    """The default name of a study: search-DATA-NwayKshot-ALGORITHM."""
    return "search-" + config.run_name.removesuffix(f"-seed{config.training.seed}")


def configured(config: RunConfig, values: dict[str, float]) -> RunConfig:
    """The config with the given values in the fields that its learner, rule and outer step have, without the others."""
    parts = {group: getattr(config, group) for group in GROUPS}
    own = {group: {n: v for n, v in values.items() if hasattr(part, n)} for group, part in parts.items()}
    return replace(config, **{group: replace(part, **own[group]) for group, part in parts.items()})


def used(config: RunConfig, settings: SearchConfig) -> list[str]:
    """Names of the searched settings that the algorithm has."""
    return [name for name in settings.ranges if any(hasattr(getattr(config, group), name) for group in GROUPS)]


class ByNumber(BaseSampler):
    """Draws log-uniformly; each draw is a pure function of (seed, number of the trial, name of the setting)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Part of Optuna's interface; empty, because every setting is drawn by itself."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Part of Optuna's interface; empty, because every setting is drawn by itself."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> float:
        """Draw one setting of one trial."""
        assert isinstance(param_distribution, FloatDistribution)
        low, high = param_distribution.low, param_distribution.high
        stream = np.random.SeedSequence((self._seed, trial.number, *param_name.encode()))
        drawn = low * math.exp(np.random.default_rng(stream).random() * math.log(high / low))
        return min(max(drawn, low), high)


def make_sampler(settings: SearchConfig, number: int) -> BaseSampler:
    """The sampler of one trial.

    TPE gets a new sampler and seed for every trial: one that served several would repeat its draws in every process
    that continues the study.
    """
    if settings.sampler == "random":
        return ByNumber(settings.search_seed)
    seed = int(np.random.SeedSequence((settings.search_seed, number)).generate_state(1)[0])
    # constant_liar counts running trials as bad ones, so that workers do not all try the same settings.
    return TPESampler(seed=seed, multivariate=True, constant_liar=True)


def make_pruner(config: RunConfig, settings: SearchConfig) -> optuna.pruners.BasePruner:
    """The pruner, which stops unpromising trials early."""
    if settings.pruner == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=first_rung(config, settings), reduction_factor=settings.halving_factor
    )


def first_rung(config: RunConfig, settings: SearchConfig) -> int:
    """Number of iterations before the first rung of successive halving."""
    return settings.halving_start or max(1, config.training.iterations // 10)
