"""List and read files in a folder, a zip or a tar in the same way. Nothing is ever extracted to the disk.

Archives may come from a stranger. One is refused if a member would leave the folder, is a link or device, is there
twice, or claims an absurd size; the message names the member.
"""

import contextlib
import errno
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from metaheed.errors import DataError, MissingDataError, is_system_error
from metaheed.files.opening import read_bounded

LARGEST_FILE = 1 << 29
"""The largest size in bytes of a file; the largest published one (CIFAR-100's train part) has 155 million."""
_RATIO = 200  # unpacked size / packed size, above which more than _SMALL unpacked bytes count as a decompression bomb
_SMALL = 1 << 26
_LARGEST_HEADER = 1 << 20  # bytes of a tar header that extends the next one (long names, attributes)
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


class Entry(NamedTuple):
    """A file in a tree."""

    path: str
    """The path relative to the root, with forward slashes and otherwise as it is written there."""
    size: int
    """The size in bytes; for a member of an archive, the size that it claims."""
    changed: int = 0
    """The modification time in nanoseconds, for a file in a folder: a changed picture may have the same size."""


class Unreadable(NamedTuple):
    """Stands in the place of the content of a file that could not be read."""

    reason: str
    """Why it could not be read."""


Content = bytes | Unreadable


def read_file(path: Path, largest: int = LARGEST_FILE) -> Content:
    """Return the content of a file, or why it cannot be read: it is one of many, and the others may be fine."""
    try:
        return read_bounded(path, largest)
    except OSError as error:
        if error.errno == errno.EFBIG:
            return Unreadable(f"it has {path.stat().st_size} bytes, more than any picture")
        return Unreadable(error.strerror or str(error))


class Tree(NamedTuple):
    """The files under a folder or in an archive."""

    root: Path
    entries: list[Entry]
    """The files, in the order in which they are read fastest."""
    contents: Callable[[Iterable[Entry]], Iterator[Content]]
    """Reads the contents of some of the entries; used by `read`."""
    remedy: str
    """What the user can do if it is damaged."""

    def read(self, entries: Iterable[Entry]) -> Iterator[Content]:
        """Read the contents of some of the entries.

        Args:
            entries: in the order in which they stand in `self.entries`.

        Raises:
            DataError: the archive is damaged.
        """
        try:
            yield from self.contents(entries)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # archive readers raise many kinds of errors for damaged files
            if is_system_error(error):
                raise
            raise damaged_error(self.root, error, self.remedy) from error


def damaged_error(path: Path, error: Exception, remedy: str) -> DataError:
    """Make the error for a damaged archive."""
    return DataError(f"{path} is damaged ({type(error).__name__}: {error}): {remedy}")


def open_tree(path: Path, published: str | None = None, largest: int = LARGEST_FILE) -> Tree:
    """List the files of a folder, a zip or a tar (compressed or not).

    Args:
        path: the folder or archive.
        published: where it is published, for messages; None if it is the user's own.
        largest: the largest size in bytes that a file may have.

    Raises:
        MissingDataError: the path is neither a folder nor an archive.
        DataError: an archive is damaged, or has a member that is refused.
    """
    remedy = f"fetch it anew from {published}" if published else "unpack it with a tool you trust, and look at it"
    if path.is_dir():
        entries = sorted(_walk(path, "", ()))
        return Tree(path, entries, lambda chosen: (read_file(path / e.path, largest) for e in chosen), remedy)
    if not path.is_file():
        raise MissingDataError(f"{path} is neither a folder nor a zip or tar file")
    try:
        if zipfile.is_zipfile(path):
            return _zip_tree(path, largest, remedy)
        if _is_tar(path):
            return _tar_tree(path, largest, remedy)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # archive readers raise many kinds of errors for damaged files
        if is_system_error(error):
            raise
        raise damaged_error(path, error, remedy) from error
    if published:
        raise DataError(f"{path} is damaged (it is neither a zip nor a tar file): {remedy}")
    raise MissingDataError(f"{path} is neither a folder nor a zip or tar file")


_SYSTEMS = ("Thumbs.db", "desktop.ini", "lost+found", "$RECYCLE.BIN", "System Volume Information")


def is_clutter(name: str) -> bool:
    """Whether the name is that of a file or folder that an operating system or metaheed puts beside images."""
    return name.startswith((".", "__MACOSX", "@eaDir")) or name in _SYSTEMS or ".metaheed" in name


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """Yield the files in a folder and below it, without clutter; links to folders are followed, but not in a circle."""
    status = folder.stat()
    here = status.st_dev, status.st_ino
    if here in above:  # a link to a folder that contains the link
        return
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda e: e.name):
            if is_clutter(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", (*above, here))
            elif entry.is_file():
                status = entry.stat()
                yield Entry(prefix + entry.name, status.st_size, status.st_mtime_ns)


def _zip_tree(path: Path, largest: int, remedy: str) -> Tree:
    """List a zip; see `open_tree`."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    entries: dict[str, Entry] = {}
    member_of: dict[str, zipfile.ZipInfo] = {}
    slashes = any("/" in member.filename for member in members)
    for member in members:
        name = _zip_name(member)
        if member.create_system in _WINDOWS or not slashes:
            name = name.replace("\\", "/")
        # Unix systems write the kind of the file into the upper half of the attributes.
        kind = (member.external_attr >> 16) & 0o170000
        folder = name.endswith("/")
        _check(path, name, kind in (0, 0o100000) or folder, member.file_size, member.compress_size, largest, remedy)
        if member.flag_bits & 1:
            raise DataError(f"{path}: {name} is encrypted, and no password is known: {remedy}")
        if not folder:
            _add(entries, Entry(name, member.file_size), path, remedy)
            member_of[name] = member

    def read(chosen: Iterable[Entry]) -> Iterator[Content]:
        with zipfile.ZipFile(path) as archive:
            for entry in chosen:
                yield archive.read(member_of[entry.path])

    return Tree(path, [*entries.values()], read, remedy)


_WINDOWS = (0, 10, 11, 14)
"""Codes of the systems whose zip programs may separate folders by backslashes; the zip standard says /."""
_UTF8 = 0x800  # the flag that says that a member's name is UTF-8


def _zip_name(member: zipfile.ZipInfo) -> str:
    """Return a member's name, decoded as UTF-8 if possible.

    macOS writes UTF-8 without setting the flag, and zipfile then decodes the name as code page 437. Names in another
    code page are hardly ever valid UTF-8 by chance.
    """
    if not member.flag_bits & _UTF8 and not member.filename.isascii():
        with contextlib.suppress(UnicodeError):
            return member.filename.encode("cp437").decode("utf-8")
    return member.filename


class _Member(tarfile.TarInfo):
    """A member of a tar. If it only extends the header of the next member, its size is checked before it is read."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDING and self.size > _LARGEST_HEADER:
            raise ValueError(f"a header claims {self.size} bytes")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]  # tarfile's hook for subclasses
        return member


_EXTENDING = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


def _is_tar(path: Path) -> bool:
    # The same as tarfile.is_tarfile, which would read as many bytes as the first header claims.
    try:
        with tarfile.open(path, tarinfo=_Member):
            return True
    except tarfile.TarError:
        return False


def _tar_tree(path: Path, largest: int, remedy: str) -> Tree:
    """List a tar; see `open_tree`."""
    files: list[Entry] = []
    total, slashes = 0, False
    with tarfile.open(path, tarinfo=_Member) as archive:
        for member in archive:
            _check(path, member.name, member.isfile() or member.isdir(), member.size, None, largest, remedy)
            total += member.size
            if total > max(_SMALL, _RATIO * path.stat().st_size):
                raise DataError(
                    f"{path} unpacks to more than {total} bytes, {_RATIO} times its own size, but an archive of images "
                    f"hardly shrinks: {remedy}"
                )
            slashes = slashes or "/" in member.name
            if member.isfile():
                files.append(Entry(member.name, member.size))
    entries: dict[str, Entry] = {}
    member_of: dict[str, str] = {}
    for file in files:
        name = file.path if slashes else file.path.replace("\\", "/")
        _add(entries, file._replace(path=name), path, remedy)
        member_of[name] = file.path

    def read(chosen: Iterable[Entry]) -> Iterator[Content]:
        # In one pass from front to back, because going back in a compressed tar means unpacking it anew.
        wanted = iter(chosen)
        entry = next(wanted, None)
        with tarfile.open(path, tarinfo=_Member) as archive:
            for member in archive:
                while entry is not None and member_of[entry.path] == member.name and member.isfile():
                    opened = archive.extractfile(member)
                    assert opened is not None  # a regular file always has content
                    yield opened.read()
                    entry = next(wanted, None)
                if entry is None:
                    return

    return Tree(path, [*entries.values()], read, remedy)


def _add(entries: dict[str, Entry], entry: Entry, path: Path, remedy: str) -> None:
    """Add a member of an archive to the entries, unless it is clutter; raise DataError if it is there already."""
    if any(is_clutter(part) for part in PurePosixPath(entry.path).parts):
        return
    if entry.path in entries:
        raise DataError(
            f"{path}: its member {entry.path!r} is there twice, and it is not clear which one counts: {remedy}"
        )
    entries[entry.path] = entry


def _check(path: Path, name: str, plain: bool, size: int, packed: int | None, largest: int, remedy: str) -> None:
    """Raise DataError if a member would leave the folder, is not a plain file or folder, or claims an absurd size."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or _DRIVE.match(name) or "\0" in name:
        raise DataError(
            f"{path}: its member {name!r} would leave the folder, so that the archive may be an attack: {remedy}"
        )

    if not plain:
        raise DataError(f"{path}: its member {name!r} is a link or a device, not a file: {remedy}")
    if size > largest or (packed is not None and size > max(_SMALL, _RATIO * packed)):
        raise DataError(f"{path}: its member {name!r} claims {size} bytes, more than any image or part has: {remedy}")
