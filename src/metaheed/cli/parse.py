"""Parsing: commands and options into configs."""

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from metaheed.cli.help import ASKED, algorithms_page, help_page
from metaheed.cli.hints import check_options
from metaheed.cli.waiting import loading_torch
from metaheed.config import (
    LEARNERS,
    RULES,
    EpisodeConfig,
    RunConfig,
    checked,
    default_pair,
    unchecked,
)
from metaheed.errors import ConfigError


def parse_command(kind: Any, command: str, arguments: list[str], description: str | None = None, **default: Any) -> Any:
    """A command's options as a value of a class, checked.

    Args:
        kind: the class, or an annotation that tyro understands.
        command: its name, for messages.
        arguments: its name, and what follows it.
        description: for --help.
        default: the value with every default, where it is not the class's own.

    Raises:
        ConfigError: an option is out of its bounds, or is one of another algorithm or library.
        SystemExit: --help, or what the parser refuses.
    """
    known = default.get("default", kind)
    one = bool(default) or isinstance(kind, type)  # else a choice among algorithms
    if one:
        check_options(known, command, arguments[1:])
    asked = ASKED & set(arguments[1:])
    if asked:
        every = "--help-all" in asked
        print(help_page(known, command, description, every) if one else algorithms_page(command, description or ""))
        raise SystemExit(0)
    with unchecked():
        parsed = tyro.cli(
            kind,
            **default,
            prog=f"metaheed {command}",
            description=description,
            args=arguments[1:],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        expanded = _expanded(parsed)
    return checked(expanded)


def _expanded(value: Any) -> Any:
    """With ~ in every path replaced: shells leave it in --data-root=~/data."""
    if isinstance(value, Path):
        with contextlib.suppress(RuntimeError):  # no such user: a name like any other
            return value.expanduser()
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    if is_dataclass(value) and not isinstance(value, type):
        inside = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return replace(value, **{name: _expanded(part) for name, part in inside.items()})
    return value


def parse_custom(
    arguments: list[str],
    description: str,
    kind: Any = RunConfig,
    wrap: Callable[[RunConfig], Any] = lambda config: config,
) -> Any:
    """`train custom --learner L --rule R` and the options of both; or `search custom`, whose kind holds a RunConfig.

    Args:
        arguments: the command's name, and what follows it.
        description: for --help; "{}" stands for the pair.
        kind: what is parsed.
        wrap: the kind's value with every default, of a run's config.
    """
    command = arguments[0]
    pair = argparse.ArgumentParser(prog=f"metaheed {command} custom", add_help=False, allow_abbrev=False)
    pair.add_argument("--learner")
    pair.add_argument("--rule")
    chosen, rest = pair.parse_known_args(arguments[2:])
    if chosen.learner is None or chosen.rule is None:
        text = (
            f"{command} custom needs both --learner and --rule: any of the learners "
            f"{', '.join(LEARNERS)} with any of the rules {', '.join(RULES)}"
        )
        if ASKED & set(rest):
            print(f"usage: metaheed {command} custom --learner LEARNER --rule RULE [options]\n\n{text}.")
            print(f"Their options: metaheed {command} custom --learner LEARNER --rule RULE --help")
            raise SystemExit(0)
        raise ConfigError(text)
    pair_named = f"the learner {chosen.learner} under the rule {chosen.rule}"
    return parse_command(
        kind,
        f"{command} custom --learner {chosen.learner} --rule {chosen.rule}",
        ["custom", *rest],
        description.format(pair_named),
        default=wrap(default_pair(chosen.learner, chosen.rule, *find_setting(arguments))),
    )


def find_setting(arguments: list[str]) -> tuple[str, int, int]:
    """Data set, ways and shots, which decide some defaults; what is no number is left for the parser to refuse."""
    setting = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    setting.add_argument("--data", nargs="?", default=EpisodeConfig.data)
    setting.add_argument("--ways", nargs="?", default=str(EpisodeConfig.ways))
    setting.add_argument("--shots", nargs="?", default=str(EpisodeConfig.shots))
    found, _ = setting.parse_known_args(arguments)
    ways, shots = (
        int(value) if value and value.isdecimal() and int(value) >= least else default
        for value, least, default in ((found.ways, 2, EpisodeConfig.ways), (found.shots, 1, EpisodeConfig.shots))
    )
    return found.data or EpisodeConfig.data, ways, shots


def tune_process() -> None:
    """Make this process fit for training: memory that is freed is kept, and results repeat to the bit."""
    with loading_torch():
        from metaheed.running.process import keep_freed_memory, make_deterministic

    keep_freed_memory()
    make_deterministic()
