"""The operations of a pickle and its payloads, read from a file in little memory."""

import codecs
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

Opener = Callable[[], BinaryIO]


_MOST_OPERATIONS = 1 << 25
"""The largest published file has 12 million; the bound keeps a hostile one from filling the memory with containers."""
_BLOCK = 1 << 20  # bytes read at once


_LINE = 1 << 16  # of a number, or of a global's name


class RefusedError(Exception):
    """The pickle asks for something that is never done."""


class StoredBytes(NamedTuple):
    """Bytes, or the text of bytes, that stayed in the file."""

    offset: int
    length: int
    form: str
    """How they are written: raw, utf8, escaped (a Python 2 str of protocol 0), unicode-escaped (a text of it)."""
    text: bool
    """Whether they are a text; one that is encoded to Latin-1 is bytes again."""

    def blocks(self, file: BinaryIO, start: int = 0) -> Iterator[bytes]:
        """The bytes from position `start` on, in blocks; from the beginning of the file's payload unless it is raw."""
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
    """An array whose bytes are in memory or stayed in the file."""

    __slots__ = ("_open", "data", "dtype", "fortran", "shape", "whole")

    def __init__(self, opener: Opener) -> None:
        self._open = opener
        self.whole = False  # until its state has been read
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.uint8)
        self.fortran = False
        self.data: bytes | StoredBytes = b""

    def is_like(self, dtype: type | str, ndim: int | None = None) -> bool:
        """Whether it is whole, of that dtype (or kind of dtype, such as "iu"), and has so many axes."""
        fits = self.dtype.kind in dtype if isinstance(dtype, str) else self.dtype == dtype
        return self.whole and fits and ndim in (None, len(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self, file: BinaryIO | None = None) -> np.ndarray:
        """The array, from its own file or from that file kept open by the caller."""
        if not self.whole:
            raise ValueError("an array without content")
        data: Any = self.data
        if isinstance(data, StoredBytes):
            with contextlib.nullcontext(file) if file is not None else self._open() as opened:
                data = b"".join(data.blocks(opened))
        return np.frombuffer(data, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")

    def chunks(self, start: int, count: int) -> Iterator[np.ndarray]:
        """Entries of the first axis from `start` on, `count` at a time, in the memory of one chunk."""
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


# Decoders of payloads: blocks of the bytes meant, from an open file that stands at their beginning.


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
    def decoded(file: BinaryIO, length: int) -> Iterator[bytes]:
        rest = b""
        for block, _ in _blocks(file, length):
            block = rest + block
            matched = pattern.match(block)
            assert matched is not None  # the pattern matches nothing, too
            rest = block[matched.end() :]  # an escape that goes on in the next block
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
    """A payload whole; the file stands behind it afterwards."""
    if not payload.text:
        return b"".join(payload.blocks(file))
    file.seek(payload.offset)
    data = _exactly(file, payload.length)
    return data.decode("utf-8", "surrogatepass") if payload.form == "utf8" else data.decode("raw_unicode_escape")


# Operation -> what follows it in the file: so many bytes, lines, or a payload behind its length of so many bytes.
_FIXED = dict.fromkeys(b"JG", 0) | {
    **{ord(c): n for c, n in zip("JKMGqrhj", (4, 1, 2, 8, 1, 4, 1, 4), strict=True)},
    **{0x80: 1, 0x82: 1, 0x83: 2, 0x84: 4, 0x95: 8},
}


_LINES = {ord(c): 1 for c in "ILFpgP"} | {ord(c): 2 for c in "ci"}


_PAYLOADS: dict[int, tuple[int, str, bool]] = {
    **{ord("T"): (4, "raw", False), ord("U"): (1, "raw", False), ord("B"): (4, "raw", False)},
    **{ord("C"): (1, "raw", False), 0x8E: (8, "raw", False), 0x96: (8, "raw", False)},
    **{ord("X"): (4, "utf8", True), 0x8C: (1, "utf8", True), 0x8D: (8, "utf8", True)},
    **{0x8A: (1, "raw", False), 0x8B: (4, "raw", False)},
}


_QUOTED, _UNICODE = ord("S"), ord("V")


_BARE = frozenset(b"0N12()]}tldasuebRoQ.") | {
    0x81,
    0x85,
    0x86,
    0x87,
    0x88,
    0x89,
    0x8F,
    0x90,
    0x91,
    0x92,
    0x93,
    0x94,
    0x97,
    0x98,
}


def read_operations(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(operation, argument) one after another; payloads are passed over."""
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
        if op == 0x2E:  # the end
            return
    raise ValueError(f"it has more than {_MOST_OPERATIONS} operations")


def _line(file: BinaryIO) -> bytes:
    line = file.readline(_LINE)
    if not line.endswith(b"\n"):
        raise EOFError("a line without an end")
    return line[:-1]


def _text_line(file: BinaryIO, op: int) -> StoredBytes:
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
    """The name of a type that a pickle may mention."""

    name: str


class DType:
    """A dtype under construction: its byte order comes with its state."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
