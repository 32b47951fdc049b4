"""metaheed report, reproduce, demo and toy."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from metaheed.cli.parse import tune_process
from metaheed.config import (
    ReportConfig,
    ReproduceConfig,
    ToyConfig,
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables and figures of runs: one HTML page, the same as Markdown, figures as PNG and SVG. Needs no data."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders that hold some at any depth; what 'metaheed toy' wrote, too."""
    out: Path
    """Folder to make. One that holds an earlier report, and nothing else, is replaced."""
    showing: ReportConfig = field(default_factory=ReportConfig)


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run what is missing of the paper's Table 1 or 2 or of its figures, go on with what was cut off, judge it all, and
    write a report. The same command goes on after any interruption."""

    experiment: tyro.conf.Positional[str]
    """table1, table2 or figures."""
    doing: ReproduceConfig = field(default_factory=ReproduceConfig)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train MAML and TA-MAML on the built-in glyphs, judge and compare them, and draw a figure. A few minutes."""

    out: Path = Path("runs/demo")
    """Folder of its runs and its figure; what is there already is continued."""
    iterations: int = 150
    """Outer steps of each of the two."""
    seed: int = 0
    """Training seed."""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """MetaLSTM against MetaLSTM++ on four problems of two parameters: the paths of their start, drawn and measured."""

    out: Path = Path("runs/toy")
    """Folder of trajectories.png and toy.json."""
    training: ToyConfig = field(default_factory=ToyConfig)


def run_report(command: Report) -> int:
    """metaheed report."""
    tune_process()
    from metaheed.studies.report import report

    page = report(command.runs, command.out, command.showing, say=lambda text: print(text, file=sys.stderr, flush=True))
    print(f"report: {page}")
    return 0


def run_reproduce(command: Reproduce) -> int:
    """metaheed reproduce."""
    tune_process()
    from metaheed.studies.reproduce import dry_run, reproduce

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if command.doing.dry_run:
        dry_run(command.experiment, command.doing, lambda text: print(text, flush=True), tell)
        return 0
    page = reproduce(command.experiment, command.doing, tell)
    print(f"report: {page}")
    return 0


def run_demo(command: Demo) -> int:
    """metaheed demo."""
    tune_process()
    from metaheed.studies.demo import demo

    demo(command.out, command.iterations, command.seed)
    return 0


def run_toy(command: Toy) -> int:
    """metaheed toy."""
    tune_process()
    from metaheed.studies.toy import toy

    for name, trajectory in toy(command.out, command.training).items():
        print(
            f"{name}: {len(trajectory.points) - 1} outer steps, path length {trajectory.path_length:.2f} for a "
            f"displacement of {trajectory.displacement:.2f}; nearer to the last task than with "
            f"the tasks reversed by {trajectory.last_task_bias:+.4f} ± {trajectory.last_task_bias_half_width:.4f}"
        )
    print(f"figure: {command.out / 'trajectories.png'}")
    return 0
