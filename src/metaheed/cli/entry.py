"""The command line: parsing only; each command is one call into the package.

Heavy imports are made inside the commands, so that --help and mistakes answer at once.
"""

import contextlib
import io
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import metaheed
from metaheed.cli.data import run_data
from metaheed.cli.help import ASKED
from metaheed.cli.judge import Compare, Evaluate, run_compare, run_evaluate
from metaheed.cli.parse import find_setting, parse_command, parse_custom
from metaheed.cli.search import SearchResume, parse_search, run_resumed_search, run_search
from metaheed.cli.studies import Demo, Report, Reproduce, Toy, run_demo, run_report, run_reproduce, run_toy
from metaheed.cli.train import TRAIN, Resume, algorithm_kinds, parse_algorithm, parse_recipe, run_resumed, run_train
from metaheed.config import (
    ALGORITHMS,
    RunConfig,
)
from metaheed.errors import ConfigError, Interrupted, MetaheedError, MetaheedWarning, naming_options, unknown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that has no ± still gets the number
    try:
        with _plain_warnings(), naming_options():
            return _dispatch(arguments)
    except Interrupted as stop:
        print(str(stop), file=sys.stderr)
        return 128 + stop.signal_number
    except MetaheedError as error:
        print(f"error: {_shortened(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does: nobody is left to talk to.
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return 128 + 13  # as if ended by SIGPIPE, the custom of such programs
    except OSError as error:
        print(f"error: {_shortened(str(error))}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        from metaheed.running.process import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0][:200] or "nothing was said of how much was asked for"
        print(
            f"error: the memory does not suffice ({reason}): set a smaller --meta-batch-size, fewer --ways, --shots, "
            "--queries or --tasks, or a smaller --backbone, or end other programs",
            file=sys.stderr,
        )
        return 1
    finally:
        _drop_unread()


def _drop_unread() -> None:
    """Throw away what standard error did not take because its reader has gone.

    Python would try to write it once more at its end, fail again, and report status 120 for a command that succeeded.
    """
    try:
        sys.stderr.flush()
    except OSError:
        with contextlib.suppress(OSError):  # it may have no file of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _shortened(message: str) -> str:
    """A message that a long name or list makes longer than a screen holds, without its middle: what is wrong stands at
    the beginning, and what helps at the end.
    """
    return message if len(message) <= 1200 else f"{message[:800]} … {message[-300:]}"


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print our own warnings as a line each: on the command line no line of Python is the user's."""
    usual = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
        return (
            f"warning: {message}\n"
            if issubclass(category, MetaheedWarning)
            else usual(message, category, *where, **more)
        )

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _dispatch(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"metaheed {metaheed.__version__}")
        return 0
    _check_text(arguments)
    resuming = any(a.split("=")[0] == "--resume" for a in arguments)
    if arguments[:1] == ["train"] and resuming:
        return run_resumed(parse_command(Resume, "train", arguments))
    if arguments[:1] == ["train"]:
        named = arguments[1:2]
        if any(a.split("=")[0] == "--recipe" for a in arguments):
            return run_train(*parse_recipe(arguments))
        if named == ["custom"]:
            custom: RunConfig = parse_custom(arguments, "Train a new run of {}.")
            return run_train(custom)
        if named and not named[0].startswith("-") and named[0] not in ALGORITHMS:
            raise unknown("algorithm", named[0], [*ALGORITHMS, "custom"])
        if named and named[0] in ALGORITHMS:
            return run_train(parse_algorithm(named[0], arguments))
        _require_algorithm("train", arguments)
        return run_train(parse_command(algorithm_kinds(*find_setting(arguments)), "train", arguments, TRAIN))
    if arguments[:1] == ["search"]:
        if resuming:
            return run_resumed_search(parse_command(SearchResume, "search", arguments))
        if not arguments[1:] or arguments[1].startswith("-"):
            _require_algorithm("search", arguments)
        return run_search(parse_search(arguments))
    commands: dict[str, tuple[Any, Callable[[Any], int]]] = {
        "evaluate": (Evaluate, run_evaluate),
        "compare": (Compare, run_compare),
        "report": (Report, run_report),
        "reproduce": (Reproduce, run_reproduce),
        "demo": (Demo, run_demo),
        "toy": (Toy, run_toy),
    }
    if arguments[:1] == ["data"]:
        return run_data(arguments)
    if arguments[:1] == ["compare"] and not {"--against", *ASKED} & {a.split("=")[0] for a in arguments}:
        raise ConfigError(
            "compare needs evaluated runs and others to set them against: metaheed compare RUN... --against RUN..."
        )
    if arguments and arguments[0] in commands:
        kind, command = commands[arguments[0]]
        return command(parse_command(kind, arguments[0], arguments))
    if arguments and arguments[0] in ALGORITHMS:
        raise ConfigError(f"{arguments[0]!r} is an algorithm, not a command: metaheed train {shlex.join(arguments)}")
    if arguments and not arguments[0].startswith("-"):
        raise unknown("command", arguments[0], ["train", "search", "data", *commands])
    print(_USAGE)
    return 0 if arguments in (["-h"], ["--help"]) else 2


def _require_algorithm(command: str, arguments: list[str]) -> None:
    """Raise ConfigError where options, or nothing, stand in the place of the algorithm, unless help is asked for."""
    if not ASKED & set(arguments):
        given = shlex.join(arguments[1:]) or "[options]"
        raise ConfigError(
            f"{command} needs the name of an algorithm first: metaheed {command} ALGORITHM {given}; "
            f"'metaheed {command} --help' lists them"
        )


def _check_text(arguments: list[str]) -> None:
    """Refuse what no option means: an empty value, which as a path would be the current folder, and control characters.

    Raises:
        ConfigError: names the option.
    """
    for before, given in zip(["", *arguments], arguments, strict=False):
        option, assigned, value = given.partition("=") if given.startswith("--") else (before, "=", given)
        name = option if option.startswith("--") else "an argument"
        if assigned and not value:
            raise ConfigError(f"{name} is empty: give it a value, or leave it out")
        if any(ord(c) < 32 or ord(c) == 127 for c in given):
            raise ConfigError(f"{name} is {value[:60]!r}, but a name or value must not hold control characters")


_USAGE = """metaheed: few-shot meta-learning with task attention

  metaheed train ALGORITHM [options]    train a new run
  metaheed train custom --learner L --rule R [options]
                                        any learner with any batch rule
  metaheed train --recipe FILE [options]
                                        what a recipe says, but for the options given
  metaheed train --resume RUN           continue one; needs nothing else
  metaheed search ALGORITHM [options]   try settings, chosen on validation: the best become a recipe
  metaheed search --resume STUDY        go on with a search; several processes and machines may at once
  metaheed evaluate RUN [options]       judge it on frozen test tasks
  metaheed compare RUN... --against RUN...
                                        paired differences on the same tasks
  metaheed report RUNS... --out DIR     tables and figures of runs as one page
  metaheed reproduce table1|table2|figures
                                        the paper's runs, those that are missing, and their report
  metaheed data COMMAND                 data sets: download, prepare, list, verify, show, split, episodes
  metaheed demo                         all of it on built-in data, in minutes
  metaheed toy                          MetaLSTM against MetaLSTM++ in two parameters, drawn
  metaheed --version

algorithms: {algorithms}
Each command has --help; those with many options also --help-all.""".format(algorithms=", ".join(sorted(ALGORITHMS)))
