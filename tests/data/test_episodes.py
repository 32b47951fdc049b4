import os
import queue
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from metaheed.data import Dataset, Episodes, Prefetcher
from metaheed.data.episodes import DrawnBatch, run_between_forks
from metaheed.data.images import make_split
from metaheed.errors import ConfigError, DataError

RECORDED = [[[234, 223, 238], [190, 191, 184], [92, 87, 96]], [[14, 9, 19], [39, 20, 30], [108, 104, 107]]]


def test_classes_are_distinct_and_support_and_query_disjoint(small_dataset: Dataset) -> None:
    episodes = Episodes(small_dataset, "train", 5, 2, 7, seed=3)
    split = small_dataset.split("train")
    class_of = np.repeat(np.arange(12), split.counts)
    for index in range(50):
        rows = episodes.rows(index)
        assert rows.shape == (5, 9)
        classes = class_of[rows]
        assert (classes == classes[:, :1]).all(), "a row of the task is one class"
        assert len(set(classes[:, 0])) == 5
        assert len(np.unique(rows)) == rows.size


def test_an_episode_is_a_pure_function(small_dataset: Dataset) -> None:
    a, b = (Episodes(small_dataset, "train", 5, 1, 3, seed=3) for _ in range(2))
    a.rows(7)
    assert np.array_equal(a.rows(4), b.rows(4))
    batch = a.batch(2, 5)
    one = b[4]
    assert all(torch.equal(part[2], whole) for part, whole in zip(batch, one, strict=True))


def test_index_seed_split_and_stream_all_matter(small_dataset: Dataset) -> None:
    def rows(seed: int = 0, index: int = 0, split: str = "train", stream: str | None = None) -> bytes:
        return Episodes(small_dataset, split, 5, 2, 5, seed, stream).rows(index).tobytes()

    others = [rows(seed=1), rows(index=1), rows(seed=2**62), rows(stream="probe"), rows(split="val")]
    assert len({rows(), *others}) == 6


def test_the_draw_is_fixed_for_ever(small_dataset: Dataset) -> None:
    """Recorded once: a change here would silently change every frozen task."""
    episodes = Episodes(small_dataset, "train", 3, 1, 2, seed=11)
    assert [episodes.rows(index).tolist() for index in (0, 1000)] == RECORDED


def test_the_draw_is_uniform(small_dataset: Dataset) -> None:
    episodes = Episodes(small_dataset, "train", 5, 1, 3, seed=0)
    counts = np.bincount(np.concatenate([episodes.rows(i).ravel() for i in range(3000)]), minlength=240)
    expected = 3000 * 20 / 240
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert 160 < chi2 < 330  # 239 degrees of freedom: ± 4 standard deviations


def test_batches_carry_the_right_images(small_dataset: Dataset) -> None:
    episodes = Episodes(small_dataset, "test", 4, 2, 3, seed=1)
    batch = episodes.batch(3, 2)
    assert batch.support_x.shape == (2, 8, 1, 16, 16)
    assert batch.query_x.shape == (2, 12, 1, 16, 16)
    assert batch.support_y[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.query_y[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert batch.support_y.dtype == torch.int64
    rows = episodes.rows(4)
    images = small_dataset.split("test").images
    assert torch.equal(batch.support_x[1, 3], images[rows[1, 1]].float() / 255)
    assert torch.equal(batch.query_x[1, 11], images[rows[3, 4]].float() / 255)


def test_pixels_are_standardised() -> None:
    image = np.full((4, 2, 16, 16), 51, np.uint8)
    splits = {name: make_split(name, [name + "a", name + "b"], [image, image]) for name in ("train", "val", "test")}
    dataset = Dataset("d", splits, mean=(0.1, 0.2), std=(0.5, 0.1))
    x = Episodes(dataset, "train", 2, 1, 1, 0).batch(0, 1).support_x
    torch.testing.assert_close(x[0, 0, :, 0, 0], torch.tensor([0.2, 0.0]), atol=1e-6, rtol=0)


def test_too_few_classes_or_images_is_a_clear_error(small_dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"8 ways, but split 'test' of small has 7 classes"):
        Episodes(small_dataset, "test", 8, 1, 1, 0)
    with pytest.raises(DataError, match=r"4 shots \+ 15 queries = 19 images per class, but class 'test0' .* has 18"):
        Episodes(small_dataset, "test", 5, 4, 15, 0)
    with pytest.raises(ConfigError, match=r"unknown split 'tset': did you mean 'test'"):
        Episodes(small_dataset, "tset", 5, 1, 1, 0)


def test_classes_of_unequal_size_are_drawn_as_one_by_one(small_dataset: Dataset) -> None:
    """The draws for equal classes are made at once; they must be those of each class on its own."""
    episodes = Episodes(small_dataset, "train", 5, 2, 7, seed=3)
    at_once = [episodes.rows(index) for index in range(20)]
    assert episodes._sorts_all_keys
    episodes._sorts_all_keys = False
    assert all(np.array_equal(episodes.rows(index), rows) for index, rows in enumerate(at_once))


def test_drawing_ahead_changes_nothing(small_dataset: Dataset) -> None:
    episodes = Episodes(small_dataset, "train", 5, 1, 3, seed=3)
    ahead = Prefetcher(episodes)
    for first, count in ((0, 1), (0, 4), (4, 4), (8, 4), (40, 4), (44, 2), (48, 2)):  # resumed, and of other sizes
        for ours, theirs in zip(ahead.batch(first, count), episodes.batch(first, count), strict=True):
            assert torch.equal(ours, theirs)


def test_the_next_batch_is_drawn_while_this_one_is_used(
    small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes = Episodes(small_dataset, "train", 5, 1, 3, seed=3)
    drawn: queue.Queue[tuple[int, int, int]] = queue.Queue()
    draw = episodes.draw

    def watched(first: int, count: int, cancelled: Callable[[], bool] = lambda: False) -> DrawnBatch:
        drawn.put((first, count, threading.get_ident()))
        return draw(first, count, cancelled)

    monkeypatch.setattr(episodes, "draw", watched)
    ahead = Prefetcher(episodes)
    ahead.batch(0, 4)
    seen = [drawn.get(timeout=10) for _ in range(2)]
    assert [task[:2] for task in seen] == [(0, 4), (4, 4)]
    assert seen[0][2] == threading.get_ident() != seen[1][2]
    ahead.batch(4, 4)
    assert drawn.get(timeout=10)[:2] == (8, 4), "the one that was ready was used, and the next begun"


def test_pixels_are_scaled_ahead_too(small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    normalize = Dataset.normalize

    def watched(dataset: Dataset, pixels: torch.Tensor) -> torch.Tensor:
        threads.append(threading.get_ident())
        return normalize(dataset, pixels)

    monkeypatch.setattr(Dataset, "normalize", watched)
    ahead = Prefetcher(Episodes(small_dataset, "train", 5, 1, 3, seed=3))
    for first in (0, 4, 8):
        ahead.batch(first, 4)
    ahead.close()
    assert len(threads) >= 6, "support and query of three batches; the fourth may not have been begun"
    assert threads.count(threading.get_ident()) == 2, "those of the first batch"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_no_fork_happens_in_mid_draw(small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = Episodes(small_dataset, "train", 5, 1, 3, seed=3)
    begun, drawn = threading.Event(), threading.Event()
    draw = episodes.draw

    def slow(first: int, count: int, cancelled: Callable[[], bool] = lambda: False) -> DrawnBatch:
        if first:
            begun.set()
            time.sleep(0.3)
            drawn.set()
        return draw(first, count, cancelled)

    monkeypatch.setattr(episodes, "draw", slow)
    ahead = Prefetcher(episodes)
    ahead.batch(0, 4)
    assert begun.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(not run_between_forks(drawn.is_set))
    assert drawn.is_set(), "the fork waited for the draw"
    assert os.waitpid(child, 0)[1] == 0, "and the child can draw"
    for ours, theirs in zip(ahead.batch(4, 4), episodes.batch(4, 4), strict=True):
        assert torch.equal(ours, theirs)
    ahead.close()


def test_every_class_with_too_few_images_is_named() -> None:
    images = [np.zeros((n, 1, 16, 16), np.uint8) for n in (9, 3, 20, 5)]
    splits = {name: make_split(name, list("abcd"), images) for name in ("train", "val", "test")}
    with pytest.raises(DataError, match=r"but class 'b' of split 'train' of d has 3, 'a' \(9\), 'd' \(5\): use fewer"):
        Episodes(Dataset("d", splits, (0.0,), (1.0,)), "train", 2, 1, 9, 0)


def test_fingerprint_knows_tasks_and_images(small_dataset: Dataset) -> None:
    prints = {
        Episodes(small_dataset, "test", 5, 1, 3, 0).fingerprint(20),
        Episodes(small_dataset, "test", 5, 1, 3, 0).fingerprint(21),
        Episodes(small_dataset, "test", 5, 1, 3, 1).fingerprint(20),
        Episodes(small_dataset, "test", 5, 2, 2, 0).fingerprint(20),
    }
    assert len(prints) == 4
    assert Episodes(small_dataset, "test", 5, 1, 3, 0).fingerprint(20) in prints
    before = small_dataset.split("train").fingerprint
    altered = {}
    for name, split in small_dataset.splits.items():
        images = split.images.numpy().copy()
        images[0, 0, 0, 0] ^= name == "test"
        altered[name] = make_split(name, split.classes, np.split(images, split.starts[1:]))
    changed = Dataset("small", altered, (0.0,), (1.0,))
    assert Episodes(changed, "test", 5, 1, 3, 0).fingerprint(20) not in prints
    assert changed.split("train").fingerprint == before
