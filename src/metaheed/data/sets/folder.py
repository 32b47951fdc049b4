"""The user's own pictures: a folder (or zip, or tar) of classes; JPEG, PNG, WebP, BMP or TIFF of any size.

Three layouts are read:

- root/{train,val,test}/class/image; capitals make no difference, and val may be called valid, validation or dev;
- root/class/image, with the lists train.txt, val.txt and test.txt in root (one class on each line, as `metaheed data
  split` writes them);
- root/class/image alone. A seed then divides the classes, as miniImageNet is divided: 64% for training, 16% for
  validation and 20% for test.

Images may lie in folders below the folder of their class, however deep. All of it may lie in one more folder: `images/`
beside `attributes/` and `parts/`, as in CUB-200-2011, or the folder that an archive was made from.

Names are compared and sorted in Unicode's composed form, so that a folder is divided in the same way on every system.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from metaheed.config import EpisodeConfig
from metaheed.data.episodes import sample
from metaheed.data.images import SPLITS
from metaheed.data.reading.decode import FORMATS, SUFFIXES, Encoded, decode_rgb
from metaheed.data.reading.names import composed, decode_text
from metaheed.data.reading.trees import Entry, Tree, Unreadable, is_clutter, open_tree
from metaheed.data.sources import Request, Source, SourceSplit, encoded_stream, stamp
from metaheed.errors import ConfigError, DataError, MissingDataError, option, shown
from metaheed.files.opening import put_in_place, write_synced

_SPLITS = {**{split: split for split in SPLITS}, "valid": "val", "validation": "val", "dev": "val"}
_LISTS: dict[tuple[str, ...], str] = {(f"{split}.txt",): split for split in SPLITS}
_LARGEST_LIST = 1 << 22  # bytes, enough for the names of ten thousand classes
_HOLDERS = ("images", "image", "imgs", "img", "pictures", "photos", "jpg", "data")
"""Names of a folder that contains the classes, and beside which folders without pictures may lie."""
_FEWEST = 2  # images of a class at least: one to adapt to, one to evaluate on


def find(request: Request) -> Source:
    """Find the data set in a folder or archive.

    Raises:
        DataError: it has no classes of images, too few classes, classes with too few images, or a class that is in two
            splits; the message names all of these classes.
    """
    if request.root is None:
        raise MissingDataError(
            f"folder needs {option('data_root')}, the folder (or zip, or tar) that has a folder of images for each "
            "class, or train/, val/ and test/ with such folders (in 'data prepare' it is called --from)"
        )
    tree = open_tree(request.root)
    parts, around = _path_parts(tree)
    side = EpisodeConfig.folder_image_size if request.image_size is None else request.image_size
    classes, layout, notices = _classes(tree, parts, around)
    settings = {"image_size": side}
    if set(classes) == {""}:
        lists = _read_lists(tree, parts)
        if lists is None:
            seed = EpisodeConfig.folder_split_seed if request.split_seed is None else request.split_seed
            settings["split_seed"] = seed
            _check_depth(classes[""], around)
            lists = split_classes(sorted(classes[""]), seed, *EpisodeConfig.folder_shares, str(around))
            layout += f", its classes split by seed {seed}"
        else:
            layout += ", its classes split by its lists"
            _check_lists(lists, set(classes[""]), tree.root)
            left_out = sorted(set(classes[""]) - {name for names in lists.values() for name in names})
            if left_out:
                notices += (
                    f"{len(left_out)} classes are in none of train.txt, val.txt and test.txt, and left out (first: "
                    f"{shown(left_out[0])})",
                )
        classes = {split: {name: classes[""][name] for name in lists[split]} for split in SPLITS}
    _check_classes(classes, tree.root)
    splits = {split: _split(tree, split, classes[split], side) for split in SPLITS}
    archive = [tree.root] if tree.root.is_file() else []
    stamped = stamp(tree.entries, settings, sorted(map(sorted, classes.values())), *archive)
    return Source("folder", layout, splits, stamped, settings=settings, notices=notices)


def _read_lists(tree: Tree, parts: "_PathParts") -> dict[str, list[str]] | None:
    """Read the classes of each split from train.txt, val.txt and test.txt; None if there are no such lists.

    Raises:
        DataError: some of the lists are missing, or a list cannot be read.
    """
    wanted = [e for e in tree.entries if parts.get(e.path) in _LISTS]
    if not wanted:
        return None
    there = {_LISTS[parts[e.path]] for e in wanted}
    absent = " and ".join(f"{s}.txt" for s in SPLITS if s not in there)
    if absent:
        raise DataError(
            f"{tree.root} has {' and '.join(f'{s}.txt' for s in SPLITS if s in there)} but no {absent}: add it, or "
            f"write all three with 'metaheed data split {tree.root}'"
        )
    for entry in wanted:
        if entry.size > _LARGEST_LIST:
            raise DataError(
                f"{tree.root}: the list {entry.path} has {entry.size:,} bytes, but a list of classes at most "
                f"{_LARGEST_LIST:,}, with one class on each line: write it anew with 'metaheed data split {tree.root} "
                "--overwrite'"
            )
    lists = {}
    for entry, content in zip(wanted, tree.read(wanted), strict=True):
        if isinstance(content, Unreadable):
            raise DataError(f"{tree.root}: the list {entry.path} cannot be read: {content.reason}")
        try:
            lines = decode_text(content).splitlines()
        except ValueError:
            lines = content.decode("utf-8", "replace").splitlines()  # classes that do not match are named later
        listed = [composed(line.strip()) for line in lines if line.strip()]
        if not listed:
            raise DataError(f"{tree.root}: the list {entry.path} is empty: write one class on each line, at least one")
        lists[_LISTS[parts[entry.path]]] = listed
    return lists


def split_classes(names: Sequence[str], seed: int, val: float, test: float, where: str) -> dict[str, list[str]]:
    """Divide classes into train, val and test by a seed, in the same way on every machine.

    Args:
        names: the names of the classes, sorted.
        seed: the seed.
        val, test: the shares of the classes for validation and test.
        where: the folder, for messages.

    Raises:
        DataError: there are too few classes for two in each split, which a task needs.
    """
    bits = np.random.Philox(key=np.array([seed, zlib.crc32(b"split")], np.uint64))
    order = [names[i] for i in sample(bits, len(names), len(names))]
    tests, vals = (max(2, round(share * len(names))) for share in (test, val))
    if len(names) - tests - vals < 2:
        raise DataError(
            f"{where} has {len(names)} classes, of which {tests} would go to test and {vals} to val, and fewer than 2 "
            "to train: add classes (at least 6), or divide them yourself into train/, val/ and test/"
        )
    ends = (len(names) - vals - tests, len(names) - tests)
    return {
        "train": sorted(order[: ends[0]]),
        "val": sorted(order[ends[0] : ends[1]]),
        "test": sorted(order[ends[1] :]),
    }


_TOO_FEW = 6
"""With fewer classes than this, there cannot be three splits of two classes."""


def _check_depth(classes: dict[str, list[tuple[Entry, str]]], around: Path) -> None:
    """Raise DataError for too few classes whose pictures all lie in subfolders: most likely those are the classes."""
    deep = all("/" in name for images in classes.values() for _, name in images)
    if len(classes) < _TOO_FEW and deep:
        most = max(classes, key=lambda c: len({name.split("/")[0] for _, name in classes[c]}))
        raise DataError(
            f"{around} has {len(classes)} folders, {_listed(sorted(classes), 5)}, too few for three splits, and all "
            "their images lie in folders below them: if those are the classes, give the folder that contains them "
            f"({around / most}, say), or rename the upper folders to train, val and test"
        )


def write_lists(folder: Path, seed: int, val: float, test: float, overwrite: bool = False) -> dict[str, list[str]]:
    """Write train.txt, val.txt and test.txt into a folder of classes, divided by a seed.

    Raises:
        ConfigError: the shares leave no classes for training, or the seed is out of its bounds.
        DataError: the folder has no classes, is divided into train/, val/ and test/, or has lists already.
    """
    if not (0 < val < 1 and 0 < test < 1 and val + test < 1):
        raise ConfigError(
            f"{option('val')} is {val} and {option('test')} {test}, but they must be shares above 0 that leave some "
            "for training"
        )
    if not 0 <= seed < 2**63:
        raise ConfigError(f"{option('seed')} is {seed}, but it must be in [0, 2**63)")
    if not folder.is_dir():
        raise MissingDataError(f"{folder} is not a folder: lists are written into the folder of classes")
    tree = open_tree(folder)
    classes, layout, _ = _classes(tree, *_path_parts(tree))
    if set(classes) != {""}:
        raise DataError(f"{layout} already, and needs no lists")
    there = [name for name in (f"{split}.txt" for split in SPLITS) if (folder / name).exists()]
    if there and not overwrite:
        raise DataError(f"{folder} has {' and '.join(there)} already: keep that split, or replace it with --overwrite")
    _check_depth(classes[""], folder)
    odd = sorted(name for name in classes[""] if name != name.strip() or not name.isprintable())
    if odd:
        raise DataError(f"{folder}: {odd[0]!r} cannot be a line of a list: rename it")
    lists = split_classes(sorted(classes[""]), seed, val, test, str(folder))
    for split, names in lists.items():
        part = folder / f"{split}.txt.part"
        write_synced(part, "".join(f"{name}\n" for name in names).encode())
    for split in lists:
        put_in_place(folder / f"{split}.txt.part", folder / f"{split}.txt")
    return lists


Members = dict[str, dict[str, list[tuple[Entry, str]]]]
"""Split ("" if the folder is not divided) -> class -> its images, each with its name within the class."""
_PathParts = dict[str, tuple[str, ...]]
"""Path of a file -> the parts of its path below the folder that contains the classes (or train/, val/ and test/)."""


class _Found(NamedTuple):
    classes: Members
    layout: str
    notices: tuple[str, ...]


def _path_parts(tree: Tree) -> tuple[_PathParts, Path]:
    """Find the folder that contains the classes (or train/, val/ and test/), and the path of each file below it."""
    parts = {e.path: PurePosixPath(e.path).parts for e in tree.entries}
    around = tree.root
    while (top := _single_top_folder(parts, around)) is not None:
        outer = parts
        parts = {path: p[1:] for path, p in outer.items() if p[0] == top and len(p) > 1}
        inner = set(parts.values())
        # Lists of classes may lie beside the folder that contains the classes.
        parts |= {path: p for path, p in outer.items() if p in _LISTS and p not in inner}
        around /= top
    return parts, around


def _single_top_folder(parts: _PathParts, around: Path) -> str | None:
    """Return the folder that contains all pictures, if they lie in subfolders of it, so that it is not a class itself.

    None if there is no such folder.
    """
    images = [p for p in parts.values() if _is_image(p)]
    tops = {p[0] for p in images}
    if len(tops) != 1 or not all(len(p) > 2 for p in images):
        return None
    (top,) = tops
    # Folders beside it may be classes whose pictures are missing, unless its name shows that it is not a class itself.
    alone = not around.is_dir() or len(_folders(around)) == 1 or top.lower() in _HOLDERS
    return top if alone and top.lower() not in _SPLITS else None


def _is_image(parts: Sequence[str]) -> bool:
    return parts[-1].lower().endswith(SUFFIXES)


def _classes(tree: Tree, parts: _PathParts, around: Path) -> _Found:
    """Find the classes and their images, and whether they are divided into train/, val/ and test/."""
    kind = "folder" if tree.root.is_dir() else "archive"
    images = [(e, parts[e.path]) for e in tree.entries if e.path in parts and _is_image(parts[e.path])]
    divided = {_SPLITS[p[0].lower()] for _, p in images if len(p) > 2 and p[0].lower() in _SPLITS}
    found: Members = {}
    if divided:
        called: dict[str, str] = {}
        for _, p in images:
            split = _SPLITS.get(p[0].lower())
            if split is not None and len(p) > 2 and called.setdefault(split, p[0]) != p[0]:
                raise DataError(
                    f"{around} has two folders for the {split} split, {called[split]} and {p[0]}, and it is not clear "
                    "which one counts: join them, or move one elsewhere"
                )
        absent = [split for split in SPLITS if split not in divided]
        if absent:
            raise DataError(
                f"{around} has {' and '.join(s for s in SPLITS if s in divided)} but no images in folders of "
                f"classes in {' and '.join(absent)}: add classes there that are in none of the others"
            )
    written: dict[tuple[str, str], str] = {}

    def members(split: str, folder: str) -> list[tuple[Entry, str]]:
        name = composed(folder)
        if (other := written.setdefault((split, name), folder)) != folder:
            raise DataError(
                f"{around}: {other!a} and {folder!a} are two folders of one name, {name!r}, written in two "
                "ways (with an accent as part of its letter, or as a character of its own): join them, or rename one"
            )
        return found.setdefault(split, {}).setdefault(name, [])

    for entry, path in images:
        split, below = (_SPLITS.get(path[0].lower()), path[1:]) if divided else ("", path)
        if split is not None and len(below) > 1:  # else it lies in no folder of a class
            members(split, below[0]).append((entry, "/".join(below[1:])))
    # Empty folders count as classes whose images are missing, so that an error names them.
    if kind == "folder":
        for top in _folders(around):
            split = _SPLITS.get(top.name.lower()) if divided else ""
            if split is not None:
                for child in _folders(top) if divided else [top]:
                    members(split, child.name)
    if not any(images for classes in found.values() for images in classes.values()):
        raise MissingDataError(
            f"{tree.root} has no folders of images ({', '.join(SUFFIXES)}): it needs a folder for each class, or "
            "train/, val/ and test/ with such folders"
        )
    taken = {entry.path for classes in found.values() for chosen in classes.values() for entry, _ in chosen}
    taken |= {path for path, p in parts.items() if p in _LISTS}
    layout = ", divided into train/, val/ and test/" if divided else f" of {len(found[''])} classes"
    passed_over = _passed_over(e.path for e in tree.entries if e.path not in taken)
    place = around if kind == "folder" else tree.root
    return _Found(found, f"the {kind} {place}{layout}", passed_over)


def _folders(path: Path) -> list[Path]:
    return [child for child in path.iterdir() if child.is_dir() and not is_clutter(child.name)]


def _passed_over(paths: Iterable[str]) -> tuple[str, ...]:
    """Make a notice of the files that are not read; empty if there are none."""
    paths = list(paths)
    if not paths:
        return ()
    kinds = Counter(PurePosixPath(path).suffix.lower() or "without a suffix" for path in paths)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())[:10])
    return (
        f"{len(paths)} files are passed over ({listed}; first: {paths[0]}): only {', '.join(FORMATS)} in folders of "
        "classes are read",
    )


def _listed(names: Sequence[str], most: int = 20) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if len(name) < 100 else shown(name) for name in names[:most]) + more


def _check_lists(lists: Mapping[str, Sequence[str]], names: set[str], root: Path) -> None:
    """Raise DataError if the lists name a class twice, or one that has no folder."""
    listed = [name for split in SPLITS for name in lists[split]]
    twice = sorted(name for name, count in Counter(listed).items() if count > 1)
    absent = sorted(set(listed) - names)
    for wrong, what in ((twice, "listed twice"), (absent, "listed, but no folder of images")):
        if wrong:
            raise DataError(
                f"{root}: {_listed(wrong, 5)} {'is' if len(wrong) == 1 else 'are'} {what} in train.txt, val.txt and "
                f"test.txt: correct them, or write them anew with 'metaheed data split {root} --overwrite'"
            )


def _check_classes(classes: Members, root: Path) -> None:
    """Raise DataError if a class is in two splits, or has too few images."""
    where: dict[str, list[str]] = {}
    for split in SPLITS:
        for name in classes[split]:
            where.setdefault(name, []).append(split)
    twice = [f"{name!r} ({' and '.join(splits)})" for name, splits in sorted(where.items()) if len(splits) > 1]
    if twice:
        raise DataError(
            f"{root}: {_listed(twice)} in more than one split; a class that is tested on must not be known from "
            "training: move or rename it"
        )
    few = [
        f"{name!r} ({len(images)})"
        for split in SPLITS
        for name, images in sorted(classes[split].items())
        if len(images) < _FEWEST
    ]
    if few:
        raise DataError(
            f"{root}: too few images (a class needs {_FEWEST} at least, one to adapt to and one to be judged on): "
            f"{_listed(few, 100)}. Add some, or remove the folder"
        )


def _split(tree: Tree, split: str, classes: dict[str, list[tuple[Entry, str]]], side: int) -> SourceSplit:
    """Make a split of some classes, with images resized to `side` pixels."""
    names = sorted(classes)
    # The rows of a class are sorted by the names of the images, which may be read in another order.
    row, row_of = 0, {}
    for name in names:
        for entry, _ in sorted(classes[name], key=lambda image: (composed(image[1]), image[1])):
            row_of[entry.path] = row
            row += 1
    path_of = {row: path for path, row in row_of.items()}
    entries = [e for e in tree.entries if e.path in row_of]

    def encoded(start: int) -> Iterator[Encoded]:
        wanted = entries[start:]
        for entry, content in zip(wanted, tree.read(wanted), strict=True):
            yield Encoded(entry.path, (row_of[entry.path],), content)

    shape = (3, side, side)
    counts = tuple(len(classes[name]) for name in names)
    stream = encoded_stream(encoded, partial(decode_rgb, side=side), shape)
    return SourceSplit(tuple(names), counts, shape, len(entries), stream, path_of.__getitem__)
