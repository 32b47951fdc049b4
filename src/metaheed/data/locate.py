"""Finding a data set's published files, and the committed class lists."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from metaheed.errors import DataError


def class_list(name: str) -> list[str]:
    """The lines of data/splits/NAME.txt."""
    text = resources.files("metaheed.data").joinpath("splits", f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("# ")]


def folders(root: Path | None, dataset: str, subfolders: Sequence[str], expected: str, published: str) -> list[Path]:
    """Where to look: the root itself, then its customary subfolders.

    Raises:
        DataError: no root was given, or it is not a folder.
    """
    if root is None:
        raise DataError(f"{dataset} needs --data-root, the folder with {expected}, published at {published}")
    if not root.is_dir():
        raise DataError(
            f"--data-root {root} is not a folder; {dataset} needs {expected} in it, published at {published}"
        )
    return [root, *(root / sub for sub in subfolders if (root / sub).is_dir())]


def find(
    root: Path | None, dataset: str, subfolders: Sequence[str], files: Sequence[str], published: str
) -> list[Path]:
    """All of `files` in the first folder that has them all.

    Raises:
        DataError: no folder has; names what is missing, where it was looked for and where it is published.
    """
    places = folders(root, dataset, subfolders, " and ".join(files), published)
    for folder in places:
        if all((folder / file).is_file() for file in files):
            return [folder / file for file in files]
    best = max(places, key=lambda folder: sum((folder / file).is_file() for file in files))
    missing = [file for file in files if not (best / file).is_file()]
    raise DataError(
        f"{dataset}: {' and '.join(missing)} not found in {' or '.join(map(str, places))}; published at {published}"
    )
