"""tieredImageNet (Ren et al., ICLR 2018): 351/97/160 classes of ImageNet in 20/6/8 disjoint categories, 84×84 RGB.

Two layouts of the images are read:

- {split}_images_png.pkl, a list of encoded PNGs of several GB. Only the place of each PNG in the file is kept in
  memory.
- {split}_images.npz, with all pixels in one array `images`. It was written with OpenCV and has the channels in the
  order BGR, which is changed to RGB here. (OpenCV wrote the PNGs from the same arrays; they give RGB when decoded.)

Labels are read from {split}_labels.pkl (with the publisher's keys; with `labels` alone, as MetaOptNet and FEAT have it;
or as a mere list or array), from {split}_labels.npy or .npz, or from `labels` in the npz of the images. They are
numbers that start from 0 in each split or continue from split to split, or names of WordNet. The publisher's files have
descriptions instead of names; a class is then named by its number in the split and its description.
"""

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from metaheed.data.images import SPLITS
from metaheed.data.locate import candidate_folders, check_disjoint, class_table, first_with, missing_files_error
from metaheed.data.reading.decode import Encoded
from metaheed.data.reading.labels import as_text, class_positions, get_field, read_labels
from metaheed.data.reading.pickle_stream import StoredArray
from metaheed.data.reading.safe_pickle import damage_explained, load_arrays
from metaheed.data.sources import Request, Source, SourceSplit, array_stream, class_rows, encoded_stream, stamp
from metaheed.errors import DataError, MissingDataError

PUBLISHED = "https://github.com/renmengye/few-shot-ssl-public"
SIDE = 84
_SHAPE = (3, SIDE, SIDE)
_SUBFOLDERS = ("tieredimagenet",)
_INLINE = 512  # longer strings (the PNGs) are left in the file
_AT_ONCE = 64  # images that are read at once
_KEYS = ("label_specific", "labels", "label")
"""The keys of the labels in different copies, the publisher's first."""
_WORDNET = re.compile(r"n\d{8}")
_LARGEST_LABELS = 1 << 26  # bytes of a file of labels
_LARGEST_PNG = 1 << 20  # bytes of a PNG; the pixels of an image have 21,168


def find(request: Request) -> Source:
    """Find tieredImageNet in any of its layouts.

    Raises:
        DataError: a file is missing or damaged, or has another number of classes; the message says which, and where it
            is published.
    """
    pickles = [f"{s}_images_png.pkl" for s in SPLITS]
    arrays = [f"{s}_images.npz" for s in SPLITS]
    labels = [f"{s}_labels.pkl" for s in SPLITS]
    expected = "{train,val,test}_images_png.pkl or _images.npz, and {train,val,test}_labels.pkl"
    places = candidate_folders(request.root, "tieredimagenet", _SUBFOLDERS, expected, PUBLISHED)
    layouts: tuple[tuple[list[str], Callable[[Path, _Labels], SourceSplit], str], ...] = (
        (pickles, _from_pickle, "the pickled PNGs *_images_png.pkl"),
        (arrays, _from_npz, "the arrays *_images.npz (BGR)"),
    )
    for files, read, layout in layouts:
        folder = first_with(places, files)
        if folder is None:
            continue
        found = {s: label for s in SPLITS if (label := _find_labels(folder, s)) is not None}
        absent = [s for s in SPLITS if s not in found]
        if absent:
            raise MissingDataError(
                f"tieredimagenet: {absent[0]}_labels.pkl not found in {folder}, nor {absent[0]}_labels.npy or .npz, "
                f"nor 'labels' in the images' npz; published at {PUBLISHED}"
            )
        # Numbers are not compared, because they may start from 0 in each split.
        names = {s: [name for name in label.distinct if isinstance(name, str)] for s, label in found.items()}
        check_disjoint(names, folder, PUBLISHED)
        splits = {s: read(folder / file, found[s]) for s, file in zip(SPLITS, files, strict=True)}
        beside = [label.path for label in found.values() if label.path.name not in files]
        stamped = stamp(*(folder / f for f in files), *beside)
        return Source("tieredimagenet", f"{layout} in {folder}", splits, stamped, published=PUBLISHED)
    raise missing_files_error("tieredimagenet", places, [[*pickles, *labels], [*arrays, *labels]], PUBLISHED)


def _find_labels(folder: Path, split: str) -> "_Labels | None":
    """Return the labels of a split from the file that has them; None if there is no such file."""
    for suffix in ("pkl", "pickle"):
        path = folder / f"{split}_labels.{suffix}"
        if path.is_file():
            return _Labels(path, split, load_arrays(path, str(path), PUBLISHED))
    path = folder / f"{split}_labels.npy"
    if path.is_file():
        return _Labels(path, split, _small_npy(path))
    for path in (folder / f"{split}_labels.npz", folder / f"{split}_images.npz"):
        if path.is_file() and (found := _small_arrays(path)):
            return _Labels(path, split, found)
    return None


class _Labels:
    """The labels of a split."""

    def __init__(self, path: Path, split: str, values: Any) -> None:
        self.path, self.split = path, split
        self.general = self.descriptions = None
        specific, key = values, "labels"
        if isinstance(values, dict):
            key = next((k for k in _KEYS if get_field(values, k) is not None), _KEYS[0])
            specific = get_field(values, key)
            general = get_field(values, "label_general")
            if general is not None:
                self.general = self._read(general, "label_general")
            described = get_field(values, "label_specific_str")
            if isinstance(described, list) and all(isinstance(d, str | bytes) for d in described):
                self.descriptions = [as_text(d) for d in described]
        self.labels, self.distinct = class_positions(self._read(specific, key))
        table = class_table(f"tieredimagenet_{split}")
        self._expect("classes", len(self.distinct), len(table))
        known = {name for name, _ in table}
        odd = [n for n in self.distinct if isinstance(n, str) and _WORDNET.fullmatch(n) and n not in known]
        if odd:
            raise self.refuse(f"has the class {odd[0]}, which is not one of tieredImageNet's {split} split")
        if self.general is not None:
            self._expect("categories", len(class_positions(self.general)[1]), len({category for _, category in table}))
            if len(self.general) != len(self.labels):
                raise self.refuse(f"has {len(self.labels)} classes of images, but {len(self.general)} categories")

    def refuse(self, what: str) -> DataError:
        return DataError(f"{self.path} {what}: fetch it anew from {PUBLISHED}")

    def _read(self, values: Any, key: str) -> np.ndarray | list[str]:
        try:
            return read_labels(values)
        except ValueError as error:
            raise self.refuse(f"has no usable {key!r} ({error})") from error

    def _expect(self, what: str, found: int, expected: int) -> None:
        if found != expected:
            raise self.refuse(f"has {found} {what}, but tieredImageNet's {self.split} split has {expected}")

    def split_of(self, images: int, where: Path) -> tuple[tuple[str, ...], np.ndarray, tuple[int, ...]]:
        """Return the class names, the row of each image, and the number of images of each class.

        Args:
            images: the number of images in the file.
            where: that file, for messages.

        Raises:
            DataError: there are more or fewer images than labels.
        """
        if images != len(self.labels):
            raise self.refuse(f"has {len(self.labels)} labels, but {where.name} has {images} images")
        rows, counts = class_rows(self.labels, len(self.distinct))
        names = [label if isinstance(label, str) else self._name(k, label) for k, label in enumerate(self.distinct)]
        return tuple(names), rows, counts

    def _name(self, position: int, label: int) -> str:
        count = len(self.distinct)
        # Consecutive labels may start from 0 or continue from the split before; both give the same numbers here.
        number = position if self.distinct[-1] - self.distinct[0] == count - 1 else label
        descriptions = self.descriptions or []
        at = position if len(descriptions) == count else label
        return f"{self.split} {number:03d} {descriptions[at] if at < len(descriptions) else ''}".strip()


def _from_pickle(path: Path, labels: _Labels) -> SourceSplit:
    """Make a split from a pickled list of PNGs."""
    classes, rows, counts = labels.split_of(len(labels.labels), path)

    def encoded(start: int) -> Iterator[Encoded]:
        pictures = load_arrays(path, str(path), PUBLISHED, _INLINE)
        if not isinstance(pictures, list) or len(pictures) != len(rows):
            found = len(pictures) if isinstance(pictures, list) else "no list of"
            raise DataError(
                f"{path} has {found} images, but {labels.path.name} has {len(rows)} labels: fetch both anew from "
                f"{PUBLISHED}"
            )
        with path.open("rb") as file:
            for index in range(start, len(pictures)):
                one = pictures[index]
                pictures[index] = None
                with damage_explained(f"{path} (image {index})", PUBLISHED):
                    if isinstance(one, StoredArray):
                        if not one.is_like(np.uint8) or one.nbytes > _LARGEST_PNG:
                            raise ValueError(f"not a PNG, but an array {one.shape} of {one.dtype}")
                        one = one.read(file).tobytes()
                    if not isinstance(one, bytes):
                        raise ValueError(f"not a PNG, but a {type(one).__name__}")
                yield Encoded(f"{path}, image {index}", (int(rows[index]),), one)

    return SourceSplit(classes, counts, _SHAPE, len(rows), encoded_stream(encoded, _decode_png, _SHAPE))


def _decode_png(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if image.size != (SIDE, SIDE):
            raise ValueError(f"an image of {image.size} pixels, not {SIDE}×{SIDE}")
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _from_npz(path: Path, labels: _Labels) -> SourceSplit:
    """Make a split from the array in an npz, whose channels are in the order BGR."""
    with damage_explained(str(path), PUBLISHED), zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
        shape, dtype, offset = _header(file)
        size = archive.getinfo("images.npy").file_size
        if dtype != np.uint8 or shape[1:] != (SIDE, SIDE, 3):
            raise ValueError(f"its images are {shape} of {dtype}, not (n, {SIDE}, {SIDE}, 3) of uint8")
        if size != offset + int(np.prod(shape)):
            raise ValueError(f"images of shape {shape} in {size} bytes")
    classes, rows, counts = labels.split_of(shape[0], path)

    def chunks(start: int) -> Iterator[np.ndarray]:
        entry = SIDE * SIDE * 3
        with (
            damage_explained(str(path), PUBLISHED),
            zipfile.ZipFile(path) as archive,
            archive.open("images.npy") as file,
        ):
            file.seek(offset + start * entry)
            for first in range(start, shape[0], _AT_ONCE):
                count = min(_AT_ONCE, shape[0] - first)
                data = file.read(count * entry)
                if len(data) != count * entry:
                    raise EOFError("it ends too early")
                bgr = np.frombuffer(data, np.uint8).reshape(count, SIDE, SIDE, 3)
                yield bgr[..., ::-1].transpose(0, 3, 1, 2)

    return SourceSplit(classes, counts, _SHAPE, len(rows), array_stream(rows, chunks))


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran or dtype.hasobject:
        raise ValueError("an array in Fortran order, or of Python objects")
    return shape, dtype, file.tell()


def _small_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read those arrays of an npz that may be labels."""

    found = {}
    with damage_explained(str(path), PUBLISHED), zipfile.ZipFile(path) as archive:
        for name in (*_KEYS, "label_general"):
            if f"{name}.npy" not in archive.namelist():
                continue
            if archive.getinfo(f"{name}.npy").file_size > _LARGEST_LABELS:
                raise ValueError(f"{name} claims more bytes than labels have")
            with archive.open(f"{name}.npy") as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
    return found


def _small_npy(path: Path) -> np.ndarray:
    with damage_explained(str(path), PUBLISHED), path.open("rb") as file:
        if path.stat().st_size > _LARGEST_LABELS:
            raise ValueError("it has more bytes than labels have")
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array
