"""Reporters that hand a run's numbers to other programs: TensorBoard and MLflow. Each needs an extra of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metaheed.errors import ConfigError
from metaheed.running.reporter import Reporter


def check_tensorboard() -> None:
    """Raise ConfigError where TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--tensorboard needs 'pip install metaheed[tensorboard]' ({error})") from error


class TensorBoard(Reporter):
    """Writes the numbers of a run as TensorBoard's events.

    Args:
        folder: where the event files go.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        check_tensorboard()
        self._folder = folder
        self._writer: Any = None

    def start(self, iteration: int, iterations: int) -> None:
        """Open the event file; iterations that a cut-off process did after its last checkpoint are purged."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=iteration + 1)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write the numbers of an iteration."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def stop(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class MLflow(Reporter):
    """Records the numbers of a run in MLflow, at the tracking server that MLflow's own settings name.

        metaheed.train(config, metaheed.MLflow(experiment="attention", parameters={"seed": 0}))

    Nothing is sent before training begins.

    Args:
        experiment: the experiment's name; MLflow's default one if None.
        run_name: the run's name; chosen by MLflow if None.
        parameters: recorded with the run.

    Raises:
        ConfigError: MLflow is not installed.
    """

    def __init__(
        self,
        experiment: str | None = None,
        run_name: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise ConfigError(f"MLflow needs 'pip install metaheed[mlflow]' ({error})") from error
        self._mlflow: Any = mlflow
        self._experiment, self._run_name, self._parameters = experiment, run_name, dict(parameters or {})
        self._active = False

    def start(self, iteration: int, iterations: int) -> None:
        """Begin a run in MLflow."""
        if self._experiment is not None:
            self._mlflow.set_experiment(self._experiment)
        self._mlflow.start_run(run_name=self._run_name)
        self._active = True
        if self._parameters:
            self._mlflow.log_params(self._parameters)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Record the numbers of an iteration."""
        self._mlflow.log_metrics(dict(values), step=iteration)

    def stop(self) -> None:
        """End the run in MLflow."""
        if self._active:
            self._mlflow.end_run()
            self._active = False
