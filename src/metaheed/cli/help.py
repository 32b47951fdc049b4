"""Help pages: the options that decide a run first, and all of them under --help-all.

The texts are the explanations under the fields of the configs, so that an option is explained in one place. They are
laid out here, not by the parser, because the parser breaks sentences where the source does.
"""

import ast
import dataclasses
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from metaheed.config import ALGORITHMS

ASKED = frozenset(["-h", "--help", "--help-all"])
"""What asks for help."""
_FIRST = (
    *("data", "data_root", "ways", "shots", "backbone", "adaptation_steps", "fast_lr", "attention_lr"),
    *(
        "equity_lambda",
        "loss_temperature",
        "replay",
        "meta_batch_size",
        "meta_lr",
        "iterations",
        "seed",
        "out",
        "device",
    ),
)
"""Fields that decide a run; the others are advanced."""
_FIRST_OF_A_SEARCH = (
    *(
        "trials",
        "sampler",
        "fast_lr_range",
        "meta_lr_range",
        "attention_lr_range",
        "data",
        "data_root",
        "ways",
        "shots",
    ),
    *("backbone", "iterations", "out", "device"),
)
_FEW = 20  # options that need no division
_COLUMN = 26
(_POSITIONAL,) = typing.get_args(tyro.conf.Positional[int])[1:]  # the mark that it leaves
_WORDS = {int: "INT", float: "FLOAT", str: "NAME", Path: "PATH"}


class Option(NamedTuple):
    """A setting as the command line takes it."""

    field: str
    group: str
    """What its config is about; empty for the command's own."""
    usage: str
    """With its value's kind: "--ways INT"."""
    text: str
    positional: bool


def help_page(config: Any, command: str, description: str | None, every: bool) -> str:
    """The page that --help prints.

    Args:
        config: what the command is parsed into: a config with its defaults, or a class of configs.
        command: as the user writes it, without metaheed: "train maml".
        description: what it does; the class's docstring if None.
        every: whether all options are wanted.
    """
    options = list(_options(config))
    kind = config if isinstance(config, type) else type(config)
    positional = [o for o in options if o.positional]
    named = [o for o in options if not o.positional]
    usage = " ".join(["usage: metaheed", command, *(o.usage for o in positional), "[options]"])
    parts = [usage, _wrapped(description or _one_line(inspect.getdoc(kind) or ""))]
    if positional:
        parts.append(_table(positional))
    wanted = _FIRST_OF_A_SEARCH if command.startswith("search") else _FIRST
    if len(named) <= _FEW:
        return "\n\n".join([*parts, "options:\n" + _table(named)])
    first = [o for name in wanted for o in named if o.field == name]
    parts.append("options that decide a run:\n" + _table(first))
    if not every:
        parts.append(f"{len(named) - len(first)} more: metaheed {command} --help-all")
        return "\n\n".join(parts)
    rest = [o for o in named if o not in first]
    for group in dict.fromkeys(o.group for o in rest):
        heading = f"advanced: {group[:1].lower()}{group[1:].rstrip('.')}"
        parts.append(f"{_wrapped(heading)}\n{_table([o for o in rest if o.group == group])}")
    return "\n\n".join(parts)


def algorithms_page(command: str, description: str) -> str:
    """The page of a command that wants the name of an algorithm first."""
    lines = [_entry(name, text) for name, (_, _, text) in ALGORITHMS.items()]
    return "\n\n".join(
        [
            f"usage: metaheed {command} ALGORITHM [options]",
            _wrapped(description),
            "algorithms:\n" + "\n".join(lines),
            f"options of one: metaheed {command} ALGORITHM --help",
        ]
    )


def _options(config: Any, group: str = "") -> Iterator[Option]:
    kind = config if isinstance(config, type) else type(config)
    hints, texts = typing.get_type_hints(kind, include_extras=True), _explanations(kind)
    for field in dataclasses.fields(kind):
        value = getattr(config, field.name, dataclasses.MISSING) if not isinstance(config, type) else _default(field)
        hint = hints[field.name]
        inside = value if dataclasses.is_dataclass(value) else hint
        if dataclasses.is_dataclass(inside):
            about = texts.get(field.name) or (inspect.getdoc(inside) or "").partition("\n\n")[0]
            yield from _options(inside, _one_line(about).partition(". ")[0])
            continue
        extras = getattr(hint, "__metadata__", ())
        plain = typing.get_args(hint)[0] if extras else hint
        positional = _POSITIONAL in extras
        renamed = next((extra.name for extra in extras if getattr(extra, "name", None)), field.name)
        yield _option(field.name, renamed, group, plain, value, texts.get(field.name, ""), positional)


def _option(field: str, name: str, group: str, hint: Any, value: object, text: str, positional: bool) -> Option:
    option, text = f"--{name.replace('_', '-')}", _one_line(text)
    if positional:
        many = typing.get_origin(hint) is tuple
        return Option(field, group, f"{field.rstrip('s').upper()}..." if many else field.upper(), text, True)
    if value is True:
        return Option(field, group, f"--no-{option[2:]}", f"Switch this off: {text[:1].lower()}{text[1:]}", False)
    if value is not False:
        option = f"{option} {_metavar(hint)}"
    if value is dataclasses.MISSING:
        text += " (required)"
    elif value is not None and value is not False and value != ():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        text += f" (default: {shown})"
    return Option(field, group, option, text, False)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return _metavar(next(kind for kind in typing.get_args(hint) if kind is not types.NoneType))
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(str(word) for word in typing.get_args(hint) if word is not None) + "}"
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        return f"{_metavar(kinds[0])}..." if kinds[-1] is Ellipsis else " ".join(map(_metavar, kinds))
    return _WORDS.get(hint, "VALUE")


@cache
def _explanations(kind: type) -> Mapping[str, str]:
    """Field -> the string under it in the source, a subclass's before its base's."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(one):
            continue
        (made,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(made, ast.ClassDef)
        for field, text in zip(made.body, made.body[1:], strict=False):
            explained = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if explained and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found[field.target.id] = str(ast.literal_eval(text.value))  # type: ignore[attr-defined]
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _width() -> int:
    return max(50, min(shutil.get_terminal_size().columns, 100))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _width(), break_on_hyphens=False)


def _table(options: list[Option]) -> str:
    return "\n".join(_entry(o.usage, o.text) for o in options)


def _entry(name: str, text: str) -> str:
    indent = " " * _COLUMN
    lines = textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    head = f"  {name}"
    if len(head) <= _COLUMN - 2 and lines:
        return "\n".join([head.ljust(_COLUMN) + lines[0].lstrip(), *lines[1:]])
    return "\n".join([head, *lines])
