"""The command line: parsing only; each command is one call into the package.

Heavy imports are made inside the commands, so that --help and mistakes answer at once.
"""

import argparse
import contextlib
import io
import json
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import metaheed
from metaheed.config import (
    ALGORITHMS,
    LEARNERS,
    RULES,
    EpisodeConfig,
    EvaluationConfig,
    ExecutionName,
    FreezeConfig,
    ReportConfig,
    ReproduceConfig,
    RunConfig,
    SearchConfig,
    ToyConfig,
    TrainingConfig,
    TrialConfig,
    checked,
    default_config,
    default_pair,
    unchecked,
)
from metaheed.errors import ConfigError, Interrupted, MetaheedError, MetaheedWarning, unknown
from metaheed.hints import check_options


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Continue a run where its newest checkpoint stands."""

    resume: Path
    """The run folder. Nothing else is needed."""
    iterations: int | None = None
    """Train to this many iterations instead."""
    data_root: Path | None = None
    """Where the data lies, if it has moved."""
    device: str | None = None
    """Compute here instead (cpu, cuda, cuda:N); bits then differ from an uninterrupted run's."""
    execution: ExecutionName | None = None
    """Run a batch's tasks so instead (as in train --help); bits then differ, too."""
    chunk_size: int | None = None
    """This many tasks at once instead, under the executions vectorized and im2col; bits then differ, too."""
    capture: Literal["auto", "on", "off"] | None = None
    """Make the steps so instead (as in train --help)."""
    trust: bool = False
    """Let the code of the run's network run where that is not one of metaheed's and you did not train it here."""


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
    """Train this many configurations in all instead."""
    storage: str | None = None
    """URL of its database, where it has moved, or needs a password (which is not written down)."""
    data_root: Path | None = None
    """Where the data lies, if it has moved."""
    device: str | None = None
    """Compute here instead (cpu, cuda, cuda:N); for trials that are begun from now on."""
    threads: int | None = None
    """CPU threads of the trials that are begun from now on."""
    trust: bool = False
    """Let the code of the study's network run where that is not one of metaheed's and you did not begin it here."""


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
class DataDownload:
    """Fetch a data set's published files; for those that may not be given away, say how to get them."""

    data: tyro.conf.Positional[str]
    """omniglot, cifar-fs, fc100; miniimagenet and tieredimagenet are explained."""
    data_root: Path = Path("data")
    """Folder to put the files into, for --data-root of other commands."""


@dataclass(frozen=True, kw_only=True)
class DataEpisodes:
    """Write frozen tasks to a file, for `metaheed evaluate RUN --episodes FILE` and for other libraries."""

    out: Path
    """The file, a numpy archive: docs/data.md says what is in it."""
    which: FreezeConfig = field(default_factory=FreezeConfig)


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


@dataclass(frozen=True, kw_only=True)
class DataPrepare:
    """Convert a data set once into a store that training maps into memory; goes on where an interrupted one stopped."""

    name: tyro.conf.Positional[str]
    """Data set: miniimagenet, tieredimagenet, cifar-fs, fc100, omniglot, omniglot-vinyals, folder, glyphs."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder of the published files; for folder: the folder, zip or tar of pictures. glyphs needs none."""
    to: Path | None = None
    """Folder in which the store is made; none: --from, or the folder that holds it if it is a file."""
    image_size: int | None = None
    """Pixels a side, of folder only; none: 84."""
    split_seed: int | None = None
    """Seed by which undivided classes are divided, of folder only; none: 0."""


@dataclass(frozen=True, kw_only=True)
class DataList:
    """What there is: every data set, whether it was found and in which layout, its classes and images."""

    data_root: Path | None = None
    """Where to look; none: the built-in data set only."""


@dataclass(frozen=True, kw_only=True)
class DataVerify:
    """Go through stores: counts, checksums, and images that are in two classes or splits."""

    stores: tyro.conf.Positional[tuple[Path, ...]]
    """Stores, or folders that hold some."""


@dataclass(frozen=True, kw_only=True)
class DataShow:
    """A picture (PNG) of an episode, or of some classes."""

    name: tyro.conf.Positional[str]
    """Data set."""
    data_root: Path | None = None
    """Where it lies; as in training."""
    image_size: int | None = None
    """Of folder only; as in training."""
    split_seed: int | None = None
    """Of folder only; as in training."""
    split: Literal["train", "val", "test"] = "train"
    """Whose classes."""
    classes: int | None = None
    """Show the first images of so many classes instead of an episode."""
    ways: int = EpisodeConfig.ways
    """N of the episode."""
    shots: int = EpisodeConfig.shots
    """K of the episode."""
    queries: int = EpisodeConfig.queries
    """Q of the episode; with --classes: images a class, less one."""
    seed: int = TrainingConfig.seed
    """Which stream of episodes: training's of that seed."""
    index: int = 0
    """Which of its episodes."""
    out: Path = Path("data.png")
    """The picture to write."""


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """Divide a folder of classes by a seed: writes the lists train.txt, val.txt and test.txt into it."""

    folder: tyro.conf.Positional[Path]
    """The folder that holds a folder of images for each class."""
    seed: int = EpisodeConfig.folder_split_seed
    """Decides which class goes where."""
    val: float = EpisodeConfig.folder_shares[0]
    """Share of the classes for validation, at least two."""
    test: float = EpisodeConfig.folder_shares[1]
    """Share of the classes for test, at least two."""
    overwrite: bool = False
    """Replace lists that are there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that has no ± still gets the number
    try:
        with _plain_warnings():
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
        from metaheed.process import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0][:200] or "nothing was said of how much was asked for"
        print(
            f"error: the memory does not suffice ({reason}): set a smaller --meta-batch-size, fewer --ways, --shots, "
            "--queries or --tasks, or a smaller --backbone, or end other programs",
            file=sys.stderr,
        )
        return 1


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
        return _resume(_parse(Resume, "train", arguments))
    if arguments[:1] == ["train"]:
        named = arguments[1:2]
        if any(a.split("=")[0] == "--recipe" for a in arguments):
            return _train(*_of_recipe(arguments))
        if named == ["custom"]:
            custom: RunConfig = _custom(arguments)
            return _train(custom)
        if named and not named[0].startswith("-") and named[0] not in ALGORITHMS:
            raise unknown("algorithm", named[0], [*ALGORITHMS, "custom"])
        if named and named[0] in ALGORITHMS:
            return _train(_of_algorithm(named[0], arguments))
        return _train(_parse(_algorithms(*_setting(arguments)), "train", arguments, _TRAIN))
    if arguments[:1] == ["search"]:
        if resuming:
            return _resume_search(_parse(SearchResume, "search", arguments))
        return _search(_searched(arguments))
    commands: dict[str, tuple[Any, Callable[[Any], int]]] = {
        "evaluate": (Evaluate, _evaluate),
        "compare": (Compare, _compare),
        "report": (Report, _report),
        "reproduce": (Reproduce, _reproduce),
        "demo": (Demo, _demo),
        "toy": (Toy, _toy),
    }
    if arguments[:1] == ["data"]:
        return _data(arguments)
    if arguments[:1] == ["compare"] and not {"--against", "-h", "--help"} & {a.split("=")[0] for a in arguments}:
        raise ConfigError(
            "compare needs evaluated runs and others to set them against: metaheed compare RUN... --against RUN..."
        )
    if arguments and arguments[0] in commands:
        kind, command = commands[arguments[0]]
        return command(_parse(kind, arguments[0], arguments))
    if arguments and arguments[0] in ALGORITHMS:
        raise ConfigError(f"{arguments[0]!r} is an algorithm, not a command: metaheed train {shlex.join(arguments)}")
    if arguments and not arguments[0].startswith("-"):
        raise unknown("command", arguments[0], ["train", "search", "data", *commands])
    print(_USAGE)
    return 0 if arguments in (["-h"], ["--help"]) else 2


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
Each command has --help.""".format(algorithms=", ".join(sorted(ALGORITHMS)))

_TRAIN = (
    "Train a new run. To continue one: metaheed train --resume RUN. "
    "Any learner with any batch rule: metaheed train custom --learner L --rule R. "
    "From a recipe: metaheed train --recipe FILE"
)

_SEARCH = (
    "Train many configurations of an algorithm and choose the best on validation. What is searched is bounded by the "
    "--…-range options; all other options of training hold for every trial. To go on with a search give the same "
    "command again, or: metaheed search --resume STUDY"
)


def _parse(kind: Any, command: str, arguments: list[str], description: str | None = None, **default: Any) -> Any:
    if default or isinstance(kind, type):
        check_options(default.get("default", kind), command, arguments[1:])
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


def _data(arguments: list[str]) -> int:
    commands: dict[str, tuple[Any, Callable[[Any], int]]] = {
        "prepare": (DataPrepare, _data_prepare),
        "list": (DataList, _data_list),
        "verify": (DataVerify, _data_verify),
        "show": (DataShow, _data_show),
        "split": (DataSplit, _data_split),
        "download": (DataDownload, _data_download),
        "episodes": (DataEpisodes, _data_episodes),
    }
    named = arguments[1:2]
    if named and named[0] in commands:
        kind, command = commands[named[0]]
        return command(_parse(kind, f"data {named[0]}", arguments[1:]))
    if named and not named[0].startswith("-"):
        raise unknown("data command", named[0], commands)
    print("usage: metaheed data COMMAND [options]\n")
    for name, (kind, _) in commands.items():
        print(f"  metaheed data {name:9}{kind.__doc__}")
    return 0 if named in (["-h"], ["--help"]) else 2


def _searched(arguments: list[str]) -> Search:
    """`search ALGORITHM` with its options and those of training, or `search custom --learner L --rule R`."""
    for given in arguments:
        name = given.split("=")[0].replace("_", "-")
        if name.removeprefix("--").replace("-", "_") in SearchConfig().ranges:
            raise ConfigError(f"{name} is searched: bound it by {name}-range LOW HIGH; the same number twice fixes it")
    named = arguments[1:2]
    if named == ["custom"]:
        custom: Search = _custom(arguments, Search, _in_search)
        return custom
    if named and not named[0].startswith("-") and named[0] not in ALGORITHMS:
        raise unknown("algorithm", named[0], [*ALGORITHMS, "custom"])
    if named and named[0] in ALGORITHMS:
        of_one: Search = _parse(
            Search,
            f"search {named[0]}",
            ["search", *arguments[2:]],
            f"{ALGORITHMS[named[0]][2]} {_SEARCH}",
            default=_in_search(default_config(named[0], *_setting(arguments))),
        )
        return of_one
    setting = _setting(arguments)
    kinds = tyro.extras.subcommand_type_from_defaults(
        {name: _in_search(default_config(name, *setting)) for name in ALGORITHMS},
        {name: description for name, (_, _, description) in ALGORITHMS.items()},
    )
    parsed: Search = _parse(kinds, "search", arguments, _SEARCH)
    return parsed


def _in_search(config: RunConfig) -> Search:
    return Search(search=SearchConfig(), run=replace(config, training=TrialConfig()))


def _custom(
    arguments: list[str], kind: Any = RunConfig, wrap: Callable[[RunConfig], Any] = lambda config: config
) -> Any:
    """`train custom --learner L --rule R` and the options of both; or `search custom`, whose kind holds a RunConfig."""
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
        if {"-h", "--help"} & set(rest):
            print(f"usage: metaheed {command} custom --learner LEARNER --rule RULE [options]\n\n{text}.")
            print(f"Their options: metaheed {command} custom --learner LEARNER --rule RULE --help")
            raise SystemExit(0)
        raise ConfigError(text)
    pair_named = f"the learner {chosen.learner} under the rule {chosen.rule}"
    return _parse(
        kind,
        f"{command} custom --learner {chosen.learner} --rule {chosen.rule}",
        ["custom", *rest],
        f"Train a new run of {pair_named}." if command == "train" else f"{_SEARCH}. Here: {pair_named}.",
        default=wrap(default_pair(chosen.learner, chosen.rule, *_setting(arguments))),
    )


def _of_algorithm(name: str, arguments: list[str]) -> RunConfig:
    """`train ALGORITHM` and its options."""
    config: RunConfig = _parse(
        RunConfig,
        f"train {name}",
        ["train", *arguments[2:]],
        f"{ALGORITHMS[name][2]} {_TRAIN}",
        default=default_config(name, *_setting(arguments)),
    )
    return config


def _of_recipe(arguments: list[str]) -> tuple[RunConfig, bool]:
    """`train --recipe FILE` and the options that override it; and whether --trust is given."""
    from metaheed import recipes

    own = argparse.ArgumentParser(prog="metaheed train", add_help=False, allow_abbrev=False)
    own.add_argument("--recipe", type=Path)
    own.add_argument("--trust", action="store_true")
    chosen, rest = own.parse_known_args(arguments[1:])
    named = [a for a in rest[:1] if not a.startswith("-")]
    if named:
        raise ConfigError(f"--recipe {chosen.recipe} says which algorithm to train: leave {named[0]!r} out")
    recipe = recipes.read(chosen.recipe)
    config: RunConfig = _parse(
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


def _setting(arguments: list[str]) -> tuple[str, int, int]:
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


def _algorithms(data: str, ways: int, shots: int) -> Any:
    return tyro.extras.subcommand_type_from_defaults(
        {name: default_config(name, data, ways, shots) for name in ALGORITHMS},
        {name: description for name, (_, _, description) in ALGORITHMS.items()},
    )


def _tune_process() -> None:
    from metaheed.process import keep_freed_memory, make_deterministic

    keep_freed_memory()
    make_deterministic()


def _train(config: RunConfig, trust: bool = False) -> int:
    from metaheed.progress import make_reporter
    from metaheed.training import train

    _tune_process()
    path = train(config, make_reporter(), trust)
    print(f"{path} is trained; judge it with 'metaheed evaluate {path}'")
    return 0


def _resume(command: Resume) -> int:
    from metaheed.progress import make_reporter
    from metaheed.training import resume

    _tune_process()
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


def _search(command: Search) -> int:
    from metaheed.progress import make_reporter
    from metaheed.search import search

    _tune_process()
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


def _resume_search(command: SearchResume) -> int:
    from metaheed.search import read_search

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
    return _search(Search(search=settings, run=replace(config, training=training, episodes=episodes)))


def _evaluate(command: Evaluate) -> int:
    from metaheed.evaluation import evaluate_run

    _tune_process()
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


def _compare(command: Compare) -> int:
    from metaheed.evaluation import compare

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


def _report(command: Report) -> int:
    from metaheed.report import report

    _tune_process()
    page = report(command.runs, command.out, command.showing, say=lambda text: print(text, file=sys.stderr, flush=True))
    print(f"report: {page}")
    return 0


def _reproduce(command: Reproduce) -> int:
    from metaheed.reproduce import dry_run, reproduce

    _tune_process()

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if command.doing.dry_run:
        dry_run(command.experiment, command.doing, lambda text: print(text, flush=True), tell)
        return 0
    page = reproduce(command.experiment, command.doing, tell)
    print(f"report: {page}")
    return 0


def _data_prepare(command: DataPrepare) -> int:
    from metaheed.data import Request, find_source
    from metaheed.data.store import prepare
    from metaheed.progress import make_watcher

    EpisodeConfig(data=command.name, image_size=command.image_size, split_seed=command.split_seed)
    source = find_source(command.name, Request(command.source, command.image_size, command.split_seed))
    to = command.to or command.source or Path()
    watcher = make_watcher()
    watcher.message(f"{command.name}: found {source.layout}")
    try:
        path = prepare(source, to.parent if to.is_file() else to, watcher)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on where it stood", signal.SIGINT) from None
    classes = "/".join(str(len(split.classes)) for split in source.splits.values())
    images = sum(sum(split.counts) for split in source.splits.values())
    print(
        f"{path} holds {classes} classes, {images} images; train with --data {command.name} --data-root "
        f"{shlex.quote(str(path.parent))}"
    )
    return 0


def _data_list(command: DataList) -> int:
    from metaheed.data import survey

    for name, state, counts in survey(command.data_root):
        print(f"{name:18}{counts:38}{state}")
    return 0


def _data_verify(command: DataVerify) -> int:
    from metaheed.data.store import stores_in, verify
    from metaheed.progress import make_watcher

    for path in stores_in(command.stores):
        manifest, notices = verify(path, make_watcher())
        classes = "/".join(str(len(classes)) for classes, _, _ in manifest.splits.values())
        images = sum(sum(counts) for _, counts, _ in manifest.splits.values())
        print(f"{path} is whole: {manifest.name}, {classes} classes, {images} images, all checksums as recorded")
        for line in notices or ["no image is in two classes"]:
            print(f"  {line}")
    return 0


def _data_show(command: DataShow) -> int:
    from metaheed.data import Episodes, load_dataset
    from metaheed.data.show import draw_classes, draw_episode, write_png

    EpisodeConfig(data=command.name, image_size=command.image_size, split_seed=command.split_seed)
    dataset = load_dataset(command.name, command.data_root, command.image_size, command.split_seed)
    if command.classes is None:
        shape = (command.ways, command.shots, command.queries)
        image, names = draw_episode(Episodes(dataset, command.split, *shape, command.seed), command.index)
    else:
        image, names = draw_classes(dataset, command.split, command.classes, command.queries + 1)
    write_png(image, command.out)
    for name in names:
        print(name)
    print(f"picture: {command.out}")
    return 0


def _data_split(command: DataSplit) -> int:
    from metaheed.data.folder import write_lists

    lists = write_lists(command.folder, command.seed, command.val, command.test, command.overwrite)
    for split, names in lists.items():
        print(f"{command.folder / split}.txt: {len(names)} classes")
    return 0


def _data_download(command: DataDownload) -> int:
    from metaheed.data.download import download
    from metaheed.progress import Transfers

    for path in download(command.data, command.data_root, Transfers()):
        print(path)
    return 0


def _data_episodes(command: DataEpisodes) -> int:
    from metaheed.data import Episodes, load_dataset
    from metaheed.data.frozen import freeze, write_episodes

    which = command.which
    dataset = load_dataset(which.data, which.data_root, which.image_size, which.split_seed)
    episodes = Episodes(dataset, which.split, which.ways, which.shots, which.queries, which.episode_seed)
    frozen = freeze(episodes, which.tasks)
    write_episodes(frozen, command.out, which.with_images)
    print(
        f"{command.out}: {which.tasks} tasks of {which.data} {which.split}, {which.ways}-way {which.shots}-shot, with "
        f"{which.queries} queries a class, that use {len(frozen.rows)} images"
    )
    return 0


def _demo(command: Demo) -> int:
    from metaheed.demo import demo

    _tune_process()
    demo(command.out, command.iterations, command.seed)
    return 0


def _toy(command: Toy) -> int:
    from metaheed.toy import toy

    _tune_process()
    for name, trajectory in toy(command.out, command.training).items():
        print(
            f"{name}: {len(trajectory.points) - 1} outer steps, path length {trajectory.path_length:.2f} for a "
            f"displacement of {trajectory.displacement:.2f}; nearer to the last task than with "
            f"the tasks reversed by {trajectory.last_task_bias:+.4f} ± {trajectory.last_task_bias_half_width:.4f}"
        )
    print(f"figure: {command.out / 'trajectories.png'}")
    return 0
