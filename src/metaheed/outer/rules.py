"""Batch rules: how the gradients of a meta-batch become the next θ.

A rule is a pure pair (init, step). Its step is handed callables, not results, so that it decides itself at which θ
gradients are taken and on which batches; it never looks inside a learner.

A step can be captured in a CUDA graph (steps.py), where t is a 0-d int64 tensor and not an int: it may be counted on
from, handed to `Tools.train` and `Tools.probe`, and compared by tensor operations, but its value is not to be read.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from metaheed.config import AttendedConfig, EquityConfig, LossSoftmaxConfig
from metaheed.data.episodes import sample
from metaheed.errors import ConfigError, NonFiniteTaskError, unknown
from metaheed.learners.base import below
from metaheed.learners.derivatives import value_and_pullback
from metaheed.outer.attention import TaskAttention, weight_gradient, weighted_sum
from metaheed.outer.equity import cross_entropy_coefficients
from metaheed.outer.optimizers import OptState, OuterOptimizer
from metaheed.types import Episode, Params, TaskInfo

Gradients = Callable[[Params, Episode], tuple[Params, TaskInfo]]
"""(θ, batch) -> (g with leading B, infos (B,))."""


class Tools(NamedTuple):
    """What a rule works with, the same at every step."""

    gradients: Gradients
    """Of `task_gradient`."""
    initial_gradients: Callable[[Params, Episode], tuple[Params, Tensor]]
    """(θ, batch) -> (∇_θ L*(φ⁰) with leading B, L*(φ⁰) (B,))."""
    optimizer: OuterOptimizer
    """The outer step on θ."""
    train: Callable[[int], Episode]
    """t -> training batch t, the same under every rule at equal seed."""
    probe: Callable[[int], Episode]
    """t -> batch t of the second stream, disjoint from the first."""
    plain_gradients: Gradients | None = None
    """`gradients` without L*⁰ (NaN), for rules that do not look at it; none: `gradients`."""

    @property
    def plain(self) -> Gradients:
        """The cheapest gradients there are."""
        return self.plain_gradients or self.gradients


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
    return _weighted(lambda t, info: uniform_weights(info))


def loss_softmax(temperature: float = LossSoftmaxConfig.loss_temperature) -> Rule:
    """Control: θ' = outer step on Σ_i w_i g_i with w = softmax(L*ᵀ/τ) over the batch: hard tasks weigh most.

    Raises:
        ConfigError: τ is not a finite number above 0.
    """
    LossSoftmaxConfig(loss_temperature=temperature)
    return _weighted(lambda t, info: torch.softmax(info.query_loss / temperature, 0))


def replayed(logged: Tensor, seed: int) -> Rule:
    """Control: the weights another run logged, permuted over the tasks of each batch: as uneven, but blind.

    Args:
        logged: (iterations, B), the weights of iteration t in row t.
        seed: decides the permutations, with t.
    """

    key = np.array([seed, zlib.crc32(b"replayed")], dtype=np.uint64)
    tasks = logged.shape[1]
    orders = [sample(np.random.Philox(key=key, counter=[0, t, 0, 0]), tasks, tasks) for t in range(len(logged))]
    permuted = logged.gather(1, torch.from_numpy(np.stack(orders)))

    @functools.cache  # a copy to a device is waited for: made once
    def placed(device: torch.device, dtype: torch.dtype) -> Tensor:
        return permuted.to(device, dtype)

    def weigh(t: int, info: TaskInfo) -> Tensor:
        weights = placed(info.query_loss.device, info.query_loss.dtype)
        return weights.index_select(0, t.reshape(1)).squeeze(0) if isinstance(t, Tensor) else weights[t]

    return _weighted(weigh)


def _weighted(weigh: Callable[[int, TaskInfo], Tensor]) -> Rule:
    """θ' = outer step on Σ_i w_i g_i, w = weigh(t, infos)."""

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        task_grads, info = tools.plain(state.meta, tools.train(t))
        weights = weigh(t, info)
        meta, optimizer = tools.optimizer.step(state.meta, state.optimizer, weighted_sum(weights, task_grads))
        return OuterState(meta, optimizer, state.rule), StepRecord(info, weights)

    return Rule(lambda meta: {}, step)


def uniform_2b() -> Rule:
    """Control: θ' = outer step on the mean over training batch t and probe batch t, both at θ.

    As many tasks as attention sees. Its records are of 2B tasks.
    """

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        results = [tools.plain(state.meta, stream(t)) for stream in (tools.train, tools.probe)]
        info = TaskInfo(*(torch.cat(parts) for parts in zip(*(i for _, i in results), strict=True)))
        weights = uniform_weights(info)
        B = len(results[0][1].query_loss)
        sums = [weighted_sum(w, g) for w, (g, _) in zip(weights.tensor_split([B]), results, strict=True)]
        combined = {name: sums[0][name] + sums[1][name] for name in state.meta}
        meta, optimizer = tools.optimizer.step(state.meta, state.optimizer, combined)
        return OuterState(meta, optimizer, state.rule), StepRecord(info, weights)

    return Rule(lambda meta: {}, step)


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
                task_grads, info = tools.plain(meta, Episode(*(part[index : index + 1] for part in batch)))
            except NonFiniteTaskError as error:  # the tool saw a batch of one
                raise NonFiniteTaskError(error.what, index + 1, error.stream) from None
            meta, optimizer = tools.optimizer.step(meta, optimizer, weighted_sum(uniform_weights(info), task_grads))
            infos.append(info)
        info = TaskInfo(*(torch.cat(parts) for parts in zip(*infos, strict=True)))
        return OuterState(meta, optimizer, state.rule), StepRecord(info, torch.ones_like(info.query_loss))

    return Rule(lambda meta: {}, step)


def equity(
    strength: float = EquityConfig.equity_lambda,
    index: str = EquityConfig.equity_index,
    parameter: float | None = EquityConfig.equity_parameter,
    losses: Literal["query", "support", "adapted"] = "query",
) -> Rule:
    """TAML (Jamal & Qi, CVPR 2019): θ' = outer step on the gradient of (1/B) Σ_i L_i*ᵀ + λ I({ℓ_i}).

    1. g_i, the meta-gradients, and h_i = ∇_θ ℓ_i, ℓ_i the loss of task i before adaptation.
    2. c_i = ∂I/∂ℓ_i. The gradient is Σ_i (g_i/B + λ c_i h_i): no joint graph is needed.

    Deviation from the paper: the mean of the losses stands beside λ, not their sum, so the paper's λ is B times ours.

    Args:
        strength: λ.
        index, parameter: of `inequality`.
        losses: ℓ_i at φ⁰ on the query set (the paper's formula) or the support set; adapted: ℓ_i = L_i*ᵀ, h_i = g_i.

    Raises:
        ConfigError: a setting out of its bounds.
    """
    EquityConfig(equity_lambda=strength, equity_index=index, equity_parameter=parameter, equity_losses=losses)  # type: ignore[arg-type]  # checked there

    def step(state: OuterState, t: int, tools: Tools) -> tuple[OuterState, StepRecord]:
        batch = tools.train(t)
        task_grads, info = tools.plain(state.meta, batch)
        if losses == "adapted":
            slopes, values = task_grads, info.query_loss
        else:
            judged = batch if losses == "query" else batch._replace(query_x=batch.support_x, query_y=batch.support_y)
            slopes, values = tools.initial_gradients(state.meta, judged)
        weights = uniform_weights(info)
        mean = weighted_sum(weights, task_grads)
        penalty = weighted_sum(strength * cross_entropy_coefficients(values, index, parameter), slopes)
        combined = {name: mean[name] + penalty[name] for name in mean}
        meta, optimizer = tools.optimizer.step(state.meta, state.optimizer, combined)
        return OuterState(meta, optimizer, state.rule), StepRecord(info, weights)

    return Rule(lambda meta: {}, step)


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
        state = _above("attention.", delta) | _above("optimizer.", attention_optimizer.init(delta))
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
            probe_grads, probe_info = tools.plain(ahead, tools.probe(t))
            leaked = weighted_sum(torch.ones_like(probe_info.query_loss), probe_grads)
            meta, optimizer = tools.optimizer.step(
                state.meta, state.optimizer, {name: g + leaked[name] for name, g in combined.items()}
            )
        else:
            meta, optimizer = tools.optimizer.step(state.meta, state.optimizer, combined)
            if reuse_probe:
                probe_grads, probe_info = tools.gradients(meta, tools.train(t + 1))
            else:
                probe_grads, probe_info = tools.plain(meta, tools.probe(t))
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
        kept = _above("attention.", delta) | _above("optimizer.", delta_state)
        if reuse_probe:
            kept |= _pending(probe_grads, probe_info, t + 1)
        return OuterState(meta, optimizer, kept), StepRecord(info, weights)

    return Rule(init, step)


def uniform_weights(info: TaskInfo) -> Tensor:
    """1/B for each of the B tasks, (B,)."""
    return torch.full_like(info.query_loss, 1 / info.query_loss.shape[0])


def _above(prefix: str, tree: Params) -> Params:
    return {f"{prefix}{name}": leaf for name, leaf in tree.items()}


def _pending(task_grads: Params, info: TaskInfo, batch: int) -> Params:
    """What is kept for the step that trains on `batch`, laid out as a checkpoint gives it back, for bits to agree."""
    device = info.query_loss.device
    return {
        "pending.batch": torch.as_tensor(batch, device=device),
        **_above("pending.gradient.", {name: g.contiguous() for name, g in task_grads.items()}),
        **_above("pending.info.", {name: value.contiguous() for name, value in info._asdict().items()}),
    }
