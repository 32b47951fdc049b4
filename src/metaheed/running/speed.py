"""Measuring how long a run's outer steps and its evaluation take on this machine."""

import itertools
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.func

from metaheed.config import RunConfig
from metaheed.data import Dataset, Split
from metaheed.data.images import make_split
from metaheed.outer import build_steps, closing_workers
from metaheed.running.process import (
    cpu_threads,
    float32_products,
    pick_device,
    translate_memory_errors,
    translate_start_errors,
)
from metaheed.running.session import Session, initial_checkpoint, move_state, on_device, set_up
from metaheed.running.train import resolve_execution


class Speed(NamedTuple):
    """Times in seconds."""

    iteration: float
    """Time of an outer step."""
    task: float
    """Time to adapt to a frozen task and evaluate it."""


_ENOUGH = 0.5  # seconds; steps are timed until they have taken this long


_BLOCK = 10  # steps in a block, where the execution makes several at once


_FEW = 4  # tasks that are evaluated


@translate_start_errors()
def measure_speed(config: RunConfig, image_shape: tuple[int, int, int]) -> Speed:
    """Measure a run's outer steps and its evaluation on images of noise. No file is read or written.

    If the first step takes longer than half a second, its time is the result, set-up included. Otherwise it is not
    counted, and further steps are timed until they have taken half a second together.

    Raises:
        ConfigError: the setting, the network or the device cannot be used, or the rule replays another run.
        OutOfMemoryError: the tasks computed at once do not fit.
        NonFiniteError: the losses or gradients of the first steps on noise are not finite.
    """
    device = pick_device(config.training.device)
    execution = resolve_execution(config.training.execution, device, config)
    training = replace(config.training, device=str(device), execution=execution, val_tasks=_FEW)
    config = replace(config, training=training)
    with closing_workers(), cpu_threads(training), float32_products(training.tf32):
        session = set_up(config, on_device(_noise(config, image_shape), device), None)
        with translate_memory_errors(config, device, config.outer.meta_batch_size, session.learner):
            return Speed(_time_steps(session), _time_judging(session))


def _noise(config: RunConfig, image_shape: tuple[int, int, int]) -> Dataset:
    """A data set of random images with as many classes as the config's tasks need."""
    generator = np.random.default_rng(0)

    def split(name: str, ways: int, shots: int, queries: int) -> Split:
        classes = [f"{name} {k}" for k in range(ways)]
        shape = (shots + queries, *image_shape)
        return make_split(name, classes, [generator.integers(0, 256, shape, np.uint8) for _ in classes])

    splits = {"train": split("train", *config.episodes.train_shape)}
    splits |= {name: split(name, *config.episodes.test_shape) for name in ("val", "test")}
    return Dataset("noise", splits, (0.5,) * image_shape[0], (0.3,) * image_shape[0])


def _time_steps(session: Session) -> float:
    training, device = session.config.training, session.device
    torch.func.grad(torch.sin)(torch.zeros(()))  # what PyTorch imports at its first gradient is no part of a step
    state = move_state(initial_checkpoint(session).state, device)
    steps = build_steps(training, device, session.rule, session.tools, session.streams, state, lambda _: None)
    done, counted, taken = 0, 0, 0.0
    try:
        for call in itertools.count():
            began = time.perf_counter()
            made = len(list(steps.advance(done, min(_BLOCK, steps.block), lambda: False)))
            seconds = time.perf_counter() - began
            done += made
            # The first call sets up what later ones use; on CUDA the second one captures the step.
            if (call < 2) if device.type == "cuda" else (call == 0 and seconds < _ENOUGH):
                continue
            counted, taken = counted + made, taken + seconds
            if taken >= _ENOUGH and counted:
                break
    finally:
        steps.close()
    return taken / counted


def _time_judging(session: Session) -> float:
    meta = move_state(initial_checkpoint(session).state, session.device).meta
    began = time.perf_counter()
    session.validation(meta, lambda _: None)
    return (time.perf_counter() - began) / _FEW
