"""Batch rules: how the gradients of a meta-batch become the next θ.

A rule is a pure pair (init, step). Its step is handed callables, not results, so that it decides itself at which θ
gradients are taken and on which batches; it never looks inside a learner.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from metaheed.config import AttendedConfig
from metaheed.errors import unknown
from metaheed.outer.attention import TaskAttention, weight_gradient, weighted_sum
from metaheed.outer.gradients import value_and_pullback
from metaheed.outer.optimizers import OptState, OuterOptimizer
from metaheed.types import Episode, Params, TaskInfo


class Tools(NamedTuple):
    """What a rule works with, the same at every step."""

    gradients: Callable[[Params, Episode], tuple[Params, TaskInfo]]
    """(θ, batch) -> (g with leading B, infos (B,))."""
    initial_gradients: Callable[[Params, Episode], tuple[Params, Tensor]]
    """(θ, batch) -> (∇_θ L*(φ⁰) with leading B, L*(φ⁰) (B,))."""
    optimizer: OuterOptimizer
    """The outer step on θ."""
    train: Callable[[int], Episode]
    """t -> training batch t, the same under every rule at equal seed."""
    probe: Callable[[int], Episode]
    """t -> batch t of the second stream, disjoint from the first."""


class OuterState(NamedTuple):
    """Everything that passes from one outer step to the next."""

    meta: Params
    """θ."""
    optimizer: OptState
    """The outer optimiser's."""
    rule: Params
    """The rule's own: δ and its optimiser for `attended`, empty for `uniform`."""


class StepRecord(NamedTuple):
    """What an outer step did, for the logs and for the checks on finite numbers."""

    info: TaskInfo
    """(B,) of the training batch."""
    weights: Tensor
    """(B,) the weights its gradients were summed with."""


class Rule(NamedTuple):
    """A pure batch rule."""

    init: Callable[[Params], Params]
    """θ -> the rule's own state before the first step."""
    step: Callable[[OuterState, int, Tools], tuple[OuterState, StepRecord]]
    """(state, t, tools) -> (the next state, record)."""


def uniform() -> Rule:
    """θ' = outer step on Σ_i g_i / B."""

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        task_grads, info = tools.gradients(state.meta, tools.train(t))
        weights = uniform_weights(info)
        meta, optimizer = tools.optimizer.step(state.meta, state.optimizer, weighted_sum(weights, task_grads))
        return OuterState(meta, optimizer, state.rule), StepRecord(info, weights)

    return Rule(lambda meta: {}, step)


def attended(
    attention: TaskAttention,
    attention_optimizer: OuterOptimizer,
    meta_lr: float,
    jacobian: str = AttendedConfig.attention_jacobian,
) -> Rule:
    """Task-attended outer step (paper, algorithm 1 and eq. 3).

    1. w = attention(infos of batch t) under δ.
    2. θ' = outer step on Σ_i w_i g_i.
    3. G = (1/B) Σ_j ∇_{θ'} L_j*(φ_jᵀ) over probe batch t, each task adapted from θ'. It reaches δ only, never θ.
    4. δ' = step of `attention_optimizer` on ∂L/∂δ, with ∂L/∂w_i = ⟨g_i, Jᵀ G⟩.

    Deviation from the authors' code: G is taken at the θ' of the real outer step, not of an SGD look-ahead.

    Args:
        attention: its present parameters are δ's start.
        attention_optimizer: the step on δ (the paper: Adam at rate γ).
        meta_lr: β of the look-ahead when `jacobian` is "sgd".
        jacobian: "sgd": J = −β I, the authors' look-ahead; "optimizer": J of the real outer step, clipping included.

    Raises:
        ConfigError: unknown jacobian.
    """
    if jacobian not in ("sgd", "optimizer"):
        raise unknown("attention jacobian", jacobian, ("sgd", "optimizer"))

    def init(meta: Params) -> Params:
        reference = next(iter(meta.values()))
        delta = {n: p.detach().clone().to(reference) for n, p in attention.named_parameters()}
        return _join(delta, attention_optimizer.init(delta))

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        delta, delta_state = _split(state.rule)
        task_grads, info = tools.gradients(state.meta, tools.train(t))
        weights, pull_delta = value_and_pullback(lambda d: functional_call(attention, d, (info,)), delta)
        combined = weighted_sum(weights, task_grads)
        meta, optimizer = tools.optimizer.step(state.meta, state.optimizer, combined)

        probe_grads, probe_info = tools.gradients(meta, tools.probe(t))
        G = weighted_sum(uniform_weights(probe_info), probe_grads)

        def pull(v: Params) -> Params:
            if jacobian == "sgd":
                return {name: -meta_lr * leaf for name, leaf in v.items()}
            _, pull_step = value_and_pullback(
                lambda g: tools.optimizer.step(state.meta, state.optimizer, g)[0], combined
            )
            return pull_step(v)

        delta_gradient = pull_delta(weight_gradient(task_grads, G, pull).to(weights.dtype))
        delta, delta_state = attention_optimizer.step(delta, delta_state, delta_gradient)
        return OuterState(meta, optimizer, _join(delta, delta_state)), StepRecord(info, weights)

    return Rule(init, step)


def uniform_weights(info: TaskInfo) -> Tensor:
    """1/B for each of the B tasks, (B,)."""
    return torch.full_like(info.query_loss, 1 / info.query_loss.shape[0])


def _join(delta: Params, delta_state: OptState) -> Params:
    return {f"attention.{n}": p for n, p in delta.items()} | {f"optimizer.{n}": p for n, p in delta_state.items()}


def _split(rule_state: Params) -> tuple[Params, OptState]:
    return _below("attention.", rule_state), _below("optimizer.", rule_state)


def _below(prefix: str, tree: Params) -> Params:
    return {name.removeprefix(prefix): leaf for name, leaf in tree.items() if name.startswith(prefix)}
