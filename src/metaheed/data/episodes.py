"""Episodes: tasks drawn from a split, each a pure function of (data set, split, ways, shots, queries, seed, index).

Legend: N ways, K shots, Q queries per class, B tasks of a batch.

Streams: the same seed gives "train", "probe", "val" and "test" unrelated streams of tasks, so that the probe batches of
attention share nothing with the training batches but the classes.
"""

import hashlib
import zlib
from collections.abc import Sequence

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
        dataset: its images may lie on any device; batches come out there.
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
        self.ways, self.shots, self.queries, self.seed = ways, shots, queries, seed
        self._key = (seed, zlib.crc32((stream or split).encode()))
        where = f"split {split!r} of {dataset.name}"
        if ways > len(self.split.classes):
            raise DataError(
                f"{ways} ways, but {where} has {len(self.split.classes)} classes: use at most that many ways"
            )
        fewest = min(self.split.counts)
        if shots + queries > fewest:
            label = self.split.classes[self.split.counts.index(fewest)]
            raise DataError(
                f"{shots} shots + {queries} queries = {shots + queries} images per class, but class {label!r} of "
                f"{where} has {fewest}: use fewer shots or queries"
            )

    def rows(self, index: int) -> np.ndarray:
        """(N, K+Q) image rows of task `index`; the first K columns are its support set."""
        bits = np.random.Philox(key=np.array(self._key, dtype=np.uint64), counter=[0, index, 0, 0])
        chosen = sample(bits, len(self.split.classes), self.ways)
        each = self.shots + self.queries
        starts, counts = self.split.starts, self.split.counts
        return np.stack([starts[c] + sample(bits, counts[c], each) for c in chosen])

    def batch(self, first: int, count: int) -> Episode:
        """Tasks first … first+count−1 as one batched Episode, images float32, gathered in one indexing operation."""
        N, K, Q = self.ways, self.shots, self.queries
        rows = torch.from_numpy(np.stack([self.rows(index) for index in range(first, first + count)]))
        device = self.split.images.device
        pixels = self.split.images[rows.flatten().to(device)]
        x = self.dataset.normalize(pixels).view(count, N, K + Q, *pixels.shape[1:])
        labels = torch.arange(N, device=device)
        return Episode(
            support_x=x[:, :, :K].flatten(1, 2),
            support_y=labels.repeat_interleave(K).expand(count, -1),
            query_x=x[:, :, K:].flatten(1, 2),
            query_y=labels.repeat_interleave(Q).expand(count, -1),
        )

    def __getitem__(self, index: int) -> Episode:
        return Episode(*(part[0] for part in self.batch(index, 1)))

    def fingerprint(self, count: int) -> str:
        """SHA-256 of the first `count` tasks: the split's images, the shape of a task, and every row drawn."""
        shape = self.ways, self.shots, self.queries
        return fingerprint(self.split.fingerprint, shape, [self.rows(index) for index in range(count)])


def fingerprint(images: str, shape: tuple[int, int, int], rows: Sequence[np.ndarray] | np.ndarray) -> str:
    """SHA-256 of tasks.

    Args:
        images: the fingerprint of the split.
        shape: ways, shots, queries.
        rows: (N, K+Q) for each task.
    """
    digest = hashlib.sha256(repr((images, *shape, len(rows))).encode())
    for of_task in rows:
        digest.update(of_task.astype("<i8").tobytes())
    return digest.hexdigest()


def sample(bits: np.random.Philox, population: int, count: int) -> np.ndarray:
    """`count` distinct numbers below `population` in random order, (count,): the positions of the smallest of
    `population` random keys, so unbiased and exactly defined.
    """
    keys: np.ndarray = bits.random_raw(population)
    return np.argsort(keys, kind="stable")[:count]
