"""Searching an algorithm's settings by the paper's procedure (30 configurations, the best by validation) with Optuna.

    search.yaml                 what is searched, all that is needed to resume
    study.db                    the study: settings, validations and state of each trial (or in another database)
    trials/NNN/                 run folder of trial NNN; of the finished ones only the best keeps its checkpoints
    trials.csv                  a line for each trial
    best.yaml                   the best configuration as a recipe
    parallel_coordinate.png     each trial's settings and validation accuracy
    importances.png             how much each setting mattered
    workers/                    a file for every working process, locked as long as the process lives
    search.lock, study.db.lock  locked by the process that writes here, or claims a trial

Several workers, on one machine or many, share a study through its database. A trial is one row there. Its settings are
drawn from its number, so they are the same whichever worker draws them.

1. A worker claims the first trial below --trials that is waiting or whose worker is dead, or adds one.
2. It trains the trial in its run folder, from the newest checkpoint if there is one, and reports each validation.
3. It records the trial's value, which is its best mean accuracy over the frozen validation tasks, or that it failed.

A worker is dead if the lock on its file is free, which other processes of its machine can see, or if it gave no sign
of life for --lost-after seconds by the observer's own clock. If one trial is left to add, two workers may each add one.
The second one then has a number that is not below --trials, and is only trained if --trials is raised.
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
from metaheed.running.reporter import Reporter
from metaheed.studies.search.database import FAILURES, reason, shown_as, sqlite_file, sqlite_url
from metaheed.studies.search.draws import first_rung, search_name
from metaheed.studies.search.results import Summary, write_results
from metaheed.studies.search.study import SharedStudy, read_settings, refuse_links_to_database
from metaheed.studies.search.worker import Presence, Worker, how_to_go_on


def search(config: RunConfig, settings: SearchConfig, reporters: Callable[[], Reporter] = Reporter) -> Summary:
    """Start or resume a study, and work on it until all its trials are finished.

    Args:
        config: config of every trial, except for the searched settings; its `out` is the study folder.
        settings: what is searched, and how.
        reporters: makes a reporter, which receives a trial's progress.

    Raises:
        ConfigError, DataError: the config, the data or the network cannot be used.
        RunError: the database or the folder cannot be used, or holds a search with other settings.
        OutOfMemoryError: a trial does not fit into memory.
        Interrupted: SIGINT or SIGTERM came; the running trial can be resumed.
    """
    out = config.training.out or Path("runs") / search_name(config)
    config, settings = _with_absolute_paths(config, settings)
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
            shutil.rmtree(out)  # no trial could be trained: a study that stayed would refuse corrected settings
        raise
    except FAILURES as error:
        database, more = shown_as(settings.storage, out), how_to_go_on(out, settings.storage)
        raise RunError(f"the database {database} failed ({reason(error)}); {more}") from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty, because it holds the study; or it was removed above
                path.rmdir()


def read_search(out: str | Path, storage: str | None = None, trust: bool = False) -> tuple[RunConfig, SearchConfig]:
    """The arguments of `search` with which it resumes a study folder.

    Args:
        out: the study folder.
        storage: URL of the study's database. If it is not given, the database must be a SQLite file in the folder,
            because a URL that only the folder names can lead anywhere.
        trust: allow the code of the network that the folder names, if it is not metaheed's and not allowed yet.

    Raises:
        RunError: the folder holds no study, or its search.yaml is damaged.
        ConfigError: its database is elsewhere, and `storage` is not given.
    """
    out = Path(out)
    config, settings = read_settings(out)
    if trust:
        allow(config.learner.backbone, config.learner.backbone_path)
    if storage is not None:
        settings = replace(settings, storage=storage)
    elif settings.storage is not None:
        settings = replace(settings, storage=_require_database_inside(out, settings.storage))
    return replace(config, training=replace(config.training, out=out)), settings


def _require_database_inside(out: Path, storage: str) -> str:
    """The database URL of search.yaml, if it is that of a SQLite file in the study folder.

    Raises:
        ConfigError, RunError: the database is elsewhere.
    """
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
        f"{out} says that its study is kept in {named}. A database that only a folder names is not opened: if that is "
        "where you keep it, name it again, with its password if it has one (--storage URL)"
    )


def _with_absolute_paths(config: RunConfig, settings: SearchConfig) -> tuple[RunConfig, SearchConfig]:
    """The same with absolute paths, so that the study can be resumed from any folder, and without the study folder."""
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
    """Refuse a config with which every trial would fail, before a study is made.

    Raises:
        ConfigError, DataError: as `train`.
    """
    training, data = config.training, config.episodes
    if settings.pruner == "halving" and max(training.val_every, first_rung(config, settings)) >= training.iterations:
        raise ConfigError(
            f"--pruner halving: with --val-every {training.val_every} and the first rung after "
            f"{first_rung(config, settings)} iterations there is no validation before the end of a trial at "
            f"{training.iterations}: lower --val-every or --halving-start"
        )
    sqlite_url(out / "study.db")  # refuse a folder whose name cannot be written in a URL
    check_name(data.data)
    find_backbone(config.learner.backbone, config.learner.backbone_path)
    allow(config.learner.backbone, config.learner.backbone_path)
    pick_device(training.device)
    if (out / STUDY_FILE).exists():
        return  # the study has begun, so its config was checked
    dataset = load_dataset(
        data.data, data.data_root, data.image_size, data.split_seed, reporter.watcher(), training.data_cache
    )
    for split, shape in (("train", data.train_shape), ("val", data.test_shape), ("test", data.test_shape)):
        Episodes(dataset, split, *shape, training.seed)
    learner = build_learner(config.learner, data.ways, dataset.image_shape, training.seed)
    theta = learner.init(torch.Generator().manual_seed(training.seed))
    size = sum(p.numel() * p.element_size() for p in theta.values())
    check_batch_fits(config, pick_device(training.device), dataset.image_shape, size)
