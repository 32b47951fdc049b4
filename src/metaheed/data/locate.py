"""Find the published files of a data set, and read the class lists that come with metaheed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from metaheed.errors import DataError, MissingDataError, option, shown


def class_list(name: str) -> list[str]:
    """Return the classes listed in data/splits/NAME.txt."""
    return [line for line in _committed(f"{name}.txt") if line and not line.startswith("# ")]


def class_table(name: str) -> list[tuple[str, str]]:
    """Return the pairs (class, category) listed in data/splits/NAME.csv."""
    pairs = (line.split(",") for line in _committed(f"{name}.csv"))
    return [(label, category) for label, category in pairs]


def _committed(file: str) -> list[str]:
    return resources.files("metaheed.data").joinpath("splits", file).read_text(encoding="utf-8").splitlines()


def candidate_folders(
    root: Path | None, dataset: str, subfolders: Sequence[str], expected: str, published: str
) -> list[Path]:
    """Return the folders in which a data set is looked for: the root, then its customary subfolders.

    Raises:
        MissingDataError: no root was given, or it is not a folder.
    """
    if root is None:
        raise MissingDataError(
            f"{dataset} needs {option('data_root')}, the folder that contains {expected} (in 'data prepare' it is "
            f"called --from); published at {published}"
        )
    if root.is_file():
        raise MissingDataError(
            f"{option('data_root')} (or --from) {root} is a file, but {dataset} is looked for in a folder: unpack it "
            f"if it is an archive, and give the folder that contains {expected}; published at {published}"
        )
    if not root.is_dir():
        raise MissingDataError(
            f"{option('data_root')} (or --from) {root} is not a folder, but {dataset} needs one that contains "
            f"{expected}; published at {published}"
        )
    return [root, *(place for sub in subfolders for place in _matching_folders(root, sub))]


def _matching_folders(root: Path, sub: str) -> list[Path]:
    """The folders at the path `sub` below the root; capitals, blanks, - and _ in their names make no difference."""
    places = [root]
    for part in sub.split("/"):
        places = [
            child
            for place in places
            for child in sorted(place.iterdir(), key=lambda c: (c.name != part, c.name))
            if _normalized(child.name) == _normalized(part) and child.is_dir()
        ]
    return places


def _normalized(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def first_with(places: Sequence[Path], files: Sequence[str]) -> Path | None:
    """Return the first of the folders that contains all of the files; None if none does."""
    return next((folder for folder in places if all((folder / file).is_file() for file in files)), None)


def check_disjoint(names: Mapping[str, Iterable[str]], folder: Path, published: str) -> None:
    """Raise DataError if a class is in two splits.

    Args:
        names: split -> the names of its classes.
        folder: where they were read from, for the message.
        published: where the data set is published.
    """
    where: dict[str, str] = {}
    for split, of_split in names.items():
        for name in of_split:
            if where.setdefault(name, split) != split:
                raise DataError(
                    f"{folder}: the labels say that {shown(name)} is in {where[name]} and in {split}, but a class that "
                    f"is tested on must not be known from training: fetch them anew from {published}"
                )


def missing_files_error(
    dataset: str, places: Sequence[Path], layouts: Sequence[Sequence[str]], published: str
) -> MissingDataError:
    """Make the error for files that are in none of the folders; it names what the most complete layout lacks.

    Args:
        dataset: the name of the data set.
        places: the folders that were searched.
        layouts: the files of each layout in which the data set is known.
        published: where the files are published.
    """
    tried = [
        (sum((folder / file).is_file() for file in files) / len(files), folder, files)
        for files in layouts
        for folder in places
    ]
    share, folder, files = max(tried, key=lambda t: t[0])  # of several equal ones, the first

    if share:
        missing = " and ".join(str(folder / file) for file in files if not (folder / file).is_file())
        return MissingDataError(f"{dataset}: {missing} not found; published at {published}")
    wanted = " nor ".join(" and ".join(files) for files in layouts)
    return MissingDataError(
        f"{dataset}: neither {wanted} found in {' or '.join(map(str, places))}; published at {published}"
        if len(layouts) > 1
        else f"{dataset}: {wanted} not found in {' or '.join(map(str, places))}; published at {published}"
    )
