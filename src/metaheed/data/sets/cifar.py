"""CIFAR-FS (Bertinetto et al., ICLR 2019) and FC100 (Oreshkin et al., NeurIPS 2018), two few-shot splits of CIFAR-100.

CIFAR-100 has 100 classes of 600 images, 32×32 RGB. CIFAR-FS divides the classes at random into 64/16/20 for train, val
and test. FC100 divides them by superclass into 60/20/20 (12/4/4 superclasses), so that train and test are less alike.

Three layouts are read:

- the published folder cifar-100-python, or its tar.gz;
- CIFAR_FS_{split}.pickle or FC100_{split}.pickle, which are pickles of Python 2 and are read by the safe reader;
- cifar100/data/CLASS/*.png, as Bertinetto et al. released CIFAR-FS, with the lists splits/bertinetto/*.txt or without.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaheed.data.images import SPLITS
from metaheed.data.locate import candidate_folders, class_list, first_with, missing_files_error
from metaheed.data.reading.classes import pictures_in, split_of_files, subfolders
from metaheed.data.reading.labels import get_field, read_labels
from metaheed.data.reading.pickle_stream import Opener, StoredArray
from metaheed.data.reading.safe_pickle import damage_explained, load_arrays
from metaheed.data.reading.trees import open_tree
from metaheed.data.sources import Request, Source, SourceSplit, array_stream, class_rows, stamp
from metaheed.errors import DataError, MissingDataError, shown

PUBLISHED = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
FOLDER = "cifar-100-python"
ARCHIVE = "cifar-100-python.tar.gz"
PARTS = ("train", "test", "meta")
SIDE = 32
_INLINE = 4096  # longer strings (the pixels) are left in the file
_AT_ONCE = 1024  # images that are read at once
_LARGEST_LIST = 1 << 20  # bytes of a list of classes


class _Variant(NamedTuple):
    """What distinguishes CIFAR-FS and FC100."""

    name: str
    lists: str
    """The name of the class lists, without the split."""
    pickle: str
    """The name of the pickles, with {} for the split."""
    subfolders: tuple[str, ...]
    """The customary subfolders of the data root."""


_FS = _Variant("cifar-fs", "cifar_fs", "CIFAR_FS_{}.pickle", (FOLDER, "cifar-fs", "cifar100"))
_FC100 = _Variant("fc100", "fc100", "FC100_{}.pickle", (FOLDER, "fc100", "cifar100"))


def find_fs(request: Request) -> Source:
    """Find CIFAR-FS in any of its layouts.

    Raises:
        DataError: a file is missing or damaged; the message says which, and where it is published.
    """
    return _find(request.root, _FS)


def find_fc100(request: Request) -> Source:
    """Find FC100 in any of its layouts.

    Raises:
        DataError: as in `find_fs`.
    """
    return _find(request.root, _FC100)


def _find(root: Path | None, variant: _Variant) -> Source:
    """Find a variant in any of its layouts."""
    pickles = [variant.pickle.format(split) for split in SPLITS]
    expected = f"{FOLDER}/{{train,test,meta}} or {ARCHIVE} or {variant.pickle.format('{train,val,test}')}"
    places = candidate_folders(root, variant.name, variant.subfolders, expected, PUBLISHED)
    folder = first_with(places, PARTS)
    if folder is not None:
        files = {part: folder / part for part in PARTS}
        parts = {part: _PicklePart(path, str(path)) for part, path in files.items()}
        return _whole(variant, parts, f"the {FOLDER} folder {folder}", stamp(*files.values()))
    folder = first_with(places, [ARCHIVE])
    if folder is not None:
        path = folder / ARCHIVE
        return _whole(variant, _from_archive(path), f"the archive {path}", stamp(path))
    folder = first_with(places, pickles)
    if folder is not None:
        return _from_pickles(variant, [folder / name for name in pickles])
    found = _from_folders(variant, places)
    if found is not None:
        return found
    if not any((place / p).is_file() for place in places for p in (*PARTS, *pickles)):
        # Nothing is there: the error names each layout by a pattern and not by all its files.
        parts_shown = [f"{FOLDER}/{{train,test,meta}}", ARCHIVE, variant.pickle.format("{train,val,test}")]
        parts_shown.append("cifar100/data/CLASS/*.png")
        raise missing_files_error(variant.name, places[:1], [[" or ".join(parts_shown)]], PUBLISHED)
    raise missing_files_error(variant.name, places, [PARTS, pickles], PUBLISHED)


def _from_folders(variant: _Variant, places: list[Path]) -> Source | None:
    """Find a folder of pictures for each class of CIFAR-100, as Bertinetto et al. released CIFAR-FS; None if not there.

    Raises:
        DataError: a class is missing, or the lists beside the folders divide the classes in another way.
    """
    wanted = {split: class_list(f"{variant.lists}_{split}") for split in SPLITS}
    names = {name for classes in wanted.values() for name in classes}
    for place in [base for p in places for base in (p, p / "cifar100")]:
        inside = subfolders(place / "data")
        if not names & set(inside):
            continue
        absent = sorted(names - set(inside))
        if absent:
            raise MissingDataError(
                f"{variant.name}: {place / 'data'} has {len(names) - len(absent)} of CIFAR-100's classes, but not "
                f"{absent[0]!r}; published at {PUBLISHED}"
            )
        lists = [place / "splits" / "bertinetto" / f"{split}.txt" for split in SPLITS]
        for split, path in zip(SPLITS, lists, strict=True):
            if variant is _FS and path.is_file():
                _check_list(path, wanted[split], split)
        splits, stamps = {}, []
        for split, classes in wanted.items():
            files = [(path, k) for k, name in enumerate(classes) for path in pictures_in(inside[name])]
            absent = [name for k, name in enumerate(classes) if not any(label == k for _, label in files)]
            if absent:
                raise MissingDataError(f"{variant.name}: {inside[absent[0]]} has no images; published at {PUBLISHED}")
            splits[split] = split_of_files(classes, files, SIDE)
            stamps += [stamp(path.name, path) for path, _ in files]
        layout = f"the folders of CIFAR-100's classes in {place / 'data'}"
        return Source(variant.name, layout, splits, stamp(variant.name, stamps), published=PUBLISHED)
    return None


def _check_list(path: Path, classes: list[str], split: str) -> None:
    """Raise DataError if a list of classes is not that of CIFAR-FS's published split."""
    with damage_explained(str(path), PUBLISHED):
        if path.stat().st_size > _LARGEST_LIST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than any list of classes")
        listed = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    odd = sorted(listed ^ set(classes))
    if odd:
        raise DataError(
            f"{path} lists {len(listed)} classes, which are not the {len(classes)} of CIFAR-FS's {split} split "
            f"({shown(odd[0])} is {'not one of them' if odd[0] in listed else 'missing'}): delete the list, and the "
            "published split is used"
        )


class _PicklePart:
    """One of the pickles that make up a data set; its pixels are left in the file."""

    def __init__(self, source: Path | Opener, name: str) -> None:
        self.name = name
        self._values = load_arrays(source, name, PUBLISHED, _INLINE)

    def __getitem__(self, key: str) -> Any:
        return get_field(self._values, key)

    def refuse(self, what: str) -> DataError:
        return DataError(f"{self.name} {what}: fetch it anew from {PUBLISHED}")

    def names(self) -> list[str]:
        values = self["fine_label_names"]
        if not isinstance(values, list):
            raise self.refuse("has no usable 'fine_label_names'")
        return [v.decode("ascii", "replace") if isinstance(v, bytes) else str(v) for v in values]

    def labels(self, key: str, below: int, count: int) -> np.ndarray:
        """Return the labels under a key, (count,) int64; raise DataError unless they are `count` numbers < `below`."""
        try:
            values = read_labels(self[key])
        except ValueError as error:
            raise self.refuse(f"has {count} images but no {key!r} that match ({error})") from error
        if len(values) != count:
            raise self.refuse(f"has {count} images but no {key!r} that match")
        if not isinstance(values, np.ndarray) or int(values.max()) >= below:
            raise self.refuse(f"has {key!r} that are not numbers below {below}")
        return values


def _from_archive(path: Path) -> dict[str, _PicklePart]:
    """Read the parts train, test and meta out of the tar.gz."""
    tree = open_tree(path, PUBLISHED)
    members = {e.path.removeprefix("./").removeprefix(f"{FOLDER}/"): e for e in tree.entries}
    missing = [part for part in PARTS if part not in members]
    if missing:
        raise DataError(f"{path} lacks {FOLDER}/{' and '.join(missing)}: fetch it anew from {PUBLISHED}")
    wanted = [e for e in tree.entries if e in [members[part] for part in PARTS]]
    parts = {}
    with damage_explained(str(path), PUBLISHED):
        for entry, content in zip(wanted, tree.read(wanted), strict=True):
            assert isinstance(content, bytes)  # a damaged archive raises an error instead of giving Unreadable
            part = next(p for p in PARTS if members[p] == entry)
            parts[part] = _PicklePart(lambda content=content: io.BytesIO(content), f"{path}:{entry.path}")  # type: ignore[misc]
    return parts


def _whole(variant: _Variant, parts: dict[str, _PicklePart], layout: str, stamped: str) -> Source:
    """Make a variant from the parts of CIFAR-100, by the names of the classes."""
    names = parts["meta"].names()
    lists = {split: tuple(class_list(f"{variant.lists}_{split}")) for split in SPLITS}
    absent = sorted({name for classes in lists.values() for name in classes} - set(names))
    if absent:
        raise parts["meta"].refuse(f"lacks the class {absent[0]!r}")
    pixels, labels = [], []
    for part in (parts["train"], parts["test"]):
        data = part["data"]
        if not isinstance(data, StoredArray) or not data.is_like(np.uint8, 2) or data.shape[1:] != (3 * SIDE**2,):
            raise part.refuse("has no usable 'data'")
        pixels.append((data, part.name))
        labels.append(part.labels("fine_labels", len(names), data.shape[0]))
    label = np.concatenate(labels)
    splits = {}
    for split, classes in lists.items():
        # The number of a class in CIFAR-100 -> its position in the split's list, −1 if it is in another split.
        place = np.full(len(names), -1)
        place[[names.index(c) for c in classes]] = np.arange(len(classes))
        rows, counts = class_rows(place[label], len(classes))
        splits[split] = SourceSplit(
            classes, counts, (3, SIDE, SIDE), len(label), array_stream(rows, lambda start: _planes(pixels, start))
        )
    return Source(variant.name, layout, splits, stamped, published=PUBLISHED)


def _planes(pixels: list[tuple[StoredArray, str]], start: int) -> Iterator[np.ndarray]:
    """Yield the images of both parts from item `start` on, in chunks of (k, 3, 32, 32)."""
    for data, name in pixels:
        count = data.shape[0]
        if start < count:
            with damage_explained(name, PUBLISHED):
                for chunk in data.chunks(start, _AT_ONCE):
                    yield chunk.reshape(-1, 3, SIDE, SIDE)
        start = max(0, start - count)


def _from_pickles(variant: _Variant, files: list[Path]) -> Source:
    """Make a variant from one pickle for each split."""
    splits = {}
    for split, path in zip(SPLITS, files, strict=True):
        part = _PicklePart(path, str(path))
        data = part["data"]
        if not isinstance(data, StoredArray) or not data.is_like(np.uint8, 4) or data.shape[1:] != (SIDE, SIDE, 3):
            raise part.refuse("has no usable 'data' (n, 32, 32, 3)")
        label = part.labels("labels", 100, data.shape[0])
        numbers = sorted(set(label.tolist()))
        expected = len(class_list(f"{variant.lists}_{split}"))
        if len(numbers) != expected:
            raise part.refuse(f"has {len(numbers)} classes, but {variant.name}'s {split} split has {expected}")
        rows, counts = class_rows(np.searchsorted(numbers, label), expected)
        # The files hold numbers of classes but no names, and the numbers may differ from CIFAR-100's.
        classes = tuple(f"{split} class {number}" for number in numbers)
        splits[split] = SourceSplit(
            classes, counts, (3, SIDE, SIDE), len(label), array_stream(rows, _pictures(data, part.name))
        )
    layout = f"the pickles {variant.pickle.format('*')} in {files[0].parent}"
    return Source(variant.name, layout, splits, stamp(*files), published=PUBLISHED)


def _pictures(data: StoredArray, name: str) -> Any:
    def chunks(start: int) -> Iterator[np.ndarray]:
        with damage_explained(name, PUBLISHED):
            for chunk in data.chunks(start, _AT_ONCE):
                yield chunk.transpose(0, 3, 1, 2)

    return chunks
