"""The public interface: what `metaheed` names is there, documented, and works from Python as from the command line."""

import inspect
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest

import metaheed
from metaheed.errors import ConfigError

PUBLIC = {
    *("ANIL", "BOIL", "MAML", "MetaLSTM", "MetaSGD", "ProtoNet", "Reptile", "Conv4", "Learner", "NetworkLearner"),
    *("TaskAttention", "stack_gradients", "task_gradient", "weighted_sum"),
    *("configure", "default_config", "default_pair", "RunConfig", "EvaluationConfig", "ReportConfig", "SearchConfig"),
    *("train", "resume", "evaluate", "compare", "Difference", "report", "search", "load"),
    *("Reporter", "Several", "TensorBoard", "MLflow"),
    *("Dataset", "Episodes", "load_dataset", "Episode", "Params", "TaskInfo"),
    *("ConfigError", "DataError", "MetaheedError", "RunError"),
}


def test_what_is_public() -> None:
    """A name comes here on purpose: it has to stay."""
    assert set(metaheed.__all__) == PUBLIC
    assert {*PUBLIC} <= {*dir(metaheed)}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name: str) -> None:
    value = getattr(metaheed, name)
    assert name == "Params" or len(inspect.getdoc(value) or "") > 20


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        metaheed.nothing_of_that_name  # noqa: B018


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, metaheed; sys.exit(bool({'torch', 'numpy', 'optuna'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Noting(metaheed.Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.numbers: dict[str, list[int]] = {}
        self.steps: list[int] = []

    def step(self, iteration: int, loss: float, accuracy: float) -> None:
        self.steps.append(iteration)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        for name in values:
            self.numbers.setdefault(name, []).append(iteration)


SETTINGS = {
    "iterations": 2,
    "val_every": 2,
    "val_tasks": 2,
    "queries": 2,
    "ways": 3,
    "adaptation_steps": 1,
    "threads": 1,
}


def test_a_run_from_python(tmp_path: Path) -> None:
    noting = Noting()
    runs = {
        algorithm: metaheed.train(metaheed.configure(algorithm, **SETTINGS, out=str(tmp_path / algorithm)), noting)
        for algorithm in ("maml", "reptile")
    }
    assert noting.steps == [1, 2, 1, 2]
    assert noting.numbers["validation/accuracy"] == [2, 2]
    assert noting.numbers["attention/largest_weight"] == [1, 2, 1, 2]
    for run in runs.values():
        assert metaheed.evaluate(run, metaheed.EvaluationConfig(tasks=4))["tasks"] == 4
    difference = metaheed.compare(runs["maml"], against=runs["reptile"])
    assert difference.mean == pytest.approx(difference.accuracy - difference.accuracy_against, abs=1e-6)
    learner, meta = metaheed.load(runs["reptile"])
    assert isinstance(learner, metaheed.Reptile)
    assert set(meta) == set(learner.backbone.names)
    page = metaheed.report(tmp_path, tmp_path / "report", metaheed.ReportConfig(toy=False))
    assert "Reptile" in page.read_text(encoding="utf-8")


def test_a_setting_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="attention_lr"):
        metaheed.configure("maml", attention_lr=0.1)
    with pytest.raises(ConfigError, match=r"fast.lr"):
        metaheed.configure("maml", fast_lr=-1.0)


def test_mlflow_is_told_once_training_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []
    fake = types.ModuleType("mlflow")
    for name in ("set_experiment", "start_run", "log_params", "end_run"):
        setattr(fake, name, lambda *given, _name=name, **named: calls.append((_name, given or named)))
    fake.log_metrics = lambda values, step: calls.append(("log_metrics", step))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    tracker = metaheed.MLflow("attention", parameters={"seed": 0})
    assert not calls
    metaheed.train(metaheed.configure("maml", **SETTINGS, out=tmp_path / "run"), tracker)
    assert [name for name, _ in calls[:3]] == ["set_experiment", "start_run", "log_params"]
    assert [step for name, step in calls if name == "log_metrics"] == [1, 2, 2]
    assert calls[-1][0] == "end_run"


def test_a_tracker_that_is_not_installed_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"metaheed\[mlflow\]"):
        metaheed.MLflow()
