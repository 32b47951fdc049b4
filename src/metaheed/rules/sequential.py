"""The sequential rule: an outer step after every task (algorithm 1).

Ravi, Larochelle: Optimization as a Model for Few-Shot Learning, ICLR 2017, whose LSTM is trained so. A meta-batch of B
tasks costs as many adaptations as under the uniform rule, but θ moves B times.

For i = 1 … B:
1. g_i = ∇_θ L_i*(φ_iᵀ), at the θ that task i−1 left.
2. θ ← outer step on g_i.
"""

import torch

from metaheed.errors import NonFiniteTaskError
from metaheed.rules.attention import weighted_sum
from metaheed.rules.rule import OuterState, Rule, StepRecord, Tools, uniform_weights
from metaheed.types import Episode, TaskInfo


def sequential() -> Rule:
    """One outer step for every task of the batch, in order; each gradient is taken at the θ that the step before left.

    Each task has the weight 1 in its own step, and so in the record.
    """

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        batch = tools.train(t)
        meta, optimizer = state.meta, state.optimizer
        infos = []
        for index in range(len(batch.support_y)):
            try:
                task_grads, info = tools.cheapest_gradients(meta, Episode(*(part[index : index + 1] for part in batch)))
            except NonFiniteTaskError as error:  # the batch of one does not know the task's number
                raise NonFiniteTaskError(error.what, index + 1, error.stream) from None
            meta, optimizer = tools.optimizer.step(meta, optimizer, weighted_sum(uniform_weights(info), task_grads))
            infos.append(info)
        info = TaskInfo(*(torch.cat(parts) for parts in zip(*infos, strict=True)))
        return OuterState(meta, optimizer, state.rule), StepRecord(info, torch.ones_like(info.query_loss))

    return Rule(lambda meta: {}, step)
