"""Every row of docs/data.md's table of errors is run: what the table shows is what a user sees."""

import io
import json
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaheed.data import SPLITS, Request, find_source
from metaheed.data import store as store_module
from metaheed.data.locate import class_list
from metaheed.data.preparing import prepare
from tests.conftest import ROOT, Run, python2_pickle
from tests.data.making import divided, mini_lists, mini_pickles, pictures, png, tiered_arrays, tiered_pickles
from tests.data.test_folder import NOISE, bomb, encoded
from tests.test_training import SMALL

Make = Callable[[Path, pytest.FixtureRequest], list[object]]
ROWS: dict[str, Make] = {}


def row(*texts: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        ROWS.update(dict.fromkeys(texts, make))
        return make

    return add


def train(name: str, root: object, *more: object) -> list[object]:
    return ["train", "maml", "--data", name, "--data-root", root, *SMALL, "--iterations", 1, *more]


@row("needs --data-root")
def _(_: Path, request: pytest.FixtureRequest) -> list[object]:
    return ["train", "maml", "--data", "fc100"]


@row("--data-root … is not a folder")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return train("miniimagenet", path / "nowhere")


@row("is a file, but … is looked for in a folder")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (path / "mini.tar").write_bytes(b"x")
    return train("miniimagenet", path / "mini.tar")


@row("miniimagenet: nothing of it is recognised in")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return train("miniimagenet", path)


@row("miniimagenet: … not found; published at")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (mini_pickles(path, 1) / "mini-imagenet-cache-test.pkl").unlink()
    return train("miniimagenet", path)


@row("tieredimagenet: neither … found in")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return train("tieredimagenet", path)


@row("train.csv lists are not in … (first:")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    next((mini_lists(path, 1) / "images").glob(f"{class_list('miniimagenet_train')[0]}*")).unlink()
    return train("miniimagenet", path)


@row("is not read: its pickle asks for … which could run code")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (mini_pickles(path, 1) / "mini-imagenet-cache-test.pkl").write_bytes(pickle.dumps(print))
    return train("miniimagenet", path)


@row("is damaged (…): fetch it anew from")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    file = mini_pickles(path, 1) / "mini-imagenet-cache-test.pkl"
    file.write_bytes(file.read_bytes()[:50_000])
    return train("miniimagenet", path)


@row("has no usable 'image_data'")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (mini_pickles(path, 1) / "mini-imagenet-cache-test.pkl").write_bytes(python2_pickle({}))
    return train("miniimagenet", path)


@row("has 20 classes, which are not the 64 of Ravi & Larochelle's train split")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    mini_pickles(path, 1)
    shutil.copy(path / "mini-imagenet-cache-test.pkl", path / "mini-imagenet-cache-train.pkl")
    return train("miniimagenet", path)


@row("has 3 classes, but tieredImageNet's train split has 351")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (tiered_arrays(path, 1) / "train_labels.pkl").write_bytes(python2_pickle({b"label_specific": [0, 1, 2]}))
    return train("tieredimagenet", path)


@row("has 3 images, but … has 702 labels: fetch both anew")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (tiered_pickles(path, 2) / "train_images_png.pkl").write_bytes(python2_pickle([b"a", b"b", b"c"]))
    return train("tieredimagenet", path)


@row("has 20 classes, but fc100's train split has 60")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    values = {b"data": np.zeros((20, 32, 32, 3), np.uint8), b"labels": list(range(20))}
    for split in ("train", "val", "test"):
        (path / f"FC100_{split}.pickle").write_bytes(python2_pickle(values))
    return train("fc100", path)


@row("of the images in … cannot be read: fetch it anew")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    next((mini_lists(path, 1) / "images").iterdir()).write_bytes(b"none")
    return train("miniimagenet", path)


def _omniglot(path: Path, request: pytest.FixtureRequest, left_out: str) -> list[object]:
    for archive in request.getfixturevalue("omniglot_zips").iterdir():
        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path / archive.name, "w") as new:
            for member in old.infolist():
                if not re.search(left_out, member.filename):
                    new.writestr(member, old.read(member))
    return train("omniglot", path)


@row("24 characters are missing from both")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return _omniglot(path, request, "/Greek/")


@row("others have 2: fetch both anew")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return _omniglot(path, request, r"/Greek/character03/\d+_02")


@row("holds no drawing of the form")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return _omniglot(path, request, "images_background")


def _zip(path: Path, name: str, content: bytes = b"", attributes: int = 0) -> list[object]:
    member = zipfile.ZipInfo(name)
    member.external_attr = attributes << 16
    member.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path / "x.zip", "w") as file:
        file.writestr(member, content)
    return train("folder", path / "x.zip")


@row("would leave the folder, so that the archive may be an attack")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return _zip(path, "a/../../x.png")


@row("is a link or a device, not a file")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return _zip(path, "a/x.png", b"/etc/passwd", 0o120777)


@row("claims … bytes, more than any image or part has")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return _zip(path, "a/x.png", bytes(70 << 20))


@row("unpacks to more than … times its own size")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    with tarfile.open(path / "x.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("a/x.png")
        member.size = 70 << 20
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    return train("folder", path / "x.tar.gz")


@row("is encrypted, and no password is known")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    arguments = _zip(path, "a/x.png", b"x")
    data = bytearray((path / "x.zip").read_bytes())
    data[data.find(b"PK\x01\x02") + 8] |= 1
    (path / "x.zip").write_bytes(data)
    return arguments


@row("which would leave the folder …: write the names")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    file = mini_lists(path, 1) / "val.csv"
    file.write_text(re.sub(r"\n.*?,", "\n../../secret.png,", file.read_text(), count=1))
    return train("miniimagenet", path)


@row("of the images in … cannot be read: repair or remove them")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (pictures(path) / "class00" / "000.png").write_bytes(b"none")
    return train("folder", path)


@row("it claims 12000×9000 pixels")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (pictures(path) / "class00" / "x.bmp").write_bytes(bomb())
    return train("folder", path)


@row("its pixels are floating-point numbers")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    picture = Image.fromarray(NOISE[..., 0].astype(np.float32))
    (pictures(path) / "class00" / "x.tif").write_bytes(encoded(picture, "TIFF"))
    return train("folder", path)


@row("images appear in two classes", "images per class, but class … use fewer shots or queries")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    pictures(path)
    shutil.copy(path / "class00" / "000.png", path / "class05" / "again.png")
    return train("folder", path, "--queries", 9, "--ways", 2)


@row("has no folders of images")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (path / "loose.png").write_bytes(png(NOISE))
    return train("folder", path)


@row("has train but no images in folders of classes in val and test")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    pictures(path / "train")
    return train("folder", path)


@row("in more than one split; a class that is tested on must not be known")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    shutil.copytree(divided(path) / "train" / "train00", path / "test" / "train00")
    return train("folder", path)


@row("too few images (a class needs 2 at least")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (pictures(path) / "empty").mkdir()
    return train("folder", path)


@row("too few for three splits, and all their images lie in folders below")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    pictures(path / "images", 8)
    pictures(path / "masks", 8)
    return train("folder", path)


@row("has two folders for the … split")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    pictures(divided(path) / "valid", 2)
    return train("folder", path)


@row("and fewer than 2 to train")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return train("folder", pictures(path, 5))


@row("has train.txt but no")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (pictures(path) / "train.txt").write_text("class00\n")
    return train("folder", path)


def _lists(path: Path, train_list: str) -> list[object]:
    (pictures(path) / "train.txt").write_text(train_list)
    (path / "val.txt").write_text("class02\nclass03\n")
    (path / "test.txt").write_text("class04\nclass05\n")
    return train("folder", path)


@row("listed twice")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return _lists(path, "class00\nclass02\n")


@row("listed, but no folder of images")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return _lists(path, "class00\nclass99\n")


@row("already: keep that split, or replace it")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    _lists(path, "class00\n")
    return ["data", "split", path]


@row("leave some for training")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return ["data", "split", pictures(path), "--val", 0.5, "--test", 0.5]


@row("divided into train/, val/ and test/ already, and needs no lists")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return ["data", "split", divided(path)]


@row("has images of its own size")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return train("cifar-fs", path, "--image-size", 64)


@row("convert it once with 'metaheed data prepare")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    request.getfixturevalue("monkeypatch").setattr("metaheed.data.sources.MOST_IN_MEMORY", 1000)
    return train("folder", divided(path))


@row("free, but … needs")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    full = shutil._ntuple_diskusage(10**9, 10**9, 0)
    request.getfixturevalue("monkeypatch").setattr("metaheed.data.preparing.shutil.disk_usage", lambda path: full)
    return ["data", "prepare", "folder", "--from", divided(path)]


@row("is being prepared by another process")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    request.getfixturevalue("monkeypatch").setattr("metaheed.data.preparing.try_lock", lambda file: False)
    return ["data", "prepare", "folder", "--from", divided(path)]


@row("is there already, and was made from other files or settings")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    prepare(find_source("folder", Request(divided(path))), path)
    pictures(path / "train", 1, prefix="more")
    return ["data", "prepare", "folder", "--from", path]


def _store(path: Path) -> Path:
    return prepare(find_source("folder", Request(divided(path / "raw"))), path)


@row("the store … is damaged")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (_store(path) / "images_val.npy").unlink()
    return train("folder", path)


@row("has the checksum")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    store = _store(path)
    data = (store / "images_val.npy").read_bytes()
    (store / "images_val.npy").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return ["data", "verify", store]


@row("is not a store, and contains none")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return ["data", "verify", path]


@row("is a store of glyphs")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    store = prepare(find_source("glyphs", Request()), path)
    return train("folder", store)


@row("was split by seed 3, not by seed 1")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    prepare(find_source("folder", Request(pictures(path), split_seed=3)), path)
    return train("folder", path, "--split-seed", 1)


def _trained(path: Path, request: pytest.FixtureRequest) -> None:
    metaheed = request.getfixturevalue("metaheed")
    options = ("--image-size", 28, "--ways", 2, "--out", path / "run")
    assert metaheed(*train("folder", pictures(path / "mine", 12, 5), *options))[0] == 0
    pictures(path / "mine", 6, 5, prefix="added")


@row("was begun with other classes")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    _trained(path, request)
    return ["train", "--resume", path / "run", "--iterations", 2]


@row("was trained on classes that are in test now")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    _trained(path, request)
    return ["evaluate", path / "run", "--tasks", 3]


@row("--data-root … is not a folder or archive")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return ["data", "list", "--data-root", path / "nowhere"]


@row("is there twice, and it is not clear which one counts")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    with tarfile.open(path / "x.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a/x.png"), io.BytesIO())
    return train("folder", path / "x.tar")


@row("lists … twice: fetch it anew")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    file = mini_lists(path, 1) / "val.csv"
    file.write_text(file.read_text() + file.read_text().splitlines()[1] + "\n")
    return train("miniimagenet", path)


@row("it has 536870913 bytes, more than any picture")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    with (pictures(path) / "class00" / "x.png").open("wb") as file:
        file.truncate((1 << 29) + 1)
    return train("folder", path)


@row("files are passed over (")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (pictures(path) / "class00" / "x.gif").write_bytes(b"GIF89a")
    return train("folder", path, "--queries", 9, "--ways", 2)


@row("classes are in none of train.txt, val.txt and test.txt")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return [*_lists(path, "class00\nclass01\n"), "--queries", 9, "--ways", 2]


@row("preparing … stopped (")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (path / "file").write_bytes(b"")
    return ["data", "prepare", "folder", "--from", divided(path / "raw"), "--to", path / "file" / "out"]


@row("--index is -1, but it must be")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return ["data", "show", "glyphs", "--index", -1]


@row("--classes is 0 with … both must be at least 1")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return ["data", "show", "glyphs", "--classes", 0]


@row("Choose another --out")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (path / "file").write_bytes(b"")
    return ["data", "show", "glyphs", "--out", path / "file" / "x.png"]


@row("its columns are … rename them, in its first line, to filename and label")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (mini_lists(path, 1) / "train.csv").write_text("what,which\na,b\n")
    return train("miniimagenet", path)


@row("has folders of 99 classes, which are not miniImageNet's 100")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    for split in SPLITS:
        for name in class_list(f"miniimagenet_{split}")[split == "val" :]:
            (path / split / name).mkdir(parents=True)
    return train("miniimagenet", path)


@row("are the same image, so that a task could both adapt to it")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    for name in (name for split in SPLITS for name in class_list(f"miniimagenet_{split}")):
        for split in ("train", "val"):
            (path / split / name).mkdir(parents=True)
            (path / split / name / "0.png").write_bytes(png(NOISE))
    return train("miniimagenet", path)


@row("has no usable 'labels' (")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    (tiered_arrays(path, 1) / "train_labels.pkl").write_bytes(pickle.dumps({"labels": [0.5]}))
    return train("tieredimagenet", path)


@row("has drawings both in … and in")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    for place in ("images_background", "images_background/images_background", "images_evaluation"):
        (path / place / "Greek" / "character01").mkdir(parents=True)
        (path / place / "Greek" / "character01" / "0394_01.png").write_bytes(b"")
    return train("omniglot", path)


@row("are two folders of one name")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    pictures(path)
    for name in ("caf\u00e9", "cafe\u0301"):
        shutil.copytree(path / "class00", path / name)
    return train("folder", path)


@row("bytes, but a list of classes at most")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    pictures(path)
    for split in SPLITS:
        with (path / f"{split}.txt").open("wb") as file:
            file.truncate(90_000_000)
    return train("folder", path)


@row("--out is … but a folder, a pipe or a device is there")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return ["data", "show", "glyphs", "--out", path]


@row("more than can be looked at")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return ["data", "show", "glyphs", "--classes", 10**30, "--queries", 10**30]


def _altered(path: Path, request: pytest.FixtureRequest, value: object) -> list[object]:
    store = prepare(find_source("folder", Request(divided(path / "raw"), 8)), path)
    values = json.loads((store / "manifest.json").read_text())
    values["std"] = value
    (store / "manifest.json").write_text(json.dumps(values))
    return ["data", "verify", store]


@row("its std is")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return _altered(path, request, [0.0, 0.1, 0.1])


@row("but that of its training images is")
def _(path: Path, request: pytest.FixtureRequest) -> list[object]:
    return _altered(path, request, [0.1, 0.1, 0.1])


def table() -> list[tuple[str, str, str]]:
    section = (ROOT / "docs" / "data.md").read_text().split("\nReading and preparing (")[1].split("\n\n")[1]
    lines = [line.strip("|").split("|") for line in section.splitlines()[2:]]
    return [(cells[0].strip().strip("`"), cells[1].strip(), cells[2].strip()) for cells in lines]


@pytest.mark.parametrize("text", sorted(ROWS))
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_the_row_is_what_a_user_sees(text: str, tmp_path: Path, metaheed: Run, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    status, _, err = metaheed(*ROWS[text](folder, request))
    assert status == 1
    pattern = ".*".join(re.escape(part.strip()) for part in text.split("…"))
    assert re.search(pattern, " ".join(err.split())), err
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".part"], "nothing half-written is left"


def test_every_row_is_run_and_says_what_to_do() -> None:
    rows = table()
    assert len(rows) > 40
    assert {seen for seen, _, _ in rows} == set(ROWS), "each row has a case above, and each case a row"
    assert all(why and remedy for _, why, remedy in rows)
    assert store_module.SUFFIX in (ROOT / "docs" / "data.md").read_text()
