"""Task-attended meta-learning: a learned attention module weighs the tasks."""

import torch
from torch import Tensor
from torch.func import functional_call

from metaheed.config import AttendedConfig
from metaheed.errors import ConfigError, unknown
from metaheed.networks.derivatives import value_and_pullback
from metaheed.rules.attention import TaskAttention, weight_gradient, weighted_sum
from metaheed.rules.optimizers import OuterOptimizer
from metaheed.rules.rule import OuterState, Rule, StepRecord, Tools, uniform_weights
from metaheed.trees import above, below
from metaheed.types import Params, TaskInfo


def attended(
    attention: TaskAttention,
    attention_optimizer: OuterOptimizer,
    meta_lr: float,
    jacobian: str = AttendedConfig.attention_jacobian,
    reuse_probe: bool = AttendedConfig.attention_reuse_probe,
    release_leak: bool = AttendedConfig.faithful_to_release,
) -> Rule:
    """Task-attended outer step (paper, algorithm 1 and eq. 3).

    1. w = attention(infos of batch t) under δ.
    2. θ' = outer step on Σ_i w_i g_i.
    3. G = (1/B) Σ_j ∇_{θ'} L_j*(φ_jᵀ) over probe batch t, each task adapted from θ'. It reaches δ only, never θ.
    4. δ' = step of `attention_optimizer` on ∂L/∂δ, with ∂L/∂w_i = ⟨g_i, Jᵀ G⟩.

    With `reuse_probe` the probe batch of step t is training batch t+1: its gradients at θ' are those that step t+1
    begins with, and are kept for it. One meta-gradient a step instead of two; the paper draws a batch of its own.

    Deviation from the authors' code: G is taken at the θ' of the real outer step, not of an SGD look-ahead.

    With `release_leak` it is as there: θ″ = θ − β Σ_i w_i g_i is looked ahead to, G is taken at θ″, and since θ″ was
    not detached from θ, the real outer step is on Σ_i w_i g_i + Σ_j ∇L_j*(φ_jᵀ), the probe tasks adapted from θ″ (to
    first order in the look-ahead; their sum, for so their losses were added up). The paper has no such term.

    Args:
        attention: its present parameters are δ's start.
        attention_optimizer: the step on δ (the paper: Adam at rate γ).
        meta_lr: β of the look-ahead when `jacobian` is "sgd".
        jacobian: "sgd": J = −β I, the authors' look-ahead; "optimizer": J of the real outer step, clipping included.
        reuse_probe: as above; needs an attention that was told the number of tasks.
        release_leak: as above; with neither reuse nor another jacobian than "sgd".

    Raises:
        ConfigError: unknown jacobian, reuse without the number of tasks, or a leak with what the release has not.
    """
    if jacobian not in ("sgd", "optimizer"):
        raise unknown("attention jacobian", jacobian, ("sgd", "optimizer"))
    if release_leak:
        AttendedConfig(attention_jacobian=jacobian, attention_reuse_probe=reuse_probe, faithful_to_release=True)  # type: ignore[arg-type]  # checked there
    if reuse_probe and attention.tasks is None:
        raise ConfigError("probe reuse keeps one gradient a task: build TaskAttention with tasks=B")

    def init(meta: Params) -> Params:
        reference = next(iter(meta.values()))
        delta = {n: p.detach().clone().to(reference) for n, p in attention.named_parameters()}
        state = above("attention.", delta) | above("optimizer.", attention_optimizer.init(delta))
        if reuse_probe:
            assert attention.tasks is not None  # checked above
            nothing = {n: p.new_zeros(attention.tasks, *p.shape) for n, p in meta.items()}
            state |= _pending(nothing, TaskInfo(*(reference.new_zeros(attention.tasks) for _ in TaskInfo._fields)), -1)
        return state

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        delta, delta_state = below("attention.", state.rule), below("optimizer.", state.rule)
        # A captured step (t a tensor) always follows one that kept its batch: steps.py takes a run's first one by one.
        if reuse_probe and (isinstance(t, Tensor) or int(state.rule["pending.batch"]) == t):
            task_grads = below("pending.gradient.", state.rule)
            info = TaskInfo(**below("pending.info.", state.rule))
        else:
            task_grads, info = tools.gradients(state.meta, tools.train(t))
        # Whether numbers are finite is looked at by whoever makes the steps, without waiting for a GPU in each of them.
        weights, pull_delta = value_and_pullback(lambda d: functional_call(attention, d, (info, False)), delta)
        combined = weighted_sum(weights, task_grads)
        if release_leak:
            ahead = {name: p - meta_lr * combined[name] for name, p in state.meta.items()}
            probe_grads, probe_info = tools.cheapest_gradients(ahead, tools.probe(t))
            leaked = weighted_sum(torch.ones_like(probe_info.query_loss), probe_grads)
            meta, optimizer = tools.optimizer.step(
                state.meta, state.optimizer, {name: g + leaked[name] for name, g in combined.items()}
            )
        else:
            meta, optimizer = tools.optimizer.step(state.meta, state.optimizer, combined)
            if reuse_probe:
                probe_grads, probe_info = tools.gradients(meta, tools.train(t + 1))
            else:
                probe_grads, probe_info = tools.cheapest_gradients(meta, tools.probe(t))
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
        kept = above("attention.", delta) | above("optimizer.", delta_state)
        if reuse_probe:
            kept |= _pending(probe_grads, probe_info, t + 1)
        return OuterState(meta, optimizer, kept), StepRecord(info, weights)

    return Rule(init, step)


def _pending(task_grads: Params, info: TaskInfo, batch: int) -> Params:
    """What is kept for the step that trains on `batch`, laid out as a checkpoint gives it back, for bits to agree."""
    device = info.query_loss.device
    return {
        "pending.batch": torch.as_tensor(batch, device=device),
        **above("pending.gradient.", {name: g.contiguous() for name, g in task_grads.items()}),
        **above("pending.info.", {name: value.contiguous() for name, value in info._asdict().items()}),
    }
