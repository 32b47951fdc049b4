"""Open files in folders that a stranger may have filled; put files in place whole; lock files.

Every file inside a run or study folder is opened through this module. Writing never follows a link inside the folder.
Reading refuses everything but regular files, and files that are larger than metaheed writes them.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import IO, Any

YAML_BYTES = 2**17
"""Upper bound on the size of a config, a recipe or a study's settings; those that metaheed writes have about 2,000."""
JSON_BYTES = 2**26
"""Upper bound on the size of a result or another JSON file: enough for the accuracies of a million tasks."""
LINE_BYTES = 2**24
"""Upper bound on a line of a log: enough for the weights and attention inputs of a hundred thousand tasks."""
_LONGEST = 200  # characters of a path in a message
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF)  # a folder cannot be synced
_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)  # another process holds the lock


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk. If that fails, nothing is left behind.

    Raises:
        OSError: it cannot be written.
    """
    try:
        path.unlink(missing_ok=True)  # left over from an interrupted write, or a link that we must not write through
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def put_in_place(part: Path, place: Path) -> None:
    """Rename a file or folder to its final place, and flush the folder that contains it to the disk.

    Without the flush, a power failure can lose the new name although the content is on the disk; SQLite does the same.
    Every rename of the package goes through this function.

    Raises:
        OSError: it cannot be renamed, or the disk failed.
    """
    part.replace(place)
    if os.name == "nt":  # Windows cannot open a folder, and keeps file names in a journal
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
    """Lock an open file for this process; return False if another process holds the lock.

    The system releases the lock when the process ends, however it ends.

    Raises:
        OSError: the file system has no locks.
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


class LinkError(OSError):
    """A link lies where metaheed would write a file."""


def refuse_link(path: Path, below: Path | None = None) -> None:
    """Raise LinkError if a link lies where something is to be written.

    Args:
        path: the file or folder to write.
        below: a folder above `path`. The folders between the two are checked as well. `below` itself, and the folders
            above it, may be links, because the user named them.

    Raises:
        LinkError: the message says where the link points.
    """
    parts = [path] if below is None else [below.joinpath(*names) for names in _prefixes(path.relative_to(below).parts)]
    for part in parts:
        if part.is_symlink():
            raise _link_error(str(part))


def refuse_special(path: Path) -> None:
    """Raise OSError if something other than a file lies there: renaming a file over a pipe or device would delete it.

    Raises:
        OSError: the message says what lies there.
    """
    with contextlib.suppress(FileNotFoundError):
        _refuse_special(os.lstat(path), str(path), written=False)


def make_folder(path: Path, below: Path) -> None:
    """Make a folder, and the folders between it and `below`, none of which may be a link.

    Raises:
        OSError: a folder cannot be made, or a link is in its place.
    """
    refuse_link(path, below)
    path.mkdir(parents=True, exist_ok=True)


def open_in_place(path: Path, mode: str) -> IO[Any]:
    """Open an existing file to write more into it, with mode "a", "a+" or "r+", as text or (with "b") as bytes.

    Raises:
        OSError: it is a link, is not a regular file, has a second name (a hard link), or cannot be opened.
    """
    refuse_link(path)
    with contextlib.suppress(FileNotFoundError):
        _refuse_special(os.lstat(path), str(path))  # checked first, because opening a device can have effects
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "errors": "replace"}
    return open(path, mode, opener=_open_not_following, **text)


def open_to_read(path: Path) -> IO[bytes]:
    """Open a file, or a link to one, to read it. A pipe is refused without waiting for its writer.

    Raises:
        OSError: it is not a regular file, or cannot be opened.
    """
    return open(path, "rb", opener=_open_not_waiting)


def read_bounded(path: Path, most: int | None = None) -> bytes:
    """Read a whole file.

    Args:
        path: the file to read.
        most: the largest size in bytes that is accepted; any size if None.

    Raises:
        OSError: it is not a regular file, is larger than `most`, or cannot be read.
    """
    with open_to_read(path) as file:
        if most is None:
            return file.read()
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size, most) + 1)  # not `most` + 1: memory for all of it would be allocated first
        if size < len(content) <= most:  # the file has grown meanwhile
            content += file.read(most + 1 - len(content))
        if len(content) > most:
            size = os.fstat(file.fileno()).st_size
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, but such a file may have {most:,} at most", str(path))
        return content


def cannot_write_message(error: OSError, path: Path) -> str:
    """The message, with a remedy, for an error in writing a file."""
    name = str(error.filename or path)
    said = f"cannot write {name if len(name) <= _LONGEST else name[:_LONGEST] + '…'}: {error.strerror or error}"
    return (
        said
        if isinstance(error, LinkError)
        else f"{said}. Make room or grant permission there, or choose another folder"
    )


def _prefixes(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [names[: n + 1] for n in range(len(names))]


def _link_error(name: str) -> LinkError:
    where = ""
    with contextlib.suppress(OSError):
        where = f" to {Path(name).readlink()}"
    words = f"it is a link{where}, and nothing is written through a link in such a folder: delete the link"
    return LinkError(errno.ELOOP, words, name)


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _refuse_special(status: os.stat_result, name: str, written: bool = True) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, but a file is expected", name)
    if written and status.st_nlink > 1:
        words = "it has a second name (a hard link), under which its content would change too: replace it by a copy"
        raise LinkError(errno.EMLINK, words, name)


def _open_not_following(name: str, flags: int) -> int:
    """Open a file to write into it, as `open`'s opener; a link is refused."""
    try:
        number = os.open(name, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _link_error(name) from error
        raise
    return _check_regular(number, name, written=True)


def _open_not_waiting(name: str, flags: int) -> int:
    return _check_regular(os.open(name, flags | getattr(os, "O_NONBLOCK", 0)), name, written=False)


def _check_regular(number: int, name: str, written: bool) -> int:
    try:
        _refuse_special(os.fstat(number), name, written)
    except OSError:
        os.close(number)
        raise
    return number
