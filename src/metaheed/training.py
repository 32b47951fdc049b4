"""The training loop: rule step, log, validation, checkpoint; resumable at any iteration, bit for bit.

Nothing here is random: θ and δ are drawn from the seed, and batch t of each stream is a function of the seed and t. So
the state of a run is its tensors and its iteration, and a run that was cut off continues as if it never had been.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from metaheed.config import CHUNKED, AttendedConfig, ExecutionName, ReplayedConfig, RunConfig
from metaheed.data import Dataset, Episodes, Split, check_name, load_dataset
from metaheed.data.images import make_split
from metaheed.errors import (
    ConfigError,
    Interrupted,
    NonFiniteError,
    OutOfMemoryError,
    RunError,
)
from metaheed.evaluation import evaluate, interval
from metaheed.learners import Learner, NetworkLearner, build_learner, find_backbone, place_constants
from metaheed.outer import (
    OuterState,
    Rule,
    StepRecord,
    Streams,
    Tools,
    adapted_outcome,
    build_execution,
    build_optimizer,
    build_rule,
    build_steps,
    check_gradient,
    describe_execution,
    initial_gradient,
    pick_for_run,
    plain_gradient,
    task_gradient,
    workers_ended,
)
from metaheed.process import (
    Signals,
    StopRequested,
    check_batch_fits,
    cpu_threads,
    describe_processor,
    failures_explained,
    float32_products,
    is_out_of_memory,
    memory_explained,
    peak_memory,
    pick_device,
    signals_received,
    starts_explained,
)
from metaheed.runs import (
    Checkpoint,
    JsonLines,
    Pixels,
    Progress,
    RunFolder,
    build_judged_learner,
    check_fits,
    check_is_of,
)
from metaheed.starting import read_weights, start_from
from metaheed.trust import allow
from metaheed.types import Episode, Params

VALIDATION_SEED = 0
"""The frozen validation tasks are the same for every run and seed."""


class Reporter(Protocol):
    """Who is told how training goes."""

    def start(self, iteration: int, iterations: int) -> None:
        """Training begins after `iteration`."""

    def step(self, iteration: int, loss: float, accuracy: float) -> None:
        """An outer step is done; means over the meta-batch."""

    def validation(self, iteration: int, accuracy: float, half_width: float, best: bool) -> None:
        """A validation is done."""

    def message(self, text: str) -> None:
        """Something worth a line."""

    def stop(self) -> None:
        """No more will be told."""


class Silent:
    """A reporter that says nothing."""

    def start(self, iteration: int, iterations: int) -> None:  # noqa: D102
        pass

    def step(self, iteration: int, loss: float, accuracy: float) -> None:  # noqa: D102
        pass

    def validation(self, iteration: int, accuracy: float, half_width: float, best: bool) -> None:  # noqa: D102
        pass

    def message(self, text: str) -> None:  # noqa: D102
        pass

    def stop(self) -> None:  # noqa: D102
        pass


def train(config: RunConfig, reporter: Reporter | None = None, trust: bool = False) -> Path:
    """Train a new run.

    What can be known to be wrong is refused before the folder is made; if data or network turn out unusable before the
    first iteration, the folder is removed again.

    Args:
        config: of the run.
        reporter: told how it goes.
        trust: let the code of a network run that a recipe names and is not one of ours. What the caller names himself
            is his word already.

    Returns:
        The run folder.

    Raises:
        ConfigError, DataError: the setting, the data or the network cannot be used.
        RunError: the folder holds a run already, is being trained in, or cannot be written.
        NonFiniteError: a loss or gradient stopped being finite; the last checkpoint is kept.
        OutOfMemoryError: the tasks computed at once do not fit; the last checkpoint is kept.
        StartError, WorkerError: a thread or worker process cannot be started, or a worker died; the same.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    check_name(config.episodes.data)
    learner = config.learner.from_anywhere()
    if trust:
        allow(learner.backbone, learner.backbone_path)
    find_backbone(learner.backbone, learner.backbone_path)
    allow(learner.backbone, learner.backbone_path)  # named by the user: so this run can be used without his saying so
    training = config.training
    device = pick_device(training.device)
    training = replace(
        training,
        device=str(device),
        execution=_picked(training.execution, device, config),
        threads=training.threads or torch.get_num_threads(),
        out=training.out or Path("runs") / config.run_name,
    )
    root = config.episodes.data_root
    episodes = replace(config.episodes, data_root=root and root.expanduser().absolute())
    rule = config.rule
    if isinstance(rule, ReplayedConfig) and rule.replay is not None:
        rule = replace(rule, replay=rule.replay.expanduser().absolute())
    config = replace(config, training=training, episodes=episodes, learner=learner, rule=rule)
    _check_tensorboard(config)
    assert training.out is not None  # set above
    folder = RunFolder(training.out)
    made = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
    try:
        with folder.locked():
            if folder.holds_a_run():
                raise RunError(
                    f"{folder.path} holds a run already: continue it with 'metaheed train --resume {folder.path}', "
                    "or choose another --out"
                )
            try:
                folder.write_config(config)
                _run(folder, config, reporter or Silent())
            except (Interrupted, NonFiniteError):
                raise
            except Exception:  # whatever it was, a run that has not begun leaves no folder that refuses the next
                logs = (folder.metrics_file, folder.tasks_file)
                begun = folder.last.exists() or not folder.is_ours()
                if not begun and not any(log.exists() and log.stat().st_size for log in logs):  # no iteration was done
                    made_here = (folder.config_file, folder.lock_file, folder.start_file, folder.replayed_file)
                    for file in (*made_here, folder.classes_file, *logs, folder.timing_file):
                        file.unlink(missing_ok=True)
                raise
    finally:
        with contextlib.suppress(OSError):  # not empty: the run is there
            for path in made:
                path.rmdir()
    return folder.path


def _picked(execution: ExecutionName, device: torch.device, config: RunConfig) -> ExecutionName:
    if execution == "auto" and config.training.chunk_size is not None:
        return "vectorized"  # of those with chunks the one that auto would take
    return pick_for_run(config, execution, device, config.outer.meta_batch_size)


def resume(
    path: str | Path,
    iterations: int | None = None,
    data_root: str | Path | None = None,
    device: str | None = None,
    reporter: Reporter | None = None,
    execution: ExecutionName | None = None,
    chunk_size: int | None = None,
    capture: Literal["auto", "on", "off"] | None = None,
    trust: bool = False,
) -> Path:
    """Continue a run where its newest whole checkpoint stands, to the bits it would have had uninterrupted.

    Args:
        path: the run folder.
        iterations: train to this many instead; not fewer than are done.
        data_root: where the data lies now; none: where it lay.
        device: compute here instead, and give up on the same bits; a device of another kind has its own execution.
        reporter: told how it goes.
        execution, chunk_size: compute so instead, and give up on the same bits.
        capture: make the steps so instead.
        trust: let the code of a network run that the run folder names, is not one of ours, and was not allowed before.

    Raises:
        As `train`; RunError also where the folder holds no run.
    """
    reporter = reporter or Silent()
    folder = RunFolder(path)
    learner = folder.read_config(trust).learner
    # Refuses what is not a run, or may not be run, before anything is made there.
    find_backbone(learner.backbone, learner.backbone_path)
    with folder.locked():
        config = folder.read_config()
        training, episodes = config.training, config.episodes
        if iterations is not None:
            training = replace(training, iterations=iterations)
        if device is not None:
            here = pick_device(device)
            if here.type != torch.device(training.device).type and execution is None:
                execution = "auto"
            training = replace(training, device=str(here))
        if execution is not None:
            execution = _picked(execution, torch.device(training.device), config)
            kept = training.chunk_size if execution in CHUNKED else None
            training = replace(training, execution=execution, chunk_size=kept)
        if chunk_size is not None:
            training = replace(training, chunk_size=chunk_size)
        if capture is not None:
            training = replace(training, capture=capture)
        if data_root is not None:
            episodes = replace(episodes, data_root=Path(data_root).expanduser().absolute())
        config = replace(config, training=training, episodes=episodes)
        _check_tensorboard(config)
        _run(folder, config, reporter)
    return folder.path


@dataclass
class _Session:
    """One process's work on a run."""

    config: RunConfig
    learner: Learner
    rule: Rule
    tools: Tools
    streams: Streams
    validation: Callable[[Params, Callable[[int], None]], tuple[float, float, float]]
    dataset: Dataset
    device: torch.device
    drawn: Params
    """θ as the seed draws it."""
    task_bytes: int | None = None
    """Memory that one task's gradient takes, where it was measured."""

    @property
    def pixels(self) -> Pixels:
        return Pixels(self.dataset.mean, self.dataset.std)


@starts_explained()
def _run(folder: RunFolder, config: RunConfig, reporter: Reporter) -> None:
    training = config.training
    with workers_ended(), cpu_threads(training), float32_products(training.tf32), signals_received() as received:
        folder.remove_leftovers()
        checkpoint, notices = folder.read_checkpoint()
        for notice in notices:
            reporter.message(notice)
        if checkpoint is None and notices:
            reporter.message("no whole checkpoint is left; starting at iteration 0")
        if checkpoint is not None:
            check_is_of(config, checkpoint.run, f"the newest checkpoint of {folder.path}")
        done = checkpoint.progress.iteration if checkpoint else 0
        if config.training.iterations < done:
            raise ConfigError(
                f"--iterations is {config.training.iterations}, but {folder.path} has done {done}: "
                "it can be raised, not lowered"
            )
        if checkpoint is not None and _finished(checkpoint.progress, config):
            folder.check_logs()
            folder.write_best(checkpoint)
            written = folder.read_config()
            if written.training.iterations != config.training.iterations:
                # Lowered to what the checkpoint has: what was logged after it was is of no run any more.
                for log in _open_logs(folder, checkpoint.progress):
                    log.close()
                lowered = replace(written.training, iterations=config.training.iterations)
                folder.write_config(replace(written, training=lowered))
            reporter.message(f"{folder.path} is finished: all {config.training.iterations} iterations are done")
            return
        try:
            with received.interrupting():
                session, fresh = _prepare(config, folder, reporter)
        except StopRequested:
            raise Interrupted(
                f"stopped before iteration {done + 1}; continue with 'metaheed train --resume {folder.path}'",
                received[0],
            ) from None
        if checkpoint is None:
            checkpoint = fresh
        else:
            for part, configured, found in zip(OuterState._fields, fresh.state, checkpoint.state, strict=True):
                check_fits(configured, found, f"the checkpoint of {folder.path} (its {part} state)")
            folder.write_best(checkpoint)
            reporter.message(f"resuming {folder.path} after iteration {checkpoint.progress.iteration}")
        if config != folder.read_config():
            folder.write_config(config)
        B, images_there = config.outer.meta_batch_size, session.streams.lie_on(session.device)
        reporter.message(describe_execution(training, session.device, B, session.learner, images_there))
        with memory_explained(config, session.device, B, session.learner, lambda: session.task_bytes):
            _loop(session, folder, checkpoint, reporter, received)


def _prepare(config: RunConfig, folder: RunFolder, reporter: Reporter) -> tuple[_Session, Checkpoint]:
    """Data, network and rule, tried out; and the state before the first iteration."""
    data = config.episodes
    dataset = load_dataset(data.data, data.data_root, data.image_size, data.split_seed)
    dataset = _on_device(dataset, pick_device(config.training.device))
    folder.record_classes(dataset)
    session = _set_up(config, dataset, folder)
    if session.dataset.origin:
        reporter.message(f"data: {session.dataset.origin}")
    fresh = _fresh(session, _given_start(config, session, folder, reporter))
    with memory_explained(config, session.device, 1, session.learner):
        _try_out(session, fresh.state.meta, reporter.message)
    return session, fresh


class Speed(NamedTuple):
    """How long work takes, in seconds."""

    iteration: float
    """An outer step."""
    task: float
    """Adapting to a frozen task and judging it."""


_ENOUGH = 0.5  # seconds of steps that are timed
_BLOCK = 10  # steps at once, where they are made in blocks
_FEW = 4  # tasks judged


@starts_explained()
def measure_speed(config: RunConfig, image_shape: tuple[int, int, int]) -> Speed:
    """What a run's outer steps and its judging take on this machine, on images of noise; nothing is read or written.

    A first step that takes longer than half a second is the measure, what it sets up included; else it is left out, and
    steps are made after it until they have taken as long.

    Raises:
        ConfigError: the setting, the network or the device cannot be used, or the rule replays another run.
        OutOfMemoryError: the tasks computed at once do not fit.
        NonFiniteError: on noise the first steps are not finite.
    """
    device = pick_device(config.training.device)
    execution = _picked(config.training.execution, device, config)
    training = replace(config.training, device=str(device), execution=execution, val_tasks=_FEW)
    config = replace(config, training=training)
    with workers_ended(), cpu_threads(training), float32_products(training.tf32):
        session = _set_up(config, _on_device(_noise(config, image_shape), device), None)
        with memory_explained(config, device, config.outer.meta_batch_size, session.learner):
            return Speed(_time_steps(session), _time_judging(session))


def _noise(config: RunConfig, image_shape: tuple[int, int, int]) -> Dataset:
    """Random images, of as many classes as the config's tasks need."""
    generator = np.random.default_rng(0)

    def split(name: str, ways: int, shots: int, queries: int) -> Split:
        classes = [f"{name} {k}" for k in range(ways)]
        shape = (shots + queries, *image_shape)
        return make_split(name, classes, [generator.integers(0, 256, shape, np.uint8) for _ in classes])

    splits = {"train": split("train", *config.episodes.train_shape)}
    splits |= {name: split(name, *config.episodes.test_shape) for name in ("val", "test")}
    return Dataset("noise", splits, (0.5,) * image_shape[0], (0.3,) * image_shape[0])


def _time_steps(session: _Session) -> float:
    training, device = session.config.training, session.device
    state = _to(_fresh(session).state, device)
    steps = build_steps(training, device, session.rule, session.tools, session.streams, state, lambda _: None)
    done, counted, taken = 0, 0, 0.0
    try:
        for call in itertools.count():
            began = time.perf_counter()
            made = len(list(steps.advance(done, min(_BLOCK, steps.block), lambda: False)))
            seconds = time.perf_counter() - began
            done += made
            # The first call sets up what the others use; on a device the second one captures the step.
            if (call < 2) if device.type == "cuda" else (call == 0 and seconds < _ENOUGH):
                continue
            counted, taken = counted + made, taken + seconds
            if taken >= _ENOUGH and counted:
                break
    finally:
        steps.close()
    return taken / counted


def _time_judging(session: _Session) -> float:
    meta = _to(_fresh(session).state, session.device).meta
    began = time.perf_counter()
    session.validation(meta, lambda _: None)
    return (time.perf_counter() - began) / _FEW


def _finished(progress: Progress, config: RunConfig) -> bool:
    total = config.training.iterations
    return progress.iteration >= total and progress.validated >= total


def _set_up(config: RunConfig, dataset: Dataset, folder: RunFolder | None) -> _Session:
    device = pick_device(config.training.device)
    # All episodes before the network, so that tasks the data cannot give are refused as such, test tasks included:
    # rather now than after a long training.
    shape, seed = config.episodes.train_shape, config.training.seed
    training, probe = (Episodes(dataset, "train", *shape, seed, stream=name) for name in ("train", "probe"))
    streams = Streams(training, probe, config.outer.meta_batch_size)
    frozen, _ = (Episodes(dataset, name, *config.episodes.test_shape, VALIDATION_SEED) for name in ("val", "test"))
    learner = build_learner(config.learner, config.episodes.ways, dataset.image_shape, seed)
    test_ways, judged = config.episodes.test_shape[0], learner
    if config.learner.any_ways and test_ways != config.episodes.ways:
        judged = build_judged_learner(config, test_ways, dataset.image_shape)
    drawn = learner.init(torch.Generator().manual_seed(seed))
    check_batch_fits(config, device, dataset.image_shape, sum(p.numel() * p.element_size() for p in drawn.values()))
    for each in {learner, judged}:
        place_constants(each, device)
    tools = Tools(
        gradients=build_execution(config.training, device, learner, task_gradient),
        initial_gradients=build_execution(config.training, device, learner, initial_gradient),
        optimizer=build_optimizer(config.outer),
        train=lambda t: streams.batch("training", t),
        probe=lambda t: streams.batch("probe", t),
        plain_gradients=(
            None
            if config.training.log_initial_loss
            else build_execution(config.training, device, learner, plain_gradient)
        ),
    )
    outcome = build_execution(config.training, device, judged, adapted_outcome)

    def validation(meta: Params, on_tasks: Callable[[int], None]) -> tuple[float, float, float]:
        outcomes = evaluate(outcome, meta, frozen, config.training.val_tasks, on_tasks)
        return *interval(outcomes.accuracies), float(outcomes.losses.mean())

    # δ has a generator of its own, so that θ's start is the same under every rule.
    logged = None
    if folder is not None and isinstance(config.rule, ReplayedConfig):
        logged = _logged_weights(folder, config)
    rule = build_rule(config, torch.Generator().manual_seed(seed + 1), logged)
    return _Session(config, learner, rule, tools, streams, validation, dataset, device, drawn)


def _on_device(dataset: Dataset, device: torch.device) -> Dataset:
    try:
        return dataset.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = sum(split.images.numel() for split in dataset.splits.values()) / 2**30
        raise OutOfMemoryError(
            f"the images of {dataset.name} take {size:.1f} GiB, which the memory of {device} does not hold: "
            "set --device cpu, or another one"
        ) from error


def _logged_weights(folder: RunFolder, config: RunConfig) -> torch.Tensor:
    """The weights to replay: this run's copy of them, made at its start; or, where that is too short, the source's."""
    needed, B = config.training.iterations, config.outer.meta_batch_size
    copied = folder.read_replayed()
    if copied is not None and copied.shape[1] == B and len(copied) >= needed:
        return copied
    assert isinstance(config.rule, ReplayedConfig)
    if config.rule.replay is None:
        raise ConfigError("--replay is missing: name the folder of the attended run whose weights are to be replayed")
    source = RunFolder(config.rule.replay)
    theirs = source.read_config()
    ours = (config.learner.name, replace(config.episodes, data_root=None), config.training.seed, B)
    if not isinstance(theirs.rule, AttendedConfig) or ours != (
        theirs.learner.name,
        replace(theirs.episodes, data_root=None),
        theirs.training.seed,
        theirs.outer.meta_batch_size,
    ):
        raise ConfigError(
            f"{source.path} is a run of {theirs.algorithm} with seed {theirs.training.seed} and meta-batches of "
            f"{theirs.outer.meta_batch_size}; this one, with seed {config.training.seed} and {B}, can replay an "
            "attended run of the same learner, tasks, seed and meta-batch size only"
        )
    weights = source.read_weights_log()
    if len(weights) < needed or weights.shape[1] != B:
        raise ConfigError(
            f"{source.path} logged the weights of {len(weights)} batches of {weights.shape[1]} tasks, but this run "
            f"needs {needed} of {B}: lower --iterations, or train that run on"
        )
    folder.write_replayed(weights)
    return weights


def _try_out(session: _Session, meta: Params, notice: Callable[[str], None]) -> None:
    """A few gradients of two tasks: refuses a network that cannot be differentiated twice, whose derivatives are wrong,
    or that does not give the same task the same result every time.

    Raises:
        ConfigError: says what the network does, and the remedy.
    """
    training, learner = session.config.training, session.learner
    meta = {name: p.to(session.device) for name, p in meta.items()}
    backbone = session.config.learner.backbone
    execution = build_execution(training, session.device, learner, task_gradient)
    tasks = session.streams.episodes["training"]
    task, other = tasks.batch(0, 1), tasks.batch(1, 1)
    on_cuda = session.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(session.device)
        before = torch.cuda.memory_allocated(session.device)

    own_network = isinstance(learner, NetworkLearner) and not learner.backbone.is_ours
    with failures_explained(session.config, session.device, learner, meta, lambda: task, judging=False):
        if isinstance(learner, NetworkLearner):
            learner.backbone.examine(learner.initial(meta), task.support_x[0])
        _, info = execution(meta, task)
        if own_network:
            execution(meta, other)  # what it leaves behind must not change the next task's result
        _, again = execution(meta, task)
    if on_cuda:
        session.task_bytes = torch.cuda.max_memory_allocated(session.device) - before
    # Kernels of a GPU may round differently from call to call; a loss that is not finite is found by the loop.
    if not torch.allclose(info.query_loss, again.query_loss, rtol=1e-6, equal_nan=True):
        raise ConfigError(
            f"backbone {backbone!r} gave the same task the losses {float(info.query_loss)} and "
            f"{float(again.query_loss)}: adaptation must be one and the same function every time, so remove what is "
            "random in it (functional dropout, say) or changes with each call"
        )
    if own_network and training.check_gradient:
        try:
            executed = partial(build_execution, training, session.device)
            unknown = check_gradient(learner, meta, Episode(*(part[0] for part in task)), executed)
        except ConfigError as error:
            raise ConfigError(f"backbone {backbone!r}: {error}") from error
        if unknown is not None:
            notice(f"backbone {backbone!r}: {unknown}")


def _given_start(config: RunConfig, session: _Session, folder: RunFolder, reporter: Reporter) -> Params | None:
    """θ of the weights that a run was told to start from, kept in its folder; none: it starts from drawn ones."""
    if config.learner.init_from is None:
        return None
    kept = folder.read_start()
    if kept is None:
        source = config.learner.init_from
        kept = start_from(read_weights(source), session.learner, session.drawn, str(source), reporter.message)
        folder.write_start(kept)
    return kept


def _fresh(session: _Session, meta: Params | None = None) -> Checkpoint:
    meta = session.drawn if meta is None else meta
    state = OuterState(meta, session.tools.optimizer.init(meta), session.rule.init(meta))
    return Checkpoint(Progress(), state, {}, session.dataset.image_shape, session.pixels, session.config.run_name)


_REMEDY = "Checkpoints before it, if any, are kept; lower --fast-lr or --meta-lr, or set --clip-norm"


def _loop(session: _Session, folder: RunFolder, start: Checkpoint, reporter: Reporter, received: Signals) -> None:
    training = session.config.training
    progress, best = start.progress, start.best
    steps = build_steps(
        training,
        session.device,
        session.rule,
        session.tools,
        session.streams,
        _to(start.state, session.device),
        reporter.message,
        received.interrupting,
    )
    metrics, tasks = _open_logs(folder, progress)
    folder.watch_config()
    clock = _Clock(session, folder, progress.iteration)
    events = _Events(session.config, folder, progress.iteration)

    def save() -> None:
        nonlocal progress
        folder.check_unaltered()
        whole = _finished(progress, session.config)  # nothing follows that would find what was missed
        (m_bytes, m_sha256), (t_bytes, t_sha256) = metrics.sync(whole), tasks.sync(whole)
        progress = progress._replace(
            metrics_bytes=m_bytes, tasks_bytes=t_bytes, metrics_sha256=m_sha256, tasks_sha256=t_sha256
        )
        about_images = session.dataset.image_shape, session.pixels
        folder.write_checkpoint(Checkpoint(progress, steps.state, best, *about_images, session.config.run_name))
        clock.write(progress.iteration)

    def check_stop(_: int = 0) -> None:
        if received:
            raise StopRequested

    reporter.start(progress.iteration, training.iterations)
    try:
        while not _finished(progress, session.config):
            done = progress.iteration
            due = done % training.val_every == 0 or done == training.iterations
            if done > progress.validated and due:
                meta = steps.state.meta
                try:
                    with received.interrupting():
                        judged = session.validation(meta, check_stop)
                except NonFiniteError as error:
                    raise NonFiniteError(f"validation after iteration {done}: {error}. {_REMEDY}") from error
                accuracy, half_width, loss = judged
                better = accuracy > progress.best_accuracy
                progress = progress._replace(validated=done)
                if better:
                    progress = progress._replace(best_iteration=done, best_accuracy=accuracy)
                    best = dict(meta)
                line = {"iteration": done, "validation_accuracy": accuracy, "validation_loss": _short(loss)}
                metrics.write(line)
                events.write(done, {"validation/accuracy": accuracy, "validation/loss": loss})
                reporter.validation(done, accuracy, half_width, better)
                # Kept at once: a validation costs as much as many steps.
                save()
                continue
            check_stop()
            every = (training.val_every, training.checkpoint_every)
            ahead = min(training.iterations - done, *(interval - done % interval for interval in every))
            try:
                with clock:
                    for record in steps.advance(done, min(ahead, steps.block), lambda: bool(received)):
                        progress = progress._replace(iteration=progress.iteration + 1)
                        loss, accuracy = _log(record, progress.iteration, metrics, tasks, events)
                        reporter.step(progress.iteration, loss, accuracy)
            except NonFiniteError as error:
                raise NonFiniteError(f"iteration {progress.iteration + 1}: {error}. {_REMEDY}") from error
            if progress.iteration > done and progress.iteration % training.checkpoint_every == 0:
                save()
    except StopRequested:
        save()
        raise Interrupted(
            f"stopped after iteration {progress.iteration}; continue with 'metaheed train --resume {folder.path}'",
            received[0],
        ) from None
    finally:
        reporter.stop()
        steps.close()
        events.close()
        metrics.close()
        tasks.close()
        clock.close()


def _open_logs(folder: RunFolder, progress: Progress) -> tuple[JsonLines, JsonLines]:
    """metrics.jsonl and tasks.jsonl, cut back to where the checkpoint was written."""
    return (
        JsonLines(folder.metrics_file, progress.metrics_bytes, progress.metrics_sha256),
        JsonLines(folder.tasks_file, progress.tasks_bytes, progress.tasks_sha256),
    )


def _log(
    record: StepRecord, iteration: int, metrics: JsonLines, tasks: JsonLines, events: "_Events"
) -> tuple[float, float]:
    columns = {name: values.tolist() for name, values in record.info._asdict().items()}
    columns["weights"] = record.weights.tolist()
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    loss, accuracy = means["query_loss"], means["query_accuracy"]
    metrics.write(
        {
            "iteration": iteration,
            "loss": _short(loss),
            "accuracy": _short(accuracy),
            "initial_loss": _short(means["initial_loss"]),
        }
    )
    tasks.write({"iteration": iteration, **{name: [_short(v) for v in values] for name, values in columns.items()}})
    weights = columns["weights"]
    events.write(
        iteration,
        {
            "train/loss": loss,
            "train/accuracy": accuracy,
            "attention/largest_weight": max(weights),
            "attention/smallest_weight": min(weights),
        },
    )
    return loss, accuracy


def _short(value: float) -> float | None:
    # What a float32 holds, and no more; JSON has no NaN.
    return None if math.isnan(value) else float(f"{value:.8g}")


def _to(state: OuterState, device: torch.device) -> OuterState:
    return OuterState(*({name: leaf.to(device) for name, leaf in tree.items()} for tree in state))


def _check_tensorboard(config: RunConfig) -> None:
    if config.training.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"--tensorboard needs 'pip install metaheed[tensorboard]' ({error})") from error


class _Events:
    """TensorBoard's scalars, where they were asked for."""

    def __init__(self, config: RunConfig, folder: RunFolder, iteration: int) -> None:
        self._writer: Any = None
        if config.training.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Events of iterations that a cut-off process did after its last checkpoint are purged.
            self._writer = SummaryWriter(str(folder.events), purge_step=iteration + 1)

    def write(self, iteration: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Clock:
    """timing.jsonl: seconds in iterations, those in validations and checkpoints left out, and memory."""

    def __init__(self, session: _Session, folder: RunFolder, iteration: int) -> None:
        file, training = folder.timing_file, session.config.training
        # Lines of iterations that are done again stay: they were measured. A run from the start begins a new file.
        self._lines = JsonLines(file, file.stat().st_size if iteration and file.exists() else 0)
        self._written, self._seconds, self._began = iteration, 0.0, 0.0
        self._device = session.device
        self._where = {
            "device": str(session.device),
            "processor": describe_processor(session.device),
            "threads": training.threads,
            "execution": training.execution,
        }

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._began

    def write(self, iteration: int) -> None:
        """Say what the iterations since the last line took."""
        steps = iteration - self._written
        if steps:
            seconds = float(f"{self._seconds:.6g}")
            taken = {"iteration": iteration, "iterations": steps, "seconds": seconds}
            self._lines.write({**taken, "peak_bytes": peak_memory(self._device), **self._where})
        self._written, self._seconds = iteration, 0.0

    def close(self) -> None:
        self._lines.close()
