"""Few-shot meta-learning in which the tasks of a meta-batch are weighted by a learned attention module.

    import metaheed

    config = metaheed.configure("ta-maml", ways=5, shots=1, iterations=1000, out="runs/mine")
    run = metaheed.train(config)
    result = metaheed.evaluate(run)
    learner, meta = metaheed.load(run)

`metaheed.__all__` is the public interface. What a name needs is imported when it is first used, so that importing
metaheed takes no time.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaheed.config import (
        EvaluationConfig,
        ReportConfig,
        RunConfig,
        SearchConfig,
        configure,
        default_config,
        default_pair,
    )
    from metaheed.data import Dataset, Episodes, load_dataset
    from metaheed.errors import ConfigError, DataError, MetaheedError, RunError
    from metaheed.learners import (
        ANIL,
        BOIL,
        MAML,
        Conv4,
        Learner,
        MetaLSTM,
        MetaSGD,
        NetworkLearner,
        ProtoNet,
        Reptile,
    )
    from metaheed.outer import TaskAttention, stack_gradients, task_gradient, weighted_sum
    from metaheed.running.compare import Difference, compare
    from metaheed.running.evaluate import evaluate_run as evaluate
    from metaheed.running.load import load
    from metaheed.running.reporter import Reporter, Several
    from metaheed.running.trackers import MLflow, TensorBoard
    from metaheed.running.train import resume, train
    from metaheed.studies.report import report
    from metaheed.studies.search import search
    from metaheed.types import Episode, Params, TaskInfo

__version__ = "0.1.0"

_HOMES = {
    "metaheed.config": "EvaluationConfig ReportConfig RunConfig SearchConfig configure default_config default_pair",
    "metaheed.data": "Dataset Episodes load_dataset",
    "metaheed.errors": "ConfigError DataError MetaheedError RunError",
    "metaheed.learners": "ANIL BOIL Conv4 Learner MAML MetaLSTM MetaSGD NetworkLearner ProtoNet Reptile",
    "metaheed.outer": "TaskAttention stack_gradients task_gradient weighted_sum",
    "metaheed.running.compare": "Difference compare",
    "metaheed.running.evaluate": "evaluate_run",
    "metaheed.running.load": "load",
    "metaheed.running.reporter": "Reporter Several",
    "metaheed.running.trackers": "MLflow TensorBoard",
    "metaheed.running.train": "resume train",
    "metaheed.studies.report": "report",
    "metaheed.studies.search": "search",
    "metaheed.types": "Episode Params TaskInfo",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
_CALLED = {"evaluate": "evaluate_run"}
"""Public name -> its name where it is defined, if that is another one."""

__all__ = [
    "ANIL",
    "BOIL",
    "MAML",
    "ConfigError",
    "Conv4",
    "DataError",
    "Dataset",
    "Difference",
    "Episode",
    "Episodes",
    "EvaluationConfig",
    "Learner",
    "MLflow",
    "MetaLSTM",
    "MetaSGD",
    "MetaheedError",
    "NetworkLearner",
    "Params",
    "ProtoNet",
    "ReportConfig",
    "Reporter",
    "Reptile",
    "RunConfig",
    "RunError",
    "SearchConfig",
    "Several",
    "TaskAttention",
    "TaskInfo",
    "TensorBoard",
    "compare",
    "configure",
    "default_config",
    "default_pair",
    "evaluate",
    "load",
    "load_dataset",
    "report",
    "resume",
    "search",
    "stack_gradients",
    "task_gradient",
    "train",
    "weighted_sum",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    import importlib

    inside = _CALLED.get(name, name)
    if name not in __all__ or inside not in _HOME:
        raise AttributeError(f"module 'metaheed' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[inside]), inside)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
