"""Images in memory: uint8 once, class after class, with what turns them into network input.

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
    """(n, C, H, W) uint8."""

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each class."""
        return np.concatenate([[0], np.cumsum(self.counts)[:-1]]).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the class names, counts and pixels."""
        digest = hashlib.sha256(repr((self.classes, self.counts, tuple(self.images.shape))).encode())
        digest.update(self.images.cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Three splits of disjoint classes, and how pixels are scaled."""

    name: str
    splits: dict[str, Split]
    mean: tuple[float, ...]
    """Subtracted from each channel of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Then divided by."""

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
        return (pixels.float() / 255 - mean) / std

    def to(self, device: torch.device) -> "Dataset":
        """The same data set with its images on a device."""
        moved = {name: replace(s, images=s.images.to(device)) for name, s in self.splits.items()}
        return replace(self, splits=moved)


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


def with_rotations(split: Split) -> Split:
    """Every class four times: as it is and turned by 90, 180 and 270 degrees, as classes of their own.

    Rotated copies are made once in memory, so that sampling stays one indexing operation.
    """
    names = tuple(f"{c}@{90 * turn}" if turn else c for turn in range(4) for c in split.classes)
    images = torch.cat([torch.rot90(split.images, turn, (2, 3)) for turn in range(4)])
    return Split(split.name, names, split.counts * 4, images.contiguous())


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over uint8 images (n, C, H, W), as fractions of 255.

    Taken from the histogram of the 256 values, so the result is exact to rounding and the same on every machine.
    """
    values = np.arange(256, dtype=np.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        histogram = torch.bincount(images[:, channel].flatten().int(), minlength=256).numpy()
        share = histogram / histogram.sum()
        mean = float((share * values).sum())
        means.append(mean)
        stds.append(float(np.sqrt((share * (values - mean) ** 2).sum())) or 1.0)
    return tuple(means), tuple(stds)
