"""Search for an algorithm's settings: the paper's procedure (30 configurations, chosen on validation), on Optuna.

    search.yaml                 what is searched: enough to go on with
    study.db                    the study: each trial's draw, validations and state (or in any other database)
    trials/NNN/                 run folder of trial NNN; of the finished ones only the best keeps its checkpoints
    trials.csv                  a line a trial
    best.yaml                   the best configuration as a recipe
    parallel_coordinate.png     each trial's settings and validation accuracy
    importances.png             how much each setting mattered
    workers/                    a file for every process at work, locked as long as it lives
    search.lock, study.db.lock  held by the process that writes here, or takes a trial

Several workers, on one machine or many, share a study through its database. A trial is one row there; its number is the
number of the configuration, so that a configuration that is drawn from its number is the same whoever draws it.

1. A worker takes the first trial below --trials that is waiting, or whose worker is gone, or adds one.
2. It trains the trial in its run folder, from the newest checkpoint where there is one, and reports each validation.
3. It writes the trial's value, which is its best mean accuracy over the frozen validation tasks, or that it failed.

A worker is gone if the lock on its file is free, which another process of its machine can see, or if it gave no sign of
life for --lost-after seconds by the watcher's own clock. Two may add a row each where one was left to add: the one too
many waits below no --trials, and is trained if that is raised.
"""

import contextlib
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import sqlalchemy
import torch

from metaheed.config import RunConfig, SearchConfig, TrainingConfig
from metaheed.data import Episodes, check_name, load_dataset
from metaheed.errors import ConfigError, DataError, Interrupted, RunError, brief
from metaheed.files.trust import allow
from metaheed.learners import build_learner, find_backbone
from metaheed.running.folder import STUDY_FILE
from metaheed.running.process import check_batch_fits, pick_device
from metaheed.running.reporter import Reporter, Silent, watcher_of
from metaheed.studies.search.database import FAILURES, reason, shown_as, sqlite_file, sqlite_url
from metaheed.studies.search.draws import first_rung, search_name
from metaheed.studies.search.results import Summary, write_results
from metaheed.studies.search.study import SharedStudy, read_settings, refuse_links_to_database
from metaheed.studies.search.worker import Presence, Worker, how_to_go_on


def search(config: RunConfig, settings: SearchConfig, reporters: Callable[[], Reporter] = Silent) -> Summary:
    """Work on a study until all its trials are finished, beginning it or going on with it.

    Args:
        config: of every trial, but for what is searched; its `out` is the study folder.
        settings: what is searched, and how.
        reporters: makes who is told how a trial goes.

    Raises:
        ConfigError, DataError: the settings, the data or the network cannot be used.
        RunError: the database or the folder cannot be used, or holds a search of other settings.
        OutOfMemoryError: a trial does not fit into memory.
        Interrupted: SIGINT or SIGTERM came; the trial at work can be gone on with.
    """
    out = config.training.out or Path("runs") / search_name(config)
    config, settings = _anywhere(config, settings)
    reporter = reporters()
    _check(config, settings, out, reporter)
    tell = reporter.message
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        with SharedStudy.opened(config, settings, out) as shared, Presence(out) as presence:
            shared.write_settings()
            worker = Worker(shared, presence, reporters, tell)
            try:
                worker.work()
            except KeyboardInterrupt:
                raise Interrupted(f"stopped; {how_to_go_on(out, settings.storage)}", signal.SIGINT) from None
            return write_results(shared)
    except (ConfigError, DataError):
        begun = [*out.glob("trials/*/config.yaml"), *[*out.glob("workers/*")][1:]]
        if out in made and settings.storage is None and not begun:
            shutil.rmtree(out)  # what no trial can be trained with leaves no study that refuses the next
        raise
    except FAILURES as error:
        database, more = shown_as(settings.storage, out), how_to_go_on(out, settings.storage)
        raise RunError(f"the database {database} failed ({reason(error)}); {more}") from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty: the study is there; or removed above
                path.rmdir()


def read_search(out: str | Path, storage: str | None = None, trust: bool = False) -> tuple[RunConfig, SearchConfig]:
    """What `search` needs to go on with a study folder.

    Args:
        out: the study folder.
        storage: its database. One that only the folder names is opened only if it is a SQLite file in the folder: a URL
            can lead anywhere.
        trust: let the code of a network run that the folder names, is not one of ours, and was not allowed before.

    Raises:
        RunError: it is none, or its search.yaml is damaged.
        ConfigError: its database lies elsewhere, and is not named.
    """
    out = Path(out)
    config, settings = read_settings(out)
    if trust:
        allow(config.learner.backbone, config.learner.backbone_path)
    if storage is not None:
        settings = replace(settings, storage=storage)
    elif settings.storage is not None:
        settings = replace(settings, storage=_inside(out, settings.storage))
    return replace(config, training=replace(config.training, out=out)), settings


def _inside(out: Path, storage: str) -> str:
    """The URL of a SQLite file in the study folder, from one that search.yaml names."""
    try:
        file = sqlite_file(storage)
        url = sqlalchemy.engine.make_url(storage)
        plain = url.drivername in ("sqlite", "sqlite+pysqlite") and not url.query
        if file is not None and plain and not str(file).startswith("file:"):
            file = file.absolute()
            if file.parent.resolve() == out.resolve():
                refuse_links_to_database(file)
                return sqlite_url(file)
        named = brief(shown_as(storage, out), 200)
        if url.password == "***":
            raise RunError(f"{out} keeps no password: name the database again (--storage URL), which is {named}")
    except ConfigError:
        named = "another database"
    raise ConfigError(
        f"{out} says that its study is kept in {named}. What only a folder names is not opened: if that is where you "
        "keep it, name it again, with its password if it has one (--storage URL)"
    )


def _anywhere(config: RunConfig, settings: SearchConfig) -> tuple[RunConfig, SearchConfig]:
    """The same, named so that it can be gone on with from any folder; the study folder taken out."""
    training = TrainingConfig(**{f.name: getattr(config.training, f.name) for f in fields(TrainingConfig)})
    learner, root = config.learner.from_anywhere(), config.episodes.data_root
    storage = settings.storage
    file = sqlite_file(storage)
    if file is not None:
        storage = sqlite_url(file)
    config = replace(
        config,
        learner=learner,
        episodes=replace(config.episodes, data_root=root and root.expanduser().absolute()),
        training=replace(training, out=None),
    )
    return config, replace(settings, storage=storage, study=settings.study or search_name(config))


def _check(config: RunConfig, settings: SearchConfig, out: Path, reporter: Reporter) -> None:
    """Refuse what would fail in every trial, before there is a study.

    Raises:
        ConfigError, DataError: as training would.
    """
    training, data = config.training, config.episodes
    if settings.pruner == "halving" and max(training.val_every, first_rung(config, settings)) >= training.iterations:
        raise ConfigError(
            f"--pruner halving: with --val-every {training.val_every} and the first rung after "
            f"{first_rung(config, settings)} iterations nothing can be judged before the end of a trial at "
            f"{training.iterations}: lower --val-every or --halving-start"
        )
    sqlite_url(out / "study.db")  # refuses a folder that cannot be named there and in search.yaml
    check_name(data.data)
    find_backbone(config.learner.backbone, config.learner.backbone_path)
    allow(config.learner.backbone, config.learner.backbone_path)
    pick_device(training.device)
    if (out / STUDY_FILE).exists():
        return  # begun, and so checked
    dataset = load_dataset(
        data.data, data.data_root, data.image_size, data.split_seed, watcher_of(reporter), training.data_cache
    )
    for split, shape in (("train", data.train_shape), ("val", data.test_shape), ("test", data.test_shape)):
        Episodes(dataset, split, *shape, training.seed)
    learner = build_learner(config.learner, data.ways, dataset.image_shape, training.seed)
    theta = learner.init(torch.Generator().manual_seed(training.seed))
    size = sum(p.numel() * p.element_size() for p in theta.values())
    check_batch_fits(config, pick_device(training.device), dataset.image_shape, size)
