"""metaheed evaluate and metaheed compare."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from metaheed.cli.parse import tune_process
from metaheed.config import (
    EvaluationConfig,
    ExecutionName,
    TrainingConfig,
)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Judge a run on frozen tasks: prints accuracy ± 95% interval and writes per-task accuracies to result.json."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    judging: EvaluationConfig = field(default_factory=EvaluationConfig)
    data_root: Path | None = None
    """Folder that holds the data now, if it has moved."""
    device: str | None = None
    """Where to compute (cpu, cuda, cuda:N); as in training if not given, or the CPU if that device is not here."""
    execution: ExecutionName | None = None
    """How tasks are computed (see train --help-all); as in training if not given."""
    chunk_size: int | None = None
    """Number of tasks computed at once by the executions vectorized and im2col; without --execution, vectorized."""
    threads: int | None = None
    """Number of CPU threads; as in training if not given."""
    data_cache: bool = TrainingConfig.data_cache
    """Read the decoded data set from the user's cache, and keep it there, if training did."""
    trust: bool = False
    """Let the code of the run's network run if it is not one of metaheed's and you did not train it here."""
    out: Path | None = None
    """File to write the result to; result.json (or result-….json) in the run folder if not given."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Paired differences of accuracy on the same frozen tasks, over one or several training seeds."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Evaluated runs of one algorithm, one for each seed."""
    against: tuple[Path, ...]
    """Evaluated runs of another algorithm, with the same seeds."""
    data: str | None = None
    """Compare on this data set, on which all runs were evaluated; the one they were trained on if not given."""
    ways: int | None = None
    """Compare at this N, at which all runs were evaluated; that of their test setting if not given."""
    shots: int | None = None
    """Compare at this K, at which all runs were evaluated; that of their test setting if not given."""
    queries: int | None = None
    """Compare at this Q, at which all runs were evaluated; that of their test setting if not given."""
    json: bool = False
    """Print the result as JSON."""


def run_evaluate(command: Evaluate) -> int:
    """metaheed evaluate."""
    tune_process()
    from metaheed.running.evaluate import evaluate_run
    from metaheed.running.progress import make_watcher

    result = evaluate_run(
        command.run,
        command.judging,
        command.data_root,
        command.device,
        execution=command.execution,
        chunk_size=command.chunk_size,
        threads=command.threads,
        trust=command.trust,
        out=command.out,
        notice=lambda text: print(text, file=sys.stderr, flush=True),
        watcher=make_watcher(brief=True),
        data_cache=command.data_cache and None,
    )
    if command.json:
        print(json.dumps(result))
        return 0
    trained = "" if result["trained_on"] == result["data"] else f" trained on {result['trained_on']},"
    print(
        f"{result['algorithm']}{trained} on {result['data']} {result['split']}, "
        f"{result['ways']}-way {result['shots']}-shot: "
        f"{result['accuracy']:.2%} ± {result['half_width_95']:.2%} over {result['tasks']} tasks "
        f"({result['checkpoint']} checkpoint, iteration {result['iteration']}; before adaptation "
        f"{result['initial_accuracy']:.2%})"
    )
    if trained:
        print(
            f"images: {result['conversion'] or 'of the same shape'}; scaled as {result['trained_on']} was in training"
        )
    if result["caution"] is not None:
        print(f"caution: {result['caution']}")
    return 0


def run_compare(command: Compare) -> int:
    """metaheed compare."""
    from metaheed.running.compare import compare

    shape = command.ways, command.shots, command.queries
    difference = compare(command.runs, command.against, command.data, shape)
    if command.json:
        print(json.dumps(difference._asdict()))
        return 0
    print(f"{difference.accuracy:.2%} against {difference.accuracy_against:.2%}")
    print(f"difference {100 * difference.mean:+.2f} ± {100 * difference.half_width:.2f} points ({difference.covers})")
    if len(difference.per_seed) > 1:
        for seed, mean in difference.per_seed.items():
            print(f"  seed {seed}: {100 * mean:+.2f}")
    return 0
