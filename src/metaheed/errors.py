"""The errors that a user can meet.

Every message names the thing, the value that was found and the remedy. The command line prints it in one line, without
a traceback.
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
    """The base class of all errors that metaheed raises on purpose."""


class ConfigError(MetaheedError, ValueError):
    """A setting has a value that cannot be used."""


class DataError(MetaheedError):
    """Images are missing, damaged, or too few for the episodes asked for."""


class MissingDataError(DataError):
    """A data set was not found where it was looked for."""


class RunError(MetaheedError):
    """A run folder cannot be used."""


class OutOfMemoryError(MetaheedError, MemoryError):
    """The tasks that are computed at the same time do not fit into the device's memory."""


class StartError(MetaheedError, RuntimeError):
    """The operating system refuses to start another thread or process."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the system starts no further thread or process here ({reason}): set fewer {option('threads')} or "
            f"another {option('execution')} (looped takes the fewest), end other processes of this user, or raise "
            "its limit (ulimit -u)"
        )
        self.reason = reason
        """The operating system's own message."""

    def __reduce__(self) -> tuple[type["StartError"], tuple[str]]:
        return type(self), (self.reason,)


class WorkerError(MetaheedError, RuntimeError):
    """A worker process of the execution "processes" has ended."""

    def __init__(self, status: int, remedy: str | None = None) -> None:
        remedy = remedy or f"use fewer {option('threads')}, or {option('execution', 'vectorized')}"
        if status < 0:
            end = f"was killed (signal {-status})"
            end += ", which most often means that memory ran out; if so" if status == -9 else ""
        else:
            end = f"ended unexpectedly (status {status})"
        super().__init__(f"a worker process {end}: {remedy}")
        self.status = status
        """The exit status, or minus the number of the signal that killed the process."""
        self.remedy = remedy
        """What the user can do about it."""

    def __reduce__(self) -> tuple[type["WorkerError"], tuple[int, str]]:
        return type(self), (self.status, self.remedy)


class NonFiniteError(MetaheedError, ArithmeticError):
    """A loss or gradient is not a finite number."""


class NonFiniteTaskError(NonFiniteError):
    """The loss or gradient of one task of a batch is not finite."""

    def __init__(self, what: str, task: int, stream: str) -> None:
        super().__init__(f"the {what} of task {task} of the {stream} batch is not finite")
        self.what = what
        """What is not finite: a loss or a gradient."""
        self.task = task
        """The number of the task in its batch, counted from 1."""
        self.stream = stream
        """The stream of batches that the task belongs to."""


class Interrupted(MetaheedError):  # noqa: N818  # the user asked for the end: it is no error
    """A signal stopped the training, whose state has been written."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class MetaheedWarning(UserWarning):
    """Tells the user about something that was not asked for and should be known."""


def warn(message: str) -> None:
    """Issue a MetaheedWarning that points at the user's line: the nearest caller outside this package."""
    # contextlib is skipped too, because its context managers decorate functions of this package.
    ours = (str(Path(__file__).parent), contextlib.__file__)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, MetaheedWarning, stacklevel=level)


def is_system_error(error: Exception) -> bool:
    """Whether the operating system raised the error (no permission, no space), rather than a reader of bad content."""
    return isinstance(error, OSError) and error.errno is not None


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Make a ConfigError for a name that is not in `known`; the message suggests the closest known name."""
    known = sorted(known)
    close = difflib.get_close_matches(name[:_LONGEST].lower(), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"unknown {kind} {shown(name)}: {hint}known are {', '.join(known)}")


_LONGEST = 120  # characters of a value in a message, about one line


def shown(value: object) -> str:
    """Return a value's `repr`, cut to one line, for use in a message.

    Huge values are cut before they are written out, so a number of a million digits, or a list that contains itself,
    takes no time.
    """
    if isinstance(value, int) and abs(value) >= 10**_LONGEST:  # Python may refuse to convert so many digits
        return f"a whole number of {value.bit_length():,} bits"
    try:
        text = _REPR.repr(value)
    except (ValueError, RecursionError):  # it contains such a number, or is nested too deep
        return f"a {type(value).__name__} that cannot be shown"
    return brief(text)


def brief(text: str, most: int = _LONGEST) -> str:
    """Return the text on one line, cut to `most` characters."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else f"{line[: most - 1]}…"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, _LONGEST - 20, _LONGEST - 20, _LONGEST
