"""Layouts and damage of kinds that strangers have brought: spellings, forms of lists, bombs, what stands doubled."""

import collections
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metaheed.data import SPLITS, find_shape, load_dataset, survey
from metaheed.data.locate import candidate_folders
from metaheed.data.reading.labels import read_labels
from metaheed.data.reading.safe_pickle import load_arrays
from metaheed.errors import DataError
from tests.conftest import Run
from tests.data.making import divided, mini_lists, mini_pickles, mini_split, picture, pictures


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_lists(tmp_path_factory.mktemp("lists"), 2)


def relisted(lists: Path, to: Path, change: Callable[[str], bytes], names: Callable[[str], str]) -> Path:
    (to / "images").symlink_to(lists / "images")
    for split in SPLITS:
        (to / f"{names(split)}.csv").write_bytes(change((lists / f"{split}.csv").read_text()))
    return to


def test_a_root_may_be_a_string(tmp_path: Path) -> None:
    root = str(pictures(tmp_path / "mine", 8, 2))
    assert len(load_dataset("folder", root, 8).split("train").classes) == 4
    assert find_shape("folder", root, 8) == (3, 8, 8)
    assert any(name == "folder" and "8 classes" in state for name, state, _ in survey(root))


@pytest.mark.parametrize("sub", ["MiniImageNet", "mini-ImageNet", "Mini ImageNet", "mini_imagenet_full_size"])
def test_subfolders_however_they_are_spelt(sub: str, lists: Path, tmp_path: Path) -> None:
    (tmp_path / sub).symlink_to(lists)
    assert str(tmp_path / sub) in load_dataset("miniimagenet", tmp_path).origin
    assert candidate_folders(tmp_path, "miniimagenet", ["mini/imagenet", "nothing"], "", "") == [tmp_path]


@pytest.mark.parametrize(
    ("change", "val"),
    [
        (lambda text: text.encode("utf-16"), "val"),
        (lambda text: text.encode(), "validation"),
        (lambda text: "\r\n".join(f"{x},{x.split(',')[1]}" for x in text.split()).encode(), "valid"),
    ],
    ids=["UTF-16", "validation", "the class twice"],
)
def test_lists_in_other_forms(change: Callable[[str], bytes], val: str, lists: Path, tmp_path: Path) -> None:
    def headed(text: str) -> bytes:
        return change(text).replace(b"filename,label,label", b"filename,label,wnid")

    relisted(lists, tmp_path, headed, lambda split: val if split == "val" else split)
    dataset, expected = load_dataset("miniimagenet", tmp_path), load_dataset("miniimagenet", lists)
    assert all(dataset.split(s).fingerprint == expected.split(s).fingerprint for s in SPLITS)


def test_messages_that_help(lists: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"x.tar is a file, but miniimagenet is looked for in a folder: unpack it"):
        load_dataset("miniimagenet", tmp_path / "x.tar")
    with pytest.raises(DataError, match=r"nothing of it is recognised in .*train_phase_train.* nor folders n01532829"):
        load_dataset("miniimagenet", tmp_path)
    relisted(lists, tmp_path, lambda text: text.rstrip().replace("\n", "\n/home/me/").encode(), str)
    with pytest.raises(DataError, match=r"would leave the folder .*: write the names of the files without a path"):
        load_dataset("miniimagenet", tmp_path)
    (tmp_path / "o" / "omniglot" / "images_background").mkdir(parents=True)
    with pytest.raises(DataError, match=r"omniglot: [^ ]*/omniglot/images_evaluation not found; published"):
        load_dataset("omniglot", tmp_path / "o")


@pytest.mark.parametrize("form", [tuple, lambda v: np.array(v, np.float64), lambda v: range(v[0], v[-1] + 1)])
def test_indices_of_a_class_in_other_forms(form: Callable[[list[int]], Any], tmp_path: Path) -> None:
    expected = load_dataset("miniimagenet", mini_pickles(tmp_path, 2))
    for split in SPLITS:
        members = collections.defaultdict(list)
        for index, (name, _) in enumerate(mini_split(split, 2)):
            members[name].append(index)
        images = np.stack([picture(seed) for _, seed in mini_split(split, 2)])
        values = {"image_data": images, "class_dict": {name: form(v) for name, v in members.items()}}
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(values))
    found = load_dataset("miniimagenet", tmp_path)
    assert all(found.split(s).fingerprint == expected.split(s).fingerprint for s in SPLITS)


def test_a_word_for_a_class_in_two_splits_is_refused(tmp_path: Path) -> None:
    for split, phase, count in (("train", "train_phase_train", 64), ("val", "val", 16), ("test", "test", 20)):
        numbers = {f"{'dog' if split != 'val' else 'cat'} {k}": k for k in range(count)}
        values = {"data": np.zeros((count, 84, 84, 3), np.uint8), "labels": [*range(count)], "catname2label": numbers}
        (tmp_path / f"miniImageNet_category_split_{phase}.pickle").write_bytes(pickle.dumps(values))
    with pytest.raises(DataError, match=r"say that 'dog 0' is in train and in test"):
        load_dataset("miniimagenet", tmp_path)


def test_numbers_as_text_are_numbers() -> None:
    assert np.array_equal(read_labels(["0", "10", "9"]), [0, 10, 9])
    assert np.array_equal(read_labels(np.array([b"7", b"07"])), [7, 7])
    assert read_labels(["1", "n02"]) == ["1", "n02"]


class TestFolder:
    def test_what_systems_put_there(self, tmp_path: Path) -> None:
        expected = load_dataset("folder", pictures(tmp_path, 8, 2), 8)
        for name in ("lost+found", "$RECYCLE.BIN", "System Volume Information"):
            (tmp_path / name).mkdir()
        assert load_dataset("folder", tmp_path, 8).split("train").fingerprint == expected.split("train").fingerprint

    def test_two_folders_for_one_split(self, tmp_path: Path) -> None:
        """Joined, each picture would stand in its class twice, to adapt to and to be judged on."""
        shutil.copytree(divided(tmp_path) / "val", tmp_path / "valid")
        with pytest.raises(DataError, match=r"has two folders for the val split, val and valid"):
            load_dataset("folder", tmp_path, 8)

    @pytest.mark.parametrize("names", [("images", "segmentations"), ("meta-train", "meta-val", "meta-test")])
    def test_classes_that_lie_deeper(self, names: tuple[str, ...], tmp_path: Path, metaheed: Run) -> None:
        for name in names:
            pictures(tmp_path / name, 8 if name == names[0] else 7, 2)
        with pytest.raises(DataError, match=rf"too few for three splits.*/{names[0]}, say\), or rename the upper"):
            load_dataset("folder", tmp_path, 8)
        status, _, err = metaheed("data", "split", tmp_path)
        assert (status, "give the folder that contains them" in err) == (1, True)

    def test_lists_of_windows_and_empty_ones(self, tmp_path: Path) -> None:
        pictures(tmp_path, 8, 2)
        for split, first in (("train", 0), ("val", 4), ("test", 6)):
            names = "".join(f"class{first + k:02d}\r\n" for k in range(2))
            (tmp_path / f"{split}.txt").write_bytes(names.encode("utf-16"))
        assert load_dataset("folder", tmp_path, 8).split("val").classes == ("class04", "class05")
        (tmp_path / "val.txt").write_text("\n")
        with pytest.raises(DataError, match=r"the list val.txt is empty"):
            load_dataset("folder", tmp_path, 8)


_NEST = b"(I1\ntp0\n" + b"".join(b"0(g%d\ng%d\ntp%d\n" % (i, i, i + 1) for i in range(60))
_PAIRS = b"(lp1\n" + b"".join(b"(I%d\nI1\nta" % i for i in range(1000)) + b"0("
_TEXT = b"X\x00\x00\x10\x00" + b"a" * 0x100000 + b"p0\n0("


@pytest.mark.parametrize(
    "content",
    [
        _NEST + b"0(g60\nI1\nd.",
        b"(dp99\n0" + _NEST + b"0g99\ng60\nI1\ns.",
        _PAIRS + b"ccollections\nOrderedDict\n(g1\ntR" * 50 + b"l.",
        _TEXT + b"c_codecs\nencode\n(g0\nX\x06\x00\x00\x00latin1tR" * 50 + b"l.",
    ],
    ids=["a key of 2^60 parts", "set later", "dicts of one list", "bytes of one text"],
)
def test_small_pickles_that_would_take_for_ever_or_all_memory(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"x is damaged .*(in a key|it copies more values than it has)"):
        load_arrays(tmp_path / "x.pkl", "x", "there")


def test_what_a_pickle_asks_for_is_not_printed_at_length(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"cnumpy\ndtype\n(S'" + b"f8," * 5000 + b"'\nI0\nI1\ntR.")
    with pytest.raises(DataError, match=r"asks for an array of \[") as error:
        load_arrays(tmp_path / "x.pkl", "x", "there")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_grey_sets_statistics_are_none(name: str, tmp_path: Path, metaheed: Run) -> None:
    assert metaheed("data", "prepare", "glyphs", "--to", tmp_path)[0] == 0
    manifest = tmp_path / "glyphs.metaheed" / "manifest.json"
    values = json.loads(manifest.read_text())
    images = np.load(manifest.with_name("images_train.npy")) / 255
    values["mean"], values["std"] = [float(images.mean())], [float(images.std())]  # right ones, but not to be used
    manifest.write_text(json.dumps(values))
    status, _, err = metaheed("data", "verify", tmp_path)
    assert (status, "the manifest's mean is" in err) == (1, True)
