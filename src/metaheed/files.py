"""Holding a file for one process."""

import os
from typing import IO, Any


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file for this process, if no other holds it; the operating system frees it when the file is closed
    or the process ends, however.
    """
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
