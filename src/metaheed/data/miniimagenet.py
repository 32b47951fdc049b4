"""miniImageNet in the split of Ravi & Larochelle (ICLR 2017): 64/16/20 classes of ImageNet, 600 images each, 84×84 RGB.

From the pickles that circulate, mini-imagenet-cache-{train,val,test}.pkl, whose one array of pixels is read from the
file part by part; or from images/ with {train,val,test}.csv (filename,label), the lists of Ravi & Larochelle.
Images of another size are resized to 84×84 with Lanczos, the aspect ratio not kept, as their scripts and Finn's do.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from metaheed.data.decode import Encoded, rgb
from metaheed.data.images import SPLITS
from metaheed.data.locate import class_list, folders, holding, lacking
from metaheed.data.safe_pickle import StoredArray, load_arrays, reading
from metaheed.data.sources import Request, Source, SourceSplit, array_stream, class_rows, encoded_stream, stamp
from metaheed.data.trees import open_tree, read_file
from metaheed.errors import DataError, MissingDataError

PUBLISHED = (
    "https://github.com/renmengye/few-shot-ssl-public (pickles), "
    "https://github.com/twitter-research/meta-learning-lstm (lists)"
)
PICKLE = "mini-imagenet-cache-{}.pkl"
SIDE = 84
_SUBFOLDERS = ("miniimagenet", "mini-imagenet", "miniImageNet", "mini_imagenet")
_INLINE = 512  # bytes of a string that are kept; the pixels stay in the file
_AT_ONCE = 64  # images


def find(request: Request) -> Source:
    """The data set from the folder that holds its three pickles, or images/ and three lists.

    Raises:
        DataError: a file is missing or damaged, or has other classes; says which, and where it is published.
    """
    pickles, lists = [PICKLE.format(s) for s in SPLITS], [f"{s}.csv" for s in SPLITS]
    expected = f"{PICKLE.format('{train,val,test}')}, or images/ and {{train,val,test}}.csv"
    places = folders(request.root, "miniimagenet", _SUBFOLDERS, expected, PUBLISHED)
    folder = holding(places, pickles)
    if folder is not None:
        splits = {split: _from_pickle(folder / name, split) for split, name in zip(SPLITS, pickles, strict=True)}
        files = [folder / name for name in pickles]
        return Source(
            "miniimagenet", f"the pickles {PICKLE.format('*')} in {folder}", splits, stamp(*files), published=PUBLISHED
        )
    folder = holding(places, lists)
    if folder is not None:
        images = folder / "images"
        if not images.is_dir():
            raise MissingDataError(f"miniimagenet: {images} not found beside {lists[0]}; published at {PUBLISHED}")
        splits = {split: _from_list(folder / name, images, split) for split, name in zip(SPLITS, lists, strict=True)}
        layout = f"images/ and the lists {', '.join(lists)} in {folder}"
        stamped = stamp(*(folder / name for name in lists), open_tree(images).entries)
        return Source("miniimagenet", layout, splits, stamped, published=PUBLISHED)
    raise lacking("miniimagenet", places, [pickles, lists], PUBLISHED)


def _check_classes(found: set[str], split: str, where: Path) -> tuple[str, ...]:
    classes = tuple(class_list(f"miniimagenet_{split}"))
    if found != set(classes):
        odd = sorted(found ^ set(classes))
        raise DataError(
            f"{where} has {len(found)} classes, which are not the {len(classes)} of Ravi & Larochelle's {split} split "
            f"({odd[0]!r} is {'not one of them' if odd[0] in found else 'missing'}): fetch it anew from {PUBLISHED}"
        )
    return classes


def _from_pickle(path: Path, split: str) -> SourceSplit:
    values = load_arrays(path, str(path), PUBLISHED, _INLINE)

    def refuse(what: str) -> DataError:
        return DataError(f"{path} {what}: fetch it anew from {PUBLISHED}")

    def field(key: str) -> Any:
        return values.get(key, values.get(key.encode())) if isinstance(values, dict) else None

    images, members = field("image_data"), field("class_dict")
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
        if isinstance(indices, StoredArray) and indices.is_like("iu", 1):
            indices = indices.read().tolist()
        if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < count for i in indices):
            raise refuse(f"has a 'class_dict' whose entry {name!r} is no list of numbers below {count}")
        if len(set(indices)) < len(indices) or (labels[indices] >= 0).any():
            raise refuse(f"gives an image of {name!r} to two places")
        labels[indices] = k
        rows[indices] = first + np.arange(len(indices))
        first += len(indices)
        counts.append(len(indices))

    def chunks(start: int) -> Iterator[np.ndarray]:
        with reading(str(path), PUBLISHED):
            for chunk in images.chunks(start, _AT_ONCE):
                yield chunk.transpose(0, 3, 1, 2)

    return SourceSplit(classes, tuple(counts), (3, SIDE, SIDE), count, array_stream(rows, chunks))


def _from_list(path: Path, images: Path, split: str) -> SourceSplit:
    # Spreadsheets put a mark of the encoding before the first word.
    with reading(str(path), PUBLISHED), path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if not {"filename", "label"} <= set(table.fieldnames or ()):
            raise ValueError(f"its columns are {table.fieldnames}, not filename and label")
        lines = [(line["filename"], line["label"]) for line in table]
        if not all(name and label for name, label in lines):
            raise ValueError("a line without filename or label")
    classes = _check_classes({label for _, label in lines}, split, path)
    twice = [name for name, count in Counter(name for name, _ in lines).items() if count > 1]
    if twice:
        raise DataError(f"{path} lists {twice[0]!r} twice: fetch it anew from {PUBLISHED}")
    for name, _ in lines:
        if Path(name).name != name or "\\" in name:
            raise DataError(
                f"{path} names {name!r}, which would leave the folder {images}: fetch it anew from {PUBLISHED}"
            )
    absent = [name for name, _ in lines if not (images / name).is_file()]
    if absent:
        raise MissingDataError(
            f"miniimagenet: {len(absent)} images that {path.name} lists are not in {images} (first: {absent[0]}); "
            f"published at {PUBLISHED}"
        )
    place = {name: k for k, name in enumerate(classes)}
    rows, counts = class_rows(np.array([place[label] for _, label in lines]), len(classes))
    names = {int(row): str(images / name) for row, (name, _) in zip(rows, lines, strict=True)}

    def encoded(start: int) -> Iterator[Encoded]:
        for (name, _), row in zip(lines[start:], rows[start:].tolist(), strict=True):
            yield Encoded(str(images / name), (row,), read_file(images / name))

    shape = (3, SIDE, SIDE)
    stream = encoded_stream(encoded, partial(rgb, side=SIDE), shape)
    return SourceSplit(classes, counts, shape, len(lines), stream, names.__getitem__)
