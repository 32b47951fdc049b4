"""Evaluating a trained run on frozen tasks and writing its result.json."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaheed.config import CHUNKED, EvaluationConfig, ExecutionName, FreezeConfig, RunConfig, TrainingConfig
from metaheed.data import Episodes, load_dataset
from metaheed.data.convert import convert
from metaheed.data.frozen import FrozenEpisodes, FrozenTasks, freeze, read_episodes
from metaheed.data.sources import Quiet, Watcher
from metaheed.errors import ConfigError, DataError, NonFiniteError, option
from metaheed.files.seals import seal_values
from metaheed.files.writing import check_writable, is_writable, write_whole
from metaheed.learners import find_backbone, place_constants
from metaheed.outer import (
    Execution,
    build_execution,
    closing_workers,
    evaluate_adapted,
    evaluate_initial,
    pick_for_run,
)
from metaheed.running.checkpoint import Pixels, recorded_pixels
from metaheed.running.folder import RunFolder
from metaheed.running.load import load_weights
from metaheed.running.process import (
    cpu_threads,
    float32_products,
    pick_device,
    translate_memory_errors,
    translate_network_errors,
    translate_start_errors,
)
from metaheed.running.results import result_file
from metaheed.running.statistics import interval
from metaheed.types import Params

_AT_ONCE = 10  # tasks in a batch; bounds the memory and the time until an interruption takes effect


class Outcomes(NamedTuple):
    """Query loss and accuracy of n tasks; each (n,) float64."""

    losses: np.ndarray
    accuracies: np.ndarray


def evaluate(
    execution: Execution[tuple[Tensor, Tensor]],
    meta: Params,
    episodes: Episodes,
    tasks: int,
    on_tasks: Callable[[int], None] | None = None,
) -> Outcomes:
    """Query loss and accuracy of the first `tasks` frozen tasks. Memory does not grow with their number.

    Args:
        execution: runs `evaluate_adapted` or `evaluate_initial` on a batch of tasks.
        meta: θ.
        episodes: the frozen tasks.
        tasks: number of tasks.
        on_tasks: called after each batch with the number of tasks done; it may raise an exception to stop.

    Raises:
        NonFiniteError: a loss is not finite, so its accuracy would mean nothing.
    """
    losses, accuracies = np.zeros(tasks), np.zeros(tasks)
    for first in range(0, tasks, _AT_ONCE):
        count = min(_AT_ONCE, tasks - first)
        loss, accuracy = execution(meta, episodes.batch(first, count))
        losses[first : first + count] = loss.double().cpu().numpy()
        accuracies[first : first + count] = accuracy.double().cpu().numpy()
        if on_tasks is not None:
            on_tasks(first + count)
    if not np.isfinite(losses).all():
        task = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise NonFiniteError(f"the loss of task {task + 1} of the {episodes.split.name} tasks is not finite")
    return Outcomes(losses, accuracies)


@translate_start_errors()
def evaluate_run(
    path: str | Path,
    config: EvaluationConfig | None = None,
    data_root: str | Path | None = None,
    device: str | None = None,
    on_tasks: Callable[[int], None] | None = None,
    execution: ExecutionName | None = None,
    chunk_size: int | None = None,
    threads: int | None = None,
    trust: bool = False,
    out: str | Path | None = None,
    notice: Callable[[str], None] | None = None,
    watcher: Watcher | None = None,
    data_cache: bool | None = None,
) -> dict[str, Any]:
    """Evaluate a run and write the result into its folder.

    The result on the run's own test setting is result.json. Other settings have files of their own:
    result-on-DATA.json, result-5way5shot15query.json, result-val.json. If the folder cannot be written (a read-only
    disk, another user's folder), the result is returned but not kept.

    Args:
        path: the run folder.
        config: the tasks to evaluate on, and the checkpoint to evaluate; the defaults if None.
        data_root: folder of the data sets; by default the one used in training.
        device: by default the one used in training if this machine has it, else the CPU.
        on_tasks: see `evaluate`.
        execution: how a batch of tasks is computed; by default as in training, or "auto" on another kind of device.
        chunk_size: number of tasks computed at once by the executions vectorized and im2col. If only this is given, the
            execution is vectorized.
        threads: number of CPU threads; by default as in training.
        trust: allow the code of the network that the run folder names, if it is not metaheed's and not allowed yet.
        out: the file to write instead of one in the run folder.
        notice: called with a message that says which file the result is in, or that it is not kept.
        watcher: told how reading the data set and judging go.
        data_cache: whether decoded images are kept in the user's cache and read from there; as in training if None.

    Returns:
        The content of the result file: accuracy and its half-width, the accuracy of each task, the hash of the tasks,
        what was evaluated and, on another data set than that of training, how its images were converted.

    Raises:
        RunError, DataError, ConfigError: the run, its data or the setting cannot be used.
        OutOfMemoryError: the tasks computed at once do not fit.
        StartError, WorkerError: a thread or worker process cannot be started, or a worker died.
    """
    config = config or EvaluationConfig()
    folder = RunFolder(path)
    path, data_root = folder.path, None if data_root is None else Path(data_root)
    run = folder.read_config(trust)
    # Refuse a missing network before anything is made or read.
    find_backbone(run.learner.backbone, run.learner.backbone_path)
    frozen = None if config.episodes is None else read_episodes(config.episodes)
    setting = _setting(config, run, frozen)
    trained_on = run.episodes.data
    shape = setting.ways, setting.shots, setting.queries
    file = Path(out) if out is not None else result_file(folder, run, setting.data, shape, setting.split)
    if out is not None and folder.needs(file):
        raise ConfigError(f"{option('out')} is {out}, which is a file of the run itself: name another file")
    kept = True
    if out is None and not is_writable(file):
        kept = False
        if notice is not None:
            notice(f"{path} cannot be written: the result is not kept there ({option('out')} FILE keeps it elsewhere)")
    else:
        check_writable(file)
    run.check_ways(setting.ways)
    learner, meta, about = load_weights(folder, run, config.checkpoint, setting.ways)
    where = pick_device(device or run.training.device, fall_back=device is None)
    meta = {name: p.to(where) for name, p in meta.items()}
    place_constants(learner, where)
    run = replace(run, training=_resolve_training(run, execution, chunk_size, threads, where))
    if data_cache is not None:
        run = replace(run, training=replace(run.training, data_cache=data_cache))
    episodes, conversion = _episodes(path, setting, frozen, run, about, data_root, where, watcher)
    folder.check_classes(episodes.dataset, setting.split)
    with (
        closing_workers(),
        cpu_threads(run.training),
        float32_products(run.training.tf32),
        translate_memory_errors(run, where, min(_AT_ONCE, setting.tasks), learner),
        translate_network_errors(run, where, learner, meta, lambda: episodes.batch(0, 1), judging=True),
    ):
        adapted, initial = (
            _watched(
                watcher or Quiet(),
                what,
                told,
                partial(
                    evaluate,
                    build_execution(run.training, where, learner, outcome),
                    meta,
                    episodes,
                    setting.tasks,
                ),
                setting.tasks,
            )
            for what, outcome, told in (
                ("after adaptation", evaluate_adapted, on_tasks),
                ("before adaptation", evaluate_initial, None),
            )
        )
    accuracy, half_width = interval(adapted.accuracies)
    initial_accuracy, initial_half_width = interval(initial.accuracies)
    result = {
        "algorithm": run.algorithm,
        **setting._asdict(),
        "trained_on": trained_on,
        "conversion": conversion,
        "caution": _caution(trained_on, setting.data),
        "episodes_sha256": episodes.fingerprint(setting.tasks),
        "seed": run.training.seed,
        "checkpoint": config.checkpoint,
        "iteration": about["iteration"],
        "accuracy": accuracy,
        "half_width_95": half_width,
        "loss": float(adapted.losses.mean()),
        "initial_accuracy": initial_accuracy,
        "initial_half_width_95": initial_half_width,
        "initial_loss": float(initial.losses.mean()),
        "accuracies": [round(a, 6) for a in adapted.accuracies.tolist()],
    }
    result = seal_values(result)
    if kept:
        write_whole(file, (json.dumps(result, indent=1) + "\n").encode())
        if notice is not None:
            notice(f"the result is in {file}")
    return result


def _watched(
    watcher: Watcher,
    what: str,
    on_tasks: Callable[[int], None] | None,
    judge: Callable[[Callable[[int], None]], Outcomes],
    tasks: int,
) -> Outcomes:
    """What `judge` gives, while the watcher is told of its tasks."""
    done = 0

    def told(count: int) -> None:
        nonlocal done
        watcher.advance(count - done)
        done = count
        if on_tasks is not None:
            on_tasks(count)

    watcher.start(f"judging {what}", tasks, 0, "tasks")
    try:
        return judge(told)
    finally:
        watcher.stop()


def _resolve_training(
    run: RunConfig, execution: ExecutionName | None, chunk_size: int | None, threads: int | None, where: torch.device
) -> TrainingConfig:
    """The run's training config with the execution, chunk size and threads to evaluate with on a device."""
    training = run.training
    if chunk_size is not None:
        return replace(
            training, execution=execution or "vectorized", chunk_size=chunk_size, threads=threads or training.threads
        )
    if execution is None:
        elsewhere = where.type != torch.device(training.device).type
        execution = "auto" if elsewhere else training.execution
    picked = pick_for_run(run, execution, where, _AT_ONCE)
    chunk_size = training.chunk_size if picked in CHUNKED else None
    return replace(training, execution=picked, chunk_size=chunk_size, threads=threads or training.threads)


class _Setting(NamedTuple):
    """The tasks that a run is evaluated on."""

    data: str
    split: str
    ways: int
    shots: int
    queries: int
    tasks: int
    episode_seed: int


def _setting(config: EvaluationConfig, run: RunConfig, frozen: FrozenTasks | None) -> _Setting:
    if frozen is not None:
        shape = frozen.ways, frozen.shots, frozen.queries
        return _Setting(frozen.data, frozen.split, *shape, len(frozen.tasks), frozen.episode_seed)
    ways, shots, queries = (
        asked if asked is not None else own
        for asked, own in zip((config.ways, config.shots, config.queries), run.episodes.test_shape, strict=True)
    )
    return _Setting(
        config.data or run.episodes.data,
        config.split or FreezeConfig.split,
        *(ways, shots, queries),
        config.tasks or FreezeConfig.tasks,
        FreezeConfig.episode_seed if config.episode_seed is None else config.episode_seed,
    )


def _episodes(
    path: Path,
    setting: _Setting,
    frozen: FrozenTasks | None,
    run: RunConfig,
    about: dict[str, Any],
    data_root: Path | None,
    where: torch.device,
    watcher: Watcher | None,
) -> tuple[Episodes, str | None]:
    """The tasks with images as the run's network takes them, and how these were converted, if they were."""
    elsewhere = setting.data != run.episodes.data
    channels, height, width = about["image_shape"]
    shape = channels, height, width
    if frozen is None or frozen.images is None:
        own = run.episodes
        of_folder = (None, None) if elsewhere else (own.image_size, own.split_seed)
        cache = run.training.data_cache
        dataset = load_dataset(setting.data, data_root or own.data_root, *of_folder, watcher=watcher, cache=cache)
        if frozen is not None:
            frozen = frozen.with_images_from(dataset)
        elif elsewhere:
            drawn = Episodes(dataset, *setting[1:5], seed=setting.episode_seed)
            frozen = freeze(drawn, setting.tasks)
        elif dataset.image_shape == shape:
            return Episodes(dataset.to(where), *setting[1:5], seed=setting.episode_seed), None
        else:
            raise DataError(f"{path} was trained on images {list(shape)}, but these are {dataset.image_shape}")
    assert frozen.images is not None  # they came with the file or were filled in above
    images, conversion = convert(frozen.images, shape)
    if conversion is not None and not elsewhere:
        raise DataError(f"{path} was trained on images {list(shape)}, but these are {frozen.image_shape}")
    return FrozenEpisodes(frozen, images.to(where), *_pixels(path, frozen, run, about, data_root)), conversion


def _pixels(path: Path, frozen: FrozenTasks, run: RunConfig, about: dict[str, Any], data_root: Path | None) -> Pixels:
    """How pixels were standardised when the run was trained; the images of any data set are standardised so."""
    recorded = recorded_pixels(about)
    if recorded is not None:
        return recorded
    if frozen.data == run.episodes.data:
        return Pixels(frozen.mean, frozen.std)
    try:
        data = run.episodes
        own = load_dataset(data.data, data.data_root or data_root, data.image_size, data.split_seed)
    except DataError as error:
        raise DataError(
            f"{path} was trained by a version that did not record how pixels were scaled, so {run.episodes.data} is "
            f"needed as well: {error}"
        ) from error
    return Pixels(own.mean, own.std)


_MADE_OF = {
    **dict.fromkeys(("cifar-fs", "fc100"), "CIFAR-100"),
    **dict.fromkeys(("miniimagenet", "tieredimagenet"), "ImageNet"),
    **dict.fromkeys(("omniglot", "omniglot-vinyals"), "Omniglot"),
}


def _caution(trained_on: str, data: str) -> str | None:
    origin = _MADE_OF.get(data)
    if trained_on == data or origin is None or origin != _MADE_OF.get(trained_on):
        return None
    return f"{trained_on} and {data} are both made of {origin}: classes judged on may have been trained on"
