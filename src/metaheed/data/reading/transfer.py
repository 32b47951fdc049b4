"""Download one published file over HTTP from its mirrors, with resumption and a check of its md5.

The steps are described at the top of download.py.
"""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import metaheed
from metaheed.errors import DataError
from metaheed.files.opening import put_in_place, try_lock

_TRIES = 4  # attempts in a row, at one mirror, that bring no new byte before it is given up
_WAIT = 1.0  # seconds before the second attempt; doubled before each later one
_LONGEST_WAIT = 30.0  # seconds, even if the server asks for more
_TIMEOUT = 30.0  # seconds without a byte from the server
_CHUNK = 1 << 18  # bytes that are read at once
_BEGINNING = 64  # bytes from which a web page can be recognised
_LARGEST = 1 << 30  # bytes of a file at most; no published file comes near it


class PublishedFile(NamedTuple):
    """A published file, and where it can be downloaded."""

    path: str
    """Its path below the data root, where the reader of the data set looks for it."""
    md5: str
    """Its published checksum."""
    urls: tuple[str, ...]
    """The publisher's URL first, then those of mirrors."""
    unpacked: Mapping[str, str] = MappingProxyType({})
    """Path below the data root -> md5 of the files in the archive, which can be there instead of it."""


class DownloadWatcher(Protocol):
    """Is told about the progress of a download."""

    def begin(self, name: str, done: int, total: int | None) -> None:
        """A transfer begins: `done` bytes of the file are there already, out of `total` (None if it is not known)."""

    def reached(self, done: int) -> None:
        """`done` bytes of the file are there now."""

    def end(self) -> None:
        """The transfer has ended."""

    def message(self, text: str) -> None:
        """Show a line of text to the user."""


def find_present(file: PublishedFile, root: Path) -> Path | None:
    """Return the file, or the folder that it was unpacked into, if it is there with the published md5; else None.

    Raises:
        DataError: it is there with another md5.
    """
    for place in (root / file.path, root / Path(file.path).name):
        if place.exists():
            _check_md5(place, file.md5)
            return place
    for base in (root, root.parent):  # the root may be the unpacked folder itself
        parts = {base / path: md5 for path, md5 in file.unpacked.items()}
        if parts and all(part.is_file() and part.is_relative_to(root) for part in parts):
            for part, md5 in parts.items():
                _check_md5(part, md5)
            return next(iter(parts)).parent
    return None


def _check_md5(path: Path, md5: str) -> None:
    found = md5_of(path)
    if found != md5:
        raise DataError(
            f"{path} is there already, but its md5 is {found} and the published file's {md5}. "
            "If it can be used (it was repacked, say), nothing needs to be done; if not, delete it and download again"
        )


def md5_of(path: Path) -> str:
    """Return the md5 of a file in hexadecimal.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error


def fetch(file: PublishedFile, root: Path, watcher: DownloadWatcher) -> Path:
    """Download one file to its place below the root, and return its path.

    Raises:
        DataError: as in `download.download`.
    """
    target = root / file.path
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with _write_errors_explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with _locked_part(target) as part:
            # Another process may just have finished the same download.
            if find_present(file, root) is None and not (part.size and md5_of(part.path) == file.md5):
                _from_mirrors(file, part, target, watcher)
            return target if target.exists() else part.rename_to(target)
    finally:
        watcher.end()
        with contextlib.suppress(OSError):  # the folder is not empty, because bytes have arrived
            for folder in made:
                folder.rmdir()


def _from_mirrors(file: PublishedFile, part: "_Part", target: Path, watcher: DownloadWatcher) -> None:
    """Download the published file into `part` from the first mirror that gives it."""
    failures = []
    for url in file.urls:
        try:
            continued = part.size > 0
            _transfer(url, part, watcher)
            found = md5_of(part.path)
            if found != file.md5 and continued:
                watcher.message(f"{part.path} held bytes of another file from an earlier session: starting anew")
                part.truncate(0)
                _transfer(url, part, watcher)
                found = md5_of(part.path)
            if found == file.md5:
                return
            part.truncate(0)
            raise _UnusableError(f"gave a file with md5 {found}, but the published one is {file.md5}")
        except _UnusableError as error:
            failures.append(f"{url} {error}")
            watcher.end()
            watcher.message(failures[-1])
    kept = f"; {part.size} bytes are kept in {part.path}, and the next attempt continues them" if part.size else ""
    raise DataError(
        f"{target.name} could not be downloaded: {'; '.join(failures)}{kept}. Try again later, or fetch it with a "
        f"browser and put it at {target}"
    )


class _UnusableError(Exception):
    """A mirror does not give the file, and would not do so if it were asked again."""


class _BrokenError(Exception):
    """A transfer was interrupted; another attempt may succeed."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait
        """The seconds that the server asks to wait; None if it does not say."""


class _Part:
    """FILE.part, which this process has opened and locked."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path, self._file = path, file

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        with _write_errors_explained(self.path):
            while rest:  # write may take only some of the bytes, if the disk is nearly full
                rest = rest[self._file.write(rest) :]

    def truncate(self, size: int) -> None:
        with _write_errors_explained(self.path):
            self._file.truncate(size)

    def rename_to(self, target: Path) -> Path:
        with _write_errors_explained(target):
            os.fsync(self._file.fileno())
            if os.name == "nt":
                self._file.close()  # Windows does not rename an open file
            put_in_place(self.path, target)
        return target


@contextlib.contextmanager
def _locked_part(target: Path) -> Iterator[_Part]:
    """Open and lock FILE.part; raise DataError if another process holds it. An empty file is deleted at the end."""
    path = target.with_name(target.name + ".part")
    while True:
        with _write_errors_explained(path):
            file = FileIO(path, "a+")
        with file:
            if not try_lock(file):
                raise DataError(f"{path} is being downloaded by another process: wait for it, or stop it")
            # Between opening and locking, the process that held the lock may have renamed the file: then try again.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            try:
                yield _Part(path, file)
            finally:
                if path.exists() and path.stat().st_size == 0:
                    with contextlib.suppress(OSError):
                        path.unlink()
            return


class _Mirror:
    """A URL, and the version of the file (its ETag) that the server named last."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.version: str | None = None
        # Built here and not at import, because it reads the environment's proxies and certificates.
        self.open = urllib.request.build_opener(_Redirects()).open


def _transfer(url: str, part: _Part, watcher: DownloadWatcher) -> None:
    """Append the missing bytes to `part`; a broken connection is tried again until _TRIES in a row bring no new byte.

    Raises:
        _UnusableError: the mirror does not give the file.
    """
    mirror, most, tries = _Mirror(url), part.size, 0
    while True:
        try:
            _request(mirror, part, watcher)
            return
        except _BrokenError as error:
            tries = 1 if part.size > most else tries + 1
            most = max(most, part.size)
            if tries >= _TRIES:
                raise _UnusableError(f"failed {tries} times in a row ({error})") from error
            wait = min(_WAIT * 2 ** (tries - 1) if error.wait is None else error.wait, _LONGEST_WAIT)
            watcher.message(f"{url}: {error}; trying again in {wait:g} s, from byte {part.size} on")
            time.sleep(wait)


def _request(mirror: _Mirror, part: _Part, watcher: DownloadWatcher) -> None:
    """Make one request for the missing bytes.

    Raises:
        _BrokenError: it failed, but another attempt may succeed.
        _UnusableError: it failed, and another attempt would fail, too.
    """
    start = part.size
    headers = {"User-Agent": f"metaheed/{metaheed.__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if mirror.version is not None:
            headers["If-Range"] = mirror.version
    try:
        with mirror.open(urllib.request.Request(mirror.url, headers=headers), timeout=_TIMEOUT) as response:
            tag = response.headers.get("ETag", "")
            mirror.version = tag if tag.startswith('"') else None  # a weak ETag does not promise equal bytes
            _receive(response, part, watcher)
    except urllib.error.HTTPError as error:
        with error:
            what = f"answers {error.code} {error.reason}"
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
                return  # the server has no more bytes than we do: the md5 decides
            if error.code in (408, 425, 429) or error.code >= 500:
                asked = error.headers.get("Retry-After", "")
                raise _BrokenError(what, float(asked) if asked.isdecimal() else None) from error
            raise _UnusableError(what) from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise _UnusableError(f"has a certificate that is not trusted here ({reason.verify_message})") from error
        if isinstance(reason, socket.gaierror):
            raise _UnusableError(
                f"cannot be found ({reason.strerror}): is there a network, or a proxy to set?"
            ) from error
        raise _BrokenError(f"the connection broke ({reason or type(reason).__name__})") from error


def _receive(response: Any, part: _Part, watcher: DownloadWatcher) -> None:
    """Append the body of a response to `part`; if the server sends the file from the start, `part` is emptied first."""
    start = part.size
    length = response.headers.get("Content-Length", "")
    length = int(length) if length.isdecimal() else None
    # read1 returns what has arrived; read would wait for a whole chunk, and lose it if the connection breaks.
    data = response.read1(_CHUNK)
    while 0 < len(data) < _BEGINNING and (more := response.read1(_CHUNK)):
        data += more
    continues = response.status == http.HTTPStatus.PARTIAL_CONTENT
    if response.headers.get_content_type() == "text/html" or (not continues and _HTML.match(data)):
        title = _TITLE.search(data + response.read(_CHUNK))
        named = f" titled {' '.join(title[1].decode('utf-8', 'replace').split())!r}" if title else ""
        raise _UnusableError(
            f"answers with a web page{named} instead of the file: a login, a quota, a consent or a proxy's page; "
            "open the address in a browser to see it"
        )
    if continues and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        part.truncate(0)
        raise _BrokenError("the server sent another range than was asked for")
    if not continues and start:
        part.truncate(0)
        start = 0
    total = None if length is None else start + length
    free = shutil.disk_usage(part.path.parent).free
    if length is not None and length > free:
        raise DataError(
            f"no room for {part.path.stem}: {_megabytes(length)} are still to be downloaded, but {part.path.parent} "
            f"has only {_megabytes(free)} free. Make room there, or choose another --data-root"
        )
    watcher.begin(part.path.stem, start, total)
    while data:
        part.append(data)
        watcher.reached(part.size)
        if part.size > _LARGEST:
            part.truncate(0)
            raise _UnusableError(f"sends more than {_megabytes(_LARGEST)}, which no published file has")
        data = response.read1(_CHUNK)
    if total is not None and part.size < total:
        raise _BrokenError(f"the connection broke ({part.size} of {total} bytes)")


_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body|script)\b", re.IGNORECASE)


_TITLE = re.compile(rb"<title[^>]*>([^<]{1,200})", re.IGNORECASE)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but refuses those from HTTPS to another protocol."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise _UnusableError(f"redirects to {newurl}, which is not HTTPS")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


@contextlib.contextmanager
def _write_errors_explained(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or path}: {error.strerror or error}. Make room or grant permission there "
            "and repeat the command, which continues the download; or choose another --data-root"
        ) from error
