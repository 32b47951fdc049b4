"""miniImageNet in the split of Ravi & Larochelle (ICLR 2017): 64/16/20 classes of ImageNet, 600 images each, 84×84 RGB.

Four layouts are read:

- mini-imagenet-cache-{train,val,test}.pkl (val may be called validation or valid): an array of all pixels, and the
  indices of each class;
- miniImageNet_category_split_{train_phase_train,val,test}.pickle: pixels and labels, as the code of TADAM and of
  MetaOptNet uses them. The files train_phase_val and train_phase_test have more images of the *training* classes, and
  are not read;
- {train,val,test}.csv, the lists of Ravi & Larochelle, with the images in images/, in folders of classes, or beside;
- a folder of images for each of the 100 classes, all in one place or below train/, val/ and test/. In some copies these
  three divide the images of every class and not the classes. All images of a class are therefore joined, and the
  classes are divided by the lists of Ravi & Larochelle.

Arrays are read from the file in chunks. Images of another size are resized to 84×84 with a Lanczos filter, without
keeping the aspect ratio, as the scripts of Ravi & Larochelle and of Finn do.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from metaheed.data.images import SPLITS
from metaheed.data.locate import candidate_folders, check_disjoint, class_list, first_with, missing_files_error
from metaheed.data.reading.classes import pictures_in, split_of_files, subfolders
from metaheed.data.reading.decode import SUFFIXES
from metaheed.data.reading.labels import as_text, class_positions, get_field, read_labels
from metaheed.data.reading.names import composed, decode_text
from metaheed.data.reading.pickle_stream import StoredArray
from metaheed.data.reading.safe_pickle import damage_explained, load_arrays
from metaheed.data.reading.trees import open_tree, read_file
from metaheed.data.sources import Request, Source, SourceSplit, array_stream, class_rows, stamp
from metaheed.errors import DataError, MissingDataError, brief, shown

PUBLISHED = (
    "https://github.com/renmengye/few-shot-ssl-public (pickles), "
    "https://github.com/twitter-research/meta-learning-lstm (lists)"
)
PICKLE = "mini-imagenet-cache-{}.pkl"
SIDE = 84
_PICKLES = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
_CATEGORY = "miniImageNet_category_split_{}.pickle"
_PHASES = {"train": "train_phase_train", "val": "val", "test": "test"}
_SUBFOLDERS = ("miniimagenet", "mini_imagenet_full_size")
_INLINE = 512  # longer strings (the pixels) are left in the file
_AT_ONCE = 64  # images that are read at once
_LARGEST_LIST = 1 << 24  # bytes; the published lists have 1.5 million at most
_WORDNET = re.compile(r"n\d{8}")
_FILE_COLUMNS = ("filename", "file", "imagename", "imagefile", "image", "img", "imagepath", "filepath", "path")
_CLASS_COLUMNS = ("label", "classname", "class", "wnid", "synset", "category", "classlabel", "labelname")
"""Names that the columns of a list have in practice, without capitals, blanks and underscores."""


def find(request: Request) -> Source:
    """Find miniImageNet in any of its layouts.

    Raises:
        DataError: a file is missing or damaged, or has other classes; the message says which, and where it is
            published.
    """
    lists = [f"{s}.csv" for s in SPLITS]
    category = [_CATEGORY.format(_PHASES[s]) for s in SPLITS]
    expected = f"{PICKLE.format('{train,val,test}')}, or images/ and {{train,val,test}}.csv"
    places = candidate_folders(request.root, "miniimagenet", _SUBFOLDERS, expected, PUBLISHED)
    pickles = [PICKLE.format(s) for s in SPLITS]
    for folder in places:
        files = [_first(folder, [PICKLE.format(name) for name in _PICKLES[split]]) for split in SPLITS]
        found = [file for file in files if file is not None]
        if len(found) == len(SPLITS):
            splits = {split: _from_pickle(path, split) for split, path in zip(SPLITS, found, strict=True)}
            return _source(f"the pickles {PICKLE.format('*')} in {folder}", splits, stamp(*found))
        if found:
            pickles = [name if file is None else file.name for name, file in zip(pickles, files, strict=True)]
    holder = first_with(places, category)
    if holder is not None:
        folder = holder
        parts = {split: _CategoryPickle(folder / name, split) for split, name in zip(SPLITS, category, strict=True)}
        splits = {split: part.split for split, part in parts.items()}
        check_disjoint({split: part.names for split, part in parts.items()}, folder, PUBLISHED)
        layout = f"the pickles {_CATEGORY.format('*')} in {folder}"
        return _source(layout, splits, stamp(*(folder / name for name in category)))
    listed = [*places, *(place / sub for place in places for sub in ("split", "splits"))]
    for folder in listed:
        named = {split: _first(folder, [f"{name}.csv" for name in _PICKLES[split]]) for split in SPLITS}
        paths = {split: path for split, path in named.items() if path is not None}
        if len(paths) < len(SPLITS):
            continue
        lists = [path.name for path in paths.values()]
        place = folder if folder in places else folder.parent
        read = {split: _read_list(path, split) for split, path in paths.items()}
        located = {split: _locate(place, path, split, read[split]) for split, path in paths.items()}
        splits = {split: split_of_files(_classes(split), files, SIDE) for split, (files, _) in located.items()}
        holders = sorted({str(holder) for _, holder in located.values()})
        layout = f"{' and '.join(holders)} and the lists {', '.join(lists)} in {folder}"
        where: list[object] = [*paths.values()]
        if holders == ["images/"]:
            where.append(open_tree(place / "images").entries)
        else:
            where += [stamp(path) for files, _ in located.values() for path, _ in files]
        return _source(layout, splits, stamp(*where))
    partly = any((place / name).is_file() for place in listed for name in (*pickles, *category, *lists))
    source = None if partly else _from_folders(places)
    if source is not None:
        return source
    if partly:
        raise missing_files_error("miniimagenet", places, [pickles, lists, category], PUBLISHED)
    raise MissingDataError(
        f"miniimagenet: nothing of it is recognised in {' or '.join(map(str, places))}: neither "
        f"{PICKLE.format('{train,val,test}')} nor {_CATEGORY.format('{train_phase_train,val,test}')} nor "
        f"{{train,val,test}}.csv with images/ nor folders n01532829 and so on, there or in {{train,val,test}}/: give "
        f"the folder that contains them; published at {PUBLISHED}"
    )


def _source(layout: str, splits: dict[str, SourceSplit], stamped: str, notices: tuple[str, ...] = ()) -> Source:
    return Source("miniimagenet", layout, splits, stamped, published=PUBLISHED, notices=notices)


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _classes(split: str) -> tuple[str, ...]:
    return tuple(class_list(f"miniimagenet_{split}"))


def _check_classes(found: set[str], split: str, where: Path) -> tuple[str, ...]:
    """Return the classes of a split; raise DataError if those found are others."""
    classes = _classes(split)
    if found != set(classes):
        odd = sorted(found ^ set(classes))
        raise DataError(
            f"{where} has {len(found)} classes, which are not the {len(classes)} of Ravi & Larochelle's {split} split "
            f"({shown(odd[0])} is {'not one of them' if odd[0] in found else 'missing'}): fetch it anew from "
            f"{PUBLISHED}"
        )
    return classes


def _from_pickle(path: Path, split: str) -> SourceSplit:
    """Make a split from a file mini-imagenet-cache-*."""
    values = load_arrays(path, str(path), PUBLISHED, _INLINE)

    def refuse(what: str) -> DataError:
        return DataError(f"{path} {what}: fetch it anew from {PUBLISHED}")

    images, members = get_field(values, "image_data"), get_field(values, "class_dict")
    if not isinstance(images, StoredArray) or not images.is_like(np.uint8, 4) or images.shape[1:] != (SIDE, SIDE, 3):
        raise refuse(f"has no usable 'image_data' (n, {SIDE}, {SIDE}, 3)")
    if not isinstance(members, dict):
        raise refuse("has no usable 'class_dict'")
    members = {k.decode("ascii", "replace") if isinstance(k, bytes) else str(k): v for k, v in members.items()}
    classes = _check_classes(set(members), split, path)
    count = images.shape[0]
    labels = np.full(count, -1, np.int64)
    rows = np.full(count, -1, np.int64)
    first, counts = 0, []
    for k, name in enumerate(classes):
        indices = members[name]
        try:
            listed = read_labels(indices)
        except ValueError:
            listed = []
        if not isinstance(listed, np.ndarray) or listed.max() >= count:
            raise refuse(f"has a 'class_dict' whose entry {name!r} is not a list of numbers below {count}")
        indices = listed.tolist()
        if len(set(indices)) < len(indices) or (labels[indices] >= 0).any():
            raise refuse(f"lists an image of {name!r} twice")
        labels[indices] = k
        rows[indices] = first + np.arange(len(indices))
        first += len(indices)
        counts.append(len(indices))

    return _split_of_array(classes, tuple(counts), images, rows, path)


def _split_of_array(
    classes: tuple[str, ...], counts: tuple[int, ...], images: StoredArray, rows: np.ndarray, path: Path
) -> SourceSplit:
    """Make a split from an array of images (n, 84, 84, 3) and the row of each image."""

    def chunks(start: int) -> Iterator[np.ndarray]:
        with damage_explained(str(path), PUBLISHED):
            for chunk in images.chunks(start, _AT_ONCE):
                yield chunk.transpose(0, 3, 1, 2)

    return SourceSplit(classes, counts, (3, SIDE, SIDE), images.shape[0], array_stream(rows, chunks))


class _CategoryPickle:
    """A file miniImageNet_category_split_*: it has `data`, `labels` and, in most copies, names in `catname2label`."""

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        values = load_arrays(path, str(path), PUBLISHED, _INLINE)

        images = get_field(values, "data")
        if (
            not isinstance(images, StoredArray)
            or not images.is_like(np.uint8, 4)
            or images.shape[1:] != (SIDE, SIDE, 3)
        ):
            raise self.refuse(f"has no usable 'data' (n, {SIDE}, {SIDE}, 3)")
        try:
            labels, distinct = class_positions(read_labels(get_field(values, "labels")))
        except ValueError as error:
            raise self.refuse(f"has no usable 'labels' ({error})") from error
        if len(labels) != images.shape[0]:
            raise self.refuse(f"has {images.shape[0]} images, but {len(labels)} labels")
        classes = _classes(split)
        if len(distinct) != len(classes):
            raise self.refuse(
                f"has {len(distinct)} classes, but the {split} split of Ravi & Larochelle has {len(classes)}"
            )
        names = self._names(get_field(values, "catname2label"), distinct)
        if all(_WORDNET.fullmatch(name) for name in names):
            order = [_check_classes(set(names), split, path).index(name) for name in names]
            labels = np.array(order, np.int64)[labels]  # gives the same episodes as the other layouts
        else:
            classes = tuple(f"{split} {name}" for name in names)
        numbered = all(re.fullmatch(r"\d{3,}", name) for name in names)
        self.names = [] if numbered else names  # numbers may start anew in each split
        rows, counts = class_rows(labels, len(classes))
        self.split = _split_of_array(classes, counts, images, rows, path)

    def refuse(self, what: str) -> DataError:
        return DataError(f"{self.path} {what}: fetch it anew from {PUBLISHED}")

    def _names(self, numbers: Any, distinct: list[Any]) -> list[str]:
        """Return the names of the distinct labels, or their numbers as text if the file has no names."""
        if all(isinstance(label, str) for label in distinct):
            return distinct
        if numbers is None:
            first = distinct[0] if distinct[-1] - distinct[0] == len(distinct) - 1 else 0
            return [f"{label - first:03d}" for label in distinct]
        name_of: dict[int, str] = {}
        for name, number in numbers.items() if isinstance(numbers, dict) else ():
            if isinstance(name, str | bytes) and type(number) is int:
                name_of[number] = composed(as_text(name))
        nameless = [label for label in distinct if label not in name_of]
        if nameless:
            raise self.refuse(f"has a 'catname2label' without the label {nameless[0]}")
        return [name_of[label] for label in distinct]


def _read_list(path: Path, split: str) -> list[tuple[str, str]]:
    """Read (file, class) of each line of a csv list.

    Raises:
        DataError: the list is damaged, has other classes, a file twice, or a path that leaves the folder.
    """
    # Spreadsheets put a byte order mark before the first word, and some separate the columns by semicolons.
    with damage_explained(str(path), PUBLISHED):
        if path.stat().st_size > _LARGEST_LIST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, but the published lists have 1,500,000 at most")
        table = decode_text(path.read_bytes())
        head = table.partition("\n")[0]
        delimiter = max(",;\t", key=head.count)
        rows = [
            [cell.strip() for cell in row] for row in csv.reader(io.StringIO(table, newline=""), delimiter=delimiter)
        ]
        rows = [row for row in rows if any(row)]
        file, label, body = _columns(path, rows)
        if not all(len(row) > max(file, label) and row[file] and row[label] for row in body):
            raise ValueError("a line without filename or label")
        lines = [(row[file].replace("\\", "/").removeprefix("./"), composed(row[label])) for row in body]
    _check_classes({label for _, label in lines}, split, path)
    twice = [name for name, count in Counter(name for name, _ in lines).items() if count > 1]
    if twice:
        raise DataError(f"{path} lists {shown(twice[0])} twice: fetch it anew from {PUBLISHED}")
    for name, _ in lines:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or ":" in name or "\0" in name:
            raise DataError(
                f"{path} names {shown(name)}, which would leave the folder {path.parent}: write the names of the files "
                f"without a path, or fetch the list anew from {PUBLISHED}"
            )
    return lines


def _columns(path: Path, rows: list[list[str]]) -> tuple[int, int, list[list[str]]]:
    """Find the columns of the files and of the classes by their names or, if these are unknown, by their content.

    Returns:
        The indices of the two columns, and the rows without the header.
    """
    if not rows:
        raise ValueError("it is empty")
    head = rows[0]
    names = [re.sub(r"[\s_-]", "", name).lower() for name in head]
    files = [k for k, name in enumerate(names) if name in _FILE_COLUMNS]
    labels = [k for k, name in enumerate(names) if name in _CLASS_COLUMNS]
    body = rows[1:]
    if len(labels) > 1:  # a class has a number beside its name, say, or its name twice
        labels = [k for k in labels if all(len(row) > k and _WORDNET.fullmatch(row[k]) for row in body)] or labels
        if all(len({row[k] for k in labels if k < len(row)}) == 1 for row in body):
            labels = labels[:1]
    if len(files) == 1 and len(labels) == 1:
        return files[0], labels[0], body
    if not any(_WORDNET.fullmatch(cell) for cell in head):  # else the list has no header
        rows = body
    width = min(map(len, rows), default=0)
    files = [k for k in range(width) if all(row[k].lower().endswith(SUFFIXES) for row in rows)]
    labels = [k for k in range(width) if all(_WORDNET.fullmatch(row[k]) for row in rows)]
    if len(files) == 1 and len(labels) == 1:
        return files[0], labels[0], rows
    raise DataError(
        f"{path}: its columns are {shown(head)}, and it is not clear which one has the pictures and which one their "
        "classes: rename them, in its first line, to filename and label"
    )


def _locate(place: Path, path: Path, split: str, lines: list[tuple[str, str]]) -> tuple[list[tuple[Path, int]], str]:
    """Find the files that a list names.

    Args:
        place: the folder to look in.
        path: the list, for messages.
        split: the split that it lists.
        lines: (file, class) of each of its lines.

    Returns:
        The path of each file with the index of its class, and a description of where the files lie.

    Raises:
        MissingDataError: files are missing.
    """
    ways: dict[str, Callable[[str, str], Path]] = {
        "images/": lambda name, label: place / "images" / name,
        "images/CLASS/": lambda name, label: place / "images" / label / name,
        "CLASS/": lambda name, label: place / label / name,
        "files": lambda name, label: place / name,
        f"{split}/CLASS/": lambda name, label: place / split / label / name,
        f"{split}/": lambda name, label: place / split / name,
    }
    some = lines[:: max(1, len(lines) // 50)]
    there = {words: sum(way(*line).is_file() for line in some) for words, way in ways.items()}
    words = max(there, key=lambda w: there[w])  # of several equal ones, the first
    files = [ways[words](*line) for line in lines]
    absent = [name for (name, _), file in zip(lines, files, strict=True) if not file.is_file()]
    if absent:
        if there[words]:
            where = str(place / words)
        else:
            where = f"{place / 'images'}, nor in a folder of its class there or in {place}"
        raise MissingDataError(
            f"miniimagenet: {len(absent)} images that {path.name} lists are not in {where} (first: "
            f"{brief(absent[0])}); published at {PUBLISHED}"
        )
    position = {name: k for k, name in enumerate(_classes(split))}
    return [(file, position[label]) for file, (_, label) in zip(files, lines, strict=True)], words


_DIVISIONS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


def _from_folders(places: Sequence[Path]) -> Source | None:
    """Find the data set in folders of classes; None if there is no folder of any of its classes.

    Raises:
        DataError: classes are missing, there are other classes as well, or an image is there twice.
    """
    ours = {split: set(_classes(split)) for split in SPLITS}
    wanted = set.union(*ours.values())
    groups: list[dict[str, dict[str, Path]]] = []  # train, val or test ("" if not divided) -> class -> its folder
    for place in [base for p in places for base in (p, p / "images", p / "data")]:
        inside = subfolders(place)
        groups.append({"": inside})
        groups.append({name: subfolders(path) for name, path in inside.items() if name.lower() in _DIVISIONS})
    group = max(groups, key=lambda g: len(wanted & {name for classes in g.values() for name in classes}))
    found = {name for classes in group.values() for name in classes if _WORDNET.fullmatch(name)}
    if not wanted & found:
        return None
    where = sorted({str(path.parent) for classes in group.values() for name, path in classes.items() if name in found})
    if found != wanted:
        odd = sorted(found ^ wanted)[0]
        raise DataError(
            f"miniimagenet: {' and '.join(where)} has folders of {len(found)} classes, which are not miniImageNet's "
            f"100 ({odd} is {'not one of them' if odd in found else 'missing'}); published at {PUBLISHED}"
        )
    pictures: dict[str, list[Path]] = {}
    for name in sorted(wanted):
        folders_of = [classes[name] for classes in group.values() if name in classes]
        pictures[name] = _joined([pictures_in(folder) for folder in folders_of], folders_of)
    splits = {}
    for split in SPLITS:
        classes = _classes(split)
        empty = [name for name in classes if not pictures[name]]
        if empty:
            raise MissingDataError(f"miniimagenet: {' and '.join(where)} has no images of {empty[0]}; see {PUBLISHED}")
        splits[split] = split_of_files(
            classes, [(p, k) for k, name in enumerate(classes) for p in pictures[name]], SIDE
        )
    notices: tuple[str, ...] = ()
    if "" not in group and any(
        found & set(classes) != ours[_DIVISIONS[name.lower()]]
        for name, classes in group.items()
        if found & set(classes)
    ):
        notices = (
            f"{', '.join(sorted(group))} divide the images in another way than Ravi & Larochelle, whose training, "
            "validation and test classes are disjoint: the images of each class are joined, and the classes are "
            "divided by their lists",
        )
    stamped = stamp([stamp(path.name, path) for name in sorted(pictures) for path in pictures[name]])
    return _source(f"the folders of 100 classes in {' and '.join(where)}", splits, stamped, notices)


def _joined(parts: list[list[Path]], folders_of: list[Path]) -> list[Path]:
    """Join the pictures of one class from several folders, sorted by name.

    Raises:
        DataError: the same picture is in two of the folders.
    """
    if len(parts) == 1:
        return parts[0]
    named: dict[str, Path] = {}
    every = []
    for folder, files in zip(folders_of, parts, strict=True):
        for file in files:
            name = composed(file.relative_to(folder).as_posix())
            other = named.setdefault(name, file)
            if other != file and other.stat().st_size == file.stat().st_size and read_file(other) == read_file(file):
                raise DataError(
                    f"miniimagenet: {other} and {file} are the same image, so that a task could both adapt to it and "
                    "be evaluated on it: remove one of the two copies"
                )
            every.append((name, file))
    return [file for _, file in sorted(every)]
