"""Episodes: tasks drawn from a split. A task depends on (data set, split, ways, shots, queries, seed, index) alone.

Legend: N ways, K shots, Q queries per class, B tasks of a batch.

Streams: with the same seed, "train", "probe", "val" and "test" name unrelated streams of tasks. The probe batches of
the attention therefore share nothing but the classes with the training batches.
"""

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from metaheed.data.images import Dataset
from metaheed.errors import ConfigError, DataError, shown
from metaheed.types import Episode

P = ParamSpec("P")
T = TypeVar("T")


class Episodes:
    """An endless stream of tasks that can be indexed.

    Task `index` draws N distinct classes in random order, which are its labels, and K+Q distinct images of each class.
    The random numbers come from Philox (key: seed and stream; counter: index), whose bits are the same in every version
    of NumPy and on every machine.

    Args:
        dataset: the data set. Batches are made on `dataset.device`; if that is None, where its images lie.
        split: train, val or test.
        ways, shots, queries: N, K and Q.
        seed: from 0 up to, but not including, 2**63.
        stream: the name of the stream; the name of the split if None.

    Raises:
        ConfigError: there is no such split, or a number is out of its bounds.
        DataError: the split has fewer than N classes, or a class has fewer than K+Q images.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        ways: int,
        shots: int,
        queries: int,
        seed: int,
        stream: str | None = None,
    ) -> None:
        if min(ways, shots, queries) < 1 or not 0 <= seed < 2**63:
            raise ConfigError(
                f"episodes of {shown(ways)} ways, {shown(shots)} shots, {shown(queries)} queries with seed "
                f"{shown(seed)}: each must be at least 1, and the seed in [0, 2**63)"
            )
        self.dataset = dataset
        self.split = dataset.split(split)
        self.ways, self.shots, self.queries, self.seed = ways, shots, queries, seed
        self._key = (seed, zlib.crc32((stream or split).encode()))
        # For small classes of equal size, sorting all keys at once is quicker than selecting the smallest keys class by
        # class; for large ones it is slower.
        self._sorts_all_keys = len(set(self.split.counts)) == 1 and self.split.counts[0] < 200
        where = f"split {split!r} of {dataset.name}"
        if ways > len(self.split.classes):
            raise DataError(
                f"{shown(ways)} ways, but {where} has {len(self.split.classes)} classes: use at most that many ways"
            )
        few = [
            (count, label)
            for label, count in zip(self.split.classes, self.split.counts, strict=True)
            if count < shots + queries
        ]
        if few:
            fewest, label = min(few, key=lambda f: f[0])
            others = [f"{name!r} ({count})" for count, name in few if name != label]
            more = f", {', '.join(others[:20])}" if others else ""
            more += f" and {len(others) - 20} more classes" if len(others) > 20 else ""
            raise DataError(
                f"{shown(shots)} shots + {shown(queries)} queries = {shown(shots + queries)} images per class, but "
                f"class {label!r} of "
                f"{where} has {fewest}{more}: use fewer shots or queries"
            )

    def rows(self, index: int) -> np.ndarray:
        """(N, K+Q) int64: the image rows of task `index`. The first K columns are its support set."""
        bits = np.random.Philox(key=np.array(self._key, dtype=np.uint64), counter=[0, index, 0, 0])
        chosen = sample(bits, len(self.split.classes), self.ways)
        each = self.shots + self.queries
        starts, counts = self.split.starts, self.split.counts
        if self._sorts_all_keys:
            # This gives the same rows as `sample` does class by class.
            keys = bits.random_raw(self.ways * counts[0]).reshape(self.ways, counts[0])
            return starts[chosen, None] + np.argsort(keys, axis=1, kind="stable")[:, :each]
        return np.stack([starts[c] + sample(bits, counts[c], each) for c in chosen])

    def batch_rows(self, first: int, count: int, cancelled: Callable[[], bool] = lambda: False) -> np.ndarray:
        """(count, N, K+Q) int64: the image rows of tasks first … first+count−1.

        Raises:
            CancelledError: `cancelled`, which is called before each task, returned True.
        """
        rows = np.empty((count, self.ways, self.shots + self.queries), np.int64)
        for task in range(count):
            if cancelled():
                raise CancelledError
            rows[task] = self.rows(first + task)
        return rows

    def batch(self, first: int, count: int) -> Episode:
        """Return tasks first … first+count−1 as one batched Episode, with float32 images."""
        return self.finish(self.draw(first, count))

    def draw(self, first: int, count: int, cancelled: Callable[[], bool] = lambda: False) -> "DrawnBatch":
        """Do the part of `batch` that uses no accelerator; if everything is on the CPU, that is all of it.

        Raises:
            CancelledError: as in `batch_rows`.
        """
        rows = torch.from_numpy(self.batch_rows(first, count, cancelled))
        if self.split.images.device.type != "cpu":
            return DrawnBatch(rows, None, None)
        pixels = self._pixels(rows)
        if self.dataset.device is not None and self.dataset.device.type != "cpu":
            return DrawnBatch(rows, pixels, None)
        return DrawnBatch(rows, None, self._scaled(pixels, count))

    def finish(self, draw: "DrawnBatch") -> Episode:
        """Do the rest of `batch`, after `draw`."""
        if draw.episode is not None:
            return draw.episode
        if draw.pixels is None:
            return self.gather(draw.rows.to(self.split.images.device))
        return self._scaled(draw.pixels, len(draw.rows))

    def gather(self, rows: Tensor) -> Episode:
        """Return the batch of the image rows `rows`, (count, N, K+Q) on the images' device.

        If batches are made on the images' device, the host neither waits nor copies, so that a CUDA graph can capture
        this call.
        """
        return self._scaled(self._pixels(rows), len(rows))

    def _pixels(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        # Support and query images are gathered separately. Cut out of one float32 tensor, they would have to be copied.
        parts = rows[:, :, : self.shots], rows[:, :, self.shots :]
        support, query = (self.split.images.index_select(0, part.flatten()) for part in parts)
        return support, query

    def _scaled(self, pixels: tuple[Tensor, Tensor], count: int) -> Episode:
        """Make the Episode of gathered pixels: move them to the batch's device, scale them, and add the labels."""
        device = self.split.images.device if self.dataset.device is None else self.dataset.device
        labels = torch.arange(self.ways, device=device).unsqueeze(1)
        (support_x, support_y), (query_x, query_y) = (
            (
                self.dataset.normalize(part.to(device)).view(count, -1, *part.shape[1:]),
                labels.expand(count, self.ways, each).flatten(1, 2),
            )
            for part, each in zip(pixels, (self.shots, self.queries), strict=True)
        )
        return Episode(support_x, support_y, query_x, query_y)

    def __getitem__(self, index: int) -> Episode:
        return Episode(*(part[0] for part in self.batch(index, 1)))

    def fingerprint(self, count: int) -> str:
        """SHA-256 of the first `count` tasks: of the split's images, the shape of a task, and every row drawn."""
        shape = self.ways, self.shots, self.queries
        return fingerprint(self.split.fingerprint, shape, [self.rows(index) for index in range(count)])


def fingerprint(images: str, shape: tuple[int, int, int], rows: Sequence[np.ndarray] | np.ndarray) -> str:
    """SHA-256 of a list of tasks.

    Args:
        images: the fingerprint of the split.
        shape: ways, shots and queries.
        rows: the image rows of each task, (N, K+Q).
    """
    digest = hashlib.sha256(repr((images, *shape, len(rows))).encode())
    for of_task in rows:
        digest.update(of_task.astype("<i8").tobytes())
    return digest.hexdigest()


class DrawnBatch(NamedTuple):
    """A batch of tasks that `Episodes.draw` has begun and `Episodes.finish` completes."""

    rows: Tensor
    """(B, N, K+Q) int64: the image rows."""
    pixels: tuple[Tensor, Tensor] | None
    """Support (B·N·K, C, H, W) and query images (B·N·Q, C, H, W), uint8 on the CPU, which `finish` moves to the
    accelerator and scales. None if `episode` is there, or if the images lie on the accelerator and `finish` gathers
    them."""
    episode: Episode | None
    """The finished batch, if `draw` could do everything; else None."""


class Prefetcher:
    """Gives the batches of a stream, and draws the next one in a thread while the present one is trained on.

    Drawing takes a processor core and, from a memory map, may wait for the disk. The batches are those of `Episodes`.
    The thread starts with the first batch.
    """

    def __init__(self, episodes: Episodes) -> None:
        self._episodes = episodes
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="episodes")
        self._next: tuple[tuple[int, int], Future[DrawnBatch]] | None = None
        self._closed = False

    def batch(self, first: int, count: int) -> Episode:
        """Return the same batch as `Episodes.batch`."""
        expected, self._next = self._next, None
        ready = expected is not None and expected[0] == (first, count)
        draw = expected[1].result() if expected is not None and ready else self._episodes.draw(first, count)
        drawing = self._pool.submit(run_between_forks, self._episodes.draw, first + count, count, self._is_closed)
        self._next = ((first + count, count), drawing)
        return self._episodes.finish(draw)

    def _is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """End the thread, even while it draws, and discard what it has drawn."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        self._next = None


_NO_FORK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_NO_FORK.acquire, after_in_parent=_NO_FORK.release, after_in_child=_NO_FORK.release)


def run_between_forks(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function from a thread, and let this process fork only before or after the call.

    A fork during the call could copy a library's lock that the thread holds. The child process has no such thread, so
    it would wait for that lock for ever.
    """
    with _NO_FORK:
        return function(*args, **kwargs)


def sample(bits: np.random.Philox, population: int, count: int) -> np.ndarray:
    """Return `count` distinct numbers below `population` in random order, (count,).

    They are the positions of the `count` smallest of `population` random keys. This draw is unbiased, and it is defined
    exactly by the keys.
    """
    keys: np.ndarray = bits.random_raw(population)
    # Sort only the keys that can be among the smallest: a handful of thousands.
    candidates = np.flatnonzero(keys <= np.partition(keys, count - 1)[count - 1])
    return candidates[np.argsort(keys[candidates], kind="stable")][:count]
