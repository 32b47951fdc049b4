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
    """Judge a run on frozen tasks: accuracy ± 95% interval, per-task accuracies in its result.json (result-….json)."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    judging: EvaluationConfig = field(default_factory=EvaluationConfig)
    data_root: Path | None = None
    """Where the data lies, if it has moved."""
    device: str | None = None
    """Where to compute; none: as in training, if that device is here."""
    execution: ExecutionName | None = None
    """How tasks are run (as in train --help); none: as in training."""
    chunk_size: int | None = None
    """Tasks at once under the executions vectorized (taken where only this is given) and im2col."""
    threads: int | None = None
    """CPU threads; none: as in training."""
    data_cache: bool = TrainingConfig.data_cache
    """Read the decoded data set from the user's cache, and keep it there, if training did."""
    trust: bool = False
    """Let the code of the run's network run where that is not one of metaheed's and you did not train it here."""
    out: Path | None = None
    """The file to write the result to; none: result.json (result-….json) in the run folder, if that can be written."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Paired differences of accuracy on the same frozen tasks, over one or several training seeds."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Evaluated runs of one algorithm, one a seed."""
    against: tuple[Path, ...]
    """Evaluated runs of another, of the same seeds."""
    data: str | None = None
    """Compare on this data set, on which all were evaluated; none: on the one they were trained on."""
    ways: int | None = None
    """Compare at this N, at which all were evaluated; none: the runs' own test setting."""
    shots: int | None = None
    """Compare at this K; as --ways."""
    queries: int | None = None
    """Compare at this Q; as --ways."""
    json: bool = False
    """Print the result as JSON."""


def run_evaluate(command: Evaluate) -> int:
    """metaheed evaluate."""
    from metaheed.running.evaluate import evaluate_run
    from metaheed.running.progress import make_watcher

    tune_process()
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
