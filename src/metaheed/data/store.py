"""Stores: a data set converted once into a folder that is mapped into memory, so that training starts without delay.

    NAME.metaheed/manifest.json       classes, counts, checksums, split, statistics, and what it was made from
    NAME.metaheed/images_train.npy    (n, C, H, W) uint8, ordered by class; images_val.npy and images_test.npy likewise

While a store is being made, its folder is called NAME.metaheed.part. Instead of the manifest it has progress.json,
which records how many items of the source are safely written. The folder is renamed at the very end, so a store is
either whole or not there. A conversion that was interrupted is continued, and gives the same bytes.
"""

import json
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaheed.data.images import SPLITS, Dataset, Split
from metaheed.data.reading.names import composed
from metaheed.data.reading.trees import Unreadable, read_file
from metaheed.data.sources import Request
from metaheed.errors import DataError, brief, option, shown

SUFFIX = ".metaheed"
FORMAT = 1
IDENTITY_SCALING = ((0.0,), (1.0,))
"""Mean and standard deviation of a grey data set whose pixels stay in [0, 1]."""
_LARGEST_MANIFEST = 1 << 28  # bytes, enough for the names of a million classes
_FIELDS: dict[str, type] = {
    **{"format": int, "name": str, "layout": str, "stamp": str, "image_shape": list, "mean": list, "std": list},
    **{"splits": dict, "settings": dict},
}


def store_name(name: str, settings: dict[str, int]) -> str:
    """The name of a store's folder; it includes the image size if the user chose that (for pictures of their own)."""
    size = settings.get("image_size")
    return f"{name}-{size}px{SUFFIX}" if size else f"{name}{SUFFIX}"


def is_store(path: str | Path) -> bool:
    """Whether the path is a finished store."""
    path = Path(path)
    return (path / "manifest.json").is_file() and not path.name.endswith(".part")


@dataclass(frozen=True)
class Manifest:
    """The description that a store holds of itself, in manifest.json."""

    path: Path
    name: str
    layout: str
    stamp: str
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: dict[str, tuple[tuple[str, ...], tuple[int, ...], str]]
    """Split -> its classes, the number of images of each class, and its fingerprint."""
    settings: dict[str, int]

    def images(self, split: str) -> np.ndarray:
        """Return the images of a split as a read-only memory map, (n, C, H, W) uint8.

        Raises:
            DataError: the file is missing, or has another shape or dtype than the manifest says.
        """
        file = self.path / f"images_{split}.npy"
        expected = (sum(self.splits[split][1]), *self.shape)
        try:
            images: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy raises many kinds of errors for a damaged header
            raise damaged_store_error(self.path, f"{file.name} cannot be read: {error}") from error
        if images.shape != expected or images.dtype != np.uint8:
            raise damaged_store_error(
                self.path, f"{file.name} holds {images.shape} of {images.dtype}, but the manifest says {expected}"
            )
        return images


def damaged_store_error(path: Path, what: str) -> DataError:
    """Make the error for a damaged store; `what` says what is wrong with it."""
    return DataError(
        f"the store {path} is damaged ({what}): delete it and prepare it anew with 'metaheed data prepare'"
    )


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a store.

    Raises:
        DataError: it is damaged, or was written by another version of metaheed.
    """
    path = Path(path)
    try:
        content = read_file(path / "manifest.json", _LARGEST_MANIFEST)
        if isinstance(content, Unreadable):
            raise ValueError(content.reason)
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError(f"it holds {shown(values)}")
        for name, kind in _FIELDS.items():
            if not isinstance(values.get(name), kind):
                raise ValueError(f"its {name} is {shown(values.get(name))}")
        if values["format"] != FORMAT:
            raise ValueError(f"it has format {shown(values['format'])}, but this program reads {FORMAT}")
        shape = values["image_shape"]
        if len(shape) != 3 or not all(type(side) is int and 0 < side < 1 << 16 for side in shape):
            raise ValueError(f"its image_shape is {shown(shape)}")
        mean, std = (_statistics(values, name, shape[0]) for name in ("mean", "std"))
        splits = {split: _split_record(values["splits"].get(split), split) for split in SPLITS}
        names = [composed(name) for classes, _, _ in splits.values() for name in classes]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"it has the class {shown(twice[0])} twice")
        if any(type(number) is not int for number in values["settings"].values()):
            raise ValueError(f"its settings are {shown(values['settings'])}")
    except (ValueError, RecursionError) as error:
        raise damaged_store_error(path, f"manifest.json cannot be read: {brief(str(error), 200)}") from error
    return Manifest(
        path,
        values["name"],
        values["layout"],
        values["stamp"],
        (shape[0], shape[1], shape[2]),
        mean,
        std,
        splits,
        values["settings"],
    )


def _statistics(values: dict[str, Any], name: str, channels: int) -> tuple[float, ...]:
    """The mean or standard deviation of each channel. Since pixels lie in [0, 1], so must these numbers."""
    numbers = values[name]
    if len(numbers) != channels:
        raise ValueError(f"its {name} has {len(numbers)} numbers, but its images {channels} channels")
    lowest = 0.0 if name == "mean" else 1e-9  # the deviation of pixels that are not all equal is far larger
    if not all(type(n) in (int, float) and lowest <= n <= 1 for n in numbers):
        bounds = "from 0 to 1" if name == "mean" else "above 0 and at most 1"
        raise ValueError(f"its {name} is {shown(numbers)}, but each number must be {bounds}")
    return tuple(map(float, numbers))


def _split_record(record: Any, split: str) -> tuple[tuple[str, ...], tuple[int, ...], str]:
    """Check what a manifest says of a split; return its classes, counts and fingerprint."""
    classes, counts, digest = (
        (record.get(k) for k in ("classes", "counts", "sha256")) if isinstance(record, dict) else [None] * 3
    )
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes) or not classes:
        raise ValueError(f"its split {split} has no list of classes")
    if not isinstance(counts, list) or not all(type(n) is int and 0 < n < 1 << 40 for n in counts):
        raise ValueError(f"its split {split} has no list of counts")
    if len(classes) != len(counts):
        raise ValueError(f"its split {split} has {len(classes)} classes and {len(counts)} counts, which do not match")
    if not isinstance(digest, str):
        raise ValueError(f"its split {split} has no checksum")
    return tuple(classes), tuple(counts), digest


def find_store(name: str, request: Request, image_size: int | None) -> Path | None:
    """Return the store of a data set if there is one: the root itself, or a folder in it.

    Args:
        name: the name of the data set.
        request: where to look.
        image_size: the image size, for a data set whose images have no size of their own.

    Raises:
        DataError: the root is a store of another data set, or of images of another size.
    """
    root = request.root
    if root is None or not root.is_dir():
        return None
    wanted = store_name(name, {} if image_size is None else {"image_size": image_size})
    if is_store(root):
        found = read_manifest(root)
        if store_name(found.name, found.settings) != wanted:
            raise DataError(
                f"{option('data_root')} {root} is a store of {found.name} with images {found.shape}: "
                f"use {option('data')} {found.name} with its {option('image_size')}, or another {option('data_root')}"
            )
        return root
    return root / wanted if is_store(root / wanted) else None


def open_store(path: str | Path, request: Request = Request()) -> Dataset:  # noqa: B008  # immutable
    """Open the data set of a store. Its images are mapped into memory: they are read when they are used.

    Raises:
        DataError: the store was made with another split seed, or is damaged. Only its manifest and the sizes of its
            files are checked here; `verify` checks everything.
    """
    manifest = read_manifest(path)
    seed = manifest.settings.get("split_seed")
    if request.split_seed is not None and request.split_seed != seed:
        raise DataError(
            f"the store {path} was split "
            + ("as its folder was" if seed is None else f"by seed {seed}")
            + f", not by seed {request.split_seed}: leave {option('split_seed')} out, or prepare another store with it"
        )
    splits = {}
    for split, (classes, counts, fingerprint) in manifest.splits.items():
        with warnings.catch_warnings():
            # PyTorch warns that writing into a read-only map would crash; metaheed never writes into images.
            warnings.simplefilter("ignore", UserWarning)
            images = torch.from_numpy(manifest.images(split))
        splits[split] = Split(split, tuple(map(composed, classes)), counts, images, fingerprint)
    return Dataset(
        manifest.name,
        splits,
        manifest.mean,
        manifest.std,
        f"the store {path} (made from {brief(manifest.layout, 300)})",
    )


def stores_under(path: str | Path) -> list[Path]:
    """Return the path itself if it is a store, and otherwise the stores directly in it."""

    path = Path(path)
    return [path] if is_store(path) else sorted(p for p in path.glob(f"*{SUFFIX}") if is_store(p))
