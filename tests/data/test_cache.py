"""The cache of decoded data sets: written once, the same bits, never an obstacle."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from metaheed.config import TrainingConfig
from metaheed.data import SPLITS, Dataset, load_dataset
from tests.data.making import divided


class Heard:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.work: list[tuple[str, int]] = []
        self.done = 0

    def start(self, what: str, items: int, done: int, unit: str = "images") -> None:
        self.work.append((what, items))

    def advance(self, items: int) -> None:
        self.done += items

    def message(self, text: str) -> None:
        self.lines.append(text)

    def stop(self) -> None: ...


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, into which everything goes that is read, however quickly."""
    monkeypatch.setenv("METAHEED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TrainingConfig, "cached_after", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return divided(tmp_path / "mine")


def load(folder: Path, cache: bool = True) -> tuple[Dataset, Heard]:
    heard = Heard()
    return load_dataset("folder", folder, 8, watcher=heard, cache=cache), heard


def same(one: Dataset, other: Dataset) -> bool:
    assert (one.mean, one.std, one.name) == (other.mean, other.std, other.name)
    return all(
        one.split(s).fingerprint == other.split(s).fingerprint
        and np.array_equal(one.split(s).images.numpy(), other.split(s).images.numpy())
        for s in SPLITS
    )


def test_decoded_once_and_the_same_bits_afterwards(cache: Path, pictures: Path) -> None:
    plain, _ = load(pictures, cache=False)
    assert not cache.exists()
    first, heard = load(pictures)
    (kept,) = cache.iterdir()
    assert heard.work == [("reading folder", 36)]
    assert heard.done == 36
    assert any(str(kept) in line and "MB" in line and "data_cache=False" in line for line in heard.lines)
    again, heard = load(pictures)
    assert (heard.work, str(kept) in again.origin, str(pictures) in again.origin) == ([], True, True)
    assert same(plain, first)
    assert same(plain, again)
    assert again.split("train").recorded_fingerprint == plain.split("train").fingerprint


def test_what_is_read_quickly_is_not_kept(cache: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingConfig, "cached_after", 60.0)
    load(pictures)
    load_dataset("glyphs")
    assert [p.suffix for p in cache.iterdir()] == [".npy"], "glyphs keeps its own"


def test_changed_files_are_read_anew(cache: Path, pictures: Path) -> None:
    load(pictures)
    (outdated,) = cache.iterdir()
    changed = next((pictures / "train").rglob("*.*"))
    os.utime(changed, ns=(1, 1))
    _, heard = load(pictures)
    assert heard.work == [("reading folder", 36)]
    (kept,) = cache.iterdir()
    assert kept != outdated, "what the cache held of the files before is removed"


@pytest.mark.parametrize("damage", ["short", "manifest"])
def test_a_damaged_cache_is_said_and_made_anew(cache: Path, pictures: Path, damage: str) -> None:
    first, _ = load(pictures)
    (kept,) = cache.iterdir()
    if damage == "short":
        file = kept / "images_val.npy"
        file.write_bytes(file.read_bytes()[:200])
    else:
        (kept / "manifest.json").write_text(json.dumps({"format": 1}))
    again, heard = load(pictures)
    assert same(first, again)
    assert "cannot be used" in heard.lines[0]
    _, heard = load(pictures)
    assert heard.work == []


def test_a_full_disk_only_costs_the_cache(cache: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metaheed.data.cache.np.save", full)
    dataset, heard = load(pictures)
    assert len(dataset.split("train").classes) == 3
    assert [line for line in heard.lines if "No space left on device" in line and "not kept" in line]
    assert not [*cache.iterdir()]

    monkeypatch.setattr("metaheed.data.cache._SPARE", 1 << 60)
    _, heard = load(pictures)
    assert [line for line in heard.lines if "are free there" in line]


def test_a_cache_that_cannot_be_made_is_no_obstacle(
    cache: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures.parent / "file").write_text("")
    monkeypatch.setenv("METAHEED_CACHE", str(pictures.parent / "file" / "below"))
    _, heard = load(pictures)
    assert len([line for line in heard.lines if "not kept" in line]) == 1


def test_a_cache_that_may_not_be_looked_into_is_no_obstacle(
    cache: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Path.is_dir

    def refused(path: Path) -> bool:
        if cache in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path)

    monkeypatch.setattr(Path, "is_dir", refused)
    dataset, _ = load(pictures)
    assert len(dataset.split("val").classes) == 3
