"""A demo of a few minutes: train MAML and TA-MAML on glyphs, evaluate both on the same tasks, and compare them."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from metaheed.config import EvaluationConfig, FreezeConfig, MAMLConfig, RunConfig, default_config
from metaheed.data import Episodes, load_dataset
from metaheed.errors import RunError
from metaheed.files.opening import refuse_link
from metaheed.files.writing import _writing
from metaheed.outer import evaluate_adapted, evaluate_initial, map_looped
from metaheed.running.compare import compare
from metaheed.running.evaluate import evaluate, evaluate_run
from metaheed.running.folder import RunFolder
from metaheed.running.load import load
from metaheed.running.progress import make_reporter, make_watcher
from metaheed.running.statistics import interval
from metaheed.running.train import resume, train
from metaheed.studies.figures import training_figure

LABELS = {"maml": "MAML", "ta-maml": "TA-MAML"}


def demo(out: str | Path, iterations: int, seed: int, tasks: int = 300) -> Path:
    """Run the demo in the folder `out`, and continue the runs that are there.

    Args:
        out: folder for the runs maml/ and ta-maml/ and for figure.png.
        iterations: outer steps of each run.
        seed: training seed of both.
        tasks: number of test tasks.

    Returns:
        The path of the figure.

    Raises:
        RunError: `out` holds a demo of other settings.
    """
    console, out = Console(), Path(out)
    runs = {}
    for algorithm, label in LABELS.items():
        config = demo_config(algorithm, out / algorithm, iterations, seed)
        console.print(f"[bold]{label}[/]: {iterations} iterations of 5-way 1-shot tasks on glyphs")
        folder = RunFolder(out / algorithm)
        with _writing(folder.path):
            refuse_link(folder.path, out)
        if folder.config_file.exists():
            found = folder.read_config()
            recorded = replace(found.training, threads=None, device="auto", out=config.training.out)
            if replace(found, training=recorded) != config:
                raise RunError(f"{folder.path} holds a demo of other settings: choose another --out, or delete it")
            runs[algorithm] = resume(folder.path, reporter=make_reporter())
        else:
            runs[algorithm] = train(config, make_reporter())

    watcher = make_watcher(brief=True)
    judged = {a: evaluate_run(path, EvaluationConfig(tasks=tasks), watcher=watcher) for a, path in runs.items()}
    table = Table(title=f"Accuracy on {tasks} test tasks of unseen scripts, ± 95% interval over tasks")
    for column in ("", "before adaptation", "after adaptation"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("untrained", *_untrained(runs["maml"], seed, tasks))
    for algorithm, result in judged.items():
        table.add_row(
            LABELS[algorithm],
            f"{result['initial_accuracy']:.2%} ± {result['initial_half_width_95']:.2%}",
            f"{result['accuracy']:.2%} ± {result['half_width_95']:.2%}",
        )
    console.print(table)
    difference = compare([runs["ta-maml"]], [runs["maml"]])
    console.print(
        f"TA-MAML minus MAML on the same tasks: {100 * difference.mean:+.2f} ± {100 * difference.half_width:.2f} "
        f"points ({difference.covers})",
        soft_wrap=True,
    )
    figure = out / "figure.png"
    training_figure({LABELS[a]: path for a, path in runs.items()}, figure)
    console.print(f"figure: {figure}", soft_wrap=True)
    return figure


def demo_config(algorithm: str, out: Path, iterations: int, seed: int) -> RunConfig:
    """A run's config in the demo: smaller tasks and fewer steps than the defaults, so that it takes minutes."""
    config = default_config(algorithm)
    return replace(
        config,
        episodes=replace(config.episodes, queries=5),
        learner=MAMLConfig(adaptation_steps=3, fast_lr=0.2),
        outer=replace(config.outer, meta_lr=3e-3),
        training=replace(
            config.training,
            iterations=iterations,
            seed=seed,
            out=out,
            val_every=max(1, iterations // 8),
            val_tasks=60,
            checkpoint_every=25,
            execution="vectorized",  # the fastest for tasks as small as these
        ),
    )


def _untrained(run: Path, seed: int, tasks: int) -> tuple[str, str]:
    learner, _ = load(run)
    meta = learner.init(torch.Generator().manual_seed(seed))  # the θ that the run began with
    config = RunFolder(run).read_config()
    episodes = Episodes(load_dataset("glyphs"), "test", *config.episodes.test_shape, FreezeConfig.episode_seed)
    before, after = (
        interval(evaluate(map_looped(partial(outcome, learner)), meta, episodes, tasks).accuracies)
        for outcome in (evaluate_initial, evaluate_adapted)
    )
    return f"{before[0]:.2%} ± {before[1]:.2%}", f"{after[0]:.2%} ± {after[1]:.2%}"
