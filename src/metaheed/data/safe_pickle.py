"""Reading a stranger's pickle without running a stranger's code.

The published CIFAR-100 files are Python 2 pickles. This reader builds numpy arrays and plain containers (dict, list,
tuple, str, bytes, numbers) and refuses everything else by name: no other global is ever looked up, let alone called.
"""

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from metaheed.errors import DataError


def load_arrays(path: Path, published: str) -> Any:
    """The value in a pickle of arrays and plain containers; a Python 2 str becomes bytes.

    Raises:
        DataError: the file is damaged, or asks for anything but arrays and plain containers; names the file, the
            offender and where the file is published.
    """
    with path.open("rb") as file:
        return loads_arrays(file, str(path), published)


def loads_arrays(file: Any, name: str, published: str) -> Any:
    """As `load_arrays`, from an open binary file."""
    try:
        return _ArrayUnpickler(file, encoding="bytes").load()
    except _RefusedError as error:
        raise DataError(
            f"{name} is not read: its pickle asks for {error}, which a file of arrays has no use for and which could "
            f"run code. Fetch the file anew from {published}"
        ) from error
    except Exception as error:  # a damaged pickle makes the unpickler raise nearly anything
        raise DataError(
            f"{name} is damaged ({type(error).__name__}: {error}): fetch it anew from {published}"
        ) from error


class _RefusedError(Exception):
    pass


class _Array(np.ndarray[Any, Any]):
    """An array under construction, whose state is checked before numpy sees it."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, data = state
        if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes):
            raise _RefusedError("an array of Python objects")
        if int(np.prod(shape, dtype=object)) * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
        super().__setstate__(state)


# The admitted callables are objects without attributes, for a pickle may try to set some on whatever it is handed.
class _Reconstruct:
    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
        # An empty array whatever shape is asked for: the memory comes with the data, in __setstate__.
        return np.ndarray.__new__(_Array, (0,), np.uint8)


class _Encode:
    """How Python 3 writes bytes into a protocol-2 pickle."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any = "latin1") -> bytes:
        if codecs.lookup(encoding).name != "iso8859-1" or not isinstance(text, str):
            raise _RefusedError(f"_codecs.encode with {encoding!r}")
        return text.encode("latin1")


class _DType:
    __slots__ = ()

    def __call__(self, code: Any, *flags: Any) -> np.dtype[Any]:
        dtype = np.dtype(code.decode("ascii") if isinstance(code, bytes) else str(code))
        if dtype.hasobject:
            raise _RefusedError("an array of Python objects")
        return dtype


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever handed to _reconstruct, which ignores it
    ("numpy", "dtype"): _DType(),
    ("_codecs", "encode"): _Encode(),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError(f"the persistent object {pid!r}")
