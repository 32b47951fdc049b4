"""metaheed train."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from metaheed.cli.parse import find_setting, parse_command, tune_process
from metaheed.config import (
    ALGORITHMS,
    ExecutionName,
    RunConfig,
    default_config,
)
from metaheed.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Continue a run where its newest checkpoint stands."""

    resume: Path
    """The run folder. Nothing else is needed."""
    iterations: int | None = None
    """Train to this number of iterations instead."""
    data_root: Path | None = None
    """Folder that holds the data now, if it has moved."""
    device: str | None = None
    """Compute on this device instead (cpu, cuda, cuda:N). The bits then differ from those of an uninterrupted run."""
    execution: ExecutionName | None = None
    """Compute the tasks of a batch this way instead (see train --help-all). The bits then differ, too."""
    chunk_size: int | None = None
    """Compute this many tasks at once instead (executions vectorized and im2col). The bits then differ, too."""
    capture: Literal["auto", "on", "off"] | None = None
    """Whether steps are computed in blocks (see train --help-all), if that is to change."""
    trust: bool = False
    """Let the code of the run's network run if it is not one of metaheed's and you did not train it here."""


TRAIN = (
    "Train a new run. To continue one: metaheed train --resume RUN. "
    "Any learner with any batch rule: metaheed train custom --learner L --rule R. "
    "From a recipe: metaheed train --recipe FILE"
)


def parse_algorithm(name: str, arguments: list[str]) -> RunConfig:
    """`train ALGORITHM` and its options."""
    config: RunConfig = parse_command(
        RunConfig,
        f"train {name}",
        ["train", *arguments[2:]],
        f"{ALGORITHMS[name][2]} {TRAIN}",
        default=default_config(name, *find_setting(arguments)),
    )
    return config


def parse_recipe(arguments: list[str]) -> tuple[RunConfig, bool]:
    """`train --recipe FILE` and the options that override it; and whether --trust is given."""
    from metaheed.studies import recipes

    own = argparse.ArgumentParser(prog="metaheed train", add_help=False, allow_abbrev=False)
    own.add_argument("--recipe", type=Path)
    own.add_argument("--trust", action="store_true")
    chosen, rest = own.parse_known_args(arguments[1:])
    named = [a for a in rest[:1] if not a.startswith("-")]
    if named:
        raise ConfigError(f"--recipe {chosen.recipe} says which algorithm to train: leave {named[0]!r} out")
    recipe = recipes.read(chosen.recipe)
    config: RunConfig = parse_command(
        RunConfig,
        f"train --recipe {chosen.recipe}",
        ["train", *rest],
        f"Train a new run of {recipe.name} as {chosen.recipe} says, but for the options given. --trust lets the "
        "code of its network run where that is not one of metaheed's.",
        default=recipe.config,
    )
    if not any(a.split("=")[0] == "--backbone" for a in rest):
        # The recipe's word, not the user's, whatever the parser made of it.
        config = replace(config, learner=replace(config.learner, backbone=recipe.config.learner.backbone))
    return config, chosen.trust


def algorithm_kinds(data: str, ways: int, shots: int) -> Any:
    """The configs among which `train` chooses by the algorithm's name, each with its defaults for that setting."""
    return tyro.extras.subcommand_type_from_defaults(
        {name: default_config(name, data, ways, shots) for name in ALGORITHMS},
        {name: description for name, (_, _, description) in ALGORITHMS.items()},
    )


def run_train(config: RunConfig, trust: bool = False) -> int:
    """metaheed train."""
    tune_process()
    from metaheed.running.progress import make_reporter
    from metaheed.running.train import train

    path = train(config, make_reporter(), trust)
    print(f"{path} is trained; judge it with 'metaheed evaluate {path}'")
    return 0


def run_resumed(command: Resume) -> int:
    """metaheed train --resume."""
    tune_process()
    from metaheed.running.progress import make_reporter
    from metaheed.running.train import resume

    path = resume(
        command.resume,
        command.iterations,
        command.data_root,
        command.device,
        make_reporter(),
        execution=command.execution,
        chunk_size=command.chunk_size,
        capture=command.capture,
        trust=command.trust,
    )
    print(f"{path} is trained; judge it with 'metaheed evaluate {path}'")
    return 0
