"""The pickle machine: every protocol, payloads in memory and in the file; what it refuses is in test_published."""

import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metaheed.data.reading.pickle_stream import StoredArray, StoredBytes
from metaheed.data.reading.safe_pickle import load_arrays
from metaheed.errors import DataError
from tests.conftest import python2_pickle

BIG = np.random.default_rng(0).integers(0, 256, (30, 9, 7), dtype=np.uint8)
VALUE: dict[str, Any] = {
    "big": BIG,
    "tricky": b"\x00'\"\\\n\r\x1a" * 300,
    "numbers": [-1, 0, 255, 65536, 2**40, -(2**70), True, False, None, 1.5, ()],
    "nested": {("a", 1): [{"b": b"c"}, (1, 2, 3, 4)]},
    "text": "λόγος",
    "empty": b"",
    "strings": np.array(["ab", "c"]),
    "big-endian": np.arange(500, dtype=">i4"),
    "fortran": np.asfortranarray(BIG[0]),
    "scalar": np.array(7),
    "numpy's numbers": [np.int64(-3), np.float32(1.5), np.bool_(True), np.uint8(200)],
    "shared": [BIG[0]] * 3,
}
SCALAR = (
    b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x02%stR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"U\x02abtR."
)
"""A number of a dtype, in two bytes."""


def plain(value: Any) -> Any:
    """With arrays and payloads read."""
    if isinstance(value, StoredArray):
        return value.read()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("inline", [None, 256])
@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(protocol: int, inline: int | None, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(VALUE, protocol))
    found = load_arrays(path, "x", "there", inline)
    tricky = found.pop("tricky")
    if inline is not None:
        assert isinstance(tricky, StoredBytes), "what is long stays in the file"
        with path.open("rb") as file:
            tricky = b"".join(tricky.blocks(file))
    assert tricky == VALUE["tricky"]
    if inline is not None:
        assert isinstance(found["big"].data, StoredBytes)
    assert np.array_equal(np.concatenate(list(found["big"].chunks(4, 7))), BIG[4:]), "part by part, from any entry"
    for key, value in plain(found).items():
        expected = VALUE[key]
        if isinstance(expected, np.ndarray):
            assert value.dtype == expected.dtype
            assert value.shape == expected.shape
        assert np.all(np.equal(value, expected) if key == "shared" else value == expected), key


def test_python_2(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(python2_pickle({b"data": BIG, b"name": b"n" * 300}))
    for inline in (None, 256):
        found = load_arrays(path, "x", "there", inline)
        assert np.array_equal(found[b"data"].read(), BIG)


def test_a_list_of_arrays_takes_little_memory(tmp_path: Path) -> None:
    """64 MB of payloads, as tieredImageNet's pickles hold them, in less than a tenth of that."""
    path = tmp_path / "x.pkl"
    path.write_bytes(python2_pickle([np.full((16384, 1), k % 256, np.uint8) for k in range(4000)]))
    code = f"""
import resource
from pathlib import Path
from metaheed.data.reading.safe_pickle import load_arrays
data = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + (6 << 20), data + (6 << 20)))
arrays = load_arrays(Path({str(path)!r}), "x", "there", 512)
assert len(arrays) == 4000 and (arrays[3999].read() == 3999 % 256).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert resource.RLIMIT_DATA  # this test is for systems that have it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError"),
        (b"\x80\x02]", "EOFError: it ends too early"),
        (b"\x80\x02}(U\x03abc", "EOFError"),
        (b"T\xff\xff\xff\x7fab.", "2147483647 bytes are announced where 3 are left"),
        (b"\xff.", "no such operation"),
        (b"h\x05.", "KeyError"),
        (b"N0000.", "IndexError"),
        (b"]]}u.", "a mark is missing"),
        (b"N(K\x01e.", "appends to something that is not a list"),
        (b"S'abc\n.", "a string without quotes"),
        (b"\x8b\xff\xff\x00\x00" + b"\1" * 65535 + b".", "a whole number of 65535 bytes"),
        (b"(lN(lR.", "a call of something that is not a function"),
        (b"\x8f.", "is not read: its pickle asks for a set"),
        (b"cnumpy\nndarray\n)R.", "a call of numpy.ndarray"),
        (b"]N\x86b.", "damaged|the state of an object"),
        (b"ios\nsystem\n.", r"os\.system"),
        (b"cnumpy.core.multiarray\nscalar\n(NNtR.", "a numpy number of another kind"),
        (SCALAR % b"u4", "ValueError: a uint32 in 2 bytes"),
        (SCALAR % b"O8", "an array of Python objects"),
        (b"\x82\x01.", "an extension code"),
    ],
)
def test_damaged_and_hostile(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_arrays(path, str(path), "https://there")
    assert "x.pkl" in str(error.value)
    assert "https://there" in str(error.value)


def test_a_pickle_of_containers_cannot_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaheed.data.reading.pickle_stream._MOST_OPERATIONS", 1000)
    path = tmp_path / "x.pkl"
    path.write_bytes(b"(" + b"}" * 2000 + b"l.")
    with pytest.raises(DataError, match="more than 1000 operations"):
        load_arrays(path, "x", "there")


@pytest.mark.parametrize("damage", [b"\\q", b"\\x4", b"\\"])
def test_a_damaged_escape_is_noticed_when_it_is_read(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"(lS'" + b"a" * 600 + damage + b"'\na.")
    (payload,) = load_arrays(path, "x", "there", 512)
    with path.open("rb") as file, pytest.raises(ValueError, match="escape"):
        list(payload.blocks(file))
