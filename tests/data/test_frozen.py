"""Frozen episodes in a file: what is in it, and what is said of files that are not whole."""

import hashlib
import json
import os
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metaheed.data import Dataset, Episodes, load_dataset
from metaheed.data.frozen import FrozenEpisodes, freeze, read_episodes, write_episodes
from metaheed.data.images import make_split
from metaheed.errors import DataError
from tests.conftest import Run


@pytest.fixture
def episodes(small_dataset: Dataset) -> Episodes:
    return Episodes(small_dataset, "test", 4, 2, 3, seed=9)


def rewrite(path: Path, **changes: Any) -> None:
    """Replace arrays of the file (None removes one), or entries of its `about`."""
    with np.load(path) as file:
        arrays: dict[str, Any] = dict(file)
    about = json.loads(str(arrays["about"]))
    for name, value in changes.items():
        if value is None or isinstance(value, np.ndarray):
            arrays[name] = value
        else:
            about[name] = value
    arrays["about"] = np.array(json.dumps(about))
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_numpy_alone_reads_the_drawn_tasks(metaheed: Run, in_folder: Path) -> None:
    arguments = ["--split", "val", "--ways", 3, "--shots", 2, "--queries", 4, "--tasks", 7, "--episode-seed", 5]
    status, out, _ = metaheed("data", "episodes", *arguments, "--with-images", "--out", "made/tasks.npz")
    assert status == 0
    assert "7 tasks of glyphs val, 3-way 2-shot, with 4 queries a class" in out
    assert os.listdir("made") == ["tasks.npz"]  # noqa: PTH208
    file = np.load("made/tasks.npz", allow_pickle=False)
    about = json.loads(str(file["about"]))
    dataset = load_dataset("glyphs")
    drawn = Episodes(dataset, "val", 3, 2, 4, 5)
    split = drawn.split
    assert (about["data"], about["split"], about["ways"], about["shots"], about["queries"]) == (
        "glyphs",
        "val",
        3,
        2,
        4,
    )
    assert (about["tasks"], about["episode_seed"], about["image_shape"]) == (7, 5, [1, 28, 28])
    assert (about["mean"], about["std"]) == ([0.0], [1.0])
    assert (about["split_sha256"], about["episodes_sha256"]) == (split.fingerprint, drawn.fingerprint(7))
    assert file["tasks"].shape == (7, 3, 6)
    for index in range(7):
        assert np.array_equal(file["rows"][file["tasks"][index]], drawn.rows(index))
        task = drawn[index]
        pixels = torch.from_numpy(file["images"][file["tasks"][index]]).float() / 255
        assert torch.equal(pixels[:, :2].flatten(0, 1), task.support_x)
        assert torch.equal(pixels[:, 2:].flatten(0, 1), task.query_x)
    for image, sha256 in zip(file["images"], file["image_sha256"], strict=True):
        assert hashlib.sha256(image.tobytes()).hexdigest() == sha256
    of_row = np.repeat(split.classes, split.counts)
    assert file["class_names"][file["image_class"]].tolist() == of_row[file["rows"]].tolist()


def test_the_same_tasks_give_the_same_bytes(episodes: Episodes, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_episodes(freeze(episodes, 5), tmp_path / name, with_images=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("with_images", [False, True])
def test_read_back(with_images: bool, episodes: Episodes, tmp_path: Path) -> None:
    write_episodes(freeze(episodes, 6), tmp_path / "file", with_images)
    frozen = read_episodes(tmp_path / "file")
    assert (frozen.images is None) is not with_images
    frozen = frozen.with_images_from(episodes.dataset)
    assert frozen.images is not None
    again = FrozenEpisodes(frozen, frozen.images, frozen.mean, frozen.std)
    assert again.fingerprint(6) == episodes.fingerprint(6)
    assert again.fingerprint(4) == episodes.fingerprint(4)
    for ours, theirs in zip(again.batch(1, 4), episodes.batch(1, 4), strict=True):
        assert torch.equal(ours, theirs)


def test_another_data_set_is_refused(episodes: Episodes, tmp_path: Path) -> None:
    write_episodes(freeze(episodes, 6), tmp_path / "file", with_images=False)
    frozen = read_episodes(tmp_path / "file")
    split = episodes.split
    images = np.split(split.images.numpy(), split.starts[1:])

    def refused(classes: list[str], images: list[np.ndarray]) -> str:
        other = Dataset("small", {"test": make_split("test", classes, images)}, (0.0,), (1.0,))
        with pytest.raises(DataError) as error:
            frozen.with_images_from(other)
        return str(error.value)

    names = list(split.classes)
    altered = [image.copy() for image in images]
    used = int(frozen.rows[3])
    label = int(np.searchsorted(split.starts, used, side="right")) - 1
    altered[label][used - split.starts[label], 0, 3, 3] ^= 1
    assert f"1 of the {len(frozen.rows)} images" in refused(names, altered)
    assert f"(first: row {used}, of class '{names[label]}' in the file" in refused(names, altered)
    assert "images that the tasks use are not those of split 'test'" in refused(names[::-1], images)
    assert "has 90 images" in refused(names[:5], images[:5])


def test_an_image_that_no_task_uses_may_differ(episodes: Episodes, tmp_path: Path) -> None:
    write_episodes(freeze(episodes, 2), tmp_path / "file", with_images=False)
    frozen = read_episodes(tmp_path / "file")
    pixels = episodes.split.images.clone()
    unused = next(row for row in range(len(pixels)) if row not in frozen.rows)
    pixels[unused] ^= 1
    split = make_split("test", episodes.split.classes, np.split(pixels.numpy(), episodes.split.starts[1:]))
    filled = frozen.with_images_from(Dataset("small", {"test": split}, (0.0,), (1.0,)))
    assert filled.episodes_sha256 == episodes.fingerprint(2)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("open('executed', 'w')",))


def _swapped(array: np.ndarray) -> np.ndarray:
    """A support image of the first task against a query image."""
    array = array.copy()
    array[0, 0, [0, -1]] = array[0, 0, [-1, 0]]
    return array


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("cut", "numpy archive|zip"),
        ("text", "numpy archive"),
        ("flipped bit", "CRC|Error|SHA"),
        ("pickle", "numpy archive"),
        ("objects", "allow_pickle=False"),
        ("no tasks", "lacks tasks"),
        ("format", "format is 2"),
        ("swapped", "tasks do not have the SHA-256"),
        ("seed", "its episode_seed is '5'"),
        ("image", "images do not have the SHA-256"),
        ("number", "use images that it does not list"),
        ("negative", "use images that it does not list"),
        ("floats", "its tasks are float64"),
        ("one class", "two labels of a task stand for one class"),
        ("two classes", "a label of its tasks stands for two classes"),
        ("twice", "a task uses an image twice"),
        ("shape", r"its tasks are \(5, 4, 4\)"),
        ("scale", "its mean and std"),
        ("split", "its split is '../x'"),
        ("rows", "do not increase"),
        ("bomb", "it claims [0-9]+ bytes"),
    ],
)
def test_damaged_files(damage: str, reason: str, episodes: Episodes, in_folder: Path) -> None:
    path = in_folder / "file.npz"
    frozen = freeze(episodes, 5)
    write_episodes(frozen, path, with_images=True)
    whole = path.read_bytes()
    tasks = frozen.tasks
    match damage:
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "text":
            path.write_text("tasks")
        case "flipped bit":
            path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 8]) + whole[5001:])
        case "pickle":
            path.write_bytes(pickle.dumps(Evil()))
        case "objects":
            rewrite(path, tasks=np.array([Evil()], dtype=object))
        case "no tasks":
            rewrite(path, tasks=None)
        case "format":
            rewrite(path, format=2)
        case "swapped":
            rewrite(path, tasks=_swapped(tasks))
        case "seed":
            rewrite(path, episode_seed="5")
        case "image":
            assert frozen.images is not None
            rewrite(path, images=frozen.images.numpy() ^ 1)
        case "number":
            rewrite(path, tasks=tasks + 1000)
        case "negative":
            rewrite(path, tasks=tasks - 1000)
        case "floats":
            rewrite(path, tasks=tasks.astype(float))
        case "one class":
            rewrite(path, tasks=np.zeros_like(tasks))
        case "two classes":
            rewrite(path, tasks=tasks.transpose(0, 2, 1)[:, :4].repeat(2, axis=2)[:, :, :5])
        case "twice":
            rewrite(path, tasks=tasks[:, :, [0, 0, 1, 2, 3]])
        case "shape":
            rewrite(path, tasks=tasks[:, :, 1:])
        case "scale":
            rewrite(path, std=[0.0])
        case "split":
            rewrite(path, split="../x")
        case "rows":
            rewrite(path, rows=frozen.rows[::-1].copy())
        case "bomb":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
                file.writestr("tasks.npy", bytes(70 << 20))
    with pytest.raises(DataError, match=rf"file.npz is not a whole file of frozen episodes \(.*({reason})"):
        read_episodes(path)
    assert not (in_folder / "executed").exists()


@pytest.mark.parametrize("kind", ["device", "link to a device", "pipe", "folder", "empty", "zeros", "sparse", ""])
def test_what_is_no_file_of_episodes(kind: str, in_folder: Path) -> None:
    path = in_folder / "file.npz" if kind else Path()
    match kind:
        case "device":
            path = Path("/dev/zero")
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "zeros":
            path.write_bytes(bytes(1 << 20))
        case "sparse":
            with path.open("wb") as file:
                file.truncate(10 << 30)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"is not a whole file of frozen episodes .*: write it anew"):
        read_episodes(path)
    assert time.monotonic() - started < 5


def test_no_file_of_episodes_makes_a_message_long(episodes: Episodes, in_folder: Path) -> None:
    path = in_folder / "file.npz"
    for about in ({"split": "x" * 10**6}, {"format": "x" * 10**6}, {"format": 10**4000}):
        write_episodes(freeze(episodes, 5), path, with_images=False)
        rewrite(path, **about)
        with pytest.raises(DataError) as error:
            read_episodes(path)
        assert len(str(error.value)) < 500
