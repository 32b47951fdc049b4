"""Noticing that another program changed or removed a file of a run that this process works on."""

import os
from pathlib import Path
from typing import NamedTuple

from metaheed.errors import RunError, brief, option


class Known(NamedTuple):
    """A file as this process left or found it."""

    identity: tuple[int, int, int, int]
    sha256: str | None
    """Of its content; none: that does not matter."""


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """Which file it is (2 numbers), its length, and when it was written into last."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def meddled(path: Path, how: str) -> RunError:
    """The error that another program removed or changed a file."""
    return RunError(
        f"{path} was {how} by another program while the run trained, so training ended without writing a checkpoint. "
        f"Put it back and resume from the checkpoint before, or choose another {option('out')} and train anew"
    )


def reason(error: Exception) -> str:
    """What the system says of an error, or the error itself, shortened."""
    return brief(getattr(error, "strerror", None) or str(error), 300)
