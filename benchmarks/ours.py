"""Our own entry, as `metaheed train` runs it. All that the benchmark knows of the library's inside is in this file."""

import atexit
import contextlib
from dataclasses import replace
from typing import Any

import torch

from benchmarks.entry import Entry
from benchmarks.settings import AUTOGRAD, FAST_LR, META_LR, Setting
from benchmarks.tasks import start, stream
from metaheed.config import AttendedConfig, MAMLConfig, MetaSGDConfig, RunConfig, default_config
from metaheed.learners import NetworkLearner, build_learner
from metaheed.outer import (
    OuterOptimizer,
    OuterState,
    Tools,
    build_execution,
    build_optimizer,
    build_rule,
    gradient_without_initial_loss,
    initial_gradient,
    pick_for_run,
    task_gradient,
)
from metaheed.running.process import cpu_threads, keep_freed_memory, make_deterministic
from metaheed.types import Params

_CPU = torch.device("cpu")
RECOMPUTED = "maml-recompute"
"""Beside the algorithms of the settings: MAML with --recompute."""


def speed_settings() -> None:
    """What the command line sets for the whole process to be fast; the peers' second row is given it too."""
    keep_freed_memory()


def run_config(setting: Setting, algorithm: str) -> RunConfig:
    """The config of such a run, its threads and execution decided as the command line decides them."""
    names = {"fomaml": "maml", RECOMPUTED: "maml", AUTOGRAD: "maml", "ta-maml-reuse": "ta-maml"}
    config = default_config(names.get(algorithm, algorithm), ways=setting.ways, shots=setting.shots)
    learner: dict[str, Any] = {"adaptation_steps": setting.steps, "recompute": algorithm == RECOMPUTED}
    if isinstance(config.learner, MAMLConfig | MetaSGDConfig):
        learner |= {"fast_lr": FAST_LR, "first_order": algorithm == "fomaml"}
    rule = config.rule
    if isinstance(rule, AttendedConfig):
        rule = replace(rule, attention_reuse_probe=algorithm == "ta-maml-reuse")
    threads = torch.get_num_threads()
    execution = pick_for_run(config, config.training.execution, _CPU, setting.tasks)
    return replace(
        config,
        episodes=replace(config.episodes, queries=setting.queries),
        learner=replace(config.learner, **learner),
        rule=rule,
        outer=replace(config.outer, meta_batch_size=setting.tasks, meta_lr=META_LR),
        training=replace(config.training, device="cpu", execution=execution, threads=threads),
    )


def build(setting: Setting, algorithm: str) -> Entry:
    """One outer iteration of the batch rule, on batches in memory."""
    config = run_config(setting, algorithm)
    speed_settings()
    make_deterministic()
    process = contextlib.ExitStack()
    process.enter_context(cpu_threads(config.training))
    atexit.register(process.close)

    learner = build_learner(config.learner, setting.ways, setting.image_shape, seed=0)
    if algorithm == AUTOGRAD:
        assert isinstance(learner, NetworkLearner)
        learner.backbone.closed_form_on_cpu = learner.backbone.closed_form_on_cuda = None
    drawn, meta = learner.init(torch.Generator().manual_seed(0)), start(setting, algorithm)
    if {n: p.shape for n, p in drawn.items()} != {n: p.shape for n, p in meta.items()}:
        raise ValueError(f"the learner's parameters are {sorted(drawn)}, but it is to start from {sorted(meta)}")
    meta = {name: meta[name] for name in drawn}
    optimizer = build_optimizer(config.outer)
    seen: dict[str, Any] = {}

    def step_and_note(theta: Params, state: Params, gradient: Params) -> tuple[Params, Params]:
        seen["gradient"] = gradient
        return optimizer.step(theta, state, gradient)

    train = stream(setting, "train")
    tools = Tools(
        gradients=build_execution(config.training, _CPU, learner, task_gradient),
        initial_gradients=build_execution(config.training, _CPU, learner, initial_gradient),
        optimizer=OuterOptimizer(optimizer.init, step_and_note),
        train=train,
        probe=stream(setting, "probe") if algorithm == "ta-maml" else train,
        gradients_without_initial_loss=build_execution(config.training, _CPU, learner, gradient_without_initial_loss),
    )
    rule = build_rule(config, torch.Generator().manual_seed(1))
    seen["state"] = OuterState(meta, optimizer.init(meta), rule.init(meta))

    def step(t: int) -> None:
        seen["state"], record = rule.step(seen["state"], t, tools)
        seen["weights"] = record.weights

    return Entry(step, lambda: (seen["gradient"], seen["weights"].detach()))
