"""Write files whole or not at all, with errors that name the file."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from metaheed.errors import RunError
from metaheed.files.opening import (
    cannot_write_message,
    put_in_place,
    refuse_link,
    refuse_special,
    write_synced,
)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it to its place, so that it is there whole or not at all.

    Raises:
        RunError: it cannot be written; nothing is left behind.
    """
    part = _part(path)
    with _writing(path):
        refuse_link(path)
        refuse_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(part, content)
        put_in_place(part, path)


def check_writable(path: Path) -> None:
    """Raise RunError if a file cannot be written; called before work whose result would be lost."""
    with _writing(path):
        refuse_link(path)
        refuse_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _try_to_write(path)


def is_writable(path: Path) -> bool:
    """Whether this user has permission to write a file there. Other obstacles, such as a full disk, do not count."""
    try:
        _try_to_write(path)
    except OSError as error:
        return error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM)
    return True


def _try_to_write(path: Path) -> None:
    part = _part(path)
    write_synced(part, b"")
    part.unlink()


def _part(path: Path) -> Path:
    """The temporary name under which a file is written; it differs from `path` even if that ends in .part."""
    return path.with_suffix(".part" if path.suffix != ".part" else ".part.part")


def add_name(path: Path, other: Path) -> None:
    """Give a file a second name. The first is kept, for processes that read it meanwhile, where hard links exist."""
    part = other.with_suffix(".part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without hard links
        put_in_place(path, other)
    else:
        put_in_place(part, other)
        part.unlink(missing_ok=True)  # os.replace leaves it if both names already belonged to the same file


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(cannot_write_message(error, path)) from error
