"""What a mistaken option may have meant: this command's own, another algorithm's, or another library's word for it."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from metaheed.config import ALGORITHMS, default_config
from metaheed.errors import ConfigError

OTHER_WORDS = {
    **dict.fromkeys(("inner-lr", "update-lr", "lr-inner", "alpha", "step-size", "task-lr", "adapt-lr"), "fast-lr"),
    **dict.fromkeys(("outer-lr", "lr-outer", "beta", "meta-learning-rate"), "meta-lr"),
    **dict.fromkeys(("n-way", "n-ways", "num-ways", "num-way", "way", "train-way", "train-ways"), "ways"),
    **dict.fromkeys(("k-shot", "k-shots", "n-shot", "num-shots", "num-shot", "shot", "k-spt", "train-shot"), "shots"),
    **dict.fromkeys(("k-qry", "n-query", "n-queries", "num-queries", "num-query", "query", "q-queries"), "queries"),
    **dict.fromkeys(
        ("update-step", "num-updates", "inner-steps", "num-inner-steps", "num-steps", "adapt-steps", "inner-iter"),
        "adaptation-steps",
    ),
    **dict.fromkeys(("task-num", "meta-bs", "batch-size", "meta-batch", "tasks-per-batch", "bsz"), "meta-batch-size"),
    **dict.fromkeys(("epochs", "epoch", "num-epochs", "num-iterations", "steps", "max-epoch"), "iterations"),
    **dict.fromkeys(("dataset", "data-set"), "data"),
    **dict.fromkeys(("data-path", "data-dir", "datapath", "dataroot", "root", "data-folder"), "data-root"),
    **dict.fromkeys(("model", "arch", "network", "net", "encoder"), "backbone"),
    **dict.fromkeys(("output", "output-dir", "save-dir", "save-path", "log-dir", "logdir", "run-dir"), "out"),
    **dict.fromkeys(("gpu", "cuda", "use-cuda", "ngpu"), "device"),
    **dict.fromkeys(("workers", "num-workers", "num-threads", "n-jobs", "jobs"), "threads"),
    **dict.fromkeys(("fo", "fomaml", "first-order-maml"), "first-order"),
    **dict.fromkeys(("pretrained", "init-weights", "load", "checkpoint-path", "weights"), "init-from"),
    **dict.fromkeys(("num-tasks", "test-tasks", "eval-tasks", "episodes-num", "n-episode", "n-tasks"), "tasks"),
    **dict.fromkeys(("lr", "learning-rate"), "fast-lr (of the adaptation) or --meta-lr"),
}
"""What other libraries call an option -> what it is called here."""


def options(config: Any) -> Iterator[str]:
    """The options, without their dashes, of a config or of a class of configs."""
    hints = typing.get_type_hints(config if isinstance(config, type) else type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name, None), hints[field.name]
        inside = value if dataclasses.is_dataclass(value) else hint
        if dataclasses.is_dataclass(inside):
            yield from options(inside)
            continue
        if value is True:  # a flag that is on can only be switched off
            yield f"no-{field.name.replace('_', '-')}"
            continue
        renamed = [extra.name for extra in getattr(hint, "__metadata__", ()) if getattr(extra, "name", None)]
        yield renamed[0] if renamed else field.name.replace("_", "-")


def check_options(config: Any, command: str, arguments: Sequence[str]) -> None:
    """Refuse an option that a command does not have, and say what was probably meant.

    Args:
        config: what the command is parsed into: a config, or a class of configs.
        command: as the user writes it, without metaheed: "train maml".
        arguments: those after it.

    Raises:
        ConfigError: names the option, what it may have meant, and where all are listed.
    """
    known = {*options(config), "help", "help-all"}
    for argument in arguments:
        name = argument.split("=")[0].removeprefix("--").replace("_", "-")
        if not argument.startswith("--") or argument == "--" or name in known:
            continue
        meant = OTHER_WORDS.get(name, "")
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        others = [algorithm for algorithm in sorted(ALGORITHMS) if name in {*options(default_config(algorithm))}]
        if meant.split(" ")[0] in known:
            hint = f"here it is called --{meant}; "
        elif others and command.startswith(("train", "search")):
            hint = f"it is an option of {', '.join(others)}; "
        elif close:
            hint = f"did you mean --{close[0]}? If not, "
        else:
            hint = ""
        raise ConfigError(f"'metaheed {command}' has no option --{name}: {hint}see 'metaheed {command} --help'")
