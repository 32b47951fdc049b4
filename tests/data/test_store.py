"""Stores: the same data as the files they were made from, whole or not there, in little memory."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch

from metaheed.data import SPLITS, Episodes, Request, find_source, load_dataset
from metaheed.data import preparing as module
from metaheed.data.preparing import prepare, stores_in, verify
from metaheed.data.sources import Chunk, Quiet, Source
from metaheed.data.store import is_store, open_store
from metaheed.errors import DataError
from tests.conftest import Run, python2_pickle
from tests.data.making import (
    divided,
    mini_lists,
    mini_pickles,
    mini_split,
    picture,
    pictures,
    png,
    tiered_arrays,
    tiered_labels,
    tiered_pickles,
)
from tests.test_training import SMALL, environment


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


class TestEveryLayout:
    @pytest.mark.parametrize(
        ("name", "make"),
        [
            ("miniimagenet", mini_pickles),
            ("miniimagenet", mini_lists),
            ("tieredimagenet", tiered_pickles),
            ("tieredimagenet", tiered_arrays),
            ("folder", divided),
            ("folder", pictures),
            ("glyphs", None),
        ],
    )
    def test_the_store_is_the_files(self, name: str, make: object, tmp_path: Path, metaheed: Run) -> None:
        root = make(tmp_path / "raw") if callable(make) else None
        before = load_dataset(name, root)
        options = ["--from", root] if root else []
        status, out, err = metaheed("data", "prepare", name, *options, "--to", tmp_path / "stores")
        assert status == 0, err
        assert f"train with --data {name} --data-root" in out
        assert "images  left 0:00:00" in err
        after = load_dataset(name, tmp_path / "stores")
        assert "the store" in after.origin
        assert (after.mean, after.std, after.image_shape) == (before.mean, before.std, before.image_shape)
        for split in SPLITS:
            ours, theirs = after.split(split), before.split(split)
            assert ours.fingerprint == theirs.fingerprint
            assert (ours.classes, ours.counts) == (theirs.classes, theirs.counts)
            assert torch.equal(ours.images, theirs.images)
            tasks = [Episodes(d, split, 2, 1, 1, 0).fingerprint(5) for d in (before, after)]
            assert tasks[0] == tasks[1], "runs on either are compared as runs on the same tasks"
        (path,) = (tmp_path / "stores").iterdir()
        assert metaheed("data", "verify", path)[0] == 0
        assert load_dataset(name, path).origin == after.origin, "the root may be the store itself"

    def test_omniglot_and_cifar(self, omniglot_zips: Path, cifar_folder: Path, tmp_path: Path) -> None:
        for name, root in (
            *(("omniglot", omniglot_zips), ("omniglot-vinyals", omniglot_zips)),
            *(("cifar-fs", cifar_folder), ("fc100", cifar_folder)),
        ):
            path = prepare(find_source(name, Request(root)), tmp_path)
            assert path.name == f"{name}.metaheed"
            before, after = load_dataset(name, root), load_dataset(name, tmp_path)
            assert all(before.split(s).fingerprint == after.split(s).fingerprint for s in SPLITS)
            assert (after.mean, after.std) == (before.mean, before.std)

    def test_training_on_either_leaves_the_same_bytes(self, tmp_path: Path, metaheed: Run) -> None:
        root = divided(tmp_path / "raw", classes=6, each=6)
        metaheed("data", "prepare", "folder", "--from", root, "--image-size", 28, "--to", tmp_path / "stores")
        for data_root, run in ((root, "raw-run"), (tmp_path / "stores", "store-run")):
            options = ["--data", "folder", "--data-root", data_root, "--image-size", 28, *SMALL]
            assert metaheed("train", "ta-maml", *options, "--iterations", 3, "--out", run)[0] == 0
        assert Path("raw-run/metrics.jsonl").read_bytes() == Path("store-run/metrics.jsonl").read_bytes()
        assert Path("raw-run/tasks.jsonl").read_bytes() == Path("store-run/tasks.jsonl").read_bytes()


class Stops(Quiet):
    """A watcher that stops the work after so many calls."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, items: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY", 0.0)
    monkeypatch.setattr("metaheed.data.reading.decode._GROUP", 7)


class TestInterruptions:
    @pytest.mark.parametrize("make", [divided, tiered_arrays])
    def test_stopped_anywhere_it_ends_in_the_same_bytes(self, make: object, tmp_path: Path, small_steps: None) -> None:
        name = "folder" if make is divided else "tieredimagenet"
        root = make(tmp_path / "raw")  # type: ignore[operator]

        def source() -> Source:
            return find_source(name, Request(root))

        whole = content(prepare(source(), tmp_path / "whole"))
        stops = 0
        for after in (0, 1, 5, 9, 12) if make is divided else (3, 40):
            folder = tmp_path / str(after)
            for more in range(40):
                try:
                    path = prepare(source(), folder, Stops(after + more))
                    break
                except KeyboardInterrupt:
                    stops += 1
                    assert not any(is_store(p) for p in folder.iterdir()), "a part is not taken for a whole"
                    with pytest.raises(DataError):
                        stores_in([folder])
            assert content(path) == whole
            assert [p.name for p in folder.iterdir()] == [path.name], "nothing else is left"
        assert stops >= 4

    def test_killed(self, tmp_path: Path) -> None:
        root = pictures(tmp_path / "raw", 12, 40, side=120)
        whole = content(prepare(find_source("folder", Request(root)), tmp_path / "whole"))
        code = (
            "import sys; from pathlib import Path; from metaheed.data import *;"
            "from metaheed.data import preparing; from metaheed.data.reading import decode;"
            "preparing._EVERY = 0.0; decode._GROUP = 5; print('ready', flush=True);"
            "preparing.prepare(find_source('folder', Request(Path(sys.argv[1]))), Path(sys.argv[2]))"
        )
        command = [sys.executable, "-c", code, str(root), str(tmp_path / "killed")]
        killed = 0
        for wait in (0.05, 0.15):
            process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE)
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(wait)
            killed += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert killed
        path = prepare(find_source("folder", Request(root)), tmp_path / "killed")
        assert content(path) == whole

    def test_it_goes_on_where_it_stood(
        self, tmp_path: Path, small_steps: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = divided(tmp_path / "raw")
        with pytest.raises(KeyboardInterrupt):
            prepare(find_source("folder", Request(root)), tmp_path / "out", Stops(3))
        source = find_source("folder", Request(root))
        asked = []

        def watched(split: str, start: int) -> Iterator[Chunk]:
            asked.append((split, start))
            return reads[split](start)

        reads = {split: part.read for split, part in source.splits.items()}
        splits = {s: dataclasses.replace(part, read=partial(watched, s)) for s, part in source.splits.items()}
        source = dataclasses.replace(source, splits=splits)
        prepare(source, tmp_path / "out")
        # The three images of the chunk in which it was stopped are written again.
        assert asked == [("val", 7), ("test", 0)]

    def test_a_changed_source_begins_anew(self, tmp_path: Path, small_steps: None) -> None:
        root = divided(tmp_path / "raw")
        with pytest.raises(KeyboardInterrupt):
            prepare(find_source("folder", Request(root)), tmp_path / "out", Stops(4))
        (root / "train" / "train00" / "000.png").write_bytes(png(picture(123456, 20)) + b"and more")
        path = prepare(find_source("folder", Request(root)), tmp_path / "out")
        whole = load_dataset("folder", root)
        assert open_store(path).split("train").fingerprint == whole.split("train").fingerprint

    def test_problems_are_remembered_over_an_interruption(self, tmp_path: Path, small_steps: None) -> None:
        root = divided(tmp_path / "raw")
        for name in ("train/train00/000.png", "test/test02/003.png"):
            (root / name).write_bytes(b"none")
        with pytest.raises(KeyboardInterrupt):
            prepare(find_source("folder", Request(root)), tmp_path / "out", Stops(4))
        with pytest.raises(DataError, match=r"2 of the images.*cannot be read") as error:
            prepare(find_source("folder", Request(root)), tmp_path / "out")
        assert "train/train00/000.png" in str(error.value)
        assert "test/test02/003.png" in str(error.value)
        assert not [*(tmp_path / "out").iterdir()], "nothing half-written is left"

    def test_two_at_once(self, tmp_path: Path) -> None:
        source = find_source("folder", Request(divided(tmp_path / "raw")))

        class Meanwhile(Quiet):
            def start(self, what: str, items: int, done: int, unit: str = "images") -> None:
                with pytest.raises(DataError, match="is being prepared by another process"):
                    prepare(source, tmp_path / "out")

        prepare(source, tmp_path / "out", Meanwhile())

    def test_a_full_disk_is_explained_and_gone_on_after(
        self, tmp_path: Path, small_steps: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, written = find_source("folder", Request(divided(tmp_path / "raw"))), []
        write = module._write_all

        def full(file: IO[bytes], images: np.ndarray) -> None:
            written.append(len(images))
            if len(written) == 3:
                raise OSError(28, "No space left on device")
            write(file, images)

        monkeypatch.setattr(module, "_write_all", full)
        with pytest.raises(
            DataError, match=r"preparing .*folder-84px.metaheed stopped \(No space left on device\): make"
        ):
            prepare(source, tmp_path / "out")
        assert (tmp_path / "out" / "folder-84px.metaheed.part" / "progress.json").exists()
        again, started = Quiet(), []
        monkeypatch.setattr(again, "start", lambda what, items, done: started.append(done))
        assert is_store(prepare(source, tmp_path / "out", again))
        assert started[0] > 0, "it goes on"

    def test_a_picture_replaced_by_one_of_the_same_size_is_noticed(self, tmp_path: Path) -> None:
        root = divided(tmp_path / "raw")
        prepare(find_source("folder", Request(root)), tmp_path / "out")
        file = root / "train" / "train00" / "000.png"
        os.utime(file, (1, 1))
        with pytest.raises(DataError, match="was made from other files or settings"):
            prepare(find_source("folder", Request(root)), tmp_path / "out")
        root = mini_lists(tmp_path / "mini", 1)
        before = find_source("miniimagenet", Request(root)).stamp
        os.utime(next((root / "images").iterdir()), (1, 1))
        assert find_source("miniimagenet", Request(root)).stamp != before

    def test_done_already(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = divided(tmp_path / "raw")
        path = prepare(find_source("folder", Request(root)), tmp_path / "out")
        before = (path / "manifest.json").stat().st_mtime_ns
        assert prepare(find_source("folder", Request(root)), tmp_path / "out") == path
        assert "is prepared already" in capsys.readouterr().err
        assert (path / "manifest.json").stat().st_mtime_ns == before


CODE = """
import resource, sys, threading
from pathlib import Path
from typing import IO
from metaheed.data import Request, find_source
from metaheed.data.preparing import prepare
threading.stack_size(1 << 19)
name, root, out, allowed = sys.argv[1:]
data = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
limit = data + int(allowed)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
prepare(find_source(name, Request(Path(root))), Path(out))
"""


class TestMemory:
    """Under a limit that is smaller than the file that is converted, and than what comes out."""

    @pytest.mark.parametrize("name", ["miniimagenet", "tieredimagenet"])
    def test_pickles(self, name: str, tmp_path: Path) -> None:
        if not sys.platform.startswith("linux"):
            pytest.skip("the limit is Linux's")
        if name == "miniimagenet":
            mini_pickles(tmp_path, 1)
            names = [n for n, _ in mini_split("train", 40)]
            members: dict[bytes, list[int]] = {}
            for index, label in enumerate(names):
                members.setdefault(label.encode(), []).append(index)
            images = np.random.default_rng(0).integers(0, 256, (len(names), 84, 84, 3), dtype=np.uint8)
            file = tmp_path / "mini-imagenet-cache-train.pkl"
            file.write_bytes(python2_pickle({b"image_data": images, b"class_dict": members}))
        else:
            tiered_pickles(tmp_path, 1)
            specific, general = tiered_labels("train", 7)
            noise = np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)
            one = np.frombuffer(png(noise), np.uint8)[:, None]
            file = tmp_path / "train_images_png.pkl"
            file.write_bytes(python2_pickle([one.copy() for _ in specific]))
            labels = {b"label_specific": specific, b"label_general": general}
            (tmp_path / "train_labels.pkl").write_bytes(python2_pickle(labels))
        allowed = 32 << 20
        assert file.stat().st_size > 1.5 * allowed
        command = [sys.executable, "-c", CODE, name, str(tmp_path), str(tmp_path / "out"), str(allowed)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert is_store(tmp_path / "out" / f"{name}.metaheed")

    def test_reading_it_all_at_once_would_not_do(self, tmp_path: Path) -> None:
        """The limit bites: the same numbers read by an ordinary unpickler do not fit."""
        if not sys.platform.startswith("linux"):
            pytest.skip("the limit is Linux's")
        (tmp_path / "x.pkl").write_bytes(python2_pickle({b"image_data": np.zeros((3840, 84, 84, 3), np.uint8)}))
        code = CODE[: CODE.index("prepare(find")] + "import pickle; pickle.load(open(root, 'rb'), encoding='bytes')"
        command = [sys.executable, "-c", code, "x", str(tmp_path / "x.pkl"), "out", str(48 << 20)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert "MemoryError" in done.stderr


class TestUse:
    def test_training_starts_in_under_a_second(self, tmp_path: Path) -> None:
        path = prepare(find_source("tieredimagenet", Request(tiered_arrays(tmp_path / "raw"))), tmp_path)
        # As large as the real one: the files are sparse, and starting must not read them.
        manifest = json.loads((path / "manifest.json").read_text())
        for split in SPLITS:
            part = manifest["splits"][split]
            part["counts"] = [1281] * len(part["counts"])
            with (path / f"images_{split}.npy").open("wb") as file:
                shape = (sum(part["counts"]), 3, 84, 84)
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                file.truncate(file.tell() + int(np.prod(shape)))
        (path / "manifest.json").write_text(json.dumps(manifest))
        began = time.monotonic()
        dataset = load_dataset("tieredimagenet", tmp_path)
        episodes = Episodes(dataset, "train", 5, 1, 15, 0)
        assert time.monotonic() - began < 1
        assert episodes.batch(0, 4).query_x.shape == (4, 75, 3, 84, 84)
        assert sum(s.images.nbytes for s in dataset.splits.values()) > 16e9

    def test_sets_too_large_for_memory_are_used_through_a_store(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("metaheed.data.sources.MOST_IN_MEMORY", 1 << 20)
        root = mini_pickles(tmp_path, 1)
        with pytest.raises(
            DataError, match=r"would take .* of memory: convert it once with 'metaheed data prepare mini"
        ):
            load_dataset("miniimagenet", root)
        prepare(find_source("miniimagenet", Request(root)), root)
        assert load_dataset("miniimagenet", root).image_shape == (3, 84, 84), "a store goes before the files"

    def test_sizes_and_seeds_of_a_folder(self, tmp_path: Path, metaheed: Run) -> None:
        root = pictures(tmp_path / "raw")
        assert metaheed("data", "prepare", "folder", "--from", root, "--image-size", 16, "--split-seed", 3)[0] == 0
        assert (root / "folder-16px.metaheed").is_dir()
        assert "the store" in load_dataset("folder", root, 16, 3).origin
        assert "the store" in load_dataset("folder", root, 16).origin
        assert "the folder" in load_dataset("folder", root, 84).origin
        with pytest.raises(DataError, match=r"was split by seed 3, not by seed 0"):
            load_dataset("folder", root, 16, 0)

    def test_a_store_is_never_written(self, tmp_path: Path) -> None:
        path = prepare(find_source("folder", Request(divided(tmp_path / "raw"))), tmp_path)
        images = np.load(path / "images_train.npy", mmap_mode="r")
        assert not images.flags.writeable
        before = content(path)
        Episodes(open_store(path), "train", 2, 1, 2, 0).batch(0, 3)
        assert content(path) == before


class TestVerify:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return prepare(find_source("folder", Request(divided(tmp_path / "raw"))), tmp_path / "out")

    def test_whole(self, path: Path, metaheed: Run) -> None:
        status, out, _ = metaheed("data", "verify", path.parent)
        assert status == 0
        assert "is whole: folder, 3/3/3 classes, 36 images" in out
        assert "no image is in two classes" in out

    def test_a_changed_byte(self, path: Path, metaheed: Run) -> None:
        file = path / "images_val.npy"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        status, _, err = metaheed("data", "verify", path)
        assert status == 1
        assert "images_val.npy has the checksum" in err
        assert open_store(path).split("train").counts == (4, 4, 4), "starting does not read it all"

    @pytest.mark.parametrize(
        "damage", ["truncated", "missing", "header", "other shape", "manifest", "counts", "format"]
    )
    def test_damage_that_starting_notices(self, damage: str, path: Path) -> None:
        file, manifest = path / "images_test.npy", path / "manifest.json"
        if damage == "truncated":
            os.truncate(file, file.stat().st_size - 1)
        elif damage == "missing":
            file.unlink()
        elif damage == "header":
            file.write_bytes(file.read_bytes().replace(b"}", b"(", 1))
        elif damage == "other shape":
            np.save(file, np.zeros((12, 3, 84, 83), np.uint8))
        elif damage == "manifest":
            manifest.write_text(manifest.read_text()[:100])
        elif damage == "counts":
            manifest.write_text(manifest.read_text().replace("4,", "5,", 1))
        else:
            manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
        with pytest.raises(DataError, match=r"the store .* is damaged .*: delete it and prepare it anew"):
            open_store(path)

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("std", [0.0, 0.1, 0.1], "each number must be above 0 and at most 1"),
            ("std", [-0.1, 0.1, 0.1], "each number must be above 0"),
            ("std", [float("nan")] * 3, "each number must be above 0"),
            ("std", [float("inf")] * 3, "each number must be above 0"),
            ("std", [10**400] * 3, "each number must be above 0"),
            ("std", ["0.1"] * 3, "each number must be above 0"),
            ("std", [True] * 3, "each number must be above 0"),
            ("std", [0.1], "its std has 1 numbers, but its images 3 channels"),
            ("std", [], "its std has 0 numbers"),
            ("std", 0.1, "its std is 0.1"),
            ("std", None, "its std is None"),
            ("mean", [0.5] * 4, "its mean has 4 numbers"),
            ("mean", [-0.1, 0.5, 0.5], "each number must be from 0 to 1"),
            ("mean", [127.5] * 3, "each number must be from 0 to 1"),
            ("mean", [float("nan")] * 3, "each number must be from 0 to 1"),
            ("image_shape", [3, -84, 84], "its image_shape is"),
            ("image_shape", [3, 84], "its image_shape is"),
            ("settings", {"image_size": "84"}, "its settings are"),
            ("layout", ["x" * 10**6], "its layout is"),
        ],
    )
    def test_a_manifest_of_impossible_values(
        self, name: str, value: object, reason: str, path: Path, metaheed: Run
    ) -> None:
        values = json.loads((path / "manifest.json").read_text())
        values[name] = value
        (path / "manifest.json").write_text(json.dumps(values))
        with pytest.raises(DataError, match=rf"the store .* is damaged \(manifest.json .*{reason}") as error:
            open_store(path)
        assert len(str(error.value)) < 600
        assert metaheed("data", "verify", path)[0] == 1

    @pytest.mark.parametrize("content", [b"[]", b"[" * 200_000, b"9" * 10_000, b"\xff", b""])
    def test_a_manifest_of_something_else(self, content: bytes, path: Path) -> None:
        (path / "manifest.json").write_bytes(content)
        with pytest.raises(DataError, match=r"the store .* is damaged \(manifest.json cannot be read"):
            open_store(path)

    @pytest.mark.parametrize(("name", "value"), [("mean", [0.0] * 3), ("std", [1.0] * 3), ("mean", [0.5] * 3)])
    def test_a_manifest_whose_statistics_are_not_those_of_its_images(
        self, name: str, value: list[float], path: Path, metaheed: Run
    ) -> None:
        values = json.loads((path / "manifest.json").read_text())
        values[name] = value
        (path / "manifest.json").write_text(json.dumps(values))
        status, _, err = metaheed("data", "verify", path)
        assert status == 1
        assert f"the manifest's {name} is ({value[0]}" in err

    def test_a_manifest_with_a_class_twice(self, path: Path) -> None:
        """As an older version wrote it of a folder with one name in two forms."""
        text = (path / "manifest.json").read_text()
        text = text.replace('"train00"', '"Caf\\u00e9"').replace('"test00"', '"Cafe\\u0301"')
        (path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match="it has the class 'Café' twice"):
            open_store(path)

    def test_grey_sets_are_not_standardised(self, tmp_path: Path, metaheed: Run) -> None:
        assert metaheed("data", "prepare", "glyphs", "--to", tmp_path)[0] == 0
        assert metaheed("data", "verify", tmp_path)[0] == 0

    def test_duplicates_across_splits(self, tmp_path: Path, metaheed: Run) -> None:
        root = divided(tmp_path / "raw")
        same = (root / "train" / "train01" / "002.png").read_bytes()
        (root / "test" / "test00" / "zzz.png").write_bytes(same)
        status, _, err = metaheed("data", "prepare", "folder", "--from", root, "--to", tmp_path / "out")
        assert status == 0
        assert "train/train01/002.png and test/test00/zzz.png are the same image" in err
        _, notices = verify(tmp_path / "out" / "folder-84px.metaheed")
        assert notices == [
            "1 images appear in two classes, 1 of them in two splits",
            "image 2 of 'train01' (train) and image 4 of 'test00' (test) are the same image",
        ]

    def test_equal_digests_are_not_yet_equal_images(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("metaheed.data.sources.hashlib.blake2b", lambda data, digest_size: _Same())
        path = prepare(find_source("folder", Request(divided(tmp_path / "raw"))), tmp_path / "out")
        assert verify(path)[1] == []


class _Same:
    def digest(self) -> bytes:
        return bytes(8)


class TestShowAndList:
    def test_list(self, omniglot_zips: Path, metaheed: Run, tmp_path: Path) -> None:
        status, out, _ = metaheed("data", "list", "--data-root", omniglot_zips)
        assert status == 0
        lines = {line.split()[0]: line for line in out.splitlines()}
        assert "3920/880/1692 classes, 12984 images" in lines["omniglot"]
        assert "the zip files images_background.zip and images_evaluation.zip" in lines["omniglot"]
        assert "not found" in lines["tieredimagenet"]
        assert "built in" in lines["glyphs"]
        (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(b"x")
        for split in ("val", "test"):
            (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(b"x")
        out = metaheed("data", "list", "--data-root", tmp_path)[1]
        assert "cannot be used" in next(line for line in out.splitlines() if line.startswith("miniimagenet"))
        assert "not looked for" in metaheed("data", "list")[1]

    def test_list_of_stores(self, tmp_path: Path, metaheed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        root = pictures(tmp_path / "mine", 10, 2)
        prepare(find_source("folder", Request(root, 16)), root)
        prepare(find_source("glyphs", Request()), root)
        lines = metaheed("data", "list", "--data-root", root)[1].splitlines()
        of_folder = [line.split(maxsplit=1)[1] for line in lines if line.startswith("folder")]
        assert [line.split("images")[1].split()[:2] for line in of_folder] == [["the", "store"], ["the", "folder"]]
        assert [line for line in lines if line.startswith("glyphs")] == [
            f"glyphs            604/160/240 classes, 20080 images     the store {root / 'glyphs.metaheed'}"
        ]
        lines = metaheed("data", "list", "--data-root", root / "folder-16px.metaheed")[1].splitlines()
        assert sum("the store" in line for line in lines) == 1
        assert sum("cannot be used" in line for line in lines) == 0
        (root / "glyphs.metaheed" / "manifest.json").write_text("{}")
        assert "cannot be used: the store" in metaheed("data", "list", "--data-root", root)[1]
        status, _, err = metaheed("data", "list", "--data-root", root / "nowhere")
        assert (status, "nothing of that name is there" in err) == (1, True)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert "the folder" in metaheed("data", "list", "--data-root=~/mine")[1], "shells leave this ~ alone"
        assert metaheed("data", "verify", "~/mine/folder-16px.metaheed")[0] == 0

    def test_names_that_are_no_text(self, tmp_path: Path, metaheed: Run) -> None:
        """On Linux a folder's name is bytes; those that are no UTF-8 are kept as they are."""
        root = divided(tmp_path / "raw", classes=2)
        try:
            (root / "train" / "train00").rename(root / "train" / os.fsdecode(b"tr\xff"))
        except OSError:
            pytest.skip("this system has names of text only")
        before = load_dataset("folder", root, 16)
        assert (
            metaheed("data", "prepare", "folder", "--from", root, "--image-size", 16, "--to", tmp_path / "out")[0] == 0
        )
        after = load_dataset("folder", tmp_path / "out", 16)
        assert after.split("train").classes == before.split("train").classes == ("train01", "tr\udcff")
        shown = ["--ways", 2, "--queries", 2, "--image-size", 16]
        assert metaheed("data", "show", "folder", "--data-root", tmp_path / "out", *shown)[0] == 0

    def test_an_episode(self, tmp_path: Path, metaheed: Run) -> None:
        from PIL import Image

        root = divided(tmp_path / "raw", classes=4, each=6)
        options = ["--data-root", root, "--image-size", 84, "--ways", 3, "--shots", 2, "--queries", 4]
        status, out, _ = metaheed("data", "show", "folder", *options, "--out", "episode.png")
        assert status == 0
        dataset = load_dataset("folder", root, 84)
        episodes = Episodes(dataset, "train", 3, 2, 4, 0)
        names = [dataset.split("train").classes[row[0] // 6] for row in episodes.rows(0)]
        assert out.split()[:3] == names
        with Image.open("episode.png") as page:
            # Each image of the task is in the picture, pixel for pixel, in its place.
            pixels = np.asarray(page.convert("RGB"))
        first = dataset.split("train").images[episodes.rows(0)[0, 0]].numpy().transpose(1, 2, 0)
        found = [
            (y, x)
            for y, x in np.argwhere((pixels[:-83, :250] == first[0, 0]).all(-1))
            if x >= 150 and np.array_equal(pixels[y : y + 84, x : x + 84], first)
        ]
        assert len(found) == 1

    def test_a_sheet_of_classes(self, metaheed: Run) -> None:
        status, out, _ = metaheed("data", "show", "glyphs", "--classes", 7, "--split", "test", "--out", "sheet.png")
        assert status == 0
        assert out.count("U+") == 7
        assert Path("sheet.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("index", [10**30, -(10**30), 2**63, 10**200])
    def test_a_huge_index(self, index: int, metaheed: Run) -> None:
        status, _, err = metaheed("data", "show", "glyphs", "--index", index)
        assert status == 1
        assert "--index is " in err
        assert len(err) < 200

    def test_the_last_index_of_all_is_no_huge_one(self, metaheed: Run) -> None:
        assert metaheed("data", "show", "glyphs", "--index", 2**63 - 1, "--queries", 1)[0] == 0

    @pytest.mark.parametrize("command", [("show", "glyphs"), ("episodes", "--data", "glyphs", "--tasks", 2)])
    @pytest.mark.parametrize("out", ["", ".", "/", "pipe", "folder"])
    def test_an_output_that_is_no_file(self, out: str, command: tuple[object, ...], metaheed: Run) -> None:
        Path("folder").mkdir()
        os.mkfifo("pipe")
        status, _, err = metaheed("data", *command, "--out", out)
        assert status == 1
        assert "--out is " in err
        assert sorted(p.name for p in Path().iterdir()) == ["folder", "pipe"]
        assert Path("pipe").is_fifo()
