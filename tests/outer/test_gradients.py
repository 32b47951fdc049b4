"""Executions: what the contract suite does not ask of every learner."""

import pytest
import torch

from metaheed.errors import ConfigError
from metaheed.learners import MAML
from metaheed.outer import map_threaded, threaded
from metaheed.types import Episode, Params
from tests.conftest import make_batch
from tests.networks import Tiny


def test_a_failure_on_a_thread_is_the_callers(rng: torch.Generator) -> None:
    learner = MAML(Tiny(3, (1, 16, 16)))
    started = []

    def failing(own: object, meta: Params, task: Episode) -> torch.Tensor:
        started.append(own)
        assert own is not learner, "each thread has a copy"
        raise RuntimeError("no luck")

    batch = make_batch(50, 3, 1, 1, (1, 16, 16), torch.float32)
    run = map_threaded(learner, failing, 2)
    with pytest.raises(RuntimeError, match="no luck"):
        run(learner.init(rng), batch)
    with pytest.raises(RuntimeError, match="no luck"):  # and may be called again
        run(learner.init(rng), batch)
    assert len(set(map(id, started))) <= 2
    with pytest.raises(ConfigError, match=r"0 workers"):
        threaded(learner, 0)
