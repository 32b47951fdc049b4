"""What a data set is before it is in memory or in a store: classes, counts, and a stream of images.

Every layout of every data set is found as a `Source`: quickly, reading names and labels but no image. Its images then
come in the order in which the files hold them, each with the rows it goes to, so that a set of any size passes through
little memory, and can be gone on with from any item.

Legend: n rows of C×H×W, class after class; an item is what a source counts its images by (one item may fill several
rows: an Omniglot drawing fills four, one a rotation).
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from metaheed.data.images import SPLITS, Dataset, Histogram, Split
from metaheed.data.reading.decode import Decoded, Decoder, Encoded, decode_all
from metaheed.errors import DataError

MOST_IN_MEMORY = 4 << 30
"""Bytes of images beyond which a data set is used through a store only."""

UNSCALED = frozenset(["glyphs", "omniglot", "omniglot-vinyals"])
"""Data sets of ink on paper, whose pixels stay in [0, 1]; those of all others are standardised."""

Chunk = Decoded


@dataclass(frozen=True)
class SourceSplit:
    """The classes of train, val or test, and how to come by their images."""

    classes: tuple[str, ...]
    """Class names, in the order of their rows."""
    counts: tuple[int, ...]
    """Images of each class."""
    shape: tuple[int, int, int]
    """(C, H, W)."""
    items: int
    """Of the source, for this split."""
    read: Callable[[int], Iterator[Chunk]]
    """The images from an item on; every row is given once."""
    name_of: Callable[[int], str] | None = None
    """The file of a row, for messages."""

    @property
    def bytes(self) -> int:
        """Of all its images."""
        return sum(self.counts) * int(np.prod(self.shape))


@dataclass(frozen=True)
class Source:
    """A data set as found."""

    name: str
    layout: str
    """What was recognised, in words."""
    splits: Mapping[str, SourceSplit]
    stamp: str
    """Another one if a file of it, or a setting, has changed."""
    standardize: bool = True
    """Whether pixels are standardised by the train split's statistics; else they stay in [0, 1]."""
    published: str | None = None
    """Where its files are published; none: they are the user's own."""
    settings: Mapping[str, int] = field(default_factory=dict)
    """The settings of the request that shaped it."""
    notices: tuple[str, ...] = ()
    """What its user should know of it, a line each."""
    keeps_itself: bool = False
    """Whether its images are quick to come by, or cached by the data set's own module, so that no cache is needed."""

    def __post_init__(self) -> None:
        for split in SPLITS:
            classes = self.splits[split].classes
            if not classes:
                raise DataError(f"{self.name}: split {split!r} has no classes in {self.layout}")


class Request(NamedTuple):
    """Where to look, and the settings that some data sets take."""

    root: Path | None = None
    image_size: int | None = None
    """Pixels a side; none: the data set's own."""
    split_seed: int | None = None
    """Of a folder's split; none: 0."""


class Watcher(Protocol):
    """Who is told how long work on images goes."""

    def start(self, what: str, items: int, done: int, unit: str = "images") -> None:
        """Work begins on so many items, called by their unit; `done` of them were finished before."""

    def advance(self, items: int) -> None:
        """So many more are done."""

    def message(self, text: str) -> None:
        """Something worth a line."""

    def stop(self) -> None:
        """No more will be told of this work."""


class Quiet:
    """A watcher that passes on messages only, to standard error."""

    def start(self, what: str, items: int, done: int, unit: str = "images") -> None:  # noqa: D102
        pass

    def advance(self, items: int) -> None:  # noqa: D102
        pass

    def message(self, text: str) -> None:  # noqa: D102
        print(text, file=sys.stderr)

    def stop(self) -> None:  # noqa: D102
        pass


def check_memory(source: Source) -> None:
    """Raise DataError if a source is larger than MOST_IN_MEMORY."""
    total = sum(split.bytes for split in source.splits.values())
    if total > MOST_IN_MEMORY:
        raise DataError(
            f"{source.name}: {source.layout} would take {gigabytes(total)} of memory: convert it once with "
            f"'metaheed data prepare {source.name} --from FOLDER', and train from what that writes"
        )


def in_memory(source: Source, watcher: Watcher | None = None) -> Dataset:
    """Read a whole source into memory.

    Raises:
        DataError: a file is damaged, or the whole is larger than MOST_IN_MEMORY.
    """
    check_memory(source)
    watcher = watcher or Quiet()
    for notice in source.notices:
        watcher.message(f"{source.name}: {notice}")
    problems: list[str] = []
    splits = {}
    watcher.start(f"reading {source.name}", sum(split.items for split in source.splits.values()), 0)
    try:
        for name, split in source.splits.items():
            images = np.empty((sum(split.counts), *split.shape), np.uint8)
            for chunk in split.read(0):
                images[chunk.rows] = chunk.images
                problems += chunk.problems
                watcher.advance(chunk.items)
            splits[name] = Split(name, split.classes, split.counts, torch.from_numpy(images))
    finally:
        watcher.stop()
    refuse(problems, source)
    # A published set is taken as it is published; of one's own one wants to know.
    if source.published is None and any(split.name_of for split in source.splits.values()):
        for line in describe_duplicates({name: s.images.numpy() for name, s in splits.items()}, source.splits):
            watcher.message(f"{source.name}: {line}")
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if source.standardize:
        histogram = Histogram(splits["train"].images.shape[1])
        histogram.add(splits["train"].images.numpy())
        mean, std = histogram.statistics()
    return Dataset(source.name, splits, mean, std, source.layout)


def refuse(problems: Sequence[str], source: Source) -> None:
    """Raise DataError if there are any, naming all of them at once (a hundred at most)."""
    if not problems:
        return
    listed = "".join(f"\n  {p}" for p in problems[:100])
    more = f"\n  and {len(problems) - 100} more" if len(problems) > 100 else ""
    remedy = f"fetch it anew from {source.published}" if source.published else "repair or remove them"
    raise DataError(
        f"{source.name}: {len(problems)} of the images in {source.layout} cannot be read: {remedy}{listed}{more}"
    )


def gigabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def stamp(*parts: object) -> str:
    """A digest of whatever decides a source; a path stands for its size and time."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            status = part.stat()
            digest.update(repr((status.st_size, status.st_mtime_ns)).encode())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


# Streams.


def class_rows(labels: np.ndarray, classes: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Labels (n,) below `classes`, negative ones being left out, to rows (−1 where left out) and counts per class.

    Images of a class keep their order.
    """
    rows = np.full(len(labels), -1, np.int64)
    chosen = np.flatnonzero(labels >= 0)
    rows[chosen[np.argsort(labels[chosen], kind="stable")]] = np.arange(len(chosen))
    return rows, tuple(np.bincount(labels[chosen], minlength=classes).tolist())


def array_stream(rows: np.ndarray, chunks: Callable[[int], Iterable[np.ndarray]]) -> Callable[[int], Iterator[Chunk]]:
    """The stream of images that lie as arrays: chunk after chunk of (k, C, H, W) uint8, item i going to rows[i] ≥ 0."""

    def read(start: int) -> Iterator[Chunk]:
        at = start
        for images in chunks(start):
            here = rows[at : at + len(images)]
            at += len(images)
            wanted = here >= 0
            yield Chunk(len(images), here[wanted], images[wanted], ())

    return read


def encoded_stream(
    encoded: Callable[[int], Iterator[Encoded]], decode: Decoder, shape: tuple[int, int, int]
) -> Callable[[int], Iterator[Chunk]]:
    """The stream of images that lie encoded."""
    return lambda start: decode_all(encoded(start), decode, shape)


# Duplicates.


class Digests:
    """64 bits of each image's pixels, to find images that are the same."""

    def __init__(self, count: int) -> None:
        self.values = np.empty(count, np.uint64)
        self._filled = 0

    def add(self, images: np.ndarray) -> None:
        """The next (k, C, H, W)."""
        for image in images:
            digest = hashlib.blake2b(image.tobytes(), digest_size=8).digest()
            self.values[self._filled] = int.from_bytes(digest, "little")
            self._filled += 1


class Duplicate(NamedTuple):
    """Two rows with the same pixels, in different classes."""

    first: tuple[str, int]
    """Split and row."""
    second: tuple[str, int]


def find_duplicates(
    images: Mapping[str, np.ndarray], counts: Mapping[str, Sequence[int]], digests: Mapping[str, np.ndarray]
) -> list[Duplicate]:
    """Images that appear in two classes: for each, its first row and the next row in another class.

    Args:
        images: split -> (n, C, H, W) uint8; may be a memory map, of which little is read.
        counts: split -> images of each class.
        digests: split -> of each image.
    """
    names = [split for split in SPLITS if split in images]
    where = np.concatenate([np.full(len(digests[s]), k) for k, s in enumerate(names)])
    row = np.concatenate([np.arange(len(digests[s])) for s in names])
    label = np.concatenate([np.repeat(np.arange(len(counts[s])), counts[s]) + (k << 32) for k, s in enumerate(names)])
    value = np.concatenate([digests[s] for s in names])
    order = np.argsort(value, kind="stable")
    edges = np.flatnonzero(np.diff(value[order])) + 1
    found = []
    for first, behind in zip([0, *edges], [*edges, len(order)], strict=True):
        if behind - first < 2:
            continue
        # The digest is short: equal pixels decide. Different ones are hardly ever in a group.
        different: list[tuple[int, bool]] = []
        for at in order[first:behind].tolist():
            picture = images[names[where[at]]][row[at]]
            for k, (a, reported) in enumerate(different):
                if np.array_equal(picture, images[names[where[a]]][row[a]]):
                    if label[at] != label[a] and not reported:
                        found.append(Duplicate((names[where[a]], int(row[a])), (names[where[at]], int(row[at]))))
                        different[k] = (a, True)
                    break
            else:
                different.append((at, False))
    return sorted(found)


def describe_duplicates(
    images: Mapping[str, np.ndarray],
    splits: Mapping[str, SourceSplit],
    digests: Mapping[str, np.ndarray] | None = None,
    listed: int = 20,
) -> list[str]:
    """A line on each image that appears in two classes, and one on how many there are; nothing if there is none."""
    if digests is None:
        made = {name: Digests(len(array)) for name, array in images.items()}
        for name, array in images.items():
            made[name].add(array)
        digests = {name: d.values for name, d in made.items()}
    found = find_duplicates(images, {name: split.counts for name, split in splits.items()}, digests)
    if not found:
        return []
    across = sum(d.first[0] != d.second[0] for d in found)
    lines = [
        f"{len(found)} images appear in two classes, {across} of them in two splits"
        + ("; 'metaheed data verify' names them" if listed == 0 else "")
    ]
    for one in found[:listed]:
        lines.append(" and ".join(_name_row(splits[split], split, row) for split, row in one) + " are the same image")
    if len(found) > listed > 0:
        lines.append(f"and {len(found) - listed} more")
    return lines


def _name_row(split: SourceSplit, name: str, row: int) -> str:
    if split.name_of is not None:
        return split.name_of(row)
    starts = np.cumsum([0, *split.counts])
    label = int(np.searchsorted(starts, row, side="right")) - 1
    return f"image {row - int(starts[label])} of {split.classes[label]!r} ({name})"
