"""miniImageNet and tieredImageNet from miniatures of their files: colours, order, and what is said of damaged ones."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from metaheed.data import SPLITS, load_dataset
from metaheed.data.locate import class_list, class_table
from metaheed.errors import DataError
from tests.conftest import python2_pickle
from tests.data.making import (
    BLUE,
    RED,
    mini_lists,
    mini_pickles,
    mini_split,
    picture,
    tiered_arrays,
    tiered_labels,
    tiered_pickles,
)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_pickles(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def tiered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiered")
    return {"pickles": tiered_pickles(folder / "pickles"), "arrays": tiered_arrays(folder / "arrays")}


def assert_colours(images: torch.Tensor) -> None:
    """Red on the left, blue on the right, in RGB."""
    for half, colour in ((images[:, :, 10:, :38], RED), (images[:, :, 10:, 46:], BLUE)):
        assert (half == torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1)).all()


class TestMini:
    def test_pickles(self, mini: Path) -> None:
        dataset = load_dataset("miniimagenet", mini)
        assert dataset.image_shape == (3, 84, 84)
        assert "the pickles mini-imagenet-cache-*.pkl" in dataset.origin
        for split in SPLITS:
            part = dataset.split(split)
            assert part.classes == tuple(class_list(f"miniimagenet_{split}"))
            assert set(part.counts) == {3}
            assert_colours(part.images)
            seeds = [seed for name in part.classes for n, seed in mini_split(split, 3) if n == name]
            expected = np.stack([picture(seed) for seed in seeds]).transpose(0, 3, 1, 2)
            assert np.array_equal(part.images.numpy(), expected)
        assert dataset.mean == pytest.approx([(a + b) / 510 for a, b in zip(RED, BLUE, strict=True)], abs=0.01)

    def test_lists(self, mini: Path, tmp_path: Path) -> None:
        listed = load_dataset("miniimagenet", mini_lists(tmp_path / "mini-imagenet").parent)
        pickled = load_dataset("miniimagenet", mini)
        assert "images/ and the lists" in listed.origin
        for split in SPLITS:
            assert listed.split(split).fingerprint == pickled.split(split).fingerprint
        assert listed.mean == pickled.mean

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_numpys_numbers(self, protocol: int, mini: Path, tmp_path: Path) -> None:
        """Whoever makes the pickles anew writes list(array) soon enough."""
        for split in SPLITS:
            path = mini / f"mini-imagenet-cache-{split}.pkl"
            values = pickle.loads(path.read_bytes(), encoding="bytes")  # ours, written by this test run
            members = {k.decode(): list(np.array(v)) for k, v in values[b"class_dict"].items()}
            content = pickle.dumps({"image_data": values[b"image_data"], "class_dict": members}, protocol)
            (tmp_path / path.name).write_bytes(content)
        theirs, ours = load_dataset("miniimagenet", mini), load_dataset("miniimagenet", tmp_path)
        assert all(ours.split(s).fingerprint == theirs.split(s).fingerprint for s in SPLITS)

    def test_lists_as_a_spreadsheet_writes_them(self, mini: Path, tmp_path: Path) -> None:
        folder = mini_lists(tmp_path)
        for split in SPLITS:
            file = folder / f"{split}.csv"
            file.write_bytes(b"\xef\xbb\xbf" + file.read_text().replace("\n", "\r\n").encode())
        ours, theirs = load_dataset("miniimagenet", folder), load_dataset("miniimagenet", mini)
        assert all(ours.split(s).fingerprint == theirs.split(s).fingerprint for s in SPLITS)

    def test_lists_of_other_columns(self, tmp_path: Path) -> None:
        file = mini_lists(tmp_path, 1) / "val.csv"
        text = file.read_text().replace(".png,", "-png,").replace("filename,label", "picture,kind", 1)
        file.write_text(text)
        with pytest.raises(DataError, match=r"val.csv: its columns are \['picture', 'kind'\].*: rename them, .* label"):
            load_dataset("miniimagenet", tmp_path)

    def test_larger_images_are_resized(self, tmp_path: Path) -> None:
        images = load_dataset("miniimagenet", mini_lists(tmp_path, 1, 300)).split("val").images
        assert images.shape[1:] == (3, 84, 84)
        assert_colours(images)

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_written_anew_by_python_3(self, protocol: int, mini: Path, tmp_path: Path) -> None:
        for split in SPLITS:
            path = mini / f"mini-imagenet-cache-{split}.pkl"
            values = pickle.loads(path.read_bytes(), encoding="bytes")  # ours, written by this test run
            values = {
                "image_data": values[b"image_data"],
                "class_dict": {k.decode(): v for k, v in values[b"class_dict"].items()},
            }
            (tmp_path / path.name).write_bytes(pickle.dumps(values, protocol))
        theirs, ours = load_dataset("miniimagenet", mini), load_dataset("miniimagenet", tmp_path)
        assert all(ours.split(s).fingerprint == theirs.split(s).fingerprint for s in SPLITS)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([1], "has no usable 'image_data'"),
            ({b"image_data": np.zeros((2, 84, 84), np.uint8)}, "has no usable 'image_data'"),
            ({b"image_data": np.zeros((2, 84, 84, 3), np.uint8)}, "has no usable 'class_dict'"),
            ({b"image_data": np.zeros((2, 84, 84, 3), np.uint8), b"class_dict": {b"n01": [0]}}, "has 1 classes, which"),
        ],
    )
    def test_damaged(self, values: object, message: str, mini: Path, tmp_path: Path) -> None:
        for path in mini.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "mini-imagenet-cache-val.pkl").write_bytes(python2_pickle(values))
        with pytest.raises(DataError, match=rf"cache-val.pkl {message}.*: fetch it anew from https"):
            load_dataset("miniimagenet", tmp_path)

    @pytest.mark.parametrize(
        ("indices", "message"),
        [([0, 0], "lists an image of"), ([99], "not a list of numbers below 16"), (b"x", "not a list of numbers")],
    )
    def test_members_that_cannot_be(self, indices: object, message: str, mini: Path, tmp_path: Path) -> None:
        for path in mini.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        names = [name.encode() for name in class_list("miniimagenet_val")]
        members: dict[bytes, object] = {name: [k] for k, name in enumerate(names)}
        members[names[3]] = indices
        content = python2_pickle({b"image_data": np.zeros((16, 84, 84, 3), np.uint8), b"class_dict": members})
        (tmp_path / "mini-imagenet-cache-val.pkl").write_bytes(content)
        with pytest.raises(DataError, match=rf"cache-val.pkl .*{message}"):
            load_dataset("miniimagenet", tmp_path)


class TestTiered:
    @pytest.mark.parametrize("layout", ["pickles", "arrays"])
    def test_either_layout_comes_out_rgb(self, layout: str, tiered: dict[str, Path]) -> None:
        dataset = load_dataset("tieredimagenet", tiered[layout])
        assert [len(dataset.split(s).classes) for s in SPLITS] == [351, 97, 160]
        for split in SPLITS:
            part = dataset.split(split)
            assert set(part.counts) == {2}
            assert_colours(part.images)
            assert part.classes[7] == f"{split} 007 thing 7"
            specific, _ = tiered_labels(split, 2)
            seeds = [SPLITS.index(split) * 10_000 + i for k in (0, 7) for i, s in enumerate(specific) if s == k]
            shown = torch.cat([part.images[part.starts[k] :][:2] for k in (0, 7)])
            assert np.array_equal(shown.numpy(), np.stack([picture(s) for s in seeds]).transpose(0, 3, 1, 2))

    def test_both_layouts_are_the_same_data(self, tiered: dict[str, Path]) -> None:
        one, other = (load_dataset("tieredimagenet", path) for path in tiered.values())
        assert "pickled PNGs" in one.origin
        assert "(BGR)" in other.origin
        assert all(one.split(s).fingerprint == other.split(s).fingerprint for s in SPLITS)

    @pytest.mark.parametrize("where", ["{}_labels.npz", "{}_images.npz"])
    def test_labels_in_an_npz(self, where: str, tiered: dict[str, Path], tmp_path: Path) -> None:
        for split in SPLITS:
            with np.load(tiered["arrays"] / f"{split}_images.npz") as arrays:
                values = {"images": arrays["images"]}
            labels = {"labels": np.array(tiered_labels(split, 2)[0])}
            np.savez_compressed(tmp_path / f"{split}_images.npz", **values)
            if where == "{}_images.npz":
                labels |= values
            np.savez_compressed(tmp_path / where.format(split), **labels)  # type: ignore[arg-type]
        theirs = load_dataset("tieredimagenet", tiered["arrays"]).split("train")
        ours = load_dataset("tieredimagenet", tmp_path).split("train")
        assert torch.equal(ours.images, theirs.images)
        assert ours.classes[3] == "train 003"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v.pop(b"label_specific"), "has no usable 'label_specific'"),
            (
                lambda v: v.update({b"label_specific": [1, 2, 3]}),
                "has 3 classes, but tieredImageNet's val split has 97",
            ),
            (lambda v: v.update({b"label_general": [0] * 194}), "has 1 categories, but .* has 6"),
            (lambda v: v.update({b"label_specific": list(range(97))}), "labels|images"),
        ],
    )
    def test_labels_that_cannot_be(
        self, change: Callable[[dict[bytes, object]], None], message: str, tiered: dict[str, Path], tmp_path: Path
    ) -> None:
        for path in tiered["arrays"].iterdir():
            (tmp_path / path.name).symlink_to(path)
        specific, general = tiered_labels("val", 2)
        values: dict[bytes, object] = {b"label_specific": specific, b"label_general": general}
        change(values)
        (tmp_path / "val_labels.pkl").unlink()
        (tmp_path / "val_labels.pkl").write_bytes(python2_pickle(values))
        with pytest.raises(DataError, match=rf"val_labels.pkl {message}.*fetch it anew from https"):
            load_dataset("tieredimagenet", tmp_path)

    def test_the_files_class_counts_are_the_committed_ones(self) -> None:
        for split in SPLITS:
            assert len(set(tiered_labels(split, 1)[0])) == len(class_table(f"tieredimagenet_{split}"))

    def test_pngs_that_are_none_are_named_at_once(self, tiered: dict[str, Path], tmp_path: Path) -> None:
        for path in tiered["pickles"].iterdir():
            (tmp_path / path.name).symlink_to(path)
        values = pickle.loads((tiered["pickles"] / "val_images_png.pkl").read_bytes(), encoding="bytes")
        values[3], values[100] = values[3][:200], np.zeros((30, 1), np.uint8)
        (tmp_path / "val_images_png.pkl").unlink()
        (tmp_path / "val_images_png.pkl").write_bytes(python2_pickle(values))
        with pytest.raises(DataError, match=r"2 of the images .* cannot be read: fetch it anew") as error:
            load_dataset("tieredimagenet", tmp_path)
        assert "val_images_png.pkl, image 3: " in str(error.value)
        assert "val_images_png.pkl, image 100: not an image" in str(error.value)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([b"x"], "val_images_png.pkl has 1 images, but val_labels.pkl has 194"),
            ({}, "has no list of images"),
            ([np.zeros((2, 2), np.uint8), *[b""] * 193], None),
            ([5] * 194, r"image 0\) is damaged \(ValueError: not a PNG, but a int\)"),
        ],
    )
    def test_pickles_of_something_else(
        self, values: object, message: str | None, tiered: dict[str, Path], tmp_path: Path
    ) -> None:
        for path in tiered["pickles"].iterdir():
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / "val_images_png.pkl").unlink()
        (tmp_path / "val_images_png.pkl").write_bytes(python2_pickle(values))
        with pytest.raises(DataError, match=message or "194 of the images"):
            load_dataset("tieredimagenet", tmp_path)
