"""The errors that a user can meet.

Every one names the thing, the value found and the remedy; the command line prints it in one line and never a traceback.
"""

import difflib
from collections.abc import Iterable


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


class WorkerError(MetaheedError, RuntimeError):
    """A worker process of the execution "processes" is gone."""

    def __init__(self, status: int) -> None:
        super().__init__(
            f"a worker process ended unexpectedly (status {status}; -9 is what a system ends it with when memory runs "
            "out): use fewer --threads, or --execution vectorized"
        )
        self.status = status
        """How it ended: its exit status, or minus the number of the signal that killed it."""

    def __reduce__(self) -> tuple[type["WorkerError"], tuple[int]]:
        return type(self), (self.status,)


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


def is_systems(error: Exception) -> bool:
    """Whether an error is the operating system's (no permission, no space, no such file), not of a file's content."""
    return isinstance(error, OSError) and error.errno is not None


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """A ConfigError for a name that is not in `known`, with the closest one suggested."""
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}")
