"""The training loop: outer step, log, validation, checkpoint. A run can be resumed at any iteration, bit for bit.

θ and δ are drawn from the seed, and batch t of each stream is a function of the seed and t. So the state of a run is
its tensors and its iteration, and an interrupted run continues as if it had not been interrupted.
"""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from metaheed.config import CHUNKED, ExecutionName, ReplayedConfig, RunConfig
from metaheed.data import check_name
from metaheed.errors import ConfigError, Interrupted, NonFiniteError, RunError, option
from metaheed.files.trust import allow
from metaheed.learners import find_backbone
from metaheed.outer import OuterState, build_steps, closing_workers, describe_execution, pick_for_run
from metaheed.running.checkpoint import Checkpoint, RunProgress, check_same_run, check_same_shapes
from metaheed.running.folder import RunFolder
from metaheed.running.process import (
    Signals,
    StopRequested,
    cpu_threads,
    float32_products,
    pick_device,
    signals_received,
    translate_memory_errors,
    translate_start_errors,
)
from metaheed.running.reporter import Reporter, Several
from metaheed.running.session import Session, move_state, prepare
from metaheed.running.trackers import TensorBoard, check_tensorboard
from metaheed.running.tracking import IterationClock, log_number, log_step, open_logs


def train(config: RunConfig, reporter: Reporter | None = None, trust: bool = False) -> Path:
    """Train a new run.

    Settings are checked before the folder is made. If data or network turn out to be unusable before the first
    iteration, the folder is removed again.

    Args:
        config: the run's config.
        reporter: receives the progress; by default nothing is reported.
        trust: allow the code of the network that a recipe names, if it is not metaheed's. A network that the caller
            names in `config` is allowed.

    Returns:
        The run folder.

    Raises:
        ConfigError, DataError: the config, the data or the network cannot be used.
        RunError: the folder holds a run already, is being trained in, or cannot be written.
        NonFiniteError: a loss or gradient stopped being finite; the last checkpoint is kept.
        OutOfMemoryError: the tasks computed at once do not fit; the last checkpoint is kept.
        StartError, WorkerError: a thread or worker process cannot be started, or a worker died; the last checkpoint is
            kept.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    check_name(config.episodes.data)
    learner = config.learner.from_anywhere()
    if trust:
        allow(learner.backbone, learner.backbone_path)
    find_backbone(learner.backbone, learner.backbone_path)
    allow(learner.backbone, learner.backbone_path)  # the user named it: allow it for later commands on this run
    training = config.training
    device = pick_device(training.device)
    training = replace(
        training,
        device=str(device),
        execution=resolve_execution(training.execution, device, config),
        threads=training.threads or torch.get_num_threads(),
        out=training.out or Path("runs") / config.run_name,
    )
    root = config.episodes.data_root
    episodes = replace(config.episodes, data_root=root and root.expanduser().absolute())
    rule = config.rule
    if isinstance(rule, ReplayedConfig) and rule.replay is not None:
        rule = replace(rule, replay=rule.replay.expanduser().absolute())
    config = replace(config, training=training, episodes=episodes, learner=learner, rule=rule)
    if config.training.tensorboard:
        check_tensorboard()
    assert training.out is not None  # set above
    folder = RunFolder(training.out)
    made = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
    try:
        with folder.locked():
            if folder.holds_a_run():
                raise RunError(
                    f"{folder.path} holds a run already: continue it with 'metaheed train --resume {folder.path}', "
                    f"or choose another {option('out')}"
                )
            try:
                folder.write_config(config)
                _run(folder, config, reporter or Reporter())
            except (Interrupted, NonFiniteError):
                raise
            except Exception:  # a run that has not begun leaves no folder, which would refuse the next attempt
                logs = (folder.metrics_file, folder.tasks_file)
                begun = folder.last.exists() or not folder.is_ours()
                if not begun and not any(log.exists() and log.stat().st_size for log in logs):  # no iteration was done
                    made_here = (folder.config_file, folder.lock_file, folder.start_file, folder.replayed_file)
                    for file in (*made_here, folder.classes_file, *logs, folder.timing_file):
                        file.unlink(missing_ok=True)
                raise
    finally:
        with contextlib.suppress(OSError):  # not empty, because it holds the run
            for path in made:
                path.rmdir()
    return folder.path


def resolve_execution(execution: ExecutionName, device: torch.device, config: RunConfig) -> ExecutionName:
    """The execution that the config's choice, which may be auto, stands for on this device."""
    if execution == "auto" and config.training.chunk_size is not None:
        return "vectorized"  # of the executions that take chunks, the one that auto would choose
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
    """Continue a run from its newest whole checkpoint, with the same bits as if it had not been interrupted.

    Args:
        path: the run folder.
        iterations: train to this number of outer steps instead, which must not be below the number done.
        data_root: folder of the data sets, if it has moved.
        device: compute on this device instead, where the bits may differ. On another kind of device the execution is
            chosen anew.
        reporter: receives the progress; by default nothing is reported.
        execution, chunk_size: compute batches in this way instead; the bits may differ.
        capture: whether to capture the outer step in a CUDA graph, instead of as before.
        trust: allow the code of the network that the run folder names, if it is not metaheed's and not allowed yet.

    Raises:
        As `train`; RunError also if the folder holds no run.
    """
    reporter = reporter or Reporter()
    folder = RunFolder(path)
    learner = folder.read_config(trust).learner
    # Refuse a folder without a run, and a network that is missing or not allowed, before anything is written there.
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
            execution = resolve_execution(execution, torch.device(training.device), config)
            kept = training.chunk_size if execution in CHUNKED else None
            training = replace(training, execution=execution, chunk_size=kept)
        if chunk_size is not None:
            training = replace(training, chunk_size=chunk_size)
        if capture is not None:
            training = replace(training, capture=capture)
        if data_root is not None:
            episodes = replace(episodes, data_root=Path(data_root).expanduser().absolute())
        config = replace(config, training=training, episodes=episodes)
        if config.training.tensorboard:
            check_tensorboard()
        _run(folder, config, reporter)
    return folder.path


@translate_start_errors()
def _run(folder: RunFolder, config: RunConfig, reporter: Reporter) -> None:
    training = config.training
    with closing_workers(), cpu_threads(training), float32_products(training.tf32), signals_received() as received:
        folder.remove_leftovers()
        checkpoint, notices = folder.read_checkpoint()
        for notice in notices:
            reporter.message(notice)
        if checkpoint is None and notices:
            reporter.message("no whole checkpoint is left; starting at iteration 0")
        if checkpoint is not None:
            check_same_run(config, checkpoint.run, f"the newest checkpoint of {folder.path}")
        done = checkpoint.progress.iteration if checkpoint else 0
        if config.training.iterations < done:
            raise ConfigError(
                f"{option('iterations')} is {config.training.iterations}, but {folder.path} has done {done}: "
                "it can be raised, not lowered"
            )
        if checkpoint is not None and _finished(checkpoint.progress, config):
            folder.check_logs()
            folder.write_best(checkpoint)
            written = folder.read_config()
            if written.training.iterations != config.training.iterations:
                # The run was shortened to what the checkpoint has: truncate the logs to the checkpoint.
                for log in open_logs(folder, checkpoint.progress):
                    log.close()
                lowered = replace(written.training, iterations=config.training.iterations)
                folder.write_config(replace(written, training=lowered))
            reporter.message(f"{folder.path} is finished: all {config.training.iterations} iterations are done")
            return
        try:
            with received.interrupting():
                session, initial = prepare(config, folder, reporter)
        except StopRequested:
            raise Interrupted(
                f"stopped before iteration {done + 1}; continue with 'metaheed train --resume {folder.path}'",
                received[0],
            ) from None
        if checkpoint is None:
            checkpoint = initial
        else:
            for part, configured, found in zip(OuterState._fields, initial.state, checkpoint.state, strict=True):
                check_same_shapes(configured, found, f"the checkpoint of {folder.path} (its {part} state)")
            folder.write_best(checkpoint)
            reporter.message(f"resuming {folder.path} after iteration {checkpoint.progress.iteration}")
        if config != folder.read_config():
            folder.write_config(config)
        B, images_there = config.outer.meta_batch_size, session.streams.lie_on(session.device)
        reporter.message(describe_execution(training, session.device, B, session.learner, images_there))
        with translate_memory_errors(config, session.device, B, session.learner, lambda: session.task_bytes):
            _loop(session, folder, checkpoint, reporter, received)


def _finished(progress: RunProgress, config: RunConfig) -> bool:
    total = config.training.iterations
    return progress.iteration >= total and progress.validated >= total


def _remedy() -> str:
    return (
        f"Checkpoints before it, if any, are kept; lower {option('fast_lr')} or {option('meta_lr')}, or set "
        f"{option('clip_norm')}"
    )


def _loop(session: Session, folder: RunFolder, start: Checkpoint, reporter: Reporter, received: Signals) -> None:
    training = session.config.training
    progress, best = start.progress, start.best
    steps = build_steps(
        training,
        session.device,
        session.rule,
        session.tools,
        session.streams,
        move_state(start.state, session.device),
        reporter.message,
        received.interrupting,
    )
    metrics, tasks = open_logs(folder, progress)
    folder.watch_config()
    clock = IterationClock(session, folder, progress.iteration)

    def save() -> None:
        nonlocal progress
        folder.check_unaltered()
        # A change that is missed here is found at the next checkpoint; after the last one it would not be.
        whole = _finished(progress, session.config)
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

    if training.tensorboard:
        reporter = Several(reporter, TensorBoard(folder.events))

    def judged_so_far(tasks: int) -> None:
        check_stop()
        reporter.validating(tasks, training.val_tasks)

    reporter.start(progress.iteration, training.iterations)
    try:
        while not _finished(progress, session.config):
            done = progress.iteration
            due = done % training.val_every == 0 or done == training.iterations
            if done > progress.validated and due:
                meta = steps.state.meta
                try:
                    with received.interrupting():
                        judged_so_far(0)
                        judged = session.validation(meta, judged_so_far)
                except NonFiniteError as error:
                    raise NonFiniteError(f"validation after iteration {done}: {error}. {_remedy()}") from error
                accuracy, half_width, loss = judged
                better = accuracy > progress.best_accuracy
                progress = progress._replace(validated=done)
                if better:
                    progress = progress._replace(best_iteration=done, best_accuracy=accuracy)
                    best = dict(meta)
                line = {"iteration": done, "validation_accuracy": accuracy, "validation_loss": log_number(loss)}
                metrics.write(line)
                reporter.log(done, {"validation/accuracy": accuracy, "validation/loss": loss})
                reporter.validation(done, accuracy, half_width, better)
                # Save at once, because a validation takes as long as many steps.
                save()
                continue
            check_stop()
            every = (training.val_every, training.checkpoint_every)
            ahead = min(training.iterations - done, *(interval - done % interval for interval in every))
            try:
                with clock:
                    for record in steps.advance(done, min(ahead, steps.block), lambda: bool(received)):
                        progress = progress._replace(iteration=progress.iteration + 1)
                        loss, accuracy = log_step(record, progress.iteration, metrics, tasks, reporter)
                        reporter.step(progress.iteration, loss, accuracy)
            except NonFiniteError as error:
                raise NonFiniteError(f"iteration {progress.iteration + 1}: {error}. {_remedy()}") from error
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
        metrics.close()
        tasks.close()
        clock.close()
