"""Read labels in the forms in which files have them: a list or an array, of numbers or of names."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from metaheed.data.reading.names import composed
from metaheed.data.reading.pickle_stream import StoredArray
from metaheed.errors import shown

_NUMBER = re.compile(r"[0-9]{1,9}")
_LARGEST = 1 << 28  # bytes of an array of labels; the labels of ImageNet's 1.3 million images have about 10 million


def read_labels(values: Any) -> np.ndarray | list[str]:
    """Return labels as (n,) int64, or as a list of n names.

    Args:
        values: a list, a tuple, an array or a stored array. Whole numbers may be written as floating-point numbers or
            as text, and an array may be a column (n, 1).

    Raises:
        ValueError: the values are no labels; the message says what they are.
    """
    if isinstance(values, StoredArray):
        if values.nbytes > _LARGEST:
            raise ValueError(f"an array of {values.nbytes:,} bytes")
        values = values.read()
    if isinstance(values, np.ndarray):
        if values.ndim == 2 and 1 in values.shape:
            values = values.ravel()
        if values.ndim != 1:
            raise ValueError(f"an array of shape {values.shape}")
        if values.dtype.kind not in "iufSU":
            raise ValueError(f"an array of {values.dtype}")
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise ValueError("it is missing" if values is None else f"a {type(values).__name__}, not a list or an array")
    if not values:
        raise ValueError("the list is empty")
    if all(isinstance(value, str | bytes) for value in values):
        names = [composed(as_text(value)) for value in values]
        if not all(_NUMBER.fullmatch(name) for name in names):
            return names
        values = [int(name) for name in names]
    odd = next((value for value in values if not _is_whole(value)), None)
    if odd is not None:
        raise ValueError(f"it contains {shown(odd)}, which is not a whole number of at least 0")
    return np.array([int(value) for value in values], np.int64)


def _is_whole(value: Any) -> bool:
    if type(value) is float:
        return value.is_integer() and 0 <= value < 2**53
    return type(value) is int and 0 <= value < 2**63


def get_field(values: Any, key: str) -> Any:
    """Return the value of a key in a dict whose keys Python 3 wrote as str, or Python 2 as bytes.

    None if the key is missing, or if `values` is not a dict.
    """
    return values.get(key, values.get(key.encode())) if isinstance(values, dict) else None


def as_text(value: str | bytes) -> str:
    """Return a text that Python 3 wrote as str, or Python 2 as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def class_positions(labels: np.ndarray | Sequence[str]) -> tuple[np.ndarray, list[Any]]:
    """Number the distinct labels in sorted order.

    Returns:
        The number of each label, (n,) int64, and the sorted distinct labels.
    """
    distinct = sorted(set(labels.tolist() if isinstance(labels, np.ndarray) else labels))
    place = {label: k for k, label in enumerate(distinct)}
    listed = labels.tolist() if isinstance(labels, np.ndarray) else labels
    return np.array([place[label] for label in listed], np.int64), distinct
