"""Files that are whole or not there, locks that end with their process, and folders that a stranger may have filled.

What is opened inside a run or study folder is opened here: written without following a link that lies in the folder,
read only where it is a file, and of a length that one of ours can have.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import IO, Any

YAML_BYTES = 2**17
"""The most that a config, a recipe or a study's settings may have; ours have about 2,000."""
JSON_BYTES = 2**26
"""The most that a result or another JSON file of ours may have: the accuracies of some million tasks."""
LINE_BYTES = 2**24
"""The most that a line of a log may have: the weights and inputs of some hundred thousand tasks."""
_LONGEST = 200  # characters of a path in a message
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF)  # of systems without it
_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)  # what systems say of another's lock


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and bring it to the disk; where that fails nothing is left behind.

    Raises:
        OSError: it cannot be written.
    """
    try:
        path.unlink(missing_ok=True)  # what is left of an interrupted write; were it a link, we would write elsewhere
        with path.open("xb") as file:
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


class LinkError(OSError):
    """A link lies where a file of ours is to be written."""


def refuse_link(path: Path, below: Path | None = None) -> None:
    """Refuse a link where something is to be written.

    Args:
        path: the file or folder.
        below: a folder above it: that the path goes through no link below this one is seen to as well. This one, and
            what is above it, the user named: they may be links.

    Raises:
        LinkError: says where it points.
    """
    parts = [path] if below is None else [below.joinpath(*names) for names in _prefixes(path.relative_to(below).parts)]
    for part in parts:
        if part.is_symlink():
            raise _link_error(str(part))


def refuse_special(path: Path) -> None:
    """Refuse what is no file, where a file is to be put: a pipe or a device would be gone then.

    Raises:
        OSError: says what it is.
    """
    with contextlib.suppress(FileNotFoundError):
        _refuse_special(os.lstat(path), str(path), written=False)


def make_folder(path: Path, below: Path) -> None:
    """Make a folder and those between it and `below`, none of which may be a link.

    Raises:
        OSError: it cannot be made, or a link is in its place.
    """
    refuse_link(path, below)
    path.mkdir(parents=True, exist_ok=True)


def open_in_place(path: Path, mode: str) -> IO[Any]:
    """Open a file to go on writing into it: in mode "a", "a+" or "r+", of text or bytes.

    Raises:
        OSError: it is a link, no file (a pipe, say), has a second name elsewhere, or cannot be opened.
    """
    refuse_link(path)
    with contextlib.suppress(FileNotFoundError):
        _refuse_special(os.lstat(path), str(path))  # before it is opened: opening alone can have effects
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "errors": "replace"}
    return open(path, mode, opener=_open_not_following, **text)


def open_to_read(path: Path) -> IO[bytes]:
    """Open a file to read it, a link to one included; what is no file is not waited for.

    Raises:
        OSError: it is no file, or cannot be opened.
    """
    return open(path, "rb", opener=_open_not_waiting)


def read_bounded(path: Path, most: int | None = None) -> bytes:
    """What a file holds.

    Args:
        path: of the file.
        most: bytes it may have; none: any number.

    Raises:
        OSError: it is no file, has more, or cannot be read.
    """
    with open_to_read(path) as file:
        if most is None:
            return file.read()
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size, most) + 1)  # not more at once: room for it is made beforehand
        if size < len(content) <= most:  # it grew meanwhile
            content += file.read(most + 1 - len(content))
        if len(content) > most:
            size = os.fstat(file.fileno()).st_size
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, where such a file has {most:,} at most", str(path))
        return content


def cannot_write_message(error: OSError, path: Path) -> str:
    """What to say where a file cannot be written."""
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
        raise OSError(errno.EINVAL, f"it is {kind}, where a file is expected", name)
    if written and status.st_nlink > 1:
        words = "it has a second name elsewhere (a hard link), whose content would change: put a copy in its place"
        raise LinkError(errno.EMLINK, words, name)


def _open_not_following(name: str, flags: int) -> int:
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
