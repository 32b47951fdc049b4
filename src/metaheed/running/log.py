"""A run's logs: files with one JSON object on each line, which a resumed run continues exactly from its checkpoint."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metaheed.errors import RunError
from metaheed.files.opening import LINE_BYTES, open_in_place, open_to_read
from metaheed.files.parsing import from_json
from metaheed.files.writing import _writing
from metaheed.running.meddling import identity, meddling_error, reason


class JsonLines:
    """An append-only file of one JSON object a line, truncated to the checkpoint's length when a run resumes."""

    def __init__(self, path: Path, length: int, sha256: str = "") -> None:
        self._path = path
        self._digest = hash_beginning(path, length, sha256)
        with _writing(path):
            self._file = open_in_place(path, "ab")
            self._file.truncate(length)
            self._length, self._touched = length, False
            self._identity = identity(os.fstat(self._file.fileno()))

    def write(self, values: dict[str, Any]) -> None:
        """Append a line and pass it to the operating system."""
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        with _writing(self._path):
            number = self._file.fileno()
            self._touched |= identity(os.fstat(number)) != self._identity
            self._file.write(line)
            self._file.flush()
            self._identity = identity(os.fstat(number))
        self._digest.update(line)
        self._length += len(line)

    def sync(self, whole: bool = False) -> tuple[int, str]:
        """Flush the file to the disk, and return its length and the checksum of its content.

        Args:
            whole: verify the whole content; by default only if the file's modification time says that another program
                wrote to it.

        Raises:
            RunError: another program removed, replaced or changed the file.
        """
        with _writing(self._path):
            os.fsync(self._file.fileno())
            here = identity(os.fstat(self._file.fileno()))
        try:
            there = identity(self._path.stat())
        except OSError as error:
            raise meddling_error(self._path, "removed") from error
        if there[:2] != here[:2]:
            raise meddling_error(self._path, "replaced")
        if here[2] != self._length:
            raise meddling_error(self._path, f"changed: it has {here[2]} bytes, where this run wrote {self._length}")
        found = self._digest.hexdigest()
        if whole or self._touched or here != self._identity:
            try:
                hash_beginning(self._path, self._length, found)
            except RunError as error:
                raise meddling_error(self._path, "changed") from error
            self._touched, self._identity = False, here
        return self._length, found

    def close(self) -> None:
        """Close the file."""
        with _writing(self._path):
            self._file.close()


def hash_beginning(path: Path, length: int, sha256: str) -> "hashlib._Hash":
    """The running SHA-256 of a log's first `length` bytes.

    Raises:
        RunError: the log cannot be read, is shorter, or its bytes do not have the checksum `sha256` (not checked if
            that is empty).
    """
    running, left = hashlib.sha256(), length
    if length:
        try:
            with open_to_read(path) as file:
                while left and (part := file.read(min(left, 1 << 20))):
                    running.update(part)
                    left -= len(part)
        except FileNotFoundError:
            pass  # reported below, as a file without content
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}") from error
    remedy = "it has been altered. Put it back from a copy, or delete the run folder and train anew"
    if left:
        raise RunError(f"{path} has {length - left} bytes, but the checkpoint was written after {length}: {remedy}")
    if sha256 and running.hexdigest() != sha256:
        raise RunError(f"{path} does not begin with the {length} bytes that the checkpoint was written after: {remedy}")
    return running


def stream_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, one after another. A last line without a newline is still being written and is left
    out.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        with open_to_read(Path(path)) as file:
            for number in itertools.count(1):
                line = file.readline(LINE_BYTES)
                if not line.endswith(b"\n"):
                    if len(line) == LINE_BYTES:
                        raise ValueError(f"line {number} has more than {LINE_BYTES:,} bytes")
                    return
                value = from_json(line)
                if not isinstance(value, dict):
                    raise ValueError(f"line {number} is not an object")
                yield value
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {reason(error)}") from error
