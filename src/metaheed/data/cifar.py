"""CIFAR-FS (Bertinetto et al., ICLR 2019): the 100 classes of CIFAR-100 split 64/16/20, 600 images each, 32×32 RGB.

Read straight from the published cifar-100-python folder or its tar.gz: Python 2 pickles, by the safe reader.
"""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from metaheed.data.images import SPLITS, Dataset, channel_statistics, make_split
from metaheed.data.locate import class_list, folders
from metaheed.data.safe_pickle import load_arrays, loads_arrays
from metaheed.errors import DataError

PUBLISHED = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
FOLDER = "cifar-100-python"
ARCHIVE = "cifar-100-python.tar.gz"
PARTS = ("train", "test", "meta")
_LARGEST = 1 << 29  # bytes of one part; the published train part has 155 million


def load(root: Path | None) -> Dataset:
    """The data set from the folder that holds cifar-100-python (or that is it), or its tar.gz.

    Raises:
        DataError: a file is missing or damaged; says which, and where it is published.
    """
    images = _by_class(_parts(root))
    splits = {}
    for split in SPLITS:
        names = class_list(f"cifar_fs_{split}")
        splits[split] = make_split(split, names, [images[name] for name in names])
    mean, std = channel_statistics(splits["train"].images)
    return Dataset("cifar-fs", splits, mean, std)


def _parts(root: Path | None) -> dict[str, Any]:
    expected = f"{FOLDER}/{{train,test,meta}} or {ARCHIVE}"
    places = folders(root, "cifar-fs", (FOLDER, "cifar-fs", "cifar100"), expected, PUBLISHED)
    for folder in places:
        if all((folder / part).is_file() for part in PARTS):
            return {part: load_arrays(folder / part, PUBLISHED) for part in PARTS}
    for folder in places:
        if (folder / ARCHIVE).is_file():
            return _from_archive(folder / ARCHIVE)
    for folder in places:
        present = [part for part in PARTS if (folder / part).is_file()]
        if folder.name == FOLDER or present:
            missing = " and ".join(str(folder / part) for part in PARTS if part not in present)
            raise DataError(f"cifar-fs: {missing} not found; published at {PUBLISHED}")
    raise DataError(f"cifar-fs: neither {expected} found in {' or '.join(map(str, places))}; published at {PUBLISHED}")


def _from_archive(path: Path) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                part = member.name.removeprefix("./").removeprefix(f"{FOLDER}/")
                if part in PARTS and member.isfile():
                    if member.size > _LARGEST:
                        raise ValueError(f"{member.name} claims {member.size} bytes")
                    file = archive.extractfile(member)
                    assert file is not None  # a regular file always has content
                    parts[part] = loads_arrays(io.BytesIO(file.read()), f"{path}:{member.name}", PUBLISHED)
    except DataError:
        raise
    except Exception as error:  # tar and gzip raise many kinds on damaged files; all mean the same here
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}): fetch it anew from {PUBLISHED}"
        ) from error
    missing = [part for part in PARTS if part not in parts]
    if missing:
        raise DataError(f"{path} lacks {FOLDER}/{' and '.join(missing)}: fetch it anew from {PUBLISHED}")
    return parts


def _by_class(parts: dict[str, Any]) -> dict[str, np.ndarray]:
    names = [_text(name) for name in _field(parts, "meta", b"fine_label_names", lambda v: isinstance(v, list))]
    wanted = {name for split in SPLITS for name in class_list(f"cifar_fs_{split}")}
    if not wanted <= set(names):
        raise DataError(
            f"CIFAR-100's meta file lacks the class {min(wanted - set(names))!r}: fetch it anew from {PUBLISHED}"
        )
    pixels, labels = [], []
    for part in ("train", "test"):
        data = _field(parts, part, b"data", _is_pixels)
        numbers = _field(parts, part, b"fine_labels", lambda v: isinstance(v, list))
        if len(numbers) != len(data) or not all(isinstance(k, int) and 0 <= k < len(names) for k in numbers):
            raise DataError(
                f"CIFAR-100's {part} file has {len(data)} images but labels that do not match: "
                f"fetch it anew from {PUBLISHED}"
            )
        pixels.append(np.asarray(data))  # a plain array, whatever class the reader built
        labels.append(np.array(numbers, dtype=np.int64))
    images = np.concatenate(pixels).reshape(-1, 3, 32, 32)
    label = np.concatenate(labels)
    return {name: images[label == k] for k, name in enumerate(names)}


def _field(parts: dict[str, Any], part: str, key: bytes, valid: Callable[[Any], bool]) -> Any:
    values = parts[part]
    # A file written anew by Python 3 has str keys.
    value = values.get(key, values.get(key.decode())) if isinstance(values, dict) else None
    if not valid(value):
        raise DataError(f"CIFAR-100's {part} file has no usable {key.decode()!r}: fetch it anew from {PUBLISHED}")
    return value


def _is_pixels(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 2 and value.shape[1] == 3072


def _text(name: Any) -> str:
    return name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)
