"""A data set as found on the disk: its classes, its counts, and a stream of its images.

Whatever its layout, a data set is first found as a `Source`. Finding it is quick, because names and labels are read but
no images. The images are then read in the order in which the files hold them, and each comes with the rows that it goes
to. A data set of any size can thus be read in little memory, and reading can continue from any item.

Legend: n rows of C×H×W, ordered by class. An item is one image in the files; it may fill several rows (an Omniglot
drawing fills four, one for each rotation).
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
"""The largest size of a data set's images, in bytes, that is read into memory; larger ones need a store."""

UNSCALED = frozenset(["glyphs", "omniglot", "omniglot-vinyals"])
"""Data sets of ink on paper, whose pixels stay in [0, 1]. The pixels of all other data sets are standardised."""

Chunk = Decoded


@dataclass(frozen=True)
class SourceSplit:
    """One split (train, val or test) of a source: its classes, and how to read their images."""

    classes: tuple[str, ...]
    """Class names, in the order of their rows."""
    counts: tuple[int, ...]
    """The number of images of each class."""
    shape: tuple[int, int, int]
    """(C, H, W) of each image."""
    items: int
    """The number of items in the files for this split."""
    read: Callable[[int], Iterator[Chunk]]
    """Reads the images from a given item on. Reading from item 0 gives every row once."""
    name_of: Callable[[int], str] | None = None
    """Returns the name of the file that a row comes from, for messages."""

    @property
    def bytes(self) -> int:
        """The size of all images in bytes."""
        return sum(self.counts) * int(np.prod(self.shape))


@dataclass(frozen=True)
class Source:
    """A data set as found on the disk."""

    name: str
    layout: str
    """A description of the layout that was recognised, and where."""
    splits: Mapping[str, SourceSplit]
    stamp: str
    """A digest that differs if one of the files or settings has changed."""
    standardize: bool = True
    """Whether pixels are standardised with the mean and deviation of the train split; otherwise they stay in [0, 1]."""
    published: str | None = None
    """Where its files are published; None if they are the user's own."""
    settings: Mapping[str, int] = field(default_factory=dict)
    """The settings of the request on which the images or the split depend."""
    notices: tuple[str, ...] = ()
    """Lines of text that the user should see."""
    keeps_itself: bool = False
    """Whether its images are quick to read, or cached by the data set's own module, so that no cache is needed."""

    def __post_init__(self) -> None:
        for split in SPLITS:
            classes = self.splits[split].classes
            if not classes:
                raise DataError(f"{self.name}: split {split!r} has no classes in {self.layout}")


class Request(NamedTuple):
    """Where to look for a data set, and the settings that some data sets take."""

    root: Path | None = None
    image_size: int | None = None
    """The side of the images in pixels; the data set's own if None."""
    split_seed: int | None = None
    """The seed that divides a folder of classes into splits; the config's default if None."""


class Watcher(Protocol):
    """Is told about the progress of long work on images."""

    def start(self, what: str, items: int, done: int, unit: str = "images") -> None:
        """The work `what` begins, on `items` items in all, called by their unit; `done` of them are done already."""

    def advance(self, items: int) -> None:
        """`items` more items are done."""

    def message(self, text: str) -> None:
        """Show a line of text to the user."""

    def stop(self) -> None:
        """The work has ended."""


class Quiet:
    """A watcher that prints messages to standard error and shows no progress."""

    def start(self, what: str, items: int, done: int, unit: str = "images") -> None:  # noqa: D102
        pass

    def advance(self, items: int) -> None:  # noqa: D102
        pass

    def message(self, text: str) -> None:  # noqa: D102
        print(text, file=sys.stderr)

    def stop(self) -> None:  # noqa: D102
        pass


def check_memory(source: Source) -> None:
    """Raise DataError if the images of a source have more than MOST_IN_MEMORY bytes."""
    total = sum(split.bytes for split in source.splits.values())
    if total > MOST_IN_MEMORY:
        raise DataError(
            f"{source.name}: {source.layout} would take {readable_size(total)} of memory: convert it once with "
            f"'metaheed data prepare {source.name} --from FOLDER', and train from the store that this writes"
        )


def read_into_memory(source: Source, watcher: Watcher | None = None) -> Dataset:
    """Read a whole source into memory.

    Raises:
        DataError: a file is damaged, or the images have more than MOST_IN_MEMORY bytes.
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
    raise_unreadable(problems, source)
    # Warn about duplicates only in the user's own data; published data sets are used as they were published.
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


def raise_unreadable(problems: Sequence[str], source: Source) -> None:
    """Raise DataError if there are problems (unreadable images); the message names up to a hundred of them."""
    if not problems:
        return
    listed = "".join(f"\n  {p}" for p in problems[:100])
    more = f"\n  and {len(problems) - 100} more" if len(problems) > 100 else ""
    remedy = f"fetch it anew from {source.published}" if source.published else "repair or remove them"
    raise DataError(
        f"{source.name}: {len(problems)} of the images in {source.layout} cannot be read: {remedy}{listed}{more}"
    )


def readable_size(count: int) -> str:
    """A number of bytes as text, in megabytes or gigabytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def stamp(*parts: object) -> str:
    """A digest of all that a source depends on; a path counts with the size and modification time of its file."""
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
    """Assign rows to images, so that they are ordered by class; images of one class keep their order.

    Args:
        labels: (n,), below `classes`; images with negative labels are left out.
        classes: the number of classes.

    Returns:
        The row of each image, (n,) int64, −1 for those left out; and the number of images of each class.
    """
    rows = np.full(len(labels), -1, np.int64)
    chosen = np.flatnonzero(labels >= 0)
    rows[chosen[np.argsort(labels[chosen], kind="stable")]] = np.arange(len(chosen))
    return rows, tuple(np.bincount(labels[chosen], minlength=classes).tolist())


def array_stream(rows: np.ndarray, chunks: Callable[[int], Iterable[np.ndarray]]) -> Callable[[int], Iterator[Chunk]]:
    """Make the `read` of a SourceSplit whose images are stored as arrays.

    Args:
        rows: (items,): the row of each item; items with negative rows are left out.
        chunks: gives the images from an item on, in chunks of (k, C, H, W) uint8.
    """

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
    """Make the `read` of a SourceSplit whose images are encoded files.

    Args:
        encoded: gives the encoded images from an item on.
        decode: decodes one of them.
        shape: (C, H, W) of a decoded image.
    """
    return lambda start: decode_all(encoded(start), decode, shape)


# Duplicates.


class Digests:
    """A 64-bit digest of each image's pixels, to find images that are the same."""

    def __init__(self, count: int) -> None:
        self.values = np.empty(count, np.uint64)
        self._filled = 0

    def add(self, images: np.ndarray) -> None:
        """Add the digests of the next images, (k, C, H, W)."""
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
    """Find images that appear in two classes: for each, its first row and the next row in another class.

    Args:
        images: split -> (n, C, H, W) uint8; may be a memory map, of which little is read.
        counts: split -> the number of images of each class.
        digests: split -> the digest of each image, (n,) uint64.
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
        # The digest is short, so the pixels are compared. Different images hardly ever have the same digest.
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
    """Describe the images that appear in two classes: a line with their number, and a line for each of them.

    Args:
        images: split -> (n, C, H, W) uint8.
        splits: the splits, for the names in the lines.
        digests: split -> the digest of each image; computed if None.
        listed: how many images are named.

    Returns:
        The lines; none if no image appears in two classes.
    """
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
