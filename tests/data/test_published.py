"""Omniglot and CIFAR-FS from their published files: what is read, and what is said of damaged ones."""

import functools
import gzip
import io
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from metaheed.data import SPLITS, Dataset, load_dataset
from metaheed.data.locate import class_list, class_table
from metaheed.data.reading.safe_pickle import load_arrays
from metaheed.errors import DataError
from tests.conftest import python2_pickle
from tests.data.making import picture, png


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("omniglot", (980, 220, 423)),
        ("omniglot_vinyals", (1028, 172, 423)),
        ("cifar_fs", (64, 16, 20)),
        ("fc100", (60, 20, 20)),
        ("miniimagenet", (64, 16, 20)),
    ],
)
def test_class_lists_have_the_sizes_of_the_splits_and_are_disjoint(name: str, sizes: tuple[int, ...]) -> None:
    lists = [class_list(f"{name}_{split}") for split in SPLITS]
    assert tuple(map(len, lists)) == sizes
    assert len({c for part in lists for c in part}) == sum(sizes)


def test_lists_of_the_same_classes_agree() -> None:
    def classes(name: str) -> set[str]:
        return {c for split in SPLITS for c in class_list(f"{name}_{split}")}

    assert classes("omniglot") == classes("omniglot_vinyals")
    assert classes("cifar_fs") == classes("fc100")


def test_tieredimagenet_lists() -> None:
    tables = [class_table(f"tieredimagenet_{split}") for split in SPLITS]
    assert tuple(map(len, tables)) == (351, 97, 160)
    assert len({name for table in tables for name, _ in table}) == 608
    categories = [{category for _, category in table} for table in tables]
    assert tuple(map(len, categories)) == (20, 6, 8)
    assert len(set.union(*categories)) == 34, "whole categories are kept apart"


def test_fc100_keeps_superclasses_apart(published: Path) -> None:
    folder = published / "cifar-100-python"
    meta = load_arrays(folder / "meta", "meta", "")
    part = load_arrays(folder / "test", "test", "", 4096)
    coarse_of = dict(zip(part[b"fine_labels"], part[b"coarse_labels"], strict=True))
    names = [name.decode() for name in meta[b"fine_label_names"]]
    coarse = [name.decode() for name in meta[b"coarse_label_names"]]
    assert tuple(len(class_list(f"fc100_{s}_superclasses")) for s in SPLITS) == (12, 4, 4)
    for split in SPLITS:
        found = {coarse[coarse_of[names.index(name)]] for name in class_list(f"fc100_{split}")}
        assert found == set(class_list(f"fc100_{split}_superclasses"))


def test_omniglot_split_is_the_documented_permutation() -> None:
    lists = [name for split in SPLITS for name in class_list(f"omniglot_{split}")]
    order = np.random.default_rng(0).permutation(1623)
    assert [sorted(lists)[i] for i in order] == lists


@functools.cache
def read_once(root: Path) -> Dataset:
    """Omniglot of a folder, for tests that only look at it. It is read within a test, where the cache is the tests'."""
    return load_dataset("omniglot", root)


class TestOmniglot:
    def test_read(self, omniglot_zips: Path) -> None:
        dataset = read_once(omniglot_zips)
        assert dataset.image_shape == (1, 28, 28)
        assert [len(dataset.split(s).classes) for s in SPLITS] == [4 * 980, 4 * 220, 4 * 423]
        assert dataset.split("val").classes[:1] == tuple(class_list("omniglot_val")[:1])
        pixels = dataset.split("train").images
        assert int(pixels.max()) == 255, "ink is 1"
        assert float(pixels.float().mean()) < 40, "paper is 0"
        assert (dataset.mean, dataset.std) == ((0.0,), (1.0,))

    def test_root_may_be_the_folder_above(self, omniglot_zips: Path, tmp_path: Path) -> None:
        (tmp_path / "omniglot").symlink_to(omniglot_zips, target_is_directory=True)
        assert load_dataset("omniglot", tmp_path).split("test").counts[0] == 2

    def test_missing(self, omniglot_zips: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"needs data_root.*images_background.zip.*github.com/brendenlake"):
            load_dataset("omniglot")
        with pytest.raises(DataError, match=r"nowhere is not a folder"):
            load_dataset("omniglot", tmp_path / "nowhere")
        shutil.copy(omniglot_zips / "images_background.zip", tmp_path)
        with pytest.raises(DataError, match=r"images_evaluation.zip not found; .*github.com/brendenlake") as error:
            load_dataset("omniglot", tmp_path)
        assert "images_background" not in str(error.value)

    @pytest.mark.parametrize("damage", ["truncated", "not a zip", "another zip", "bomb"])
    def test_damaged(self, damage: str, omniglot_zips: Path, tmp_path: Path) -> None:
        for archive in omniglot_zips.iterdir():
            shutil.copy(archive, tmp_path)
        victim = tmp_path / "images_background.zip"
        if damage == "truncated":
            victim.write_bytes(victim.read_bytes()[:50_000])
        elif damage == "not a zip":
            victim.write_bytes(b"<html>404</html>")
        else:
            content = {"another zip": b"", "bomb": b"\0" * (1 << 22)}[damage]
            name = "other.txt" if damage == "another zip" else "images_background/Greek/character01/0001_01.png"
            with zipfile.ZipFile(victim, "w", zipfile.ZIP_DEFLATED) as file:
                file.writestr(name, content)
        what = "is damaged|holds no drawing|its member .* claims 4194304 bytes"
        with pytest.raises(DataError, match=rf"images_background.zip:? ({what}).*github.com/brenden"):
            load_dataset("omniglot", tmp_path)

    @pytest.mark.parametrize("content", [b"\x89PNG\r\n", b"", "of another size"])
    def test_a_drawing_that_is_none(self, content: bytes | str, omniglot_zips: Path, tmp_path: Path) -> None:
        for archive in omniglot_zips.iterdir():
            with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / archive.name, "w") as new:
                for member in old.infolist():
                    bad = member.filename.endswith("Greek/character07/" + member.filename[-11:])
                    data = png(picture(1, 20)) if isinstance(content, str) else content
                    new.writestr(member, data if bad else old.read(member))
        with pytest.raises(DataError, match=r"2 of the images .* cannot be read: .*github.com/brenden") as error:
            load_dataset("omniglot", tmp_path)
        assert str(error.value).count("Greek/character07") == 2, "all of them are named at once"

    def test_a_member_whose_checksum_is_wrong(self, omniglot_zips: Path, tmp_path: Path) -> None:
        for archive in omniglot_zips.iterdir():
            shutil.copy(archive, tmp_path)
        victim = tmp_path / "images_evaluation.zip"
        data = bytearray(victim.read_bytes())
        at = data.find(b"IDAT")
        data[at + 6] ^= 0xFF
        victim.write_bytes(data)
        with pytest.raises(DataError, match=r"images_evaluation.zip is damaged \(BadZipFile: Bad CRC-32"):
            load_dataset("omniglot", tmp_path)

    def test_unpacked(self, omniglot_zips: Path, tmp_path: Path) -> None:
        for archive in omniglot_zips.iterdir():
            with zipfile.ZipFile(archive) as file:
                file.extractall(tmp_path / "omniglot")
        dataset = load_dataset("omniglot", tmp_path)
        assert "the folders images_background and images_evaluation" in dataset.origin
        zips = read_once(omniglot_zips)
        assert "the zip files" in zips.origin
        assert [s.fingerprint for s in dataset.splits.values()] == [s.fingerprint for s in zips.splits.values()]

    def test_vinyals(self, omniglot_zips: Path) -> None:
        dataset = load_dataset("omniglot-vinyals", omniglot_zips)
        assert [len(dataset.split(s).classes) for s in SPLITS] == [4 * 1028, 4 * 172, 4 * 423]
        ours = read_once(omniglot_zips)

        def drawings(data: Dataset, split: str, name: str) -> torch.Tensor:
            part = data.split(split)
            return part.images[part.starts[part.classes.index(name)] :][:2]

        name = next(c for c in class_list("omniglot_vinyals_test") if c in class_list("omniglot_train"))
        assert torch.equal(drawings(dataset, "test", name), drawings(ours, "train", name))

    def test_rotations_are_extra_classes(self, omniglot_zips: Path) -> None:
        split = read_once(omniglot_zips).split("val")
        assert split.classes[220] == split.classes[0] + "@90"
        assert split.classes[440 + 7] == split.classes[7] + "@180"
        for turn in range(4):
            turned = split.images[split.starts[220 * turn + 3]]
            assert torch.equal(turned, torch.rot90(split.images[split.starts[3]], turn, (1, 2)))

    def test_incomplete(self, omniglot_zips: Path, tmp_path: Path) -> None:
        for archive in omniglot_zips.iterdir():
            with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / archive.name, "w") as new:
                for member in old.infolist():
                    if "/Greek/" not in member.filename:
                        new.writestr(member, old.read(member))
        with pytest.raises(DataError, match=r"24 characters are missing from both.*first: Greek/character01"):
            load_dataset("omniglot", tmp_path)

    def test_the_real_one(self, published: Path) -> None:
        dataset = load_dataset("omniglot", published)
        assert all(set(dataset.split(s).counts) == {20} for s in SPLITS)
        ink = float(dataset.split("train").images.float().mean()) / 255
        assert 0.05 < ink < 0.12


class TestCifarFs:
    def test_read(self, cifar_folder: Path) -> None:
        dataset = load_dataset("cifar-fs", cifar_folder)
        assert dataset.image_shape == (3, 32, 32)
        assert [len(dataset.split(s).classes) for s in SPLITS] == [64, 16, 20]
        split = dataset.split("test")
        names = sorted(name for s in SPLITS for name in class_list(f"cifar_fs_{s}"))
        for k, name in enumerate(split.classes):
            images = split.images[split.starts[k] : split.starts[k] + split.counts[k]]
            assert split.counts[k] == 30
            assert (images[:, 1:] == names.index(name)).all()
            assert (images[:, 0] == names.index(name) + 100).all(), "red is the first channel"

    def test_statistics_are_the_train_splits(self, cifar_folder: Path) -> None:
        dataset = load_dataset("cifar-fs", cifar_folder)
        train = dataset.split("train").images.double() / 255
        assert dataset.mean == pytest.approx(train.mean((0, 2, 3)).tolist())
        assert dataset.std == pytest.approx(train.std((0, 2, 3), correction=0).tolist())

    def test_root_may_be_the_folder_itself(self, cifar_folder: Path) -> None:
        direct = load_dataset("cifar-fs", cifar_folder / "cifar-100-python")
        assert direct.split("val").fingerprint == load_dataset("cifar-fs", cifar_folder).split("val").fingerprint

    def test_archive(self, cifar_folder: Path, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
            archive.add(cifar_folder / "cifar-100-python", "cifar-100-python")
        dataset = load_dataset("cifar-fs", tmp_path)
        assert dataset.split("val").fingerprint == load_dataset("cifar-fs", cifar_folder).split("val").fingerprint
        whole = (tmp_path / "cifar-100-python.tar.gz").read_bytes()
        for part in (whole[: len(whole) // 2], b"<html>", gzip.compress(b"")):
            (tmp_path / "cifar-100-python.tar.gz").write_bytes(part)
            with pytest.raises(DataError, match=r"tar.gz (is damaged|lacks).*cs.toronto.edu"):
                load_dataset("cifar-fs", tmp_path)

    def test_missing(self, cifar_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"cifar-100-python/.* or cifar-100-python.tar.gz or CIFAR_FS.*cs.toronto.edu"
        ):
            load_dataset("cifar-fs", tmp_path)
        shutil.copytree(cifar_folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / "cifar-100-python" / "meta").unlink()
        with pytest.raises(DataError, match=r"cifar-100-python/meta not found; published at https"):
            load_dataset("cifar-fs", tmp_path)

    @pytest.mark.parametrize(
        ("part", "content"),
        [
            ("train", b""),
            ("train", python2_pickle({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0]})),
            ("train", python2_pickle({b"data": np.zeros((1, 3000), np.uint8), b"fine_labels": [0]})),
            ("train", python2_pickle({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [100]})),
            ("test", python2_pickle([1, 2])),
            ("meta", python2_pickle({b"fine_label_names": [b"apple"]})),
        ],
    )
    def test_damaged(self, part: str, content: bytes, cifar_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(cifar_folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / "cifar-100-python" / part).write_bytes(content)
        with pytest.raises(DataError, match=rf"{part}.*fetch it anew from https"):
            load_dataset("cifar-fs", tmp_path)

    def test_written_anew_by_python_3(self, cifar_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(cifar_folder, tmp_path, dirs_exist_ok=True)
        for part in ("train", "test", "meta"):
            path = tmp_path / "cifar-100-python" / part
            values = pickle.loads(path.read_bytes(), encoding="bytes")  # ours, written by this test run
            for protocol in (2, 4):
                path.write_bytes(pickle.dumps({k.decode(): v for k, v in values.items()}, protocol=protocol))
        dataset = load_dataset("cifar-fs", tmp_path)
        assert dataset.split("val").fingerprint == load_dataset("cifar-fs", cifar_folder).split("val").fingerprint

    def test_the_real_one(self, published: Path) -> None:
        dataset = load_dataset("cifar-fs", published)
        assert all(set(dataset.split(s).counts) == {600} for s in SPLITS)
        assert dataset.mean == pytest.approx((0.507, 0.487, 0.441), abs=0.01)


class TestCifarPickles:
    @pytest.mark.parametrize(("data", "file"), [("cifar-fs", "CIFAR_FS_{}.pickle"), ("fc100", "FC100_{}.pickle")])
    def test_read(self, data: str, file: str, tmp_path: Path) -> None:
        sizes = (64, 16, 20) if data == "cifar-fs" else (60, 20, 20)
        for split, size in zip(SPLITS, sizes, strict=True):
            labels = [k for _ in range(3) for k in range(10, 10 + size)]
            images = np.zeros((len(labels), 32, 32, 3), np.uint8)
            images[..., 0] = 200
            images[..., 2] = np.array(labels)[:, None, None]
            path = tmp_path / file.format(split)
            path.write_bytes(python2_pickle({b"data": images, b"labels": labels}))
        dataset = load_dataset(data, tmp_path)
        assert tuple(len(dataset.split(s).classes) for s in SPLITS) == sizes
        val = dataset.split("val")
        assert val.classes[3] == "val class 13"
        mine = val.images[val.starts[3] :][:3]
        assert (mine[:, 0] == 200).all(), "red first"
        assert (mine[:, 2] == 13).all()
        assert "the pickles" in dataset.origin
        (tmp_path / file.format("train")).write_bytes(python2_pickle({b"data": images, b"labels": labels}))
        with pytest.raises(DataError, match=rf"has 20 classes, but {data}'s train split has {sizes[0]}"):
            load_dataset(data, tmp_path)


def test_fc100(cifar_folder: Path) -> None:
    dataset = load_dataset("fc100", cifar_folder)
    assert [len(dataset.split(s).classes) for s in SPLITS] == [60, 20, 20]
    other = load_dataset("cifar-fs", cifar_folder)
    name = dataset.split("test").classes[0]
    found = next(s for s in other.splits.values() if name in s.classes)
    ours = dataset.split("test").images[:30]
    assert torch.equal(ours, found.images[found.starts[found.classes.index(name)] :][:30])


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("open('executed', 'w')",))


@pytest.mark.parametrize(
    ("value", "offender"),
    [
        (Evil(), r"builtins.exec|__builtin__.exec"),
        ({b"data": np.array([Evil()], dtype=object)}, r".*exec|an array of Python objects"),
        (io.BytesIO, r"_io.BytesIO"),
        (np.datetime64("2020"), r"an array of datetime64"),
        ({"a": np.random.default_rng}, r"numpy.random.*default_rng"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_never_runs_code(
    value: object, offender: str, protocol: int, cifar_folder: Path, in_folder: Path
) -> None:
    shutil.copytree(cifar_folder, in_folder, dirs_exist_ok=True)
    (in_folder / "cifar-100-python" / "meta").write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(DataError, match=rf"meta is not read: its pickle asks for ({offender})"):
        load_dataset("cifar-fs", in_folder)
    assert not (in_folder / "executed").exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"cos\nsystem\n(S'touch executed'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L9999999999999L\ntS'b'\ntR.",  # a huge array
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"(lp0\n" * 100_000,
        b"\x80\x02Pid\n.",
    ],
)
def test_hand_made_attacks(attack: bytes, cifar_folder: Path, in_folder: Path) -> None:
    shutil.copytree(cifar_folder, in_folder, dirs_exist_ok=True)
    (in_folder / "cifar-100-python" / "meta").write_bytes(attack)
    with pytest.raises(DataError, match=r"meta"):
        load_dataset("cifar-fs", in_folder)
    assert not (in_folder / "executed").exists()
