"""Miniatures of data sets in the layouts in which people have them."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from metaheed.data import SPLITS
from metaheed.data.locate import class_list, class_table
from tests.conftest import python2_pickle

RED, BLUE = (220, 30, 10), (10, 40, 200)


def picture(seed: int, side: int = 84) -> np.ndarray:
    """(side, side, 3) uint8: left half red, right half blue, and a mark of the seed, so that no two are the same."""
    image = np.empty((side, side, 3), np.uint8)
    image[:, : side // 2], image[:, side // 2 :] = RED, BLUE
    image[:2, :4, 0] = [(seed >> shift) & 255 for shift in (0, 8, 16, 24)]
    return image


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def mini_split(split: str, each: int) -> Iterator[tuple[str, int]]:
    """(class, seed of the image): classes in another order than the lists', images one class after another."""
    first = 10_000 * SPLITS.index(split)
    for k, name in enumerate(sorted(class_list(f"miniimagenet_{split}"), reverse=True)):
        for i in range(each):
            yield name, first + k * each + i


def mini_pickles(folder: Path, each: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        members: dict[bytes, list[int]] = {}
        images = []
        for index, (name, seed) in enumerate(mini_split(split, each)):
            members.setdefault(name.encode(), []).append(index)
            images.append(picture(seed))
        content = python2_pickle({b"image_data": np.stack(images), b"class_dict": members})
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(content)
    return folder


def mini_lists(folder: Path, each: int = 3, side: int = 84) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = ["filename,label"]
        for name, seed in mini_split(split, each):
            file = f"{name}{seed:08d}.png"
            (folder / "images" / file).write_bytes(png(picture(seed, side)))
            lines.append(f"{file},{name}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def tiered_labels(split: str, each: int) -> tuple[list[int], list[int]]:
    """Label and category of each image, in an order that is not the classes'."""
    table = class_table(f"tieredimagenet_{split}")
    categories = sorted({category for _, category in table})
    specific = [k for _ in range(each) for k in range(len(table))]
    return specific, [categories.index(table[k][1]) for k in specific]


def _write_labels(folder: Path, split: str, each: int) -> list[int]:
    specific, general = tiered_labels(split, each)
    values = {
        b"label_specific": np.array(specific, np.uint8 if max(specific) < 256 else np.int64),
        b"label_general": general,
        b"label_specific_str": [f"thing {k}".encode() for k in range(max(specific) + 1)],
        b"label_general_str": [b"category"],
    }
    if values[b"label_specific"].dtype != np.uint8:  # type: ignore[attr-defined]
        values[b"label_specific"] = specific
    (folder / f"{split}_labels.pkl").write_bytes(python2_pickle(values))
    return specific


def tiered_pickles(folder: Path, each: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        specific = _write_labels(folder, split, each)
        pngs = [np.frombuffer(png(picture(_tiered_seed(split, i))), np.uint8)[:, None] for i in range(len(specific))]
        (folder / f"{split}_images_png.pkl").write_bytes(python2_pickle(pngs))
    return folder


def tiered_arrays(folder: Path, each: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        specific = _write_labels(folder, split, each)
        images = np.stack([picture(_tiered_seed(split, i)) for i in range(len(specific))])
        np.savez(folder / f"{split}_images.npz", images=images[..., ::-1])  # as OpenCV has them
    return folder


def _tiered_seed(split: str, index: int) -> int:
    return 10_000 * SPLITS.index(split) + index


def pictures(folder: Path, classes: int = 10, each: int = 4, side: int = 20, prefix: str = "class") -> Path:
    """A folder of classes of PNGs, all different."""
    first = sum(map(ord, prefix)) * 1000
    for k in range(classes):
        (folder / f"{prefix}{k:02d}").mkdir(parents=True)
        for i in range(each):
            (folder / f"{prefix}{k:02d}" / f"{i:03d}.png").write_bytes(png(picture(first + 100 * k + i, side)))
    return folder


def divided(folder: Path, classes: int = 3, each: int = 4) -> Path:
    """train/, val/ and test/ of classes."""
    for split in SPLITS:
        pictures(folder / split, classes, each, prefix=split)
    return folder


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path
