"""Images in memory, or mapped into it: uint8 once, class after class, with what turns them into network input.

Legend: n images of C×H×W; a class is a run of consecutive rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from metaheed.errors import DataError, unknown

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """The classes of train, val or test."""

    name: str
    classes: tuple[str, ...]
    """Class names, in the order of their rows."""
    counts: tuple[int, ...]
    """Images of each class."""
    images: Tensor
    """(n, C, H, W) uint8; may be a read-only memory map."""
    recorded_fingerprint: str | None = None
    """The fingerprint where it is known, so that a large split need not be read for it."""

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each class."""
        return np.concatenate([[0], np.cumsum(self.counts)[:-1]]).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the class names, counts and pixels."""
        if self.recorded_fingerprint is not None:
            return self.recorded_fingerprint
        digest = fingerprint_head(self.classes, self.counts, tuple(self.images.shape))
        digest.update(self.images.cpu().contiguous().numpy().data)
        return digest.hexdigest()


def fingerprint_head(classes: tuple[str, ...], counts: tuple[int, ...], shape: tuple[int, ...]) -> "hashlib._Hash":
    """The digest of a split to which its pixels, row after row, are still to be added."""
    return hashlib.sha256(repr((classes, counts, shape)).encode())


@dataclass(frozen=True)
class Dataset:
    """Three splits of disjoint classes, and how pixels are scaled."""

    name: str
    splits: dict[str, Split]
    mean: tuple[float, ...]
    """Subtracted from each channel of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Then divided by."""
    origin: str = ""
    """What it was read from, in words."""
    device: torch.device | None = None
    """Where batches come out; none: where the images lie."""

    def renamed(self, origin: str) -> "Dataset":
        """The same data set, said to have been read from `origin`."""
        return replace(self, origin=origin)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.splits["train"].images.shape[1:]
        return channels, height, width

    def split(self, name: str) -> Split:
        """One of train, val, test.

        Raises:
            ConfigError: no such split.
        """
        if name not in self.splits:
            raise unknown("split", name, self.splits)
        return self.splits[name]

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (..., C, H, W) to float32: /255, minus mean, over standard deviation, channel by channel."""
        mean, std = (_per_channel(values, pixels.device) for values in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)

    def to(self, device: torch.device) -> "Dataset":
        """The same data set with its batches on a device; its images lie there too, unless they would take more than
        half of what is free there: they then stay where they are, and each batch is brought over.
        """
        if device.type == "cuda":
            needed = sum(s.images.nbytes for s in self.splits.values())
            if needed > torch.cuda.mem_get_info(device)[0] // 2:
                return replace(self, device=device)
        moved = {name: replace(s, images=s.images.to(device)) for name, s in self.splits.items()}
        return replace(self, splits=moved, device=device)


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept: to make it on a device anew is a copy that the host waits for.
    return torch.tensor(values, device=device).view(-1, 1, 1)


def make_split(name: str, classes: Sequence[str], images: Sequence[np.ndarray]) -> Split:
    """A split from one uint8 array (count, C, H, W) per class.

    Raises:
        DataError: no classes, a class without images, or images of different shapes.
    """
    if not classes:
        raise DataError(f"split {name!r} has no classes")
    for label, array in zip(classes, images, strict=True):
        if len(array) == 0:
            raise DataError(f"class {label!r} of split {name!r} has no images")
        if array.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"class {label!r} of split {name!r} has images of shape {array.shape[1:]}, others {images[0].shape[1:]}"
            )
    stacked = torch.from_numpy(np.ascontiguousarray(np.concatenate(images)))
    return Split(name, tuple(classes), tuple(len(array) for array in images), stacked)


class Histogram:
    """How often each channel has each of the 256 values, over any number of images."""

    def __init__(self, channels: int) -> None:
        self._counts = np.zeros((channels, 256), np.int64)

    def add(self, images: np.ndarray) -> None:
        """Uint8 images (k, C, H, W)."""
        few = 128  # bincount makes int64 of them
        for first in range(0, len(images), few):
            for channel, counts in enumerate(self._counts):
                counts += np.bincount(images[first : first + few, channel].ravel(), minlength=256)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, as fractions of 255.

        Taken from whole numbers, so exact to rounding and the same on every machine.
        """
        values = np.arange(256, dtype=np.float64) / 255
        means, stds = [], []
        for counts in self._counts:
            share = counts / counts.sum()
            mean = float((share * values).sum())
            means.append(mean)
            stds.append(float(np.sqrt((share * (values - mean) ** 2).sum())) or 1.0)
        return tuple(means), tuple(stds)
