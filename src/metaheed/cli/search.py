"""metaheed search."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from metaheed.cli.parse import find_setting, parse_command, parse_custom, tune_process
from metaheed.config import (
    ALGORITHMS,
    RunConfig,
    SearchConfig,
    TrialConfig,
    default_config,
)
from metaheed.errors import ConfigError, unknown


@dataclass(frozen=True, kw_only=True)
class Search:
    """A study: what is searched, and what every trial of it shares."""

    search: SearchConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class SearchResume:
    """Go on with a search: its trials that are not finished."""

    resume: Path
    """The study folder. Nothing else is needed."""
    trials: int | None = None
    """Try this number of configurations in all instead."""
    storage: str | None = None
    """URL of the study's database, if it has moved or needs a password, which is not written down."""
    data_root: Path | None = None
    """Folder that holds the data now, if it has moved."""
    device: str | None = None
    """Compute trials that begin from now on here instead (cpu, cuda, cuda:N)."""
    threads: int | None = None
    """Number of CPU threads of trials that begin from now on."""
    trust: bool = False
    """Let the code of the study's network run if it is not one of metaheed's and you did not begin the study here."""


_SEARCH = (
    "Train many configurations of an algorithm and choose the best on validation. What is searched is bounded by the "
    "--…-range options; all other options of training hold for every trial. To go on with a search give the same "
    "command again, or: metaheed search --resume STUDY"
)


def parse_search(arguments: list[str]) -> Search:
    """`search ALGORITHM` with its options and those of training, or `search custom --learner L --rule R`."""
    for given in arguments:
        name = given.split("=")[0].replace("_", "-")
        if name.removeprefix("--").replace("-", "_") in SearchConfig().ranges:
            raise ConfigError(f"{name} is searched: bound it by {name}-range LOW HIGH; the same number twice fixes it")
    named = arguments[1:2]
    if named == ["custom"]:
        custom: Search = parse_custom(arguments, f"{_SEARCH}. Here: {{}}.", Search, _default_search)
        return custom
    if named and not named[0].startswith("-") and named[0] not in ALGORITHMS:
        raise unknown("algorithm", named[0], [*ALGORITHMS, "custom"])
    if named and named[0] in ALGORITHMS:
        of_one: Search = parse_command(
            Search,
            f"search {named[0]}",
            ["search", *arguments[2:]],
            f"{ALGORITHMS[named[0]][2]} {_SEARCH}",
            default=_default_search(default_config(named[0], *find_setting(arguments))),
        )
        return of_one
    setting = find_setting(arguments)
    kinds = tyro.extras.subcommand_type_from_defaults(
        {name: _default_search(default_config(name, *setting)) for name in ALGORITHMS},
        {name: description for name, (_, _, description) in ALGORITHMS.items()},
    )
    parsed: Search = parse_command(kinds, "search", arguments, _SEARCH)
    return parsed


def _default_search(config: RunConfig) -> Search:
    return Search(search=SearchConfig(), run=replace(config, training=TrialConfig()))


def run_search(command: Search) -> int:
    """metaheed search."""
    tune_process()
    from metaheed.running.progress import make_reporter
    from metaheed.studies.search import search

    done = search(command.run, command.search, lambda: make_reporter(brief=True))
    stopped = f", {done.stopped} stopped early" if done.stopped else ""
    failed = f", {done.failed} failed" if done.failed else ""
    print(f"{done.folder}: {done.trials} trials{stopped}{failed}, {done.iterations} iterations in all")
    for notice in done.notices:
        print(notice)
    if done.best is None:
        return 1
    recipe = done.folder / "best.yaml"
    print(f"best: trial {done.best}, validation accuracy {done.accuracy:.2%}")
    print(f"to train it: metaheed train --recipe {shlex.quote(str(recipe))}")
    return 0


def run_resumed_search(command: SearchResume) -> int:
    """Go on with a search."""
    from metaheed.studies.search import read_search

    config, settings = read_search(command.resume, command.storage, command.trust)
    training, episodes = config.training, config.episodes
    if command.device is not None:
        training = replace(training, device=command.device)
    if command.threads is not None:
        training = replace(training, threads=command.threads)
    if command.data_root is not None:
        episodes = replace(episodes, data_root=command.data_root)
    if command.trials is not None:
        settings = replace(settings, trials=command.trials)
    return run_search(Search(search=settings, run=replace(config, training=training, episodes=episodes)))
