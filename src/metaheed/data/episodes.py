"""Episodes: tasks drawn from a split, each a pure function of (data set, split, ways, shots, queries, seed, index).

Legend: N ways, K shots, Q queries per class, B tasks of a batch.

Streams: the same seed gives "train", "probe", "val" and "test" unrelated streams of tasks, so that the probe batches of
attention share nothing with the training batches but the classes.
"""

import hashlib
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from metaheed.data.images import Dataset
from metaheed.errors import ConfigError, DataError
from metaheed.types import Episode


class Episodes:
    """An endless, indexable stream of tasks.

    Task `index` draws N distinct classes, in random order (its labels), and K+Q distinct images of each. The draw is
    made from Philox counters (key: seed and stream; counter: index), whose bits are the same in every version of NumPy
    and on every machine.

    Args:
        dataset: its images may lie on any device; batches come out there, or on the data set's own device.
        split: train, val or test.
        ways, shots, queries: N, K, Q.
        seed: below 2**63.
        stream: a name; none: the split's.

    Raises:
        ConfigError: no such split, or a number out of its bounds.
        DataError: the split has fewer than N classes, or a class fewer than K+Q images.
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
                f"episodes of {ways} ways, {shots} shots, {queries} queries with seed {seed}: "
                "each must be at least 1, the seed in [0, 2**63)"
            )
        self.dataset = dataset
        self.split = dataset.split(split)
        self.ways, self.shots, self.queries = ways, shots, queries
        self._key = (seed, zlib.crc32((stream or split).encode()))
        self._equal = len(set(self.split.counts)) == 1
        where = f"split {split!r} of {dataset.name}"
        if ways > len(self.split.classes):
            raise DataError(
                f"{ways} ways, but {where} has {len(self.split.classes)} classes: use at most that many ways"
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
                f"{shots} shots + {queries} queries = {shots + queries} images per class, but class {label!r} of "
                f"{where} has {fewest}{more}: use fewer shots or queries"
            )

    def rows(self, index: int) -> np.ndarray:
        """(N, K+Q) image rows of task `index`; the first K columns are its support set."""
        bits = np.random.Philox(key=np.array(self._key, dtype=np.uint64), counter=[0, index, 0, 0])
        chosen = sample(bits, len(self.split.classes), self.ways)
        each = self.shots + self.queries
        starts, counts = self.split.starts, self.split.counts
        if self._equal:
            # The same draws, all classes' keys at once.
            keys = bits.random_raw(self.ways * counts[0]).reshape(self.ways, counts[0])
            return starts[chosen, None] + np.argsort(keys, axis=1, kind="stable")[:, :each]
        return np.stack([starts[c] + sample(bits, counts[c], each) for c in chosen])

    def batch(self, first: int, count: int) -> Episode:
        """Tasks first … first+count−1 as one batched Episode, images float32, gathered at once."""
        return self.episode(self.draw(first, count))

    def draw(self, first: int, count: int) -> "Draw":
        """The first part of `batch`, which touches no accelerator: rows, and their images if they lie on the CPU."""
        rows = torch.from_numpy(np.stack([self.rows(index) for index in range(first, first + count)]))
        support, query = rows[:, :, : self.shots].flatten(), rows[:, :, self.shots :].flatten()
        images = self.split.images
        if images.device.type != "cpu":
            return Draw(count, support, query)
        return Draw(count, images[support], images[query])

    def episode(self, draw: "Draw") -> Episode:
        """The second part of `batch`."""
        N, K, Q = self.ways, self.shots, self.queries
        images = self.split.images
        device = images.device if self.dataset.device is None else self.dataset.device
        labels = torch.arange(N, device=device)

        def x(chosen: torch.Tensor) -> torch.Tensor:
            pixels = chosen if images.device.type == "cpu" else images[chosen.to(images.device)]
            return self.dataset.normalize(pixels.to(device)).view(draw.tasks, -1, *pixels.shape[1:])

        return Episode(
            support_x=x(draw.support),
            support_y=labels.repeat_interleave(K).expand(draw.tasks, -1),
            query_x=x(draw.query),
            query_y=labels.repeat_interleave(Q).expand(draw.tasks, -1),
        )

    def __getitem__(self, index: int) -> Episode:
        return Episode(*(part[0] for part in self.batch(index, 1)))

    def fingerprint(self, count: int) -> str:
        """SHA-256 of the first `count` tasks: the split's images, the shape of a task, and every row drawn."""
        digest = hashlib.sha256(repr((self.split.fingerprint, self.ways, self.shots, self.queries, count)).encode())
        for index in range(count):
            digest.update(self.rows(index).astype("<i8").tobytes())
        return digest.hexdigest()


class Draw(NamedTuple):
    """A batch of tasks whose images have been chosen."""

    tasks: int
    """B."""
    support: torch.Tensor
    """(B·N·K, C, H, W) uint8; or (B·N·K,) int64, the rows of images that are gathered where they lie."""
    query: torch.Tensor
    """(B·N·Q, …) likewise."""


class Ahead:
    """Batch after batch of a stream, the next one being drawn in a thread of its own while this one is trained on.

    Drawing takes a processor core and, from a memory map, may wait for the disk; what comes out is the same.
    """

    def __init__(self, episodes: Episodes) -> None:
        self._episodes = episodes
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="episodes")
        self._next: tuple[tuple[int, int], Future[Draw]] | None = None

    def batch(self, first: int, count: int) -> Episode:
        """As `Episodes.batch`."""
        expected, self._next = self._next, None
        ready = expected is not None and expected[0] == (first, count)
        draw = expected[1].result() if expected is not None and ready else self._episodes.draw(first, count)
        following = (first + count, count)
        self._next = (following, self._pool.submit(self._episodes.draw, *following))
        return self._episodes.episode(draw)


def sample(bits: np.random.Philox, population: int, count: int) -> np.ndarray:
    """`count` distinct numbers below `population` in random order, (count,): the positions of the smallest of
    `population` random keys, so unbiased and exactly defined.
    """
    keys: np.ndarray = bits.random_raw(population)
    return np.argsort(keys, kind="stable")[:count]
