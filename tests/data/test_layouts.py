"""Data as people have it: one test a layout, and what is said of those that are nearly one."""

import collections
import io
import json
import pickle
import shutil
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from metaheed.data import SPLITS, Dataset, Request, find_source, load_dataset
from metaheed.data.locate import class_list, class_table
from metaheed.data.reading.labels import read_labels
from metaheed.data.reading.safe_pickle import load_arrays
from metaheed.errors import DataError
from tests.conftest import SHARED, Run
from tests.data.making import divided, mini_lists, mini_pickles, mini_split, picture, pictures, png, tiered_labels
from tests.test_training import SMALL


def same(one: Dataset, other: Dataset) -> bool:
    return all(one.split(s).fingerprint == other.split(s).fingerprint for s in SPLITS)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset("miniimagenet", mini_pickles(tmp_path_factory.mktemp("mini"), 2))


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ and three lists, two images a class."""
    return mini_lists(tmp_path_factory.mktemp("flat"), 2)


def arranged(flat: Path, to: Path, place: Callable[[str, str, int], str]) -> Path:
    """The images at other places: a function of split, class and number within the class."""
    for split in SPLITS:
        seen: collections.Counter[str] = collections.Counter()
        for line in sorted((flat / f"{split}.csv").read_text().splitlines()[1:]):
            file, label = line.split(",")
            target = to / place(split, label, seen[label]) / file
            seen[label] += 1
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(flat / "images" / file)
    return to


class TestMiniPickles:
    def test_validation_is_val(self, mini: Dataset, tmp_path: Path) -> None:
        mini_pickles(tmp_path, 2)
        (tmp_path / "mini-imagenet-cache-val.pkl").rename(tmp_path / "mini-imagenet-cache-validation.pkl")
        assert same(load_dataset("miniimagenet", tmp_path), mini)
        (tmp_path / "mini-imagenet-cache-test.pkl").unlink()
        with pytest.raises(DataError, match=r"^miniimagenet: [^ ]*-cache-test.pkl not found"):
            load_dataset("miniimagenet", tmp_path)

    @staticmethod
    def category(folder: Path, change: Callable[[str, dict[Any, Any]], Any] = lambda split, values: values) -> Path:
        """As MetaOptNet has them; labels count on from split to split."""
        first = 0
        for split in SPLITS:
            names = sorted({name for name, _ in mini_split(split, 2)})
            number = {name: first + k for k, name in enumerate(names)}
            first += len(names)
            images = np.stack([picture(seed) for _, seed in mini_split(split, 2)])
            labels = [number[name] for name, _ in mini_split(split, 2)]
            values = {"data": images, "labels": labels, "catname2label": number}
            phase = {"train": "train_phase_train"}.get(split, split)
            path = folder / f"miniImageNet_category_split_{phase}.pickle"
            path.write_bytes(pickle.dumps(change(split, values), protocol=2))
        return folder

    def test_category_pickles(self, mini: Dataset, tmp_path: Path) -> None:
        dataset = load_dataset("miniimagenet", self.category(tmp_path))
        assert same(dataset, mini), "named classes come in the order of the lists"

    @pytest.mark.parametrize("form", [float, str, np.array, lambda v: np.array(v, np.float32)[:, None], bytes])
    def test_labels_in_other_forms(self, form: Callable[[Any], Any], mini: Dataset, tmp_path: Path) -> None:
        def change(split: str, values: dict[Any, Any]) -> dict[bytes, Any]:
            names = {number: name for name, number in values["catname2label"].items()}
            if form is bytes:
                labels: Any = [names[k].encode() for k in values["labels"]]
            elif form is str:
                labels = [names[k] for k in values["labels"]]
            else:
                labels = [form(k) for k in values["labels"]] if form is float else form(values["labels"])
            named = {name.encode(): number for name, number in values["catname2label"].items()}
            return {b"data": values["data"], b"labels": labels, b"catname2label": named}

        assert same(load_dataset("miniimagenet", self.category(tmp_path, change)), mini)

    def test_without_names(self, tmp_path: Path) -> None:
        def change(split: str, values: dict[str, Any]) -> dict[str, Any]:
            return {"data": values["data"], "labels": values["labels"]}

        dataset = load_dataset("miniimagenet", self.category(tmp_path, change))
        assert [len(dataset.split(s).classes) for s in SPLITS] == [64, 16, 20]
        assert dataset.split("val").classes[:2] == ("val 000", "val 001")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v.pop("data"), r"has no usable 'data' \(n, 84, 84, 3\)"),
            (lambda v: v.pop("labels"), r"has no usable 'labels' \(it is missing\)"),
            (lambda v: v["labels"].pop(), "has 128 images, but 127 labels"),
            (lambda v: v.update(labels=[0.5] * 128), "it contains 0.5, which is not a whole number"),
            (lambda v: v.update(labels=[float("nan")] * 128), "it contains nan"),
            (lambda v: v.update(labels=[-1] * 128), "it contains -1"),
            (lambda v: v.update(labels=[[1, 2], [3]]), r"it contains \[1, 2\]"),
            (lambda v: v.update(labels=[k // 4 for k in range(128)]), "has 32 classes, but the train split .* has 64"),
            (lambda v: v.update(catname2label={"n01": 0}), "without the label 1:"),
            (
                lambda v: v.update(catname2label={f"n{k:08d}": k for k in range(64)}),
                "has 64 classes, which are not the 64 of Ravi",
            ),
        ],
    )
    def test_what_is_refused(self, change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
        def changed(split: str, values: dict[str, Any]) -> dict[str, Any]:
            if split == "train":
                change(values)
            return values

        self.category(tmp_path, changed)
        with pytest.raises(DataError, match=rf"phase_train.pickle .*{message}.*fetch it anew"):
            load_dataset("miniimagenet", tmp_path)

    def test_validation_images_of_training_classes_are_not_taken_for_the_validation_split(self, tmp_path: Path) -> None:
        self.category(tmp_path)
        path = tmp_path / "miniImageNet_category_split_val.pickle"
        path.rename(path.with_name("miniImageNet_category_split_train_phase_val.pickle"))
        with pytest.raises(DataError, match=r"category_split_val.pickle not found"):
            load_dataset("miniimagenet", tmp_path)


class TestMiniLists:
    @pytest.mark.parametrize(
        "place",
        ["images/{1}", "{1}", "{0}/{1}", "{0}", "."],
        ids=["images/class", "class", "split/class", "split", "beside"],
    )
    def test_beside_folders(self, place: str, mini: Dataset, flat: Path, tmp_path: Path) -> None:
        arranged(flat, tmp_path, lambda split, label, _: place.format(split, label))
        for split in SPLITS:
            shutil.copy(flat / f"{split}.csv", tmp_path)
        assert same(load_dataset("miniimagenet", tmp_path), mini)

    @pytest.mark.parametrize(
        ("head", "line"),
        [
            ("filename, label", "{file}, {label}"),
            ("image_name,class_name", "{file},{label}"),
            ("Image Name;Class", "{file};{label}"),
            (",filename,label,class_name", "7,{file},12,{label}"),
            ("label\tfile", "{label}\t{file}"),
            ("path,wnid", "images\\{file},{label}"),
            ("what,which", "{file},{label}"),
            (None, "{file},{label}"),
        ],
    )
    def test_columns(self, head: str | None, line: str, mini: Dataset, flat: Path, tmp_path: Path) -> None:
        (tmp_path / "split").mkdir()
        (tmp_path / "images").symlink_to(flat / "images")
        for split in SPLITS:
            rows = [row.split(",") for row in (flat / f"{split}.csv").read_text().splitlines()[1:]]
            lines = [line.format(file=file, label=label) for file, label in rows]
            text = "\n".join([head, *lines] if head is not None else lines)
            (tmp_path / "split" / f"{split}.csv").write_text(text + "\n\n")
        assert same(load_dataset("miniimagenet", tmp_path), mini)

    def test_files_that_are_absent(self, flat: Path, tmp_path: Path) -> None:
        arranged(flat, tmp_path, lambda split, label, _: f"images/{label}")
        for split in SPLITS:
            shutil.copy(flat / f"{split}.csv", tmp_path)
        name = class_list("miniimagenet_val")[3]
        for file in (tmp_path / "images" / name).iterdir():
            file.unlink()
        message = rf"2 images that val.csv lists are not in .*images/CLASS/? \(first: {name}"
        with pytest.raises(DataError, match=message):
            load_dataset("miniimagenet", tmp_path)
        shutil.rmtree(tmp_path / "images")
        with pytest.raises(
            DataError, match=r"128 images that train.csv lists are not in .*, nor in a folder of its cl"
        ):
            load_dataset("miniimagenet", tmp_path)

    @pytest.mark.parametrize("content", ["", "filename,label\n", "a,b\n" * 3, "filename,label\nx.jpg\n", "\0" * 99])
    def test_lists_of_something_else(self, content: str, flat: Path, tmp_path: Path) -> None:
        for split in SPLITS:
            (tmp_path / f"{split}.csv").write_text(content)
        (tmp_path / "images").symlink_to(flat / "images")
        with pytest.raises(DataError, match=r"train.csv") as error:
            load_dataset("miniimagenet", tmp_path)
        assert len(str(error.value)) < 500

    def test_a_list_of_90_megabytes(self, tmp_path: Path) -> None:
        for split in SPLITS:
            with (tmp_path / f"{split}.csv").open("wb") as file:
                file.truncate(90_000_000)
        with pytest.raises(DataError, match=r"train.csv is damaged .*it has 90,000,000 bytes"):
            load_dataset("miniimagenet", tmp_path)


class TestMiniFolders:
    @pytest.mark.parametrize(
        "place",
        ["{1}", "images/{1}", "{0}/{1}", "images/{0}/{1}"],
        ids=["flat", "images", "divided", "divided below images"],
    )
    def test_read(self, place: str, mini: Dataset, flat: Path, tmp_path: Path, capfd: Any) -> None:
        arranged(flat, tmp_path / "mini-imagenet", lambda split, label, _: place.format(split, label))
        dataset = load_dataset("miniimagenet", tmp_path)
        assert same(dataset, mini)
        assert "the folders of 100 classes in" in dataset.origin
        assert capfd.readouterr().err == ""

    def test_all_classes_in_train_and_val_are_joined(
        self, mini: Dataset, flat: Path, tmp_path: Path, capfd: Any
    ) -> None:
        arranged(flat, tmp_path, lambda split, label, number: f"{('train', 'val')[number]}/{label}")
        assert same(load_dataset("miniimagenet", tmp_path), mini)
        assert "train, val divide the images in another way than Ravi & Larochelle" in capfd.readouterr().err

    def test_what_is_refused(self, flat: Path, tmp_path: Path) -> None:
        arranged(flat, tmp_path, lambda split, label, number: f"{('train', 'val')[number]}/{label}")
        name = class_list("miniimagenet_test")[0]
        one = next((tmp_path / "train" / name).iterdir())
        (tmp_path / "val" / name / one.name).write_bytes(one.read_bytes())
        with pytest.raises(DataError, match=rf"{one} and .*/val/{name}/{one.name} are the same image, .*remove one"):
            load_dataset("miniimagenet", tmp_path)
        for part in ("train", "val"):
            shutil.rmtree(tmp_path / part / name)
        with pytest.raises(DataError, match=rf"has folders of 99 classes, which .* 100 \({name} is missing\)"):
            load_dataset("miniimagenet", tmp_path)
        (tmp_path / "train" / name).mkdir()
        with pytest.raises(DataError, match=f"has no images of {name}"):
            load_dataset("miniimagenet", tmp_path)
        shutil.copytree(tmp_path / "train" / class_list("miniimagenet_test")[1], tmp_path / "train" / "n99999999")
        with pytest.raises(DataError, match=r"has folders of 101 classes, .*n99999999 is not one of them"):
            load_dataset("miniimagenet", tmp_path)


class TestTieredLabels:
    """The images are all alike: what is tried is how they are labelled."""

    @pytest.fixture(scope="class")
    @staticmethod
    def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("arrays")
        for split in SPLITS:
            count = len(tiered_labels(split, 2)[0])
            images = np.zeros((count, 84, 84, 3), np.uint8)
            images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(count), 256)
            np.savez_compressed(folder / f"{split}_images.npz", images=images)
        return folder

    @staticmethod
    def labelled(arrays: Path, to: Path, write: Callable[[Path, str, list[int], int], None]) -> Dataset:
        first = 0
        for split in SPLITS:
            (to / f"{split}_images.npz").symlink_to(arrays / f"{split}_images.npz")
            labels, _ = tiered_labels(split, 2)
            write(to, split, labels, first)
            first += max(labels) + 1
        return load_dataset("tieredimagenet", to)

    FORMS: dict[str, Callable[[Path, str, list[int], int], Any]] = {  # noqa: RUF012
        "labels": lambda to, split, labels, first: {"labels": labels},
        "labels that count on": lambda to, split, labels, first: {"labels": [k + first for k in labels]},
        "bytes keys": lambda to, split, labels, first: {b"labels": labels},
        "an array": lambda to, split, labels, first: {"labels": np.array(labels)},
        "a column": lambda to, split, labels, first: {"labels": np.array(labels)[:, None]},
        "floats": lambda to, split, labels, first: {"labels": np.array(labels, np.float64)},
        "an ordered dict": lambda to, split, labels, first: collections.OrderedDict(labels=labels),
        "a default dict": lambda to, split, labels, first: collections.defaultdict(list, labels=labels),
        "a tuple": lambda to, split, labels, first: {"labels": tuple(labels)},
        "numpy's numbers": lambda to, split, labels, first: {"labels": [np.int64(k) for k in labels]},
        "a list alone": lambda to, split, labels, first: labels,
        "an array alone": lambda to, split, labels, first: np.array(labels) + first,
    }

    @pytest.mark.parametrize("form", FORMS)
    def test_pickled(self, form: str, arrays: Path, tmp_path: Path) -> None:
        def write(to: Path, split: str, labels: list[int], first: int) -> None:
            values = self.FORMS[form](to, split, labels, first)
            (to / f"{split}_labels.pkl").write_bytes(pickle.dumps(values, protocol=2 if "numpy" in form else 4))

        self.check(self.labelled(arrays, tmp_path, write))

    @pytest.mark.parametrize("form", ["npy", "npz"])
    def test_as_arrays(self, form: str, arrays: Path, tmp_path: Path) -> None:
        def write(to: Path, split: str, labels: list[int], first: int) -> None:
            if form == "npy":
                np.save(to / f"{split}_labels.npy", np.array(labels) + first)
            else:
                np.savez(to / f"{split}_labels.npz", labels=np.array(labels))

        self.check(self.labelled(arrays, tmp_path, write))

    @staticmethod
    def check(dataset: Dataset) -> None:
        assert [len(dataset.split(s).classes) for s in SPLITS] == [351, 97, 160]
        for split in SPLITS:
            part = dataset.split(split)
            assert part.classes[7] == f"{split} 007"
            labels, _ = tiered_labels(split, 2)
            expected = np.argsort(labels, kind="stable")
            # BGR in the file, RGB here.
            assert np.array_equal(part.images[:, 2, 0, 0].int() * 256 + part.images[:, 1, 0, 0].int(), expected)

    @pytest.mark.parametrize("form", ["list", "array"])
    def test_names(self, form: str, arrays: Path, tmp_path: Path) -> None:
        def write(to: Path, split: str, labels: list[int], first: int) -> None:
            names = [class_table(f"tieredimagenet_{split}")[k][0] for k in labels]
            values = {"labels": names if form == "list" else np.array(names)}
            (to / f"{split}_labels.pkl").write_bytes(pickle.dumps(values))

        dataset = self.labelled(arrays, tmp_path, write)
        assert dataset.split("val").classes == tuple(sorted(n for n, _ in class_table("tieredimagenet_val")))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"labels": [0, 0.5] * 97}, "has no usable 'labels' .it contains 0.5, which is not a whole number"),
            ({"labels": [True, False] * 97}, "it contains True|it contains False"),
            ({"labels": [10**30] * 194}, "it contains"),
            ({"labels": np.zeros((97, 2), int)}, "an array of shape"),
            ({"labels": None}, "has no usable 'label_specific' .it is missing"),
            ({"other": [1]}, "has no usable 'label_specific' .it is missing"),
            ({"labels": "text"}, "a str, not a list or an array"),
            ({"labels": []}, "the list is empty"),
            ({"labels": [k // 2 for k in range(160)]}, "has 80 classes, but tieredImageNet's val split has 97"),
            ({"labels": [k % 97 for k in range(193)]}, "has 193 labels, but val_images.npz has 194 images"),
            ({"labels": [f"n{k % 97:08d}" for k in range(194)]}, "has the class n00000000, which is not one of tiered"),
        ],
    )
    def test_what_is_refused(self, values: Any, message: str, arrays: Path, tmp_path: Path) -> None:
        def write(to: Path, split: str, labels: list[int], first: int) -> None:
            content = values if split == "val" else {"labels": labels}
            (to / f"{split}_labels.pkl").write_bytes(pickle.dumps(content))

        with pytest.raises(DataError, match=rf"val_labels.pkl .*({message}).*fetch it anew"):
            self.labelled(arrays, tmp_path, write)

    def test_a_class_in_two_splits(self, arrays: Path, tmp_path: Path) -> None:
        def write(to: Path, split: str, labels: list[int], first: int) -> None:
            (to / f"{split}_labels.pkl").write_bytes(pickle.dumps([f"thing {k}" for k in labels]))

        with pytest.raises(DataError, match="the labels say that 'thing 0' is in train and in val"):
            self.labelled(arrays, tmp_path, write)

    def test_without_labels(self, arrays: Path, tmp_path: Path) -> None:
        def write(to: Path, split: str, labels: list[int], first: int) -> None:
            if split != "val":
                np.save(to / f"{split}_labels.npy", labels)

        with pytest.raises(DataError, match=r"tieredimagenet: val_labels.pkl not found in .*, nor val_labels.npy or"):
            self.labelled(arrays, tmp_path, write)


class TestCifar:
    @pytest.fixture(scope="class")
    @staticmethod
    def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("released") / "cifar100"
        for k, name in enumerate(sorted(n for s in SPLITS for n in class_list(f"cifar_fs_{s}"))):
            (folder / "data" / name).mkdir(parents=True)
            for i in range(2):
                (folder / "data" / name / f"{name}_s_{i:06d}.png").write_bytes(png(picture(2 * k + i, 32)))
        (folder / "splits" / "bertinetto").mkdir(parents=True)
        for split in SPLITS:
            lines = "".join(f"{name}\n" for name in reversed(class_list(f"cifar_fs_{split}")))
            (folder / "splits" / "bertinetto" / f"{split}.txt").write_text(lines)
        return folder

    @pytest.mark.parametrize("name", ["cifar-fs", "fc100"])
    def test_as_released(self, name: str, released: Path) -> None:
        dataset = load_dataset(name, released)
        assert same(load_dataset(name, released.parent), dataset)
        names = sorted(n for s in SPLITS for n in class_list(f"cifar_fs_{s}"))
        for split in SPLITS:
            part = dataset.split(split)
            assert part.classes == tuple(class_list(f"{name.replace('-', '_')}_{split}"))
            assert set(part.counts) == {2}
            expected = picture(2 * names.index(part.classes[3]) + 1, 32).transpose(2, 0, 1)
            assert np.array_equal(part.images[7], expected)

    def test_what_is_refused(self, released: Path, tmp_path: Path) -> None:
        folder = tmp_path / "cifar100"
        shutil.copytree(released, folder)
        path = folder / "splits" / "bertinetto" / "val.txt"
        path.write_text(path.read_text() + "apple\n")
        with pytest.raises(
            DataError, match=r"bertinetto/val.txt lists 17 classes, .*'apple' is not one of .*delete the list"
        ):
            load_dataset("cifar-fs", tmp_path)
        assert load_dataset("fc100", tmp_path).image_shape == (3, 32, 32), "whose classes they do not divide"
        with path.open("wb") as file:
            file.truncate(90_000_000)
        with pytest.raises(DataError, match=r"val.txt is damaged .*90,000,000 bytes"):
            load_dataset("cifar-fs", tmp_path)
        shutil.rmtree(folder / "splits")
        shutil.rmtree(folder / "data" / "apple")
        with pytest.raises(DataError, match=r"cifar-fs: .*/data has 99 of CIFAR-100's classes, but not 'apple'"):
            load_dataset("cifar-fs", tmp_path)
        (folder / "data" / "apple").mkdir()
        with pytest.raises(DataError, match=r"data/apple has no images"):
            load_dataset("cifar-fs", tmp_path)


def validation(root: Path) -> np.ndarray:
    """The validation images of Omniglot, which are quicker read than all."""
    split = find_source("omniglot", Request(root)).splits["val"]
    images = np.empty((sum(split.counts), *split.shape), np.uint8)
    for chunk in split.read(0):
        images[chunk.rows] = chunk.images
    return images


class TestOmniglot:
    @staticmethod
    def unpacked(zips: Path, to: Path, place: str) -> None:
        for archive in zips.iterdir():
            with zipfile.ZipFile(archive) as file:
                file.extractall(to / place.format(archive.stem))

    def test_nested_once_more_and_below_its_parent(self, omniglot_zips: Path, tmp_path: Path) -> None:
        theirs = validation(omniglot_zips)
        self.unpacked(omniglot_zips, tmp_path / "a" / "omniglot-py", "{}")
        assert np.array_equal(validation(tmp_path / "a"), theirs)
        part = tmp_path / "a" / "omniglot-py" / "images_background" / "images_background" / "Greek"
        shutil.copytree(part, part.parents[1] / "Greek")
        with pytest.raises(DataError, match=r"images_background has drawings both in .* and in .*: delete one of them"):
            find_source("omniglot", Request(tmp_path / "a"))

    def test_torchvision_and_the_repository(self, omniglot_zips: Path, tmp_path: Path) -> None:
        for place in ("a/omniglot-py", "b/omniglot/python"):
            (tmp_path / place).parent.mkdir(parents=True)
            (tmp_path / place).symlink_to(omniglot_zips)
            source = find_source("omniglot", Request(tmp_path / place.split("/")[0]))
            assert source.splits["test"].counts[0] == 2


class TestFolder:
    def test_cub(self, tmp_path: Path) -> None:
        pictures(tmp_path / "CUB_200_2011" / "images", 12, 3)
        for beside in ("attributes", "parts"):
            (tmp_path / "CUB_200_2011" / beside).mkdir()
            (tmp_path / "CUB_200_2011" / beside / "list.txt").write_text("1 2 3\n")
        (tmp_path / "CUB_200_2011" / "images.txt").write_text("1 a.jpg\n")
        expected = load_dataset("folder", tmp_path / "CUB_200_2011" / "images", 8)
        assert same(load_dataset("folder", tmp_path / "CUB_200_2011", 8), expected)
        found = load_dataset("folder", tmp_path, 8)
        assert same(found, expected), "and from its parent"
        assert "CUB_200_2011/images of 12 classes" in found.origin

    def test_lists_beside_the_folder_of_classes(self, tmp_path: Path, metaheed: Run) -> None:
        pictures(tmp_path / "mine" / "images", 10, 2)
        assert metaheed("data", "split", tmp_path / "mine", "--seed", 5)[0] == 0
        dataset = load_dataset("folder", tmp_path / "mine", 8)
        assert "by its lists" in dataset.origin
        assert list(dataset.split("val").classes) == (tmp_path / "mine" / "val.txt").read_text().split()

    def test_folders_beside_may_be_classes_without_pictures(self, tmp_path: Path) -> None:
        pictures(tmp_path / "mine" / "cats", 8, 2)
        (tmp_path / "mine" / "dogs").mkdir()
        with pytest.raises(DataError, match=r"has 2 folders, cats, dogs, too few .*mine/cats, say\), or rename"):
            load_dataset("folder", tmp_path / "mine")

    @pytest.mark.parametrize("system", [0, 3, 10])
    def test_a_zip_with_backslashes(self, system: int, tmp_path: Path) -> None:
        folder = divided(tmp_path / "mine")
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in sorted(folder.rglob("*")):
                name = str(file.relative_to(tmp_path)).replace("/", "\\")
                member = zipfile.ZipInfo(name if file.is_file() else name + "\\")
                member.create_system = system
                archive.writestr(member, file.read_bytes() if file.is_file() else b"")
        assert same(load_dataset("folder", tmp_path / "x.zip", 20), load_dataset("folder", folder, 20))

    def test_a_backslash_in_a_name_made_elsewhere_is_one(self, tmp_path: Path) -> None:
        folder = divided(tmp_path / "mine")
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in sorted(folder.rglob("*.png")):
                member = zipfile.ZipInfo(str(file.relative_to(folder)).replace("train00/", "train\\00/"))
                member.create_system = 3
                archive.writestr(member, file.read_bytes())
        assert "train\\00" in load_dataset("folder", tmp_path / "x.zip", 20).split("train").classes


Form = Literal["NFC", "NFD"]
FORMS: tuple[Form, Form] = ("NFC", "NFD")
WORDS = ("Café", "Über", "Zürich", "naïve", "Ångström", "Éclair", "Ñandú", "Öl", "Äpfel", "Pâté", "한국어", "が")


class TestNames:
    """One folder with composed names (Linux) and one with decomposed ones (macOS)."""

    @staticmethod
    def folder(to: Path, form: Form, split: bool = False) -> Path:
        for k, word in enumerate(WORDS):
            for i, tail in enumerate("àz"):
                name = unicodedata.normalize(form, word)
                path = to / (SPLITS[k % 3] if split else "") / name / f"{unicodedata.normalize(form, tail)}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(picture(10 * k + i, 20)))
        return to

    @pytest.mark.parametrize("split", [False, True])
    @pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
    def test_the_same_on_either_system(self, kind: str, split: bool, tmp_path: Path) -> None:
        if kind == "folder":
            places = [self.folder(tmp_path / form, form, split) for form in FORMS]
        else:
            places = [
                Path(shutil.make_archive(str(tmp_path / form), kind, self.folder(tmp_path / f"in{form}", form, split)))
                for form in FORMS
            ]
        one, other = (load_dataset("folder", place, 8) for place in places)
        assert same(one, other)
        assert {name for s in SPLITS for name in other.split(s).classes} == set(WORDS)

    def test_a_zip_of_macos_does_not_say_that_its_names_are_utf_8(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path / "mine", "NFD", True)
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in sorted(folder.rglob("*.png")):
                archive.write(file, file.relative_to(folder))
        (tmp_path / "x.zip").write_bytes(unflagged((tmp_path / "x.zip").read_bytes()))
        with zipfile.ZipFile(tmp_path / "x.zip") as archive:
            assert not any(unicodedata.normalize("NFD", "Café") in name for name in archive.namelist())
        assert same(load_dataset("folder", tmp_path / "x.zip", 8), load_dataset("folder", folder, 8))

    def test_lists(self, tmp_path: Path, metaheed: Run) -> None:
        composed, decomposed = (self.folder(tmp_path / form, form) for form in FORMS)
        assert metaheed("data", "split", decomposed, "--seed", 5)[0] == 0
        for split in SPLITS:
            text = (decomposed / f"{split}.txt").read_text()
            (composed / f"{split}.txt").write_text(unicodedata.normalize("NFD", text))
        assert same(load_dataset("folder", composed, 8), load_dataset("folder", decomposed, 8))

    def test_two_folders_of_one_name(self, tmp_path: Path) -> None:
        for form in FORMS:
            self.folder(tmp_path, form)
        with pytest.raises(DataError, match=r"are two folders of one name, '.*', written in two ways .*: join them"):
            load_dataset("folder", tmp_path)

    def test_a_class_in_two_splits(self, tmp_path: Path) -> None:
        divided(tmp_path)
        for split, form in zip(("train", "test"), FORMS, strict=True):
            (tmp_path / split / f"{split}00").rename(tmp_path / split / unicodedata.normalize(form, "Café"))
        with pytest.raises(DataError, match=r"'Café' \(train and test\) in more than one split"):
            load_dataset("folder", tmp_path)

    def test_a_run_begun_on_one_is_judged_and_continued_on_the_other(self, tmp_path: Path, metaheed: Run) -> None:
        composed, decomposed = (self.folder(tmp_path / form, form) for form in FORMS)
        options = ["--data", "folder", "--image-size", 8, *SMALL, "--ways", 2, "--queries", 1, "--iterations", 1]
        status, _, err = metaheed("train", "maml", *options, "--data-root", decomposed, "--out", "run")
        assert status == 0, err
        classes = Path("run/classes.json")
        assert "Caf\\u00e9" in classes.read_text()
        then = {split: names for split, names in json.loads(classes.read_text()).items() if split in SPLITS}
        classes.write_text(json.dumps(then).replace("\\u00e9", "e\\u0301"))  # as older versions wrote it, unsealed
        shutil.rmtree(decomposed)
        composed.rename(decomposed)
        assert metaheed("evaluate", "run", "--tasks", 2)[0] == 0
        status, _, err = metaheed("train", "--resume", "run", "--iterations", 2)
        assert status == 0, err

    def test_a_known_class_is_known_in_either_form(self, tmp_path: Path, metaheed: Run) -> None:
        self.folder(tmp_path / "mine", "NFC", True)
        options = ["--data", "folder", "--image-size", 8, *SMALL, "--ways", 2, "--queries", 1, "--iterations", 1]
        status, _, err = metaheed("train", "maml", *options, "--data-root", tmp_path / "mine", "--out", "run")
        assert status == 0, err
        (tmp_path / "mine" / "train").rename(tmp_path / "mine" / "old")
        (tmp_path / "mine" / "test").rename(tmp_path / "mine" / "train")
        (tmp_path / "mine" / "old").rename(tmp_path / "mine" / "test")
        name = unicodedata.normalize("NFD", WORDS[0])
        (tmp_path / "mine" / "test" / WORDS[0]).rename(tmp_path / "mine" / "test" / name)
        status, _, err = metaheed("evaluate", "run", "--tasks", 2)
        assert status == 1
        assert f"was trained on classes that are in test now: {WORDS[0]}" in err


def unflagged(data: bytes) -> bytes:
    """A zip whose members do not say that their names are UTF-8."""
    bare = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            bare[member.header_offset + 7] &= ~8
        at = archive.start_dir
        for _ in archive.infolist():
            bare[at + 9] &= ~8
            at += 46 + sum(int.from_bytes(data[at + k :][:2], "little") for k in (28, 30, 32))
    return bytes(bare)


class TestPicklesOfPlainThings:
    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_containers(self, protocol: int, tmp_path: Path) -> None:
        values = {
            "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
            "default": collections.defaultdict(list, a=[1]),
            "range": range(3, 9, 2),
            "names": np.array(["n01", "n02"]),
            "bytes": np.array([b"n01", b"n02"]),
        }
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(values, protocol))
        found = load_arrays(tmp_path / "x.pkl", "x", "there")
        assert list(found["ordered"].items()) == [("b", 1), ("a", 2)]
        assert type(found["ordered"]) is type(found["default"]) is dict
        assert found["default"] == {"a": [1]}
        assert found["range"] == [3, 5, 7]
        assert read_labels(found["names"]) == read_labels(found["bytes"]) == ["n01", "n02"]

    @pytest.mark.parametrize(
        "content",
        [
            b"ccollections\ndefaultdict\n(cos\nsystem\ntR.",
            b"ccollections\ndefaultdict\n(S'x'\ntR.",
            b"ccollections\nOrderedDict\n((lS'ab'\natR.",
            b"c__builtin__\nxrange\n(L99999999999999999999999L\ntR.",
            b"c__builtin__\nxrange\n(I4000000\ntR0c__builtin__\nxrange\n(I4000000\ntR.",
            b"c__builtin__\nxrange\n(F1\ntR.",
            b"c__builtin__\nint\n(S'9'\ntR.",
            b"c__builtin__\neval\n(S'1'\ntR.",
        ],
    )
    def test_what_is_refused(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(DataError, match=r"x (is damaged|is not read)"):
            load_arrays(tmp_path / "x.pkl", "x", "there")


@pytest.mark.skipif(not (SHARED / "miniimagenet").is_dir(), reason="the real miniImageNet is not at hand")
def test_the_real_miniimagenets_validation_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pickle, and its pictures in the folders that some have; of 16 classes only, as the whole takes minutes."""
    monkeypatch.syspath_prepend(str(SHARED))
    unpack = __import__("unpack")
    classes = class_list("miniimagenet_val")
    assert unpack.miniimagenet_classes("val") == classes
    images = [np.asarray(p) for name in classes[:2] for _, p in unpack.miniimagenet_pictures(name)]
    assert len(images) == 1200
    assert {image.shape for image in images} == {(84, 84, 3)}
    sys.modules.pop("unpack")
    for split in SPLITS:
        names = class_list(f"miniimagenet_{split}")
        of_split = [images[(2 * k + i) % 1200] for k in range(len(names)) for i in range(2)]
        members = {name.encode(): [2 * k, 2 * k + 1] for k, name in enumerate(names)}
        path = tmp_path / "pickles" / f"mini-imagenet-cache-{split}.pkl"
        path.parent.mkdir(exist_ok=True)
        unpack.dump({b"image_data": np.stack(of_split), b"class_dict": members}, path)
        for k, name in enumerate(names):
            (tmp_path / "folders" / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(of_split[2 * k + i]).save(tmp_path / "folders" / name / f"{name}{i:08d}.png")
    assert same(load_dataset("miniimagenet", tmp_path / "pickles"), load_dataset("miniimagenet", tmp_path / "folders"))
