"""tieredImageNet (Ren et al., ICLR 2018): 351/97/160 classes of ImageNet in 20/6/8 disjoint categories, 84×84 RGB.

Two layouts circulate. {split}_images_png.pkl is a list of encoded PNGs, several GB, of which only where each lies is
kept; {split}_images.npz has the pixels in one array `images`. Labels: {split}_labels.pkl beside, or `labels` in the npz
or in {split}_labels.npz. The npz was written with OpenCV and holds BGR, which is swapped here; the PNGs, written by
OpenCV from the same arrays, hold RGB for every reader that is not OpenCV, and are left alone.

Classes have descriptions in the files, not WordNet names; a class is named by its number and its description.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from metaheed.data.decode import Encoded
from metaheed.data.images import SPLITS
from metaheed.data.locate import class_table, folders, holding, lacking
from metaheed.data.safe_pickle import StoredArray, load_arrays, reading
from metaheed.data.sources import Request, Source, SourceSplit, array_stream, class_rows, encoded_stream, stamp
from metaheed.errors import DataError, MissingDataError

PUBLISHED = "https://github.com/renmengye/few-shot-ssl-public"
SIDE = 84
_SHAPE = (3, SIDE, SIDE)
_SUBFOLDERS = ("tieredimagenet", "tiered-imagenet", "tieredImageNet", "tiered_imagenet")
_INLINE = 512  # bytes of a string that are kept; the PNGs stay in the file
_AT_ONCE = 64  # images
_LARGEST_PNG = 1 << 20  # bytes; 84×84×3 pixels have 21,168


def find(request: Request) -> Source:
    """The data set from the folder that holds its pickled PNGs, or its npz files, and their labels.

    Raises:
        DataError: a file is missing or damaged, or has other numbers of classes; says which, and where it is published.
    """
    pickles = [f"{s}_images_png.pkl" for s in SPLITS]
    arrays = [f"{s}_images.npz" for s in SPLITS]
    labels = [f"{s}_labels.pkl" for s in SPLITS]
    expected = "{train,val,test}_images_png.pkl or _images.npz, and {train,val,test}_labels.pkl"
    places = folders(request.root, "tieredimagenet", _SUBFOLDERS, expected, PUBLISHED)
    folder = holding(places, [*pickles, *labels])
    if folder is not None:
        splits = {s: _from_pickle(folder / f"{s}_images_png.pkl", _Labels(folder, s)) for s in SPLITS}
        layout = f"the pickled PNGs *_images_png.pkl in {folder}"
        return Source(
            "tieredimagenet", layout, splits, stamp(*(folder / f for f in pickles + labels)), published=PUBLISHED
        )
    folder = holding(places, arrays)
    if folder is not None:
        splits = {s: _from_npz(folder / f"{s}_images.npz", _Labels(folder, s)) for s in SPLITS}
        layout = f"the arrays *_images.npz (BGR) in {folder}"
        beside = [p for s in SPLITS for p in (folder / f"{s}_labels.pkl", folder / f"{s}_labels.npz") if p.is_file()]
        return Source(
            "tieredimagenet", layout, splits, stamp(*(folder / f for f in arrays), *beside), published=PUBLISHED
        )
    raise lacking("tieredimagenet", places, [[*pickles, *labels], [*arrays, *labels]], PUBLISHED)


class _Labels:
    """The labels of a split, from whichever file has them."""

    def __init__(self, folder: Path, split: str) -> None:
        self.split = split
        self.path = folder / f"{split}_labels.pkl"
        self.general = self.descriptions = None
        if self.path.is_file():
            values = load_arrays(self.path, str(self.path), PUBLISHED)
            self.specific = self._numbers(_get(values, "label_specific"), "label_specific")
            general = _get(values, "label_general")
            if general is not None:
                self.general = self._numbers(general, "label_general")
            described = _get(values, "label_specific_str")
            if isinstance(described, list) and all(isinstance(d, str | bytes) for d in described):
                self.descriptions = [d.decode("utf-8", "replace") if isinstance(d, bytes) else d for d in described]
        else:
            for self.path in (folder / f"{split}_labels.npz", folder / f"{split}_images.npz"):
                found = self.path.is_file() and _small_array(self.path, "labels")
                if found is not None and found is not False:
                    self.specific = self._numbers(found, "labels")
                    break
            else:
                raise MissingDataError(
                    f"tieredimagenet: {split}_labels.pkl not found in {folder}, nor 'labels' in an npz; "
                    f"published at {PUBLISHED}"
                )
        table = class_table(f"tieredimagenet_{split}")
        self._expect("classes", len(set(self.specific.tolist())), len(table))
        if self.general is not None:
            self._expect("categories", len(set(self.general.tolist())), len({category for _, category in table}))
            if len(self.general) != len(self.specific):
                raise self.refuse(f"has {len(self.specific)} classes of images, but {len(self.general)} categories")

    def refuse(self, what: str) -> DataError:
        return DataError(f"{self.path} {what}: fetch it anew from {PUBLISHED}")

    def _numbers(self, values: Any, key: str) -> np.ndarray:
        if isinstance(values, StoredArray):
            values = values.read()
        array = np.asarray(values) if isinstance(values, list | np.ndarray) else np.empty(0)
        if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
            raise self.refuse(f"has no usable {key!r}")
        return array.astype(np.int64)

    def _expect(self, what: str, found: int, expected: int) -> None:
        if found != expected:
            raise self.refuse(f"has {found} {what}, but tieredImageNet's {self.split} split has {expected}")

    def split_of(self, images: int, where: Path) -> tuple[tuple[str, ...], np.ndarray, tuple[int, ...]]:
        """Class names, the rows of the images, and the images of each class."""
        if images != len(self.specific):
            raise self.refuse(f"has {len(self.specific)} labels, but {where.name} {images} images")
        numbers = np.unique(self.specific)
        rows, counts = class_rows(np.searchsorted(numbers, self.specific), len(numbers))
        names = []
        for number in numbers.tolist():
            described = self.descriptions[number] if self.descriptions and number < len(self.descriptions) else ""
            names.append(f"{self.split} {number:03d} {described}".strip())
        return tuple(names), rows, counts


def _get(values: Any, key: str) -> Any:
    return values.get(key, values.get(key.encode())) if isinstance(values, dict) else None


def _from_pickle(path: Path, labels: _Labels) -> SourceSplit:
    classes, rows, counts = labels.split_of(len(labels.specific), path)

    def encoded(start: int) -> Iterator[Encoded]:
        pictures = load_arrays(path, str(path), PUBLISHED, _INLINE)
        if not isinstance(pictures, list) or len(pictures) != len(rows):
            found = len(pictures) if isinstance(pictures, list) else "no list of"
            raise DataError(
                f"{path} has {found} images, {labels.path.name} {len(rows)}: fetch both anew from {PUBLISHED}"
            )
        with path.open("rb") as file:
            for index in range(start, len(pictures)):
                one = pictures[index]
                pictures[index] = None
                with reading(f"{path} (image {index})", PUBLISHED):
                    if isinstance(one, StoredArray):
                        if not one.is_like(np.uint8) or one.nbytes > _LARGEST_PNG:
                            raise ValueError(f"no PNG, but an array {one.shape} of {one.dtype}")
                        one = one.read(file).tobytes()
                    if not isinstance(one, bytes):
                        raise ValueError(f"no PNG, but a {type(one).__name__}")
                yield Encoded(f"{path}, image {index}", (int(rows[index]),), one)

    return SourceSplit(classes, counts, _SHAPE, len(rows), encoded_stream(encoded, _decode_png, _SHAPE))


def _decode_png(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if image.size != (SIDE, SIDE):
            raise ValueError(f"an image of {image.size} pixels, not {SIDE}×{SIDE}")
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _from_npz(path: Path, labels: _Labels) -> SourceSplit:
    with reading(str(path), PUBLISHED), zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
        shape, dtype, offset = _header(file)
        size = archive.getinfo("images.npy").file_size
        if dtype != np.uint8 or shape[1:] != (SIDE, SIDE, 3):
            raise ValueError(f"its images are {shape} of {dtype}, not (n, {SIDE}, {SIDE}, 3) of uint8")
        if size != offset + int(np.prod(shape)):
            raise ValueError(f"images of shape {shape} in {size} bytes")
    classes, rows, counts = labels.split_of(shape[0], path)

    def chunks(start: int) -> Iterator[np.ndarray]:
        entry = SIDE * SIDE * 3
        with reading(str(path), PUBLISHED), zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
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


def _small_array(path: Path, name: str) -> np.ndarray | None:
    with reading(str(path), PUBLISHED), zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        if archive.getinfo(f"{name}.npy").file_size > 1 << 26:
            raise ValueError(f"{name} claims more bytes than labels have")
        with archive.open(f"{name}.npy") as file:
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        return array
