"""What is searched, and how a trial's settings are drawn."""

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
"""Parts of a run's config that hold what is searched."""


def search_name(config: RunConfig) -> str:
    """search-DATA-NwayKshot-ALGORITHM."""
    return "search-" + config.run_name.removesuffix(f"-seed{config.training.seed}")


def configured(config: RunConfig, values: dict[str, float]) -> RunConfig:
    """The config with those of the values that its learner, rule and outer step have; the others are not used."""
    parts = {group: getattr(config, group) for group in GROUPS}
    own = {group: {n: v for n, v in values.items() if hasattr(part, n)} for group, part in parts.items()}
    return replace(config, **{group: replace(part, **own[group]) for group, part in parts.items()})


def used(config: RunConfig, settings: SearchConfig) -> list[str]:
    """Those of the searched settings that the algorithm has."""
    return [name for name in settings.ranges if any(hasattr(getattr(config, group), name) for group in GROUPS)]


class ByNumber(BaseSampler):
    """Log-uniform draws, each a pure function of (seed, number of the trial, name of the setting)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing is drawn together."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing is drawn together."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> float:
        """One setting of one trial."""
        assert isinstance(param_distribution, FloatDistribution)
        low, high = param_distribution.low, param_distribution.high
        stream = np.random.SeedSequence((self._seed, trial.number, *param_name.encode()))
        drawn = low * math.exp(np.random.default_rng(stream).random() * math.log(high / low))
        return min(max(drawn, low), high)


def make_sampler(settings: SearchConfig, number: int) -> BaseSampler:
    """Of one trial. A TPE that lived longer would begin its draws again in every process that goes on with a study."""
    if settings.sampler == "random":
        return ByNumber(settings.search_seed)
    seed = int(np.random.SeedSequence((settings.search_seed, number)).generate_state(1)[0])
    # constant_liar: trials at work count, as bad ones, so that workers do not all try the same.
    return TPESampler(seed=seed, multivariate=True, constant_liar=True)


def make_pruner(config: RunConfig, settings: SearchConfig) -> optuna.pruners.BasePruner:
    """What stops trials early."""
    if settings.pruner == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=first_rung(config, settings), reduction_factor=settings.halving_factor
    )


def first_rung(config: RunConfig, settings: SearchConfig) -> int:
    """Iterations to the first rung of successive halving."""
    return settings.halving_start or max(1, config.training.iterations // 10)
