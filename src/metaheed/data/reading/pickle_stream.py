"""Read the operations of a pickle one by one, and its payloads only when they are needed, in little memory.

A pickle is a list of operations. A payload is the argument of an operation that carries a string or bytes.
"""

import codecs
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

Opener = Callable[[], BinaryIO]
"""Opens the file of a pickle anew."""
_MOST_OPERATIONS = 1 << 25
"""The largest number of operations. The largest published file has 12 million; a hostile one could fill the memory."""
_BLOCK = 1 << 20  # bytes read at once
_LINE = 1 << 16  # the most bytes of a line, which holds a number or the name of a global


class RefusedError(Exception):
    """The pickle asks for something that is refused, because it could run code."""


class StoredBytes(NamedTuple):
    """A payload that was left in the file: where its bytes lie, and how they are written."""

    offset: int
    length: int
    """In the file, in bytes."""
    form: str
    """How it is written: raw, utf8, escaped (a str of Python 2 in protocol 0), or unicode-escaped (a unicode of it)."""
    text: bool
    """Whether it is text and not bytes. Python 3 writes bytes as Latin-1 text into protocol 2."""

    def blocks(self, file: BinaryIO, start: int = 0) -> Iterator[bytes]:
        """Yield the decoded bytes from position `start` on, in blocks.

        A raw payload is read from `start`; any other must be decoded from its beginning.
        """
        if self.form == "raw":
            file.seek(self.offset + start)
            left = self.length - start
            while left:
                block = _exactly(file, min(left, _BLOCK))
                left -= len(block)
                yield block
            return
        file.seek(self.offset)
        skip = start
        for block in _DECODERS[self.form](file, self.length):
            yield block[skip:]
            skip = max(0, skip - len(block))


class StoredArray:
    """An array whose bytes are in memory or were left in the file."""

    __slots__ = ("_open", "data", "dtype", "fortran", "shape", "whole")

    def __init__(self, opener: Opener) -> None:
        self._open = opener
        self.whole = False  # becomes True when the pickle gives it a shape and bytes
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.uint8)
        self.fortran = False
        self.data: bytes | StoredBytes = b""

    def is_like(self, dtype: type | str, ndim: int | None = None) -> bool:
        """Whether the array is whole and has that dtype (or one of those kinds, such as "iu") and number of axes."""
        fits = self.dtype.kind in dtype if isinstance(dtype, str) else self.dtype == dtype
        return self.whole and fits and ndim in (None, len(self.shape))

    @property
    def nbytes(self) -> int:
        """The size of its values in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self, file: BinaryIO | None = None) -> np.ndarray:
        """Return the array; its bytes are read from `file` if the caller keeps the pickle's file open."""
        if not self.whole:
            raise ValueError("an array without content")
        data: Any = self.data
        if isinstance(data, StoredBytes):
            with contextlib.nullcontext(file) if file is not None else self._open() as opened:
                data = b"".join(data.blocks(opened))
        return np.frombuffer(data, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")

    def chunks(self, start: int, count: int) -> Iterator[np.ndarray]:
        """Yield the entries of the first axis from `start` on, `count` at a time, holding one chunk in memory."""
        if not self.whole or self.fortran:
            raise ValueError("an array in Fortran order" if self.whole else "an array without content")
        entry = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        at = start
        with self._open() as file:
            data = self.data
            blocks = (
                data.blocks(file, start * entry) if isinstance(data, StoredBytes) else iter([data[start * entry :]])
            )
            held = bytearray()
            while at < self.shape[0]:
                taken = min(count, self.shape[0] - at)
                while len(held) < taken * entry:
                    held += next(blocks, b"") or _raise(EOFError("an array with too few bytes"))
                chunk = bytes(held[: taken * entry])
                del held[: taken * entry]
                yield np.frombuffer(chunk, self.dtype).reshape(taken, *self.shape[1:])
                at += taken


def _raise(error: Exception) -> bytes:
    raise error


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError("it ends too early")
    return data


# Decoders of payloads. They read from a file that stands at the beginning of a payload, and yield the bytes it encodes.


def _blocks(file: BinaryIO, length: int) -> Iterator[tuple[bytes, bool]]:
    while length:
        block = _exactly(file, min(length, _BLOCK))
        length -= len(block)
        yield block, not length


def _utf8(file: BinaryIO, length: int) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
    for block, last in _blocks(file, length):
        yield decoder.decode(block, last).encode("latin1")


def _escapes(pattern: re.Pattern[bytes], decode: Callable[[bytes], bytes]) -> Callable[..., Iterator[bytes]]:
    """Make a decoder of escaped text.

    Args:
        pattern: matches as many whole escapes and other characters as possible.
        decode: decodes such a match.
    """

    def decoded(file: BinaryIO, length: int) -> Iterator[bytes]:
        rest = b""
        for block, _ in _blocks(file, length):
            block = rest + block
            matched = pattern.match(block)
            assert matched is not None  # the pattern matches the empty string, too
            rest = block[matched.end() :]  # the beginning of an escape that ends in the next block
            if len(rest) > 12:
                raise ValueError(f"the escape {rest[:12]!r}")
            yield decode(matched[0])
        if rest:
            raise ValueError(f"the escape {rest!r}")

    return decoded


_DECODERS: dict[str, Callable[[BinaryIO, int], Iterator[bytes]]] = {
    "utf8": _utf8,
    "escaped": _escapes(
        re.compile(rb"(?:[^\\]+|\\[\\'\"abfnrtv0]|\\x[0-9a-fA-F]{2})*"), lambda text: codecs.escape_decode(text)[0]
    ),
    "unicode-escaped": _escapes(
        re.compile(rb"(?:[^\\]+|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8})*"),
        lambda text: text.decode("raw_unicode_escape").encode("latin1"),
    ),
}


def read_payload(file: BinaryIO, payload: StoredBytes) -> bytes | str:
    """Read a whole payload; the file then stands behind it."""
    if not payload.text:
        return b"".join(payload.blocks(file))
    file.seek(payload.offset)
    data = _exactly(file, payload.length)
    return data.decode("utf-8", "surrogatepass") if payload.form == "utf8" else data.decode("raw_unicode_escape")


# What follows an operation in the file.
_FIXED = {
    **{ord(c): n for c, n in zip("JKMGqrhj", (4, 1, 2, 8, 1, 4, 1, 4), strict=True)},
    **{0x80: 1, 0x82: 1, 0x83: 2, 0x84: 4, 0x95: 8},
}
"""Operation -> the number of bytes that follow it."""
_LINES = {ord(c): 1 for c in "ILFpgP"} | {ord(c): 2 for c in "ci"}
"""Operation -> the number of lines that follow it."""
_PAYLOADS: dict[int, tuple[int, str, bool]] = {
    **{ord("T"): (4, "raw", False), ord("U"): (1, "raw", False), ord("B"): (4, "raw", False)},
    **{ord("C"): (1, "raw", False), 0x8E: (8, "raw", False), 0x96: (8, "raw", False)},
    **{ord("X"): (4, "utf8", True), 0x8C: (1, "utf8", True), 0x8D: (8, "utf8", True)},
    **{0x8A: (1, "raw", False), 0x8B: (4, "raw", False)},
}
"""Operation -> the payload that follows it: the number of bytes of its length, its form, and whether it is text."""
_QUOTED, _UNICODE = ord("S"), ord("V")  # a payload on one line follows
_BARE = {*b"0N12()]}tldasuebRoQ.", 0x81, *range(0x85, 0x8A), *range(0x8F, 0x95), 0x97, 0x98}  # nothing follows


def read_operations(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yield (operation, argument) one after another; payloads are skipped, and given as `StoredBytes`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    for _ in range(_MOST_OPERATIONS):
        code = file.read(1)
        if not code:
            raise EOFError("it ends too early")
        op = code[0]
        if op in _BARE:
            yield op, None
        elif op in _FIXED:
            yield op, _exactly(file, _FIXED[op])
        elif op in _PAYLOADS:
            width, form, text = _PAYLOADS[op]
            length = int.from_bytes(_exactly(file, width), "little")
            payload = StoredBytes(file.tell(), length, form, text)
            if payload.offset + length > size:
                raise EOFError(f"{length} bytes are announced where {size - payload.offset} are left")
            file.seek(length, os.SEEK_CUR)
            yield op, payload
        elif op in _LINES:
            yield op, [_line(file) for _ in range(_LINES[op])]
        elif op in (_QUOTED, _UNICODE):
            yield op, _text_line(file, op)
        else:
            raise ValueError(f"no such operation as {code!r}")
        if op == 0x2E:  # the operation that ends a pickle
            return
    raise ValueError(f"it has more than {_MOST_OPERATIONS} operations")


def _line(file: BinaryIO) -> bytes:
    line = file.readline(_LINE)
    if not line.endswith(b"\n"):
        raise EOFError("a line without an end")
    return line[:-1]


def _text_line(file: BinaryIO, op: int) -> StoredBytes:
    """Skip the line of a quoted string or of a unicode text, and return where it lies."""
    offset, length, block, last = file.tell(), 0, b"", b""
    first = file.read(1)
    file.seek(offset)
    while not block.endswith(b"\n"):
        block = file.readline(_LINE)
        if not block:
            raise EOFError("a line without an end")
        length += len(block)
        last = block[-2:-1] or last
    if op == _UNICODE:
        return StoredBytes(offset, length - 1, "unicode-escaped", True)
    if length < 3 or first not in b"\"'" or last != first:
        raise ValueError("a string without quotes")
    return StoredBytes(offset + 1, length - 3, "escaped", False)


class AdmittedType(NamedTuple):
    """A type or function that a pickle may name; `name` is what `safe_pickle` makes in its place."""

    name: str


class DType:
    """A numpy dtype that is being built; its byte order comes later, with its state."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
