"""Bounds and types of settings, checked when a config is created."""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Literal

from metaheed.errors import ConfigError, option, shown

_checking = ContextVar("checking", default=True)


_LARGEST = 10**300  # of a whole number where any number is meant: larger ones are no float


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Let configs be created with settings out of their bounds, for `checked` to find afterwards.

    For parsers that would wrap an error raised in a constructor into one of their own.
    """
    token = _checking.set(False)
    try:
        yield
    finally:
        _checking.reset(token)


def checked(config: Any) -> Any:
    """The same config, and every config inside it, built anew.

    Raises:
        ConfigError: a setting is out of its bounds.
    """
    inside = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{n: checked(v) for n, v in inside.items() if dataclasses.is_dataclass(v)})


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise ConfigError, which names the setting, its value and the rule, unless the condition holds."""
    if not condition and _checking.get():
        raise ConfigError(f"{option(name)} is {shown(value)}, but {rule}")


def check_types(config: Any) -> None:
    """Raise ConfigError unless every setting has a value of its type; turn strings into paths where a path is meant."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is ClassVar:
            continue
        value = getattr(config, name)
        if isinstance(value, str) and Path in (kinds := _alternatives(hint)) and str not in kinds:
            value = Path(value)  # a path may be given as a string everywhere
            object.__setattr__(config, name, value)
        if not any(_is(value, kind) for kind in _alternatives(hint)):
            require(False, name, value, f"it must be {_describe(hint)}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    # `Literal[...] | None` is of another class than `int | None`.
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _is(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
        return whole or isinstance(value, float)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            return isinstance(value, tuple) and all(_is(v, kinds[0]) for v in value)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is, value, kinds))
    return isinstance(value, kind)


def _describe(hint: Any) -> str:
    if len(_alternatives(hint)) > 1:
        return " or ".join(map(_describe, _alternatives(hint)))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[-1] is Ellipsis:
        return f"values, each {_describe(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is tuple:
        return f"{len(typing.get_args(hint))} values, each {_describe(typing.get_args(hint)[0])}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "none"}
    return plain.get(hint) or str(hint.__name__.lower())


def at_least(config: Any, bound: int, *names: str, most: int = 10**9) -> None:
    """Raise ConfigError unless each named setting is None or within the bounds."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= bound, name, value, f"it must be at least {bound}")
        require(value is None or value <= most, name, value, f"it must be at most {most}")


def positive(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named setting is None or a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or (math.isfinite(value) and value > 0),
            name,
            value,
            "it must be a finite number above 0",
        )
