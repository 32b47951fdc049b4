"""Small data in the published formats, small networks, and tasks in float64."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from metaheed.data.images import Dataset, make_split
from metaheed.data.locate import class_list
from metaheed.data.sets.omniglot import ARCHIVES
from metaheed.running.checkpoint import _digest
from metaheed.types import Episode
from tests.warm import SERVER, WarmProcess, start_server

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"

os.environ.setdefault("OMP_NUM_THREADS", "2")
if not torch.cuda.is_available():
    # Our kernels are run by Triton's interpreter, on which it decides when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _away_from_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the user's cache; all share one, so that glyphs are built once."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("METAHEED_CACHE", os.environ.get("METAHEED_TEST_CACHE", str(cache)))


@pytest.fixture(autouse=True, scope="session")
def _state_away_from_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nor into the user's state folder, fixtures that outlive a test included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAHEED_STATE", str(tmp_path_factory.getbasetemp() / "state"))
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Path of the socket of the server that forks processes (tests/warm.py)."""
    folder = Path(tempfile.mkdtemp(prefix="metaheed-"))  # pytest's own may have a longer name than a socket can have
    process, path = start_server(folder)
    os.environ[SERVER] = path
    try:
        yield path
    finally:
        del os.environ[SERVER]
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        shutil.rmtree(folder)


Begin = Callable[..., WarmProcess]


@pytest.fixture
def begin(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Begin]:
    """Begins `metaheed ARGUMENTS` in a process of its own; the options are WarmProcess's. What is left is killed."""
    folder = tmp_path_factory.mktemp("output")
    begun: list[WarmProcess] = []

    def start(*arguments: object, **options: Any) -> WarmProcess:
        places = {name: folder / f"{len(begun)}.{name}" for name in ("output", "errors")}
        begun.append(WarmProcess(arguments, **{**places, **options}))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real data sets as their publishers distribute them, where they are at hand."""
    if not (SHARED / "unpack.py").exists():
        pytest.skip("the real data sets are not at hand")
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("published")
    subprocess.run([sys.executable, SHARED / "unpack.py", folder], check=True, capture_output=True)
    return folder


def make_batch(
    tasks: int, ways: int, shots: int, queries: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float64
) -> Episode:
    """Random images, class by class, with a trace of the class in them so that there is something to learn."""
    generator = torch.Generator().manual_seed(5)
    marks = torch.randn(tasks, ways, 1, *shape, generator=generator, dtype=dtype)
    labels = torch.arange(ways)

    def draw(each: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = marks + torch.randn(tasks, ways, each, *shape, generator=generator, dtype=dtype)
        return x.flatten(1, 2), labels.repeat_interleave(each).repeat(tasks, 1)

    return Episode(*draw(shots), *draw(queries))


def task(batch: Episode, index: int) -> Episode:
    return Episode(*(part[index] for part in batch))


@pytest.fixture
def small_dataset() -> Dataset:
    """Three splits of random 16×16 images: 12, 6 and 7 classes of 20, 20 and 18 images."""
    generator = np.random.default_rng(0)
    splits = {}
    for name, classes, count in (("train", 12, 20), ("val", 6, 20), ("test", 7, 18)):
        labels = [f"{name}{k}" for k in range(classes)]
        images = [generator.integers(0, 256, (count, 1, 16, 16), dtype=np.uint8) for _ in labels]
        splits[name] = make_split(name, labels, images)
    return Dataset("small", splits, (0.0,), (1.0,))


@pytest.fixture(scope="session")
def omniglot_zips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two zip files of all 1623 characters, two drawings each."""
    folder = tmp_path_factory.mktemp("omniglot")
    names = [name for split in ("train", "val", "test") for name in class_list(f"omniglot_{split}")]
    for part, archive in enumerate(ARCHIVES):
        with zipfile.ZipFile(folder / archive, "w") as file:
            file.writestr(archive.replace(".zip", "/"), "")
            for index, name in enumerate(sorted(names)[part::2]):
                for drawing in (1, 2):
                    path = f"{archive.removesuffix('.zip')}/{name}/{index % 9999:04d}_{drawing:02d}.png"
                    file.writestr(path, _drawing(index, drawing))
    return folder


def _drawing(index: int, drawing: int) -> bytes:
    paper = np.full((105, 105), 255, np.uint8)
    paper[5 + index % 80 : 15 + index % 80, 10 * drawing : 10 * drawing + 40] = 0
    buffer = io.BytesIO()
    Image.fromarray(paper).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


class Python2Pickler(pickle._Pickler):
    """Writes bytes and arrays as Python 2 wrote them."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        short = len(value) < 256
        self.write(b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value)))  # type: ignore[attr-defined]
        self.write(value)  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]

    dispatch[bytes] = save_bytes

    def save_array(self, value: np.ndarray) -> None:
        write, save = self.write, self.save  # type: ignore[attr-defined]
        write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n")
        save((0,))
        save(b"b")
        write(b"\x87R(K\x01")
        save(value.shape)
        write(b"cnumpy\ndtype\n")
        save(b"u1")
        write(b"K\x00K\x01\x87R(K\x03")
        save(b"|")
        write(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
        save(value.tobytes())
        write(b"tb")

    dispatch[np.ndarray] = save_array


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder holding cifar-100-python with 25 + 5 images a class, each filled with its label."""
    folder = tmp_path_factory.mktemp("cifar") / "cifar-100-python"
    folder.mkdir()
    names = sorted(name for split in ("train", "val", "test") for name in class_list(f"cifar_fs_{split}"))
    for part, count in (("train", 25), ("test", 5)):
        labels = [k for k in range(100) for _ in range(count)]
        data = np.repeat(np.array(labels, np.uint8)[:, None], 3072, axis=1)
        data[:, :1024] += 100  # red above green and blue
        (folder / part).write_bytes(python2_pickle({b"data": data, b"fine_labels": labels, b"batch_label": b"x" * 300}))
    (folder / "meta").write_bytes(python2_pickle({b"fine_label_names": [n.encode() for n in names]}))
    return folder.parent


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(file: Path, pattern: str, replacement: str) -> None:
    """Change a config.yaml by hand, and delete its last line, as is to be done then."""
    text = re.sub(pattern, replacement, file.read_text())
    file.write_text(re.sub(r"# sha256: .*\n$", "", text))


def as_format_1(path: Path, change: Callable[[dict[str, Any]], object] = lambda about: None) -> None:
    """Make a checkpoint that of a version whose checksum covered tensors only, and change what it says of itself."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["metaheed"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    for name in [name for name in about if name.endswith("_sha256")]:
        del about[name]
    change(about)
    save_file(tensors, path, {"metaheed": json.dumps({**about, "format": 1, "sha256": _digest(tensors, None)})})


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def metaheed(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: (exit status, standard output, standard error)."""
    from metaheed.cli.entry import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:  # how the parser ends
            status = stop.code if isinstance(stop.code, int) else 1
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run
