"""Write the file that `--out` of a data command names, whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from metaheed.errors import ConfigError, DataError
from metaheed.files.opening import put_in_place


def write_output(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a temporary name and rename it to `path`; nothing unfinished is left behind.

    Args:
        path: the file to write; its folder is made if it does not exist, and a file of that name is replaced.
        write: writes the content into the file that it is given.

    Raises:
        ConfigError: the path does not end in a name, or something other than a file is there.
        DataError: the file cannot be written.
    """
    if not path.name:
        raise ConfigError(f"--out is {str(path)!r}, but it must be the name of a file to write")
    if path.exists() and not path.is_file():
        raise ConfigError(f"--out is {path}, but a folder, a pipe or a device is there: choose the name of a file")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)  # left over from an interrupted write, or a link that we must not write through
        try:
            with part.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or path}: {error.strerror or error}. Choose another --out"
        ) from error
