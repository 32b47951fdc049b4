"""Files that are whole or not there, and locks that end with their process."""

import contextlib
import errno
import os
from pathlib import Path
from typing import IO, Any

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF)  # of systems without it
_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)  # what systems say of another's lock


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and bring it to the disk; where that fails nothing is left behind.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def put_in_place(part: Path, place: Path) -> None:
    """Rename a file or folder to its place, and bring the folder that it is in to the disk.

    Without the second step the new name may be lost with the machine's power, though the content is on the disk: SQLite
    does the same. Every rename of the package goes through here.

    Raises:
        OSError: it cannot be renamed, or the disk failed.
    """
    part.replace(place)
    if os.name == "nt":  # which cannot open a folder, and keeps its names in a journal
        return
    try:
        folder = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file for this process, unless another has it; the system frees it when the process ends, however.

    Raises:
        OSError: its file system has no locks, so that waiting for one would never end.
    """
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        words = f"its file system has no locks ({error.strerror}); put the folder on another disk"
        raise OSError(error.errno, words, getattr(file, "name", None)) from error
    return True
