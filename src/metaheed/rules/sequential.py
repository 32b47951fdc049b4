"""An outer step after every task."""

import torch

from metaheed.errors import NonFiniteTaskError
from metaheed.rules.attention import weighted_sum
from metaheed.rules.rule import OuterState, Rule, StepRecord, Tools, uniform_weights
from metaheed.types import Episode, TaskInfo


def sequential() -> Rule:
    """An outer step after every task of the batch, in order, each gradient taken at the θ that the one before left.

    Over B tasks it is B single-task outer steps (Ravi & Larochelle's training). Each task weighs 1 in its own step.
    """

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        batch = tools.train(t)
        meta, optimizer = state.meta, state.optimizer
        infos = []
        for index in range(len(batch.support_y)):
            try:
                task_grads, info = tools.cheapest_gradients(meta, Episode(*(part[index : index + 1] for part in batch)))
            except NonFiniteTaskError as error:  # the tool saw a batch of one
                raise NonFiniteTaskError(error.what, index + 1, error.stream) from None
            meta, optimizer = tools.optimizer.step(meta, optimizer, weighted_sum(uniform_weights(info), task_grads))
            infos.append(info)
        info = TaskInfo(*(torch.cat(parts) for parts in zip(*infos, strict=True)))
        return OuterState(meta, optimizer, state.rule), StepRecord(info, torch.ones_like(info.query_loss))

    return Rule(lambda meta: {}, step)
