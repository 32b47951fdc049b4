"""Read a stranger's pickle without running code of the stranger, and without holding the file in memory.

A pickle is a program for a small stack machine. This module is such a machine, for protocols 0 to 5 as Python 2 and
Python 3 write them. It knows numpy arrays and plain values only (dict, list, tuple, str, bytes, and numbers, including
numpy's), and refuses everything else by name: no other global is looked up or called. A str of Python 2 becomes bytes.

Strings and arrays longer than a bound are left in the file, and only the place of their bytes is kept. A file of many
gigabytes is thus read in little memory. Payloads have four forms: raw bytes, UTF-8 of Latin-1 text (as Python 3 writes
bytes into protocol 2), and two kinds of escapes (protocol 0).
"""

import codecs
import contextlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from metaheed.data.reading.pickle_stream import (
    AdmittedType,
    DType,
    Opener,
    RefusedError,
    StoredArray,
    StoredBytes,
    read_operations,
    read_payload,
)
from metaheed.errors import DataError, brief, is_system_error


def load_arrays(source: Path | Opener, name: str, published: str, inline: int | None = None) -> Any:
    """Read a pickle of arrays and plain containers. Its arrays are returned as `StoredArray`.

    Args:
        source: the file, or a function that opens it anew (as a seekable file).
        name: the name of the file in messages.
        published: where the file is published, for messages.
        inline: strings and arrays of more bytes than this are left in the file; everything is read if None.

    Raises:
        DataError: the file is damaged, or has anything but arrays and plain containers; the message names the file, the
            cause, and where the file is published.
    """
    opener: Opener = (lambda: source.open("rb", buffering=4096)) if isinstance(source, Path) else source
    with damage_explained(name, published), opener() as file:
        return _Machine(file, opener, inline).run()


@contextlib.contextmanager
def damage_explained(name: str, published: str) -> Iterator[None]:
    """Turn any error that damaged content raises into a DataError that names the file and where it is published."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except RefusedError as error:
        raise DataError(
            f"{name} is not read: its pickle asks for {brief(str(error))}, which a file of arrays does not need and "
            f"which could run code. Fetch the file anew from {published}"
        ) from error
    except Exception as error:  # readers raise nearly any kind of error for damaged content
        if is_system_error(error):
            raise
        raise DataError(
            f"{name} is damaged ({type(error).__name__}: {brief(str(error), 200)}): fetch it anew from {published}"
        ) from error


_ADMITTED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): "reconstruct" for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): "frombuffer" for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): "scalar" for core in ("core", "_core")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    ("collections", "OrderedDict"): "dict",
    ("collections", "defaultdict"): "defaultdict",
    **{(builtins, name): name for builtins in ("__builtin__", "builtins") for name in ("bytes", "list", "dict", "int")},
    **{("__builtin__", "xrange"): "range", ("builtins", "range"): "range"},
}
"""(module, name) of each global that a pickle may name -> the `_make_…` method used in its place; none is looked up."""
_MARK = object()


def _keys(keys: list[Any]) -> list[Any]:
    """Return the keys unchanged; nested tuples are refused, because comparing them may take for ever."""
    for key in keys:
        for part in key if isinstance(key, tuple) else (key,):
            if not isinstance(part, str | bytes | int | float | None):
                raise TypeError(f"a dict with a {type(part).__name__} in a key")
    return keys


_GETS = frozenset(b"ghj")  # the operations that fetch from the memo
_LONGEST_RANGE = 1 << 22  # numbers in all ranges together, because they take memory here but almost none in the file


class _Machine:
    """The stack machine: a method for each kind of operation, and a `_make_…` method for each admitted global."""

    def __init__(self, file: BinaryIO, opener: Opener, inline: int | None) -> None:
        self._file, self._open, self._inline = file, opener, inline
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._memoized = 0
        self._ranged = 0  # the numbers in ranges so far
        self._operations = 0  # the number of operations in the file
        self._copied = 0  # the pairs and bytes that were copied from values that existed already

    def run(self) -> Any:
        """Execute all operations and return the value that is left on the stack."""
        # Only values that are fetched later are kept in the memo; Python 2 puts everything into it.
        self._fetched = set()
        for op, argument in read_operations(self._file):
            self._operations += 1
            if op in _GETS:
                self._fetched.add(self._number(op, argument))
        self._size = self._file.tell()
        for op, argument in read_operations(self._file):
            handler = _HANDLERS.get(op)
            if handler is None:
                raise RefusedError(_NAMES.get(op, f"the operation {bytes([op])!r}"))
            handler(self, op, argument)
        (value,) = self._stack
        return value

    @staticmethod
    def _number(op: int, argument: Any) -> int:
        return int(argument[0]) if op in b"gp" else int.from_bytes(argument, "little")

    def _pop_to_mark(self) -> list[Any]:
        """Remove the values above the topmost mark, and the mark itself; return the values."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _nothing(self, op: int, argument: Any) -> None:
        pass

    def _mark(self, op: int, argument: Any) -> None:
        self._push(_MARK)

    def _pop(self, op: int, argument: Any) -> None:
        self._stack.pop()

    def _drop_to_mark(self, op: int, argument: Any) -> None:
        self._pop_to_mark()

    def _repeat(self, op: int, argument: Any) -> None:
        self._push(self._stack[-1])

    def _constant(self, op: int, argument: Any) -> None:
        self._push({ord("N"): None, 0x88: True, 0x89: False}[op])

    def _number_line(self, op: int, argument: Any) -> None:
        (text,) = argument
        if op == ord("I") and text in (b"00", b"01"):
            self._push(text == b"01")
        else:
            self._push(float(text) if op == ord("F") else int(text.rstrip(b"L")))

    def _integer(self, op: int, argument: Any) -> None:
        self._push(int.from_bytes(argument, "little", signed=op == ord("J")))

    def _long(self, op: int, argument: StoredBytes) -> None:
        if argument.length > 1024:
            raise ValueError(f"a whole number of {argument.length} bytes")
        data = read_payload(self._file, argument)
        assert isinstance(data, bytes)  # not text
        self._push(int.from_bytes(data, "little", signed=True))

    def _float(self, op: int, argument: Any) -> None:
        self._push(struct.unpack(">d", argument)[0])

    def _payload(self, op: int, argument: StoredBytes) -> None:
        if self._inline is not None and argument.length > self._inline:
            self._push(argument)
            return
        behind = self._file.tell()
        self._push(read_payload(self._file, argument))
        self._file.seek(behind)

    def _empty(self, op: int, argument: Any) -> None:
        self._push({ord("]"): list, ord("}"): dict, ord(")"): tuple}[op]())

    def _short_tuple(self, op: int, argument: Any) -> None:
        count = op - 0x84
        if len(self._stack) < count:
            raise IndexError("a tuple has more values than the stack")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._push(items)

    def _container(self, op: int, argument: Any) -> None:
        items = self._pop_to_mark()
        if op == ord("d"):
            self._push(dict(zip(_keys(items[::2]), items[1::2], strict=True)))
        else:
            self._push(items if op == ord("l") else tuple(items))

    def _append(self, op: int, argument: Any) -> None:
        items = self._pop_to_mark() if op == ord("e") else [self._stack.pop()]
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError("it appends to something that is not a list")
        target.extend(items)

    def _set_items(self, op: int, argument: Any) -> None:
        if op == ord("u"):
            items = self._pop_to_mark()
        else:
            value = self._stack.pop()
            items = [self._stack.pop(), value]
        target = self._stack[-1]
        if type(target) is not dict:
            raise TypeError("it sets items of something that is not a dict")
        target.update(zip(_keys(items[::2]), items[1::2], strict=True))

    def _put(self, op: int, argument: Any) -> None:
        if op == 0x94:
            number = self._memoized
            self._memoized += 1
        else:
            number = self._number(op, argument)
        if number in self._fetched:
            self._memo[number] = self._stack[-1]

    def _get(self, op: int, argument: Any) -> None:
        self._push(self._memo[self._number(op, argument)])

    def _global(self, op: int, argument: Any) -> None:
        if op == 0x93:
            name, module = self._stack.pop(), self._stack.pop()
            if not (isinstance(name, str) and isinstance(module, str)):
                raise TypeError("a global whose name is not text")
        else:
            module, name = (part.decode("utf-8") for part in argument)
        if (module, name) not in _ADMITTED or op == ord("i"):
            raise RefusedError(f"{module}.{name}")
        self._push(AdmittedType(_ADMITTED[module, name]))

    def _reduce(self, op: int, argument: Any) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if not isinstance(kind, AdmittedType) or type(arguments) is not tuple:
            raise RefusedError("a call of something that is not a function")
        self._push(getattr(self, f"_make_{kind.name}")(*arguments))

    def _make_reconstruct(self, kind: Any, shape: Any, code: Any) -> StoredArray:
        # The shape that is given here is ignored; the true one comes with the state.
        return StoredArray(self._open)

    def _make_frombuffer(self, data: Any, dtype: Any, shape: Any, order: Any) -> StoredArray:
        return self._fill(StoredArray(self._open), shape, dtype, order == "F", data)

    def _make_scalar(self, dtype: Any, data: Any) -> Any:
        # A number of numpy becomes a plain number, so that labels can be compared.
        if not isinstance(dtype, DType) or not isinstance(data, bytes):
            raise RefusedError("a numpy number of another kind")
        if len(data) != dtype.dtype.itemsize:
            raise ValueError(f"a {dtype.dtype} in {len(data)} bytes")
        return np.frombuffer(data, dtype.dtype)[0].item()

    def _make_dtype(self, code: Any, *flags: Any) -> DType:
        dtype = np.dtype(code.decode("ascii") if isinstance(code, bytes) else str(code))
        if dtype.hasobject:
            raise RefusedError("an array of Python objects")
        if dtype.kind not in "biufSU":
            raise RefusedError(f"an array of {dtype}")
        return DType(dtype)

    def _make_encode(self, text: Any, encoding: Any = "latin1") -> bytes | StoredBytes:
        if not isinstance(encoding, str) or codecs.lookup(encoding).name != "iso8859-1":
            raise RefusedError(f"_codecs.encode with {encoding!r}")
        if isinstance(text, StoredBytes) and text.text:
            return text._replace(text=False)
        if not isinstance(text, str):
            raise RefusedError("_codecs.encode of something that is not text")
        self._count_copies(len(text), self._size)
        return text.encode("latin1")

    def _count_copies(self, count: int, most: int) -> None:
        """Count the values that are copied, `most` at most: a bomb copies one value again and again."""
        self._copied += count
        if self._copied > most:
            raise ValueError("it copies more values than it has")

    def _make_bytes(self) -> bytes:
        return b""

    def _make_list(self) -> list[Any]:
        return []

    def _make_int(self) -> int:
        return 0

    def _make_dict(self, pairs: Any = ()) -> dict[Any, Any]:
        # Python 2 gives the items of an ordered dict as a list of lists; Python 3 sets them one after another.
        if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            raise RefusedError("a dict of something other than pairs")
        self._count_copies(len(pairs), self._operations)
        return dict(zip(_keys([key for key, _ in pairs]), [value for _, value in pairs], strict=True))

    def _make_defaultdict(self, factory: Any = None) -> dict[Any, Any]:
        if factory is not None and not isinstance(factory, AdmittedType):
            raise RefusedError("a dict whose missing values come from a function")
        return {}

    def _make_range(self, *bounds: Any) -> list[int]:
        if not 1 <= len(bounds) <= 3 or not all(type(bound) is int for bound in bounds):
            raise RefusedError("a range of something other than whole numbers")
        numbers = range(*bounds)
        if numbers and (numbers[-1] - numbers[0]) // numbers.step >= _LONGEST_RANGE - self._ranged:
            raise ValueError(f"ranges of more than {_LONGEST_RANGE} numbers")
        self._ranged += len(numbers)
        return list(numbers)

    def _make_ndarray(self, *arguments: Any) -> None:
        raise RefusedError("a call of numpy.ndarray")

    def _build(self, op: int, argument: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, DType):
            order, subdtype, names, fields = state[1:5]
            if (subdtype, names, fields) != (None, None, None):
                raise RefusedError("an array of records")
            order = order.decode("ascii") if isinstance(order, bytes) else str(order)
            if order not in ("|", "<", ">", "="):
                raise ValueError(f"the byte order {order!r}")
            target.dtype = target.dtype.newbyteorder("=" if order == "|" else order)  # type: ignore[arg-type]
        elif isinstance(target, StoredArray):
            _, shape, dtype, fortran, data = state
            self._fill(target, shape, dtype, bool(fortran), data)
        else:
            raise RefusedError("the state of an object")

    def _fill(self, array: StoredArray, shape: Any, dtype: Any, fortran: bool, data: Any) -> StoredArray:
        """Give an array its shape, dtype and bytes, after checking that they fit together."""
        if not isinstance(dtype, DType) or not (
            isinstance(data, bytes) or (isinstance(data, StoredBytes) and not data.text)
        ):
            raise RefusedError("an array of Python objects")
        if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"an array of shape {shape!r}")
        count = int(np.prod(np.array(shape, dtype=object))) * dtype.dtype.itemsize
        known = data.length if isinstance(data, StoredBytes) else len(data)
        raw = isinstance(data, bytes) or data.form == "raw"
        # A payload that is not raw has at least as many bytes in the file as it encodes.
        if known < count or (raw and known != count):
            raise ValueError(f"an array of shape {shape} in {known} bytes")
        array.shape, array.dtype, array.fortran, array.data = shape, dtype.dtype, fortran and len(shape) > 1, data
        array.whole = True
        return array


_HANDLERS: dict[int, Callable[[_Machine, int, Any], None]] = {
    **dict.fromkeys((0x80, 0x95, 0x2E), _Machine._nothing),
    **dict.fromkeys((ord("N"), 0x88, 0x89), _Machine._constant),
    **dict.fromkeys(b"ILF", _Machine._number_line),
    **dict.fromkeys(b"JKM", _Machine._integer),
    **dict.fromkeys((0x8A, 0x8B), _Machine._long),
    **dict.fromkeys((*b"TUBCXSV", 0x8E, 0x96, 0x8C, 0x8D), _Machine._payload),
    **dict.fromkeys(b"]})", _Machine._empty),
    **dict.fromkeys((0x85, 0x86, 0x87), _Machine._short_tuple),
    **dict.fromkeys(b"tld", _Machine._container),
    **dict.fromkeys(b"ae", _Machine._append),
    **dict.fromkeys(b"su", _Machine._set_items),
    **dict.fromkeys((*b"pqr", 0x94), _Machine._put),
    **dict.fromkeys(b"ghj", _Machine._get),
    **dict.fromkeys((*b"ci", 0x93), _Machine._global),
    ord("G"): _Machine._float,
    ord("("): _Machine._mark,
    ord("0"): _Machine._pop,
    ord("1"): _Machine._drop_to_mark,
    ord("2"): _Machine._repeat,
    ord("R"): _Machine._reduce,
    ord("b"): _Machine._build,
}
_NAMES = {
    **dict.fromkeys((*b"o", 0x81, 0x92), "the creation of an object"),
    **dict.fromkeys((0x82, 0x83, 0x84), "an extension code"),
    **dict.fromkeys(b"PQ", "a persistent object"),
    **dict.fromkeys((0x97, 0x98), "a buffer outside the file"),
    **dict.fromkeys((0x8F, 0x90, 0x91), "a set"),
}
"""Operation that is refused -> its name in messages."""
