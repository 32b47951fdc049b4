"""Read published data sets whose pictures are single files, in folders of classes or named by lists."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from metaheed.data.reading.decode import SUFFIXES, Encoded, decode_rgb
from metaheed.data.reading.names import composed
from metaheed.data.reading.trees import is_clutter, open_tree, read_file
from metaheed.data.sources import SourceSplit, class_rows, encoded_stream


def subfolders(folder: Path) -> dict[str, Path]:
    """Return name -> path of the folders directly in a folder; empty if `folder` is not a folder."""
    if not folder.is_dir():
        return {}
    return {composed(child.name): child for child in sorted(folder.iterdir()) if _is_folder(child)}


def _is_folder(path: Path) -> bool:
    return not is_clutter(path.name) and path.is_dir()


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures in the folder of a class and below it, sorted by name."""
    entries = [entry for entry in open_tree(folder).entries if entry.path.lower().endswith(SUFFIXES)]
    return [folder / entry.path for entry in sorted(entries, key=lambda e: (composed(e.path), e.path))]


def split_of_files(classes: Sequence[str], files: Sequence[tuple[Path, int]], side: int) -> SourceSplit:
    """Make a split of picture files.

    Args:
        classes: the names of the classes.
        files: the path of each picture, with the index of its class; pictures of one class keep their order.
        side: the side in pixels to which the pictures are resized.
    """
    rows, counts = class_rows(np.array([label for _, label in files], np.int64), len(classes))
    path_of = {int(row): str(path) for row, (path, _) in zip(rows, files, strict=True)}

    def encoded(start: int) -> Iterator[Encoded]:
        for (path, _), row in zip(files[start:], rows[start:].tolist(), strict=True):
            yield Encoded(str(path), (row,), read_file(path))

    shape = (3, side, side)
    decode: Callable[[bytes], np.ndarray] = partial(decode_rgb, side=side)
    return SourceSplit(
        tuple(classes), counts, shape, len(files), encoded_stream(encoded, decode, shape), path_of.__getitem__
    )
