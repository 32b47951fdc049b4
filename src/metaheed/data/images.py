"""The images of a data set, in memory or in a memory map, and how they become the input of a network.

Legend: n images of C×H×W. They are uint8 and ordered by class, so that a class is a run of consecutive rows.
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
    """One split (train, val or test): its classes and their images."""

    name: str
    classes: tuple[str, ...]
    """Class names, in the order of their rows."""
    counts: tuple[int, ...]
    """The number of images of each class."""
    images: Tensor
    """(n, C, H, W) uint8; may be a read-only memory map."""
    recorded_fingerprint: str | None = None
    """The fingerprint, if it is known already, so that a large split need not be read to compute it."""

    @cached_property
    def starts(self) -> np.ndarray:
        """(classes,) int64: the first row of each class."""
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
    """Begin the fingerprint of a split; the caller adds the pixels, row after row."""
    return hashlib.sha256(repr((classes, counts, shape)).encode())


@dataclass(frozen=True)
class Dataset:
    """Three splits of disjoint classes, and how pixels are scaled."""

    name: str
    splits: dict[str, Split]
    mean: tuple[float, ...]
    """The mean of each channel, subtracted from pixels in [0, 1]."""
    std: tuple[float, ...]
    """The standard deviation of each channel, by which the pixels are then divided."""
    origin: str = ""
    """A description of what it was read from."""
    device: torch.device | None = None
    """The device on which batches are made; where the images lie if None."""

    def renamed(self, origin: str) -> "Dataset":
        """The same data set, said to have been read from `origin`."""
        return replace(self, origin=origin)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.splits["train"].images.shape[1:]
        return channels, height, width

    def split(self, name: str) -> Split:
        """Return the split of that name: train, val or test.

        Raises:
            ConfigError: there is no such split.
        """
        if name not in self.splits:
            raise unknown("split", name, self.splits)
        return self.splits[name]

    def normalize(self, pixels: Tensor) -> Tensor:
        """Scale uint8 pixels (..., C, H, W) to float32: divide by 255, subtract the mean, divide by the deviation."""
        mean, std = (_per_channel(values, pixels.device) for values in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)

    def to(self, device: torch.device) -> "Dataset":
        """Return the same data set with its batches on a device.

        The images are moved there as well, unless they would take more than half of the device's free memory. In that
        case they stay where they are, and each batch is copied to the device.
        """
        if device.type == "cuda":
            needed = sum(s.images.nbytes for s in self.splits.values())
            if needed > torch.cuda.mem_get_info(device)[0] // 2:
                return replace(self, device=device)
        moved = {name: replace(s, images=s.images.to(device)) for name, s in self.splits.items()}
        return replace(self, splits=moved, device=device)


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Cached, because making it on a device is a copy for which the host waits.
    return torch.tensor(values, device=device).view(-1, 1, 1)


def make_split(name: str, classes: Sequence[str], images: Sequence[np.ndarray]) -> Split:
    """Make a split from one uint8 array (count, C, H, W) for each class.

    Raises:
        DataError: there are no classes, a class has no images, or images have different shapes.
    """
    if not classes:
        raise DataError(f"split {name!r} has no classes")
    for label, array in zip(classes, images, strict=True):
        if len(array) == 0:
            raise DataError(f"class {label!r} of split {name!r} has no images")
        if array.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"class {label!r} of split {name!r} has images of shape {array.shape[1:]}, but others have "
                f"{images[0].shape[1:]}"
            )
    stacked = torch.from_numpy(np.ascontiguousarray(np.concatenate(images)))
    return Split(name, tuple(classes), tuple(len(array) for array in images), stacked)


class Histogram:
    """Counts how often each of the 256 values occurs in each channel, over any number of images."""

    def __init__(self, channels: int) -> None:
        self._counts = np.zeros((channels, 256), np.int64)

    def add(self, images: np.ndarray) -> None:
        """Count the pixels of uint8 images (k, C, H, W)."""
        few = 128  # images at a time, because bincount converts them to int64
        for first in range(0, len(images), few):
            for channel, counts in enumerate(self._counts):
                counts += np.bincount(images[first : first + few, channel].ravel(), minlength=256)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and standard deviation of each channel, of pixels scaled to [0, 1].

        They are computed from integer counts, and so the same on every machine.
        """
        values = np.arange(256, dtype=np.float64) / 255
        means, stds = [], []
        for counts in self._counts:
            share = counts / counts.sum()
            mean = float((share * values).sum())
            means.append(mean)
            stds.append(float(np.sqrt((share * (values - mean) ** 2).sum())) or 1.0)
        return tuple(means), tuple(stds)
