"""Finding a data set's published files, and the committed class lists."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from metaheed.errors import MissingDataError, option


def class_list(name: str) -> list[str]:
    """The lines of data/splits/NAME.txt."""
    return [line for line in _committed(f"{name}.txt") if line and not line.startswith("# ")]


def class_table(name: str) -> list[tuple[str, str]]:
    """The lines of data/splits/NAME.csv: class and category."""
    pairs = (line.split(",") for line in _committed(f"{name}.csv"))
    return [(label, category) for label, category in pairs]


def _committed(file: str) -> list[str]:
    return resources.files("metaheed.data").joinpath("splits", file).read_text(encoding="utf-8").splitlines()


def folders(root: Path | None, dataset: str, subfolders: Sequence[str], expected: str, published: str) -> list[Path]:
    """Where to look: the root itself, then its customary subfolders, however their names are spelt.

    Raises:
        MissingDataError: no root was given, or it is not a folder.
    """
    if root is None:
        raise MissingDataError(
            f"{dataset} needs {option('data_root')}, or --from of 'data prepare', the folder with {expected}, "
            f"published at {published}"
        )
    if root.is_file():
        raise MissingDataError(
            f"{option('data_root')} (or --from) {root} is a file, but {dataset} is looked for in a folder: unpack it "
            f"if it is an archive, and name the folder with {expected}, published at {published}"
        )
    if not root.is_dir():
        raise MissingDataError(
            f"{option('data_root')} (or --from) {root} is not a folder; {dataset} needs {expected} in it, published at "
            f"{published}"
        )
    return [root, *(place for sub in subfolders for place in _below(root, sub))]


def _below(root: Path, sub: str) -> list[Path]:
    """The folders of that name, or of one that differs in capitals, blanks, - and _ only; sub may be several deep."""
    places = [root]
    for part in sub.split("/"):
        places = [
            child
            for place in places
            for child in sorted(place.iterdir(), key=lambda c: (c.name != part, c.name))
            if _plain(child.name) == _plain(part) and child.is_dir()
        ]
    return places


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def holding(places: Sequence[Path], files: Sequence[str]) -> Path | None:
    """The first of the places that has all of the files."""
    return next((folder for folder in places if all((folder / file).is_file() for file in files)), None)


def lacking(dataset: str, places: Sequence[Path], layouts: Sequence[Sequence[str]], published: str) -> MissingDataError:
    """The error that none of the layouts (each a list of files) is in the places: what the nearest one lacks."""
    tried = [
        (sum((folder / file).is_file() for file in files) / len(files), folder, files)
        for files in layouts
        for folder in places
    ]
    share, folder, files = max(tried, key=lambda t: t[0])  # the first of equals
    if share:
        missing = " and ".join(str(folder / file) for file in files if not (folder / file).is_file())
        return MissingDataError(f"{dataset}: {missing} not found; published at {published}")
    wanted = " nor ".join(" and ".join(files) for files in layouts)
    return MissingDataError(
        f"{dataset}: neither {wanted} found in {' or '.join(map(str, places))}; published at {published}"
        if len(layouts) > 1
        else f"{dataset}: {wanted} not found in {' or '.join(map(str, places))}; published at {published}"
    )
