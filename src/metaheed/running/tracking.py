"""What a run logs at each iteration: metrics.jsonl, tasks.jsonl, timing.jsonl and TensorBoard's events."""

import math
import time
from typing import Any

from metaheed.config import RunConfig
from metaheed.errors import ConfigError
from metaheed.outer import StepRecord
from metaheed.running.checkpoint import RunProgress
from metaheed.running.folder import RunFolder
from metaheed.running.log import JsonLines
from metaheed.running.process import describe_processor, peak_memory
from metaheed.running.session import Session


def open_logs(folder: RunFolder, progress: RunProgress) -> tuple[JsonLines, JsonLines]:
    """metrics.jsonl and tasks.jsonl, truncated to their lengths when the checkpoint was written."""
    return (
        JsonLines(folder.metrics_file, progress.metrics_bytes, progress.metrics_sha256),
        JsonLines(folder.tasks_file, progress.tasks_bytes, progress.tasks_sha256),
    )


def log_step(
    record: StepRecord, iteration: int, metrics: JsonLines, tasks: JsonLines, events: "TensorBoardEvents"
) -> tuple[float, float]:
    """Log an outer step, and return the mean loss and accuracy of its query sets."""
    columns = {name: values.tolist() for name, values in record.info._asdict().items()}
    columns["weights"] = record.weights.tolist()
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    loss, accuracy = means["query_loss"], means["query_accuracy"]
    metrics.write(
        {
            "iteration": iteration,
            "loss": log_number(loss),
            "accuracy": log_number(accuracy),
            "initial_loss": log_number(means["initial_loss"]),
        }
    )
    tasks.write({"iteration": iteration, **{name: [log_number(v) for v in values] for name, values in columns.items()}})
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


def log_number(value: float) -> float | None:
    """A number as logs hold it: rounded to eight digits, and None for NaN."""
    # A float32 holds no more digits, and JSON has no NaN.
    return None if math.isnan(value) else float(f"{value:.8g}")


def check_tensorboard(config: RunConfig) -> None:
    """Raise ConfigError if TensorBoard is asked for and not installed."""
    if config.training.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"--tensorboard needs 'pip install metaheed[tensorboard]' ({error})") from error


class TensorBoardEvents:
    """Writes scalars for TensorBoard if the run's config asks for it."""

    def __init__(self, config: RunConfig, folder: RunFolder, iteration: int) -> None:
        self._writer: Any = None
        if config.training.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Purge events that an interrupted process wrote after its last checkpoint.
            self._writer = SummaryWriter(str(folder.events), purge_step=iteration + 1)

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Write the scalars of an iteration."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Close the file of events."""
        if self._writer is not None:
            self._writer.close()


class IterationClock:
    """Times the iterations and writes timing.jsonl; used as a context around them.

    Validations and checkpoints are not counted.
    """

    def __init__(self, session: Session, folder: RunFolder, iteration: int) -> None:
        file, training = folder.timing_file, session.config.training
        # A resumed run keeps the lines of iterations that it repeats, because they are measurements all the same. A run
        # from the start begins a new file.
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
        """Write a line with the time and memory that the iterations since the last line took."""
        steps = iteration - self._written
        if steps:
            seconds = float(f"{self._seconds:.6g}")
            taken = {"iteration": iteration, "iterations": steps, "seconds": seconds}
            self._lines.write({**taken, "peak_bytes": peak_memory(self._device), **self._where})
        self._written, self._seconds = iteration, 0.0

    def close(self) -> None:
        """Close timing.jsonl."""
        self._lines.close()
