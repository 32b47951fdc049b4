import hashlib
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from metaheed.data import SPLITS, load_dataset
from metaheed.data.locate import class_list
from metaheed.data.sets.glyphs import FACES, INSTANCES, Font, _distort, build, character_of

RECORDED = "e385357edb159a9386fe4c57c60338c91cbc0810ed2da595b9ffcc5eaa24dc25"


def test_counts_and_shapes() -> None:
    dataset = load_dataset("glyphs")
    for split, least in (("train", 600), ("val", 100), ("test", 200)):
        part = dataset.split(split)
        assert len(part.classes) >= least
        assert set(part.counts) == {INSTANCES} == {20}
    assert dataset.image_shape == (1, 28, 28)


def test_scripts_are_disjoint() -> None:
    scripts = {
        split: {unicodedata.name(character_of(name)).split()[0] for name in class_list(f"glyphs_{split}")}
        for split in SPLITS
    }
    assert not scripts["train"] & scripts["val"]
    assert not scripts["train"] & scripts["test"]
    assert not scripts["val"] & scripts["test"]
    names = [name for split in SPLITS for name in class_list(f"glyphs_{split}")]
    assert all(name.split(" ", 1)[1] == unicodedata.name(character_of(name)) for name in names)


def test_no_two_classes_are_alike_in_any_face() -> None:
    characters = [character_of(name) for split in SPLITS for name in class_list(f"glyphs_{split}")]
    assert len(set(characters)) == len(characters)
    for face in FACES:
        font = Font(face)
        drawn = np.stack([font.draw(c) for c in characters if c in font]).reshape(-1, 48 * 48).astype(np.float32)
        norms = (drawn**2).sum(1)
        distance = norms[:, None] + norms[None] - 2 * drawn @ drawn.T
        np.fill_diagonal(distance, np.inf)
        # The lists were made with 1/8; a font renderer of another version may move a pixel.
        assert (distance > np.minimum.outer(norms, norms) / 16).all(), face
        assert norms.min() > 0


def test_instances_differ_from_each_other() -> None:
    images = load_dataset("glyphs").split("test").images.numpy()
    assert len({image.tobytes() for image in images}) == len(images)


def test_the_distortion_has_the_same_bits_everywhere() -> None:
    """Of a fixed bitmap, so that the font renderer has no part in it."""
    y, x = np.mgrid[:48, :48]
    master = ((((y - 20) ** 2 + (x - 26) ** 2) < 200) * (x * 5)).astype(np.uint8)
    out = _distort(np.repeat(master[None], 20, axis=0), ord("A"))
    assert out.shape == (20, 28, 28)
    assert out.dtype == np.uint8
    assert hashlib.sha256(out.tobytes()).hexdigest() == RECORDED
    undistorted = master[::2, ::2]
    assert abs(float(out.mean()) / float(undistorted.mean()) - 1) < 0.5, "it should still be the same figure"


def test_built_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"glyphs_train": ["U+0041 A"], "glyphs_val": ["U+10D0 AN"], "glyphs_test": ["U+1401 E"]}
    monkeypatch.setattr("metaheed.data.sets.glyphs.class_list", small.__getitem__)
    monkeypatch.setenv("METAHEED_CACHE", str(tmp_path / "c"))
    first = load_dataset("glyphs")
    (cached,) = (tmp_path / "c").iterdir()
    monkeypatch.setattr("metaheed.data.sets.glyphs.build", lambda names: pytest.fail("built twice"))
    again = load_dataset("glyphs")
    assert all(first.split(s).fingerprint == again.split(s).fingerprint for s in SPLITS)

    monkeypatch.setattr("metaheed.data.sets.glyphs.build", build)
    cached.write_bytes(cached.read_bytes()[:100])
    assert load_dataset("glyphs").split("test").fingerprint == first.split("test").fingerprint


def test_an_unwritable_cache_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"glyphs_train": ["U+0041 A"], "glyphs_val": ["U+10D0 AN"], "glyphs_test": ["U+1401 E"]}
    monkeypatch.setattr("metaheed.data.sets.glyphs.class_list", small.__getitem__)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAHEED_CACHE", str(tmp_path / "file" / "below"))
    assert len(load_dataset("glyphs").split("train").classes) == 1
    assert "cannot be written" in capsys.readouterr().err
