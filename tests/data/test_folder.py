"""Pictures of one's own: layouts, formats, and what is said of what cannot be used."""

import io
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from metaheed.data import SPLITS, load_dataset
from metaheed.data.reading import trees
from metaheed.data.reading.decode import decode_rgb
from metaheed.data.reading.trees import open_tree
from metaheed.data.sets.folder import split_classes
from metaheed.errors import DataError
from metaheed.files.opening import read_bounded
from tests.conftest import Run
from tests.data.making import divided, picture, pictures, png, zipped
from tests.test_training import SMALL

NOISE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A small file that claims to be a picture of 12000×9000 pixels."""
    data = bytearray(encoded(Image.fromarray(NOISE[..., 0]), "BMP"))
    data[18:26] = struct.pack("<ii", 12000, 9000)
    return bytes(data)


def resized(image: Image.Image, side: int = 24) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)).transpose(2, 0, 1)


class TestFormats:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
    def test_lossless_to_the_pixel_and_jpeg_as_pillow_reads_it(self, kind: str) -> None:
        data = encoded(Image.fromarray(NOISE), kind, **({"lossless": True} if kind == "WEBP" else {}))
        expected = resized(Image.open(io.BytesIO(data)) if kind == "JPEG" else Image.fromarray(NOISE))
        assert np.array_equal(decode_rgb(data, 24), expected)

    def test_an_image_of_the_right_size_is_left_alone(self) -> None:
        image = picture(7, 24)
        assert np.array_equal(decode_rgb(png(image), 24), image.transpose(2, 0, 1))

    def test_grey_palette_and_one_bit(self) -> None:
        grey = Image.fromarray(NOISE[..., 0])
        assert np.array_equal(decode_rgb(encoded(grey, "PNG"), 24), resized(grey))
        palette = Image.fromarray(NOISE).quantize(16)
        assert np.array_equal(decode_rgb(encoded(palette, "PNG"), 24), resized(palette))
        bits = Image.fromarray(NOISE[..., 0]).convert("1")
        assert np.array_equal(decode_rgb(encoded(bits, "TIFF"), 24), resized(bits))
        ink = Image.fromarray(NOISE).convert("CMYK")
        data = encoded(ink, "JPEG")
        assert np.array_equal(decode_rgb(data, 24), resized(Image.open(io.BytesIO(data))))

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_transparency_is_white(self, mode: str) -> None:
        image = Image.new("RGBA", (20, 20), (200, 200, 200, 255))
        image.paste((0, 0, 0, 0), (0, 0, 20, 10))
        if mode == "P":
            image = image.convert("P", palette=Image.Palette.ADAPTIVE)
            data = encoded(image, "PNG", transparency=image.getpixel((0, 0)))
        else:
            data = encoded(image.convert(mode), "PNG")
        out = decode_rgb(data, 20)
        assert (out[:, :7] == 255).all()
        assert (np.abs(out[:, 13:].astype(int) - 200) <= 1).all()

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bits_are_scaled_not_cut_off(self, kind: str) -> None:
        ramp = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
        out = decode_rgb(encoded(Image.fromarray(ramp), kind), 32)
        assert np.array_equal(out[1, 5], np.round(ramp[5] / 257).astype(np.uint8))

    def test_16_bit_grey_with_a_transparent_value(self) -> None:
        values = np.full((8, 8), 1000, np.uint16)
        values[:, 4:] = 30000
        out = decode_rgb(encoded(Image.fromarray(values), "PNG", transparency=1000), 8)
        assert (out[:, :, :4] == 255).all()
        assert (out[:, :, 4:] == 117).all()

    def test_16_bits_take_little_memory(self) -> None:
        data = encoded(Image.fromarray(np.zeros((2000, 2000), np.uint16)), "PNG")
        tracemalloc.start()
        decode_rgb(data, 24)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 9 * 2000 * 2000, "a picture of the largest size stays far below 2 GB"

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
    def test_exif_rotation(self, kind: str) -> None:
        """Pillow itself turns TIFFs as it loads them: no picture is turned twice."""
        image = Image.fromarray(picture(3, 24))
        lossless: dict[str, dict[str, int]] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": 1}}
        options = lossless.get(kind, {})
        with Image.open(io.BytesIO(encoded(image, kind, **options))) as untagged:
            plain = untagged.convert("RGB")
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            plain.getexif()[0x0112] = orientation
            expected = np.asarray(ImageOps.exif_transpose(plain)).transpose(2, 0, 1)
            assert np.array_equal(decode_rgb(encoded(image, kind, exif=exif, **options), 24), expected), orientation

    def test_the_first_of_several_frames(self) -> None:
        frames = [Image.fromarray(picture(k, 24)) for k in (1, 2)]
        data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
        assert np.array_equal(decode_rgb(data, 24), picture(1, 24).transpose(2, 0, 1))

    def test_what_is_refused(self) -> None:
        with pytest.raises(ValueError, match="floating-point"):
            decode_rgb(encoded(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"), 24)
        with pytest.raises(ValueError, match="more than 16 bits"):
            decode_rgb(encoded(Image.fromarray(np.full((9, 9), 1 << 20, np.int32)), "TIFF"), 24)
        with pytest.raises(OSError, match="identify"):
            decode_rgb(encoded(Image.fromarray(NOISE), "GIF"), 24)


class TestLayouts:
    def test_divided(self, tmp_path: Path) -> None:
        dataset = load_dataset("folder", divided(tmp_path), image_size=20)
        assert dataset.image_shape == (3, 20, 20)
        assert "divided into train/, val/ and test/" in dataset.origin
        for split in SPLITS:
            part = dataset.split(split)
            assert part.classes == tuple(f"{split}{k:02d}" for k in range(3))
            assert part.counts == (4, 4, 4)
            expected = np.asarray(Image.open(tmp_path / split / f"{split}01" / "002.png")).transpose(2, 0, 1)
            assert np.array_equal(part.images[4 + 2].numpy(), expected)

    def test_valid_is_val(self, tmp_path: Path) -> None:
        (divided(tmp_path) / "val").rename(tmp_path / "valid")
        assert load_dataset("folder", tmp_path).split("val").classes[0] == "val00"
        assert load_dataset("folder", tmp_path).image_shape == (3, 84, 84)

    def test_split_by_seed(self, tmp_path: Path) -> None:
        pictures(tmp_path, 25, 2)

        def classes(seed: int | None) -> list[tuple[str, ...]]:
            dataset = load_dataset("folder", tmp_path, 8, seed)
            return [dataset.split(s).classes for s in SPLITS]

        first = classes(None)
        assert [len(part) for part in first] == [16, 4, 5]
        assert len({name for part in first for name in part}) == 25
        assert classes(0) == first != classes(1)

    def test_the_split_is_the_same_on_every_machine(self) -> None:
        """Recorded once: a change here would silently move classes between train and test."""
        lists = split_classes([f"c{k}" for k in range(10)], 3, 0.2, 0.2, "here")
        assert lists == RECORDED

    def test_lists(self, tmp_path: Path, metaheed: Run) -> None:
        pictures(tmp_path / "mine", 10, 2)
        status, out, _ = metaheed("data", "split", tmp_path / "mine", "--seed", 5, "--val", 0.3, "--test", 0.3)
        assert status == 0
        assert "train.txt: 4 classes" in out
        dataset = load_dataset("folder", tmp_path / "mine", 8)
        assert "by its lists" in dataset.origin
        lines = [(tmp_path / "mine" / f"{s}.txt").read_text().split() for s in SPLITS]
        assert [list(dataset.split(s).classes) for s in SPLITS] == lines
        assert [len(part) for part in lines] == [4, 3, 3]
        before = (tmp_path / "mine" / "train.txt").read_text()
        assert metaheed("data", "split", tmp_path / "mine", "--seed", 6)[0] == 1
        assert (tmp_path / "mine" / "train.txt").read_text() == before
        assert metaheed("data", "split", tmp_path / "mine", "--seed", 6, "--overwrite")[0] == 0
        assert (tmp_path / "mine" / "train.txt").read_text() != before

    @pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
    @pytest.mark.parametrize("layout", ["divided", "classes"])
    def test_archives_are_as_the_folder(self, kind: str, layout: str, tmp_path: Path) -> None:
        folder = tmp_path / "mine"
        folder = divided(folder) if layout == "divided" else pictures(folder)
        (folder / ".DS_Store").write_bytes(b"x")
        archive = tmp_path / f"mine.{kind}"
        if kind == "zip":
            zipped(folder, archive)
        else:
            with tarfile.open(archive, "w:gz" if kind == "tar.gz" else "w") as file:
                for path in sorted(folder.rglob("*"), reverse=True):  # in another order than the names'
                    file.add(path, path.relative_to(tmp_path), recursive=False)
        ours, theirs = load_dataset("folder", archive, 20), load_dataset("folder", folder, 20)
        assert "the archive" in ours.origin
        assert [s.fingerprint for s in ours.splits.values()] == [s.fingerprint for s in theirs.splits.values()]

    @pytest.mark.parametrize("kind", ["zip", "tar"])
    def test_lists_in_archives(self, kind: str, tmp_path: Path, metaheed: Run) -> None:
        folder = pictures(tmp_path / "mine", 10, 2)
        assert metaheed("data", "split", folder, "--seed", 5)[0] == 0
        archive = tmp_path / f"mine.{kind}"
        if kind == "zip":  # below a folder of its own
            zipped(folder, archive)
        else:  # as `tar cf mine.tar .` makes it
            with tarfile.open(archive, "w") as tar:
                tar.add(folder, ".")
        ours, theirs = load_dataset("folder", archive, 8), load_dataset("folder", folder, 8)
        assert "its classes split by its lists" in ours.origin
        assert [s.fingerprint for s in ours.splits.values()] == [s.fingerprint for s in theirs.splits.values()]

    def test_an_archive_of_one_split_is_not_a_folder_of_classes(self, tmp_path: Path) -> None:
        archive = zipped(pictures(tmp_path / "train"), tmp_path / "x.zip")
        with pytest.raises(DataError, match="has train but no images in folders of classes in val and test"):
            load_dataset("folder", archive)

    def test_splits_in_capitals(self, tmp_path: Path) -> None:
        divided(tmp_path)
        for split, name in (("train", "Train"), ("val", "Validation"), ("test", "TEST")):
            (tmp_path / split).rename(tmp_path / f"{split}.moved").rename(tmp_path / name)
        assert [load_dataset("folder", tmp_path, 8).split(s).classes[0] for s in SPLITS] == [f"{s}00" for s in SPLITS]

    def test_images_however_deep(self, tmp_path: Path) -> None:
        folder = pictures(tmp_path / "mine")
        deep = folder / "class00" / "a" / "b" / "c" / "d" / "e"
        deep.mkdir(parents=True)
        (deep / "x.png").write_bytes(png(picture(1)))
        (deep / "loop").symlink_to(folder, target_is_directory=True)
        dataset = load_dataset("folder", folder, 8)
        counts = {c: n for s in dataset.splits.values() for c, n in zip(s.classes, s.counts, strict=True)}
        assert counts == {f"class{k:02d}": 5 if k == 0 else 4 for k in range(10)}

    def test_what_is_passed_over_is_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = divided(tmp_path / "mine")
        (folder / "train" / "loose.png").write_bytes(png(picture(1)))
        (folder / "val" / "val00" / "moving.GIF").write_bytes(b"GIF89a")
        (folder / "val" / "val00" / "Thumbs.db").write_bytes(b"x")
        load_dataset("folder", folder, 8)
        assert "2 files are passed over (1 .gif, 1 .png; first: train/loose.png)" in capsys.readouterr().err

    def test_classes_that_no_list_names_are_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = pictures(tmp_path / "mine", 7, 2)
        for k, split in enumerate(SPLITS):
            (folder / f"{split}.txt").write_bytes(f"\ufeffclass{2 * k:02d}\r\nclass{2 * k + 1:02d}\r\n".encode())
        assert load_dataset("folder", folder, 8).split("val").classes == ("class02", "class03")
        assert "1 classes are in none of train.txt, val.txt and test.txt, and left out (first: 'class06')" in (
            capsys.readouterr().err
        )

    def test_classes_without_a_picture_that_is_read(self, tmp_path: Path) -> None:
        folder = divided(tmp_path / "mine")
        (folder / "train" / "empty").mkdir()
        (folder / "test" / "gifs").mkdir()
        (folder / "test" / "gifs" / "x.gif").write_bytes(b"GIF89a")
        with pytest.raises(DataError, match=r"too few images .*: 'empty' \(0\), 'gifs' \(0\)"):
            load_dataset("folder", folder)

    def test_what_is_no_image_is_passed_over(self, tmp_path: Path) -> None:
        folder = pictures(tmp_path / "mine")
        before = load_dataset("folder", folder, 8).split("train").fingerprint
        (folder / "readme.txt").write_text("mine")
        (folder / "class00" / "Thumbs.db").write_bytes(b"x")
        (folder / "class00" / ".hidden.png").write_bytes(b"x")
        (folder / "loose.png").write_bytes(png(picture(1)))
        assert load_dataset("folder", folder, 8).split("train").fingerprint == before


RECORDED = {
    "train": ["c1", "c3", "c4", "c7", "c8", "c9"],
    "val": ["c5", "c6"],
    "test": ["c0", "c2"],
}


def test_all_unreadable_files_are_named_at_once(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "mine")
    whole = (folder / "class03" / "001.png").read_bytes()
    (folder / "class03" / "001.png").write_bytes(whole[:-30])
    (folder / "class05" / "000.png").write_bytes(b"GIF89a")
    (folder / "class07" / "002.png").write_bytes(b"")
    with pytest.raises(DataError) as error:
        load_dataset("folder", folder)
    text = str(error.value)
    assert "3 of the images" in text
    assert "repair or remove them" in text
    for name in (
        "class03/001.png: image file is truncated",
        "class05/000.png: not an image",
        "class07/002.png: not an",
    ):
        assert name in text


def test_a_file_that_the_system_does_not_give_is_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(tmp_path / "mine")
    (folder / "class03" / "001.png").write_bytes(b"")

    def denied(path: Path, most: int | None = None) -> bytes:
        if path.name == "002.png" and path.parent.name == "class05":
            raise PermissionError(13, "Permission denied")
        return read_bounded(path, most)

    monkeypatch.setattr(trees, "read_bounded", denied)
    with pytest.raises(DataError, match="2 of the images") as error:
        load_dataset("folder", folder)
    assert "class05/002.png: Permission denied" in str(error.value)
    assert "class03/001.png: not an image" in str(error.value)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "mine")
    (folder / "class00" / "000.bmp").write_bytes(bomb())
    with (
        pytest.raises(DataError, match=r"class00/000.bmp: it claims 12000×9000 pixels, more than 89478485"),
        pytest.warns(Image.DecompressionBombWarning),
    ):
        load_dataset("folder", folder)


def test_images_in_two_classes_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = divided(tmp_path / "mine")
    load_dataset("folder", folder)
    assert capsys.readouterr().err == ""
    same = (folder / "train" / "train01" / "000.png").read_bytes()
    (folder / "test" / "test02" / "again.png").write_bytes(same)
    (folder / "train" / "train01" / "same-class.png").write_bytes(same)
    load_dataset("folder", folder)
    err = capsys.readouterr().err
    assert "1 images appear in two classes, 1 of them in two splits" in err
    assert "train/train01/000.png and test/test02/again.png are the same image" in err


class TestArchives:
    @pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "C:\\x.png", "a\\..\\..\\x.png"])
    def test_members_that_leave_the_folder(self, name: str, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
            file.writestr(zipfile.ZipInfo(name), b"x")
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        for archive in ("x.zip", "x.tar"):
            with pytest.raises(DataError, match=r"its member .* would leave the folder"):
                open_tree(tmp_path / archive)

    def test_links_and_devices(self, tmp_path: Path) -> None:
        link = zipfile.ZipInfo("a/x.png")
        link.external_attr = 0o120777 << 16
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
            file.writestr(link, "/etc/passwd")
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            member = tarfile.TarInfo("a/x.png")
            member.type, member.linkname = kind, "/etc/passwd"
            with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
                tar.addfile(member)
        for archive in tmp_path.iterdir():
            with pytest.raises(DataError, match=r"'a/x.png' is a link or a device"):
                open_tree(archive)

    def test_absurd_sizes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a/x.png", bytes(70 << 20))
        with pytest.raises(DataError, match=r"'a/x.png' claims 73400320 bytes"):
            open_tree(tmp_path / "x.zip")
        monkeypatch.setattr("metaheed.data.reading.trees._SMALL", 1 << 20)
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
            for k in range(3):
                member = tarfile.TarInfo(f"a/{k}.png")
                member.size = 1 << 20
                tar.addfile(member, io.BytesIO(bytes(1 << 20)))
        with pytest.raises(DataError, match=r"x.tar.gz unpacks to more than \d+ bytes, 200 times its own size"):
            open_tree(tmp_path / "x.tar.gz")

    def test_members_that_are_there_twice(self, tmp_path: Path) -> None:
        archive = zipped(pictures(tmp_path / "mine"), tmp_path / "x.zip")
        with zipfile.ZipFile(archive, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("mine/class00/000.png", png(picture(5)))
        with pytest.raises(DataError, match=r"'mine/class00/000.png' is there twice"):
            open_tree(archive)

    @pytest.mark.parametrize("first", [True, False])
    def test_a_header_of_absurd_size(self, first: bool, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
            if not first:
                tar.addfile(tarfile.TarInfo("a/0.png"))
            member = tarfile.TarInfo("a/1.png")
            member.pax_headers = {"comment": "x" * (8 << 20)}
            tar.addfile(member)
        with pytest.raises(
            DataError, match=r"x.tar.gz is damaged \(ValueError: a header claims 8\d+ bytes.*: unpack it"
        ):
            open_tree(tmp_path / "x.tar.gz")

    def test_encrypted_and_damaged(self, tmp_path: Path) -> None:
        archive = zipped(pictures(tmp_path / "mine"), tmp_path / "x.zip")
        data = bytearray(archive.read_bytes())
        at = data.find(b"PK\x01\x02")
        data[at + 8] |= 1
        (tmp_path / "locked.zip").write_bytes(data)
        with pytest.raises(DataError, match="is encrypted"):
            open_tree(tmp_path / "locked.zip")
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / "mine", "mine")
        whole = (tmp_path / "x.tar.gz").read_bytes()
        (tmp_path / "x.tar.gz").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"x.tar.gz is damaged \(.*: unpack it with a tool you trust"):
            open_tree(tmp_path / "x.tar.gz")


class TestTraining:
    def test_the_split_is_recorded_and_kept(self, tmp_path: Path, metaheed: Run) -> None:
        folder = pictures(tmp_path / "mine", 24, 6)
        options = ["--data", "folder", "--data-root", folder, "--image-size", 28, "--split-seed", 4, *SMALL]
        status, _, err = metaheed("train", "maml", *options, "--ways", 3, "--iterations", 2, "--out", "run")
        assert status == 0, err
        assert "its classes split by seed 4" in err
        assert "split_seed: 4" in Path("run/config.yaml").read_text()
        assert metaheed("evaluate", "run", "--tasks", 5)[0] == 0
        pictures(folder, 5, 6, prefix="added")
        status, _, err = metaheed("train", "--resume", "run", "--iterations", 3)
        assert status == 1
        assert "was begun with other classes: " in err
        status, _, err = metaheed("evaluate", "run", "--tasks", 5)
        assert status == 1
        assert "was trained on classes that are in test now: class" in err
