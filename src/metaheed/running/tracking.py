"""What a run logs at each iteration, metrics.jsonl, tasks.jsonl and timing.jsonl, and what reporters are told of it."""

import math
import time

from metaheed.outer import StepRecord
from metaheed.running.checkpoint import RunProgress
from metaheed.running.folder import RunFolder
from metaheed.running.log import JsonLines
from metaheed.running.process import describe_processor, peak_memory
from metaheed.running.reporter import Reporter
from metaheed.running.session import Session


def open_logs(folder: RunFolder, progress: RunProgress) -> tuple[JsonLines, JsonLines]:
    """metrics.jsonl and tasks.jsonl, truncated to their lengths when the checkpoint was written."""
    return (
        JsonLines(folder.metrics_file, progress.metrics_bytes, progress.metrics_sha256),
        JsonLines(folder.tasks_file, progress.tasks_bytes, progress.tasks_sha256),
    )


def log_step(
    record: StepRecord, iteration: int, metrics: JsonLines, tasks: JsonLines, reporter: Reporter
) -> tuple[float, float]:
    """Log an outer step and tell the reporter its numbers; return the mean loss and accuracy of its query sets."""
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
    reporter.log(
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
