"""What one process needs to work on a run: data, learner, rule and tools, built from the config and checked."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from metaheed.config import AttendedConfig, ReplayedConfig, RunConfig
from metaheed.data import Dataset, Episodes, load_dataset
from metaheed.errors import ConfigError, OutOfMemoryError, option
from metaheed.learners import Learner, NetworkLearner, build_learner, place_constants
from metaheed.outer import (
    OuterState,
    Rule,
    Streams,
    Tools,
    build_execution,
    build_optimizer,
    build_rule,
    check_gradient,
    evaluate_adapted,
    gradient_without_initial_loss,
    initial_gradient,
    task_gradient,
)
from metaheed.running.checkpoint import Checkpoint, Pixels, RunProgress
from metaheed.running.evaluate import evaluate
from metaheed.running.folder import RunFolder
from metaheed.running.load import build_judged_learner
from metaheed.running.process import (
    check_batch_fits,
    is_out_of_memory,
    pick_device,
    translate_memory_errors,
    translate_network_errors,
)
from metaheed.running.reporter import Reporter
from metaheed.running.starting import read_weights, start_from
from metaheed.running.statistics import interval
from metaheed.types import Episode, Params

VALIDATION_SEED = 0
"""Seed of the frozen validation tasks, which are the same for every run."""


@dataclass
class Session:
    """Everything that a process computes a run with."""

    config: RunConfig
    learner: Learner
    rule: Rule
    tools: Tools
    streams: Streams
    validation: Callable[[Params, Callable[[int], None]], tuple[float, float, float]]
    """(θ, called with the number of tasks done) -> (accuracy, half-width of its interval, loss)."""
    dataset: Dataset
    device: torch.device
    drawn: Params
    """θ as drawn from the seed."""
    task_bytes: int | None = None
    """Bytes of memory that one task's gradient takes; None if not measured."""

    @property
    def pixels(self) -> Pixels:
        """The mean and deviation by which pixels are standardised."""
        return Pixels(self.dataset.mean, self.dataset.std)


def prepare(config: RunConfig, folder: RunFolder, reporter: Reporter) -> tuple[Session, Checkpoint]:
    """Build and check a run's data, network and rule; returns them with the checkpoint before the first iteration."""
    data = config.episodes
    dataset = load_dataset(
        data.data,
        data.data_root,
        data.image_size,
        data.split_seed,
        watcher=reporter.watcher(),
        cache=config.training.data_cache,
    )
    dataset = on_device(dataset, pick_device(config.training.device))
    folder.record_classes(dataset)
    session = set_up(config, dataset, folder)
    if session.dataset.origin:
        reporter.message(f"data: {session.dataset.origin}")
    initial = initial_checkpoint(session, _read_or_keep_start(config, session, folder, reporter))
    with translate_memory_errors(config, session.device, 1, session.learner):
        _try_out(session, initial.state.meta, reporter.message)
    return session, initial


def set_up(config: RunConfig, dataset: Dataset, folder: RunFolder | None) -> Session:
    """Build everything that a run computes with from its config and its data.

    Args:
        config: the run's config.
        dataset: its data, on its device.
        folder: the run folder, which keeps the weights to be replayed; None if the run has none.
    """
    device = pick_device(config.training.device)
    # All episodes are built before the network, test tasks included, so that a data set with too few classes or images
    # is refused now and not after a long training.
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
        gradients_without_initial_loss=(
            None
            if config.training.log_initial_loss
            else build_execution(config.training, device, learner, gradient_without_initial_loss)
        ),
    )
    outcome = build_execution(config.training, device, judged, evaluate_adapted)

    def validation(meta: Params, on_tasks: Callable[[int], None]) -> tuple[float, float, float]:
        outcomes = evaluate(outcome, meta, frozen, config.training.val_tasks, on_tasks)
        return *interval(outcomes.accuracies), float(outcomes.losses.mean())

    # δ is drawn with a generator of its own, so that θ starts the same under every rule.
    logged = None
    if folder is not None and isinstance(config.rule, ReplayedConfig):
        logged = _logged_weights(folder, config)
    rule = build_rule(config, torch.Generator().manual_seed(seed + 1), logged)
    return Session(config, learner, rule, tools, streams, validation, dataset, device, drawn)


def on_device(dataset: Dataset, device: torch.device) -> Dataset:
    """The data set with its images on the device; OutOfMemoryError if they do not fit."""
    try:
        return dataset.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = sum(split.images.numel() for split in dataset.splits.values()) / 2**30
        raise OutOfMemoryError(
            f"the images of {dataset.name} take {size:.1f} GiB, which the memory of {device} does not hold: "
            f"set {option('device', 'cpu')}, or another device"
        ) from error


def _logged_weights(folder: RunFolder, config: RunConfig) -> torch.Tensor:
    """The task weights to replay, (iterations, B): this run's copy, or the other run's log if the copy is too short."""
    needed, B = config.training.iterations, config.outer.meta_batch_size
    copied = folder.read_replayed()
    if copied is not None and copied.shape[1] == B and len(copied) >= needed:
        return copied
    assert isinstance(config.rule, ReplayedConfig)
    if config.rule.replay is None:
        raise ConfigError(
            f"{option('replay')} is missing: name the folder of the attended run whose weights are to be replayed"
        )
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
            f"needs {needed} of {B}: lower {option('iterations')}, or train that run on"
        )
    folder.write_replayed(weights)
    return weights


def _try_out(session: Session, meta: Params, notice: Callable[[str], None]) -> None:
    """Compute a few gradients to find out whether training can use the network.

    Raises:
        ConfigError: the network cannot be differentiated twice, has wrong derivatives, or does not give the same result
            for the same task every time.
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
    with translate_network_errors(session.config, session.device, learner, meta, lambda: task, judging=False):
        if isinstance(learner, NetworkLearner):
            learner.backbone.examine(learner.initial(meta), task.support_x[0])
        _, info = execution(meta, task)
        if own_network:
            execution(meta, other)  # state that it keeps must not change the next task's result
        _, again = execution(meta, task)
    if on_cuda:
        session.task_bytes = torch.cuda.max_memory_allocated(session.device) - before
    # A GPU's kernels may round differently from call to call. A loss that is not finite is reported by the loop.
    if not torch.allclose(info.query_loss, again.query_loss, rtol=1e-6, equal_nan=True):
        raise ConfigError(
            f"backbone {backbone!r} gave the same task the losses {float(info.query_loss)} and "
            f"{float(again.query_loss)}: adaptation must be the same function every time, so remove what is "
            "random in it (such as functional dropout) or changes with each call"
        )
    if own_network and training.check_gradient:
        try:
            executed = partial(build_execution, training, session.device)
            unknown = check_gradient(learner, meta, Episode(*(part[0] for part in task)), executed)
        except ConfigError as error:
            raise ConfigError(f"backbone {backbone!r}: {error}") from error
        if unknown is not None:
            notice(f"backbone {backbone!r}: {unknown}")


def _read_or_keep_start(config: RunConfig, session: Session, folder: RunFolder, reporter: Reporter) -> Params | None:
    """θ from the weights that the run is to start from, kept in its folder; None if it starts from drawn ones."""
    if config.learner.init_from is None:
        return None
    kept = folder.read_start()
    if kept is None:
        source = config.learner.init_from
        kept = start_from(read_weights(source), session.learner, session.drawn, str(source), reporter.message)
        folder.write_start(kept)
    return kept


def initial_checkpoint(session: Session, meta: Params | None = None) -> Checkpoint:
    """The checkpoint before the first iteration, with the given θ or, by default, the drawn one."""
    meta = session.drawn if meta is None else meta
    state = OuterState(meta, session.tools.optimizer.init(meta), session.rule.init(meta))
    return Checkpoint(RunProgress(), state, {}, session.dataset.image_shape, session.pixels, session.config.run_name)


def move_state(state: OuterState, device: torch.device) -> OuterState:
    """The state with all its tensors on the device."""
    return OuterState(*({name: leaf.to(device) for name, leaf in tree.items()} for tree in state))
