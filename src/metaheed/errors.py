"""The errors that a user can meet.

Every one names the thing, the value found and the remedy; the command line prints it in one line and never a traceback.
"""

import contextlib
import difflib
import reprlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path

_on_command_line = False
_in_file = ContextVar("in_file", default=False)


@contextlib.contextmanager
def naming_options() -> Iterator[None]:
    """Let messages call settings by their options (--fast-lr), as the command line does; in all threads."""
    global _on_command_line
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


@contextlib.contextmanager
def naming_fields() -> Iterator[None]:
    """Let messages call settings by their fields (fast_lr), as a file that is being read does; in this thread."""
    token = _in_file.set(True)
    try:
        yield
    finally:
        _in_file.reset(token)


def option(field: str, value: object = None) -> str:
    """A setting as the caller knows it, and a value to set it to: --fast-lr 0.1, or in Python fast_lr=0.1."""
    if not _on_command_line or _in_file.get():
        return field if value is None else f"{field}={value!r}"
    name = f"--{'no-' if value is False else ''}{field.replace('_', '-')}"
    return name if value is None or isinstance(value, bool) else f"{name} {value}"


class MetaheedError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(MetaheedError, ValueError):
    """A setting that cannot be used."""


class DataError(MetaheedError):
    """Images that are missing, damaged, or too few for the episodes asked for."""


class MissingDataError(DataError):
    """A data set that does not lie where it was looked for."""


class RunError(MetaheedError):
    """A run folder that cannot be used."""


class OutOfMemoryError(MetaheedError, MemoryError):
    """The device's memory does not hold the tasks that are computed at once."""


class StartError(MetaheedError, RuntimeError):
    """The system starts no further thread or process."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the system starts no further thread or process here ({reason}): set fewer {option('threads')} or "
            f"another {option('execution')} (looped takes the fewest), end other processes of this user, or raise "
            "its limit (ulimit -u)"
        )
        self.reason = reason
        """In the system's words."""

    def __reduce__(self) -> tuple[type["StartError"], tuple[str]]:
        return type(self), (self.reason,)


class WorkerError(MetaheedError, RuntimeError):
    """A worker process of the execution "processes" is gone."""

    def __init__(self, status: int, remedy: str | None = None) -> None:
        remedy = remedy or f"use fewer {option('threads')}, or {option('execution', 'vectorized')}"
        if status < 0:
            end = f"was killed (signal {-status})"
            end += ", which most often means that memory ran out; if so" if status == -9 else ""
        else:
            end = f"ended unexpectedly (status {status})"
        super().__init__(f"a worker process {end}: {remedy}")
        self.status, self.remedy = status, remedy
        """How it ended: its exit status, or minus the number of the signal that killed it. What to do about it."""

    def __reduce__(self) -> tuple[type["WorkerError"], tuple[int, str]]:
        return type(self), (self.status, self.remedy)


class NonFiniteError(MetaheedError, ArithmeticError):
    """A loss or gradient that is not a finite number."""


class NonFiniteTaskError(NonFiniteError):
    """The loss or gradient of one task of a batch is not finite."""

    def __init__(self, what: str, task: int, stream: str) -> None:
        super().__init__(f"the {what} of task {task} of the {stream} batch is not finite")
        self.what, self.task, self.stream = what, task, stream
        """What it was, of which task (counted from 1), of which stream of batches."""


class Interrupted(MetaheedError):  # noqa: N818  # an end asked for, not a fault
    """Training was stopped by a signal after its state had been written."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class MetaheedWarning(UserWarning):
    """Something that the user did not ask for, and should know."""


def warn(message: str) -> None:
    """Warn at the line of the user's that led here: the nearest one outside of this package."""
    ours = (str(Path(__file__).parent), contextlib.__file__)  # whose context managers decorate functions of ours
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, MetaheedWarning, stacklevel=level)


def is_systems(error: Exception) -> bool:
    """Whether an error is the operating system's (no permission, no space, no such file), not of a file's content."""
    return isinstance(error, OSError) and error.errno is not None


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """A ConfigError for a name that is not in `known`, with the closest one suggested."""
    known = sorted(known)
    close = difflib.get_close_matches(name[:_LONGEST].lower(), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"unknown {kind} {shown(name)}: {hint}known are {', '.join(known)}")


_LONGEST = 120  # characters of a value in a message: about a line


def shown(value: object) -> str:
    """A value as a message prints it: as repr does, on one line and never longer, whatever a file made it.

    Large values are not written out first: a number of a million digits, or a list in itself, takes no time.
    """
    if isinstance(value, int) and abs(value) >= 10**_LONGEST:  # whose digits Python may refuse to write out
        return f"a whole number of {value.bit_length():,} bits"
    try:
        text = _REPR.repr(value)
    except (ValueError, RecursionError):  # such a number inside; or nested too deep
        return f"a {type(value).__name__} that cannot be shown"
    return brief(text)


def brief(text: str, most: int = _LONGEST) -> str:
    """Text on one line, cut to so many characters."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else f"{line[: most - 1]}…"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, _LONGEST - 20, _LONGEST - 20, _LONGEST
