"""Task-attended meta-learning (algorithm 1).

Aimen, Sidheekh, Krishnan: Task Attended Meta-Learning for Few-Shot Learning. A learned attention module with parameters
δ weighs the tasks of a meta-batch; δ is trained so that the θ that results from the weighted step does well on other
tasks, the probe batch.

1. w = attention(infos of training batch t) under δ.
2. θ' = outer step on Σ_i w_i g_i, with g_i = ∇_θ L_i*(φ_iᵀ).
3. G = (1/B) Σ_j ∇_{θ'} L_j*(φ_jᵀ) over probe batch t, each task adapted from θ'. G changes δ only, never θ.
4. δ' = step of δ's optimiser on ∂L/∂δ, where ∂L/∂w_i = ⟨g_i, Jᵀ G⟩ (eq. 3) and J is the Jacobian of the outer step
   with respect to its gradient.
"""

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
    """The task-attended outer step, steps 1 to 4 above, with two options.

    With `reuse_probe` the probe batch of step t is training batch t+1. Its gradients at θ' are just those that step t+1
    begins with, so they are kept for it: one meta-gradient a step instead of two. The paper draws a batch of its own.

    Deviation from the authors' code: G is taken at the θ' of the real outer step, not of an SGD look-ahead. With
    `release_leak` the step is as in their code: G is taken at θ″ = θ − β Σ_i w_i g_i, and since that code does not
    detach θ″ from θ, the probe losses reach θ too. Its real outer step is on Σ_i w_i g_i + Σ_j ∇L_j*(φ_jᵀ), the probe
    tasks adapted from θ″ (exact to first order in the look-ahead; a sum, because that code adds the losses up). The
    paper has no such term.

    Args:
        attention: its present parameters are the initial δ.
        attention_optimizer: the step on δ (the paper: Adam at rate γ).
        meta_lr: β of the look-ahead when `jacobian` is "sgd".
        jacobian: "sgd": J = −β I, as in the authors' code; "optimizer": J of the real outer step, clipping included.
        reuse_probe: as above; the attention must have been built with its number of tasks.
        release_leak: as above; excludes `reuse_probe` and every other jacobian than "sgd".

    Raises:
        ConfigError: the jacobian is unknown, `reuse_probe` lacks the number of tasks, or `release_leak` is combined
            with what it excludes.
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
        # A captured step (t is a tensor) always follows one that kept its batch, since captured.py makes a run's first
        # step by itself.
        if reuse_probe and (isinstance(t, Tensor) or int(state.rule["pending.batch"]) == t):
            task_grads = below("pending.gradient.", state.rule)
            info = TaskInfo(**below("pending.info.", state.rule))
        else:
            task_grads, info = tools.gradients(state.meta, tools.train(t))
        # No check for finite inputs here: the engine checks all numbers, without waiting for a GPU in every step.
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
    """What is kept for the step that trains on `batch`: the gradients and infos of its tasks.

    Contiguous, so that a resumed run is bit-identical.
    """
    device = info.query_loss.device
    return {
        "pending.batch": torch.as_tensor(batch, device=device),
        **above("pending.gradient.", {name: g.contiguous() for name, g in task_grads.items()}),
        **above("pending.info.", {name: value.contiguous() for name, value in info._asdict().items()}),
    }
