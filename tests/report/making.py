"""Run folders with known numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metaheed.config import ALGORITHMS, RULES, RunConfig, default_config, default_pair
from metaheed.running.folder import RunFolder

TASKS = (0.2, 0.4, 0.6, 0.8)
"""Accuracies on four test tasks, mean 0.5."""
EPISODES = "e" * 64


def make_config(algorithm: str = "maml", seed: int = 0, data: str = "cifar-fs", **changes: Any) -> RunConfig:
    """`changes`: GROUP=mapping of fields. An algorithm may be RULE-LEARNER."""
    if algorithm in ALGORITHMS:
        config = default_config(algorithm)
    else:
        rule = max((r for r in RULES if algorithm.startswith(f"{r}-")), key=len)
        config = default_pair(algorithm.removeprefix(f"{rule}-"), rule)
    config = replace(
        config,
        episodes=replace(config.episodes, data=data),
        training=replace(config.training, iterations=4, val_every=2, seed=seed, device="cpu", threads=1),
    )
    return replace(config, **{group: replace(getattr(config, group), **fields) for group, fields in changes.items()})


def make_run(
    path: Path,
    algorithm: str = "maml",
    seed: int = 0,
    accuracies: Sequence[float] | None = TASKS,
    validations: Mapping[int, float] | None = None,
    tasks: Sequence[Mapping[str, Any]] = (),
    done: int | None = None,
    timing: Sequence[Mapping[str, Any]] = (),
    result: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A run folder as training and evaluation leave it, but for checkpoints.

    Args:
        path: the folder.
        algorithm, seed, changes: see `make_config`.
        accuracies: on the test tasks; none: not judged.
        validations: iteration -> accuracy.
        tasks: the lines of tasks.jsonl; none: equal weights.
        done: iterations done; none: all.
        timing: the lines of timing.jsonl.
        result: fields of result.json that are to be others.
    """
    config = make_config(algorithm, seed, **changes)
    total = config.training.iterations
    done = total if done is None else done
    path.mkdir(parents=True)
    RunFolder(path).write_config(config)
    validations = validations or {2: 0.3, total: 0.4}
    metrics: list[dict[str, Any]] = []
    for iteration in range(1, done + 1):
        metrics.append({"iteration": iteration, "loss": 1.5, "accuracy": 0.3, "initial_loss": None})
        if iteration in validations:
            metrics.append(
                {"iteration": iteration, "validation_accuracy": validations[iteration], "validation_loss": 1.5}
            )
    write_lines(path / "metrics.jsonl", metrics)
    write_lines(path / "tasks.jsonl", tasks or [batch(i, [1, 2, 3, 4], [0.25] * 4) for i in range(1, done + 1)])
    if timing:
        write_lines(path / "timing.jsonl", timing)
    if accuracies is not None:
        e = config.episodes
        found = {
            **{"algorithm": config.algorithm, "data": e.data, "split": "test", "ways": e.ways, "shots": e.shots},
            **{"queries": 15, "tasks": len(accuracies), "episode_seed": 0, "trained_on": e.data, "seed": seed},
            **{"episodes_sha256": EPISODES, "checkpoint": "best", "loss": 1.0},
            "iteration": max(validations, key=lambda i: validations[i]),
            "accuracy": sum(accuracies) / len(accuracies),
            "half_width_95": 0.25,
            "accuracies": [round(a, 6) for a in accuracies],
        }
        (path / "result.json").write_text(json.dumps({**found, **(result or {})}))
    return path


def batch(iteration: int, losses: Sequence[float], weights: Sequence[float], **others: Any) -> dict[str, Any]:
    """A line of tasks.jsonl; inputs that are not given are 1 for all tasks."""
    ones = [1.0] * len(losses)
    columns = {"query_loss": [*losses], "query_accuracy": ones, "initial_loss": ones, "grad_norm": ones}
    return {"iteration": iteration, **columns, "weights": [*weights], **others}


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def shifted(by: float, pattern: Sequence[float] = (0.01, -0.01, 0.01, -0.01)) -> list[float]:
    """TASKS plus a shift and a pattern of mean zero."""
    return [a + by + p for a, p in zip(TASKS, pattern, strict=True)]
