"""The results of a search: the best configuration as a recipe, a table of the trials, and two figures."""

import contextlib
import csv
import io
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from metaheed import __version__
from metaheed.config import RunConfig, SearchConfig
from metaheed.files.writing import write_whole
from metaheed.running.folder import RunFolder
from metaheed.studies import recipes
from metaheed.studies.figures import importance_figure, parallel_figure
from metaheed.studies.search.draws import configured, used
from metaheed.studies.search.study import SharedStudy

ENOUGH_FOR_IMPORTANCES = 10
"""Number of complete trials from which importances are drawn. PED-ANOVA compares the best fifth of them with all, which
would be only one or two of fewer."""
_BEST_SHARE = 0.2  # of the trials, which PED-ANOVA compares with all trials: six of 30
_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Summary:
    """The outcome of a search."""

    folder: Path
    """The study folder."""
    trials: int
    """Number of finished trials."""
    failed: int
    """How many of them diverged in training."""
    stopped: int
    """How many of them were stopped early."""
    iterations: int
    """Outer steps of all finished trials together."""
    best: int | None
    """Number of the best trial; None if no trial was trained to its end."""
    accuracy: float | None
    """Validation accuracy of the best trial in [0, 1]."""
    notices: tuple[str, ...]
    """Lines that say which result was not written, and why."""


def write_results(shared: SharedStudy) -> Summary:
    """Write trials.csv, best.yaml and the figures, and delete the checkpoints of all finished trials but the best."""
    config, settings, out = shared.config, shared.settings, shared.out
    notices = []
    with shared.writing():
        trials = shared.trials()
        finished = [trial for trial in trials if trial.state.is_finished()]
        whole = [trial for trial in finished if trial.state == TrialState.COMPLETE]
        best = max(whole, key=lambda trial: (_value(trial), -trial.number), default=None)  # of equal ones the first
        write_whole(out / "trials.csv", _table(trials, settings).encode())
        for trial in finished:
            if trial is not best:
                _drop_checkpoints(shared.folder(trial.number))
        if best is None:
            notices.append("no trial was trained to its end, so there is no best.yaml")
        else:
            recipes.write(_recipe(shared, best, len(finished)), out / "best.yaml")
            axes = {name: settings.ranges[name] for name in used(config, settings)}
            shown = [trial for trial in finished if trial.params]
            rows = [[trial.params[name] for name in axes] for trial in shown]
            values = [_value(trial) if trial.state == TrialState.COMPLETE else None for trial in shown]
            parallel_figure(axes, rows, values, shown.index(best), out / "parallel_coordinate.png")
        if len(whole) < ENOUGH_FOR_IMPORTANCES:
            notices.append(
                f"importances.png needs {ENOUGH_FOR_IMPORTANCES} complete trials, and there are {len(whole)}"
            )
        elif len(_searched(config, settings)) < 2:
            notices.append("importances.png needs at least two settings that are searched")
        elif len({trial.value for trial in whole}) == 1:
            notices.append("importances.png needs trials that differ in accuracy")
        else:
            importance_figure(_importances(shared, whole), len(whole), out / "importances.png")
    return Summary(
        folder=out,
        trials=len(finished),
        failed=sum(trial.state == TrialState.FAIL for trial in finished),
        stopped=sum(trial.state == TrialState.PRUNED for trial in finished),
        iterations=sum(trial.user_attrs.get("iterations", 0) for trial in finished),
        best=None if best is None else best.number,
        accuracy=None if best is None else _value(best),
        notices=tuple(notices),
    )


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None  # every complete trial has a value
    return trial.value


def _recipe(shared: SharedStudy, best: FrozenTrial, finished: int) -> recipes.Recipe:
    config, settings = shared.config, shared.settings
    about = {
        "kind": "searched",
        "study": settings.study,
        "trials": finished,
        "iterations": config.training.iterations,
        "seed": settings.search_seed,
        "validation_accuracy": _value(best),
        "version": __version__,
        "trial": best.number,
        "training_seed": config.training.seed,
        "sampler": settings.sampler,
        "pruner": settings.pruner,
        "ranges": {name: list(settings.ranges[name]) for name in used(config, settings)},
    }
    return recipes.Recipe(configured(config, best.params), about)


def _searched(config: RunConfig, settings: SearchConfig) -> list[str]:
    """Names of the settings that the algorithm has and whose range is more than one number."""
    return [name for name in used(config, settings) if settings.ranges[name][0] < settings.ranges[name][1]]


def _importances(shared: SharedStudy, whole: list[FrozenTrial]) -> dict[str, float]:
    """Setting -> its share in what distinguishes the best fifth of the trials (PED-ANOVA, Watanabe et al. 2023)."""
    names = _searched(shared.config, shared.settings)
    # A study in memory, because the one in the database may have more trials than --trials.
    study = optuna.create_study(direction="maximize")
    study.add_trials(whole)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BEST_SHARE)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=names)
    return {name: found[name] for name in names}


def _table(trials: list[FrozenTrial], settings: SearchConfig) -> str:
    """The content of trials.csv. It has no times, so that the same search leaves the same bytes."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    facts = ("best_iteration", "iterations", "host", "reason")
    lines.writerow(["trial", "state", "validation_accuracy", *settings.ranges, *facts])
    for trial in trials:
        value = trial.value if trial.state == TrialState.COMPLETE else None
        drawn = [trial.params.get(name, "") for name in settings.ranges]
        found = [trial.user_attrs.get(name, "") for name in facts]
        lines.writerow([trial.number, _STATES[trial.state], "" if value is None else value, *drawn, *found])
    return text.getvalue()


def _drop_checkpoints(folder: RunFolder) -> None:
    for file in (folder.last, folder.previous, folder.best, folder.last.with_suffix(".part")):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the folder is not there, or holds a file of the user's
        folder.checkpoints.rmdir()
