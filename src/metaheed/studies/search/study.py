"""A study in its database and its folder: what is searched, and which worker has which trial."""

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import yaml
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from metaheed.config import RunConfig, SearchConfig, build, from_dict, to_dict
from metaheed.errors import RunError, brief, shown
from metaheed.files.opening import YAML_BYTES, LinkError, cannot_write_message, make_folder, read_bounded, refuse_link
from metaheed.files.parsing import from_yaml
from metaheed.files.seals import seal_text, unseal_text
from metaheed.files.writing import _writing, write_whole
from metaheed.running.folder import STUDY_FILE, RunFolder
from metaheed.studies import recipes
from metaheed.studies.search.database import connect, exclusive, shown_as, sqlite_file, sqlite_url
from metaheed.studies.search.draws import make_pruner, make_sampler

_SETTLE = 2.0  # seconds in which workers on other machines that want the same trial have written their names
_RECORD = "metaheed"  # the attribute of the study that records what is searched


class SharedStudy:
    """A study in its database, which several workers may share, and its folder on this machine."""

    def __init__(self, config: RunConfig, settings: SearchConfig, out: Path, lock: Path | None) -> None:
        self.config, self.settings, self.out = config, settings, out
        self._lock = lock
        self.record = _study_record(config, settings)
        url = settings.storage or sqlite_url(out / "study.db")
        self.shown = shown_as(settings.storage, out)
        with self.alone():
            self.storage = connect(url, self.shown)
            self.study = self._study()
        self._study_id = self.storage.get_study_id_from_name(self.study.study_name)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, config: RunConfig, settings: SearchConfig, out: Path) -> Iterator["SharedStudy"]:
        """Open a study, and create it if there is none.

        Raises:
            ConfigError: the URL or its driver cannot be used.
            RunError: the database cannot be used, or holds a study of that name with other settings.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # Checked before a study is made, because in a shared database that would refuse the next search of its name.
        _refuse_other_search(out, config, settings)
        lock, database = None, sqlite_file(settings.storage)
        if settings.storage is None:
            _make(out)
            database = out / "study.db"
            refuse_links_to_database(database)
        if database is not None:
            if not database.parent.is_dir():
                raise RunError(f"the database {database} cannot be made: {database.parent} is not a folder")
            # SQLite has no locks on rows, so without this lock two processes could claim the same trial.
            lock = database.with_name(f"{database.name}.lock")
        shared = cls(config, settings, out, lock)
        _make(out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            try:
                yield shared
            finally:
                shared.storage.remove_session()
                shared.storage.engine.dispose()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Exclude the other workers of a SQLite file; other databases lock what they write."""
        return exclusive(self._lock)

    def _study(self) -> Study:
        name, pruner = self.settings.study, make_pruner(self.config, self.settings)
        assert name is not None  # `search` has set it
        try:
            study = optuna.create_study(study_name=name, storage=self.storage, pruner=pruner, direction="maximize")
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(study_name=name, storage=self.storage, pruner=pruner)
        if _RECORD not in study.user_attrs:
            if study.get_trials(deepcopy=False):
                raise RunError(
                    f"the study {shown(name)} in {self.shown} belongs to another program: choose another --study"
                )
            study.set_user_attr(_RECORD, self.record)
        self._verify(study)
        return study

    def _verify(self, study: Study) -> None:
        theirs = study.user_attrs[_RECORD]
        refuse_difference(f"the study {shown(study.study_name)} in {self.shown}", theirs, self.record)

    def trials(self) -> list[FrozenTrial]:
        """The trials whose number is below --trials, in order."""
        return [t for t in self._rows() if t.number < self.settings.trials]

    def _rows(self) -> list[FrozenTrial]:
        return sorted(self.storage.get_all_trials(self._study_id, deepcopy=False), key=lambda t: t.number)

    def id_of(self, number: int) -> int:
        """The database's id of the trial with a number."""
        return self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def claim(self, worker: str, gone: Callable[[FrozenTrial], bool]) -> Trial | None:
        """Claim a trial for a worker and draw its settings; None if no trial is free now.

        Args:
            worker: name of the worker.
            gone: says whether the worker of a running trial is dead.
        """
        with self.alone():
            self._verify(self.study)
            number = self._claimed(worker, gone)
            if number is None:
                return None
            self.study.sampler = make_sampler(self.settings, number)
            self.study.get_trials(deepcopy=False)  # lets the study read the new trial from the database
            trial = Trial(self.study, self.id_of(number))
            for name, (low, high) in self.settings.ranges.items():
                trial.suggest_float(name, low, high, log=True)
            return trial

    def _claimed(self, worker: str, gone: Callable[[FrozenTrial], bool]) -> int | None:
        while True:
            rows = self._rows()
            for row in rows[: self.settings.trials]:
                if row.state == TrialState.RUNNING and gone(row) and self._taken_over(row, worker):
                    return row.number
                if row.state == TrialState.WAITING and self._taken(row, worker):
                    return row.number
            if len(rows) >= self.settings.trials:
                return None
            self.storage.create_new_trial(self._study_id, optuna.create_trial(state=TrialState.WAITING))

    def _taken(self, row: FrozenTrial, worker: str) -> bool:
        trial_id = self.id_of(row.number)
        try:
            if not self.storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                return False
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        self.storage.set_trial_user_attr(trial_id, "worker", worker)
        return True

    def _taken_over(self, row: FrozenTrial, worker: str) -> bool:
        trial_id = self.id_of(row.number)
        try:
            self.storage.set_trial_user_attr(trial_id, "worker", worker)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        if self._lock is None:  # of the workers that want it, the last to write its name gets it
            time.sleep(_SETTLE)
        return self.is_worked_on_by(trial_id, worker)

    def is_worked_on_by(self, trial_id: int, worker: str) -> bool:
        """Whether the trial is running and claimed by that worker."""
        trial = self.storage.get_trial(trial_id)
        return trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") == worker

    def folder(self, number: int) -> RunFolder:
        """The run folder of a trial.

        Raises:
            RunError: there is a link in its place.
        """
        path = self.out / "trials" / f"{number:03d}"
        with _writing(path):
            refuse_link(path / "checkpoints", self.out)
        return RunFolder(path)

    def write_settings(self) -> None:
        """Write search.yaml.

        Raises:
            RunError: the folder belongs to another search.
        """
        file = self.out / STUDY_FILE
        with self.writing():
            _refuse_other_search(self.out, self.config, self.settings)  # another process may have written it first
            settings = self.settings
            if settings.storage is not None:
                url = sqlalchemy.engine.make_url(settings.storage)
                settings = replace(settings, storage=url.render_as_string(hide_password=True))
            values = {"search": to_dict(settings), "config": to_dict(self.config)}
            head = f"# metaheed search --resume {self.out}\n"
            write_whole(file, seal_text((head + yaml.safe_dump(values, sort_keys=False)).encode()))

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Exclude the other workers that write into this study folder."""
        return exclusive(self.out / "search.lock")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("trials", "workers"):
            make_folder(out / name, out)
        for trial in sorted((out / "trials").iterdir()):
            refuse_link(trial)
    except LinkError as error:
        raise RunError(cannot_write_message(error, out)) from error
    except OSError as error:
        raise RunError(f"the study folder {out} cannot be made: {error.strerror}. Choose another --out") from error


def refuse_links_to_database(file: Path) -> None:
    """Raise RunError if a study folder's own database, or a file that SQLite keeps beside it, is a link."""
    with _writing(file):
        for suffix in ("", "-journal", "-wal", "-shm"):
            refuse_link(file.with_name(file.name + suffix))


def read_settings(out: Path) -> tuple[RunConfig, SearchConfig]:
    """The content of a study folder's search.yaml: the config of every trial, and what is searched.

    Raises:
        RunError: the file is missing or damaged.
    """
    file = out / STUDY_FILE
    try:
        values = from_yaml(unseal_text(read_bounded(file, YAML_BYTES)))
        return from_dict(values["config"]), build(SearchConfig, values["search"], "search")
    except OSError as error:
        raise RunError(f"{out} is not a study folder: search.yaml cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} does not describe a search of this program: {brief(str(error), 400)}") from error


def _refuse_other_search(out: Path, config: RunConfig, settings: SearchConfig) -> None:
    if (out / STUDY_FILE).exists():
        theirs, mine = (
            {"study": search.study, **_study_record(of_trials, search)}
            for of_trials, search in (read_settings(out), (config, settings))
        )
        refuse_difference(str(out), theirs, mine)


def count_finished(trials: list[FrozenTrial]) -> int:
    """Number of finished trials."""
    return sum(trial.state.is_finished() for trial in trials)


def _study_record(config: RunConfig, settings: SearchConfig) -> dict[str, Any]:
    """The settings that must be equal for all workers of a study, as JSON returns them."""
    alike = {"config": trial_record(config)}
    for name, value in to_dict(settings).items():
        if name not in ("trials", "storage", "study"):
            alike[name] = value
    record: dict[str, Any] = json.loads(json.dumps(alike))
    return record


def trial_record(config: RunConfig) -> dict[str, Any]:
    """The settings that decide a trial, without those that belong to a machine."""
    return {**recipes.recipe_settings(config), "seed": config.training.seed}


def refuse_difference(what: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise RunError if two records differ, naming the first setting that does."""
    then, now = dict(_flat(theirs)), dict(_flat(ours))
    for name in {**now, **then}:
        if then.get(name) != now.get(name):
            option = name.rpartition(".")[2].replace("_", "-")
            raise RunError(
                f"{what} was begun with {option} {_said(then.get(name))}, and this search has "
                f"{_said(now.get(name))}: set it as there, or choose another --out (and --study, in a shared database)"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _said(value: Any) -> str:
    return brief(" ".join(map(str, value)) if isinstance(value, list) else str(value))
