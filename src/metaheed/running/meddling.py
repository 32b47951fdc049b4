"""Detecting that another program changed or removed a file of the run that this process trains."""

import os
from pathlib import Path
from typing import NamedTuple

from metaheed.errors import RunError, brief, option


class KnownFile(NamedTuple):
    """A file as this process last wrote or read it."""

    identity: tuple[int, int, int, int]
    """See `identity`."""
    sha256: str | None
    """Checksum of its content; None if only the file's identity matters."""


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """Device and inode of a file, its length, and the time when it was last modified."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def meddling_error(path: Path, how: str) -> RunError:
    """The error that says that another program removed or changed a file."""
    return RunError(
        f"{path} was {how} by another program while the run trained, so training ended without writing a checkpoint. "
        f"Put it back and resume from the checkpoint before, or choose another {option('out')} and train anew"
    )


def reason(error: Exception) -> str:
    """The operating system's words for an error, or the error's own, shortened."""
    return brief(getattr(error, "strerror", None) or str(error), 300)
