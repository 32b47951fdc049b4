"""What a run logs of its iterations: metrics, tasks, seconds, and TensorBoard's events."""

import math
import time
from typing import Any

from metaheed.config import RunConfig
from metaheed.errors import ConfigError, option
from metaheed.outer import (
    StepRecord,
)
from metaheed.running.checkpoint import Progress
from metaheed.running.folder import RunFolder
from metaheed.running.log import JsonLines
from metaheed.running.process import (
    describe_processor,
    peak_memory,
)
from metaheed.running.session import Session


def open_logs(folder: RunFolder, progress: Progress) -> tuple[JsonLines, JsonLines]:
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
            "loss": short(loss),
            "accuracy": short(accuracy),
            "initial_loss": short(means["initial_loss"]),
        }
    )
    tasks.write({"iteration": iteration, **{name: [short(v) for v in values] for name, values in columns.items()}})
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


def short(value: float) -> float | None:
    """A number rounded to eight digits, and None for NaN, as logs hold it."""
    # What a float32 holds, and no more; JSON has no NaN.
    return None if math.isnan(value) else float(f"{value:.8g}")


def check_tensorboard(config: RunConfig) -> None:
    """Raise ConfigError where TensorBoard is asked for and not installed."""
    if config.training.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"{option('tensorboard')} needs 'pip install metaheed[tensorboard]' ({error})") from error


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

    def __init__(self, session: Session, folder: RunFolder, iteration: int) -> None:
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
