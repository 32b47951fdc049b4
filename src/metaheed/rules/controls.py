"""Three controls for task attention, ours: each shares one of its advantages but does not learn the weights.

1. `loss_softmax`: the weights depend on the tasks' losses, by a fixed formula.
2. `replayed`: the weights are as uneven as those of a run with attention, but have nothing to do with the tasks.
3. `uniform_2b`: as many tasks an iteration as attention sees, all with the same weight.
"""

import functools
import zlib

import numpy as np
import torch
from torch import Tensor

from metaheed.config import LossSoftmaxConfig
from metaheed.data.episodes import sample
from metaheed.rules.attention import weighted_sum
from metaheed.rules.rule import OuterState, Rule, StepRecord, Tools, uniform_weights, weighted
from metaheed.types import TaskInfo


def loss_softmax(temperature: float = LossSoftmaxConfig.loss_temperature) -> Rule:
    """Control: θ' = outer step on Σ_i w_i g_i with w = softmax(L*ᵀ/τ) over the batch, so that hard tasks weigh most.

    Args:
        temperature: τ.

    Raises:
        ConfigError: τ is not a finite number above 0.
    """
    LossSoftmaxConfig(loss_temperature=temperature)
    return weighted(lambda t, info: torch.softmax(info.query_loss / temperature, 0))


def replayed(logged: Tensor, seed: int) -> Rule:
    """Control: the weights that another run has logged, randomly permuted over the tasks of each batch.

    Args:
        logged: (iterations, B), the weights of iteration t in row t.
        seed: decides the permutations, together with t.
    """
    key = np.array([seed, zlib.crc32(b"replayed")], dtype=np.uint64)
    tasks = logged.shape[1]
    orders = [sample(np.random.Philox(key=key, counter=[0, t, 0, 0]), tasks, tasks) for t in range(len(logged))]
    permuted = logged.gather(1, torch.from_numpy(np.stack(orders)))

    @functools.cache  # made once, since the host waits for a copy to a device
    def placed(device: torch.device, dtype: torch.dtype) -> Tensor:
        return permuted.to(device, dtype)

    def weigh(t: int, info: TaskInfo) -> Tensor:
        weights = placed(info.query_loss.device, info.query_loss.dtype)
        return weights.index_select(0, t.reshape(1)).squeeze(0) if isinstance(t, Tensor) else weights[t]

    return weighted(weigh)


def uniform_2b() -> Rule:
    """Control: θ' = outer step on the mean gradient of training batch t and probe batch t, both taken at θ.

    These are as many tasks as attention sees in an iteration, so the records are of 2B tasks.
    """

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        results = [tools.cheapest_gradients(state.meta, stream(t)) for stream in (tools.train, tools.probe)]
        info = TaskInfo(*(torch.cat(parts) for parts in zip(*(i for _, i in results), strict=True)))
        weights = uniform_weights(info)
        B = len(results[0][1].query_loss)
        sums = [weighted_sum(w, g) for w, (g, _) in zip(weights.tensor_split([B]), results, strict=True)]
        combined = {name: sums[0][name] + sums[1][name] for name in state.meta}
        meta, optimizer = tools.optimizer.step(state.meta, state.optimizer, combined)
        return OuterState(meta, optimizer, state.rule), StepRecord(info, weights)

    return Rule(lambda meta: {}, step)
