"""Frozen episodes in a file, so that anything can be judged on the very same tasks; and tasks of images that were
copied out of their data set.

The file is a numpy archive without pickles: `numpy.load(FILE)` is all that reading it takes. Of T tasks, that use M
images:

    about         0-d text: JSON of data, split, ways, shots, queries, tasks, episode_seed, image_shape (C, H, W), mean
                  and std (how this package scales the data set's pixels: /255, minus mean, over std, channel by
                  channel), split_sha256 (of all images of the split), episodes_sha256 (as in result.json)
    tasks         (T, N, K+Q) int32: which of the M images; axis 1 is the label, the first K columns are the support set
    rows          (M,) int64: each image's row in the split, class after class, increasing
    image_class   (M,) int32: its class, an index into
    class_names   (classes,) text
    image_sha256  (M,) text: SHA-256 of its pixels, uint8 of (C, H, W)
    images        (M, C, H, W) uint8; only where asked for

Legend: N ways, K shots, Q queries per class.
"""

import dataclasses
import hashlib
import json
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaheed.data.episodes import Episodes, fingerprint
from metaheed.data.images import SPLITS, Dataset, Split
from metaheed.data.reading.names import check_out, composed
from metaheed.errors import DataError, brief, option, shown
from metaheed.files.opening import put_in_place

_FORMAT = 1
_LARGEST = 1 << 33  # bytes of the arrays: 600 tasks of 84×84 RGB images use one eighth of it
_SMALL, _RATIO = 1 << 26, 200  # beyond so many bytes, of unpacked to packed: pictures and hashes hardly shrink
_SCALARS: dict[str, type] = {
    **{"data": str, "split": str, "split_sha256": str},
    **{"ways": int, "shots": int, "queries": int, "episode_seed": int},
}
_KINDS = {"tasks": "i", "rows": "i", "image_class": "i", "class_names": "U", "image_sha256": "U", "images": "u"}


@dataclass(frozen=True)
class Frozen:
    """Tasks, and the images that they use."""

    data: str
    split: str
    ways: int
    shots: int
    queries: int
    episode_seed: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """How the data set's pixels are scaled."""
    split_sha256: str
    """The fingerprint of the whole split."""
    tasks: np.ndarray
    """(T, N, K+Q), indices into the images."""
    rows: np.ndarray
    """(M,), each image's row in the split."""
    image_class: np.ndarray
    """(M,), indices into the class names."""
    class_names: np.ndarray
    """(classes,), those that the tasks use."""
    image_sha256: np.ndarray
    """(M,), hexadecimal."""
    images: Tensor | None
    """(M, C, H, W) uint8; none: they are in the data set only."""

    @property
    def episodes_sha256(self) -> str:
        """What `Episodes.fingerprint` is where these tasks are drawn."""
        return fingerprint(self.split_sha256, (self.ways, self.shots, self.queries), self.rows[self.tasks])

    def filled(self, dataset: Dataset) -> "Frozen":
        """With the images out of the data set.

        Raises:
            DataError: it has not the very images that the tasks use.
        """
        split = dataset.split(self.split)
        where = f"split {self.split!r} of {dataset.name}"
        remedy = (
            "the file was made from another version of it. Use the data set that it was made from, or have it made "
            f"{option('with_images', True)}"
        )
        if int(self.rows[-1]) >= len(split.images):
            raise DataError(
                f"the tasks use image {self.rows[-1]}, but {where} has {len(split.images)} images: {remedy}"
            )
        images = _taken(split, self.rows)
        names = np.array(split.classes)[np.searchsorted(split.starts, self.rows, side="right") - 1]
        theirs = np.array([composed(name) for name in self.class_names.tolist()])
        wrong = (_digests(images) != self.image_sha256) | (names != theirs[self.image_class])
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            name, ours = str(theirs[self.image_class[first]]), str(names[first])
            raise DataError(
                f"{int(wrong.sum())} of the {len(wrong)} images that the tasks use are not those of {where} (first: "
                f"row {self.rows[first]}, of class {shown(name)} in the file and {shown(ours)} here): {remedy}"
            )
        return dataclasses.replace(self, images=images)


class FrozenEpisodes(Episodes):
    """Given tasks, in the place of drawn ones.

    Args:
        frozen: the tasks.
        images: (M, C, H, W) uint8, on any device; batches come out there.
        mean, std: how their pixels are scaled.
    """

    def __init__(self, frozen: Frozen, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        counts = np.bincount(frozen.image_class, minlength=len(frozen.class_names)).tolist()
        self.split = Split(frozen.split, tuple(frozen.class_names.tolist()), tuple(counts), images)
        self.dataset = Dataset(frozen.data, {frozen.split: self.split}, mean, std)
        self.ways, self.shots, self.queries, self.seed = frozen.ways, frozen.shots, frozen.queries, frozen.episode_seed
        self._frozen = frozen

    def rows(self, index: int) -> np.ndarray:
        """(N, K+Q) image rows of task `index`; the first K columns are its support set."""
        rows: np.ndarray = self._frozen.tasks[index].astype(np.int64)
        return rows

    def fingerprint(self, count: int) -> str:
        """As of the same tasks drawn from their data set."""
        return dataclasses.replace(self._frozen, tasks=self._frozen.tasks[:count]).episodes_sha256


def freeze(episodes: Episodes, count: int) -> Frozen:
    """The first `count` tasks, with their images."""
    drawn = np.stack([episodes.rows(index) for index in range(count)])
    rows, tasks = np.unique(drawn, return_inverse=True)
    split, dataset = episodes.split, episodes.dataset
    classes, image_class = np.unique(np.searchsorted(split.starts, rows, side="right") - 1, return_inverse=True)
    images = _taken(split, rows)
    channels, height, width = images.shape[1:]
    return Frozen(
        data=dataset.name,
        split=split.name,
        ways=episodes.ways,
        shots=episodes.shots,
        queries=episodes.queries,
        episode_seed=episodes.seed,
        split_sha256=split.fingerprint,
        image_shape=(channels, height, width),
        mean=dataset.mean,
        std=dataset.std,
        tasks=tasks.reshape(drawn.shape).astype(np.int32),
        rows=rows,
        image_class=image_class.astype(np.int32),
        class_names=np.array([split.classes[k] for k in classes]),
        image_sha256=_digests(images),
        images=images,
    )


def _taken(split: Split, rows: np.ndarray) -> Tensor:
    return split.images.index_select(0, torch.from_numpy(rows).to(split.images.device)).cpu()


def _digests(images: Tensor) -> np.ndarray:
    return np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images.numpy()])


def write_episodes(frozen: Frozen, path: str | Path, with_images: bool) -> None:
    """Write a file of frozen episodes, whole or not at all; the same tasks give the same bytes.

    Raises:
        ConfigError: the path is no name of a file, or something else is there.
        DataError: it cannot be written.
    """
    about = {name: getattr(frozen, name) for name in _SCALARS}
    about |= {"tasks": len(frozen.tasks), "image_shape": frozen.image_shape, "mean": frozen.mean, "std": frozen.std}
    about |= {"episodes_sha256": frozen.episodes_sha256, "format": _FORMAT}
    arrays: dict[str, Any] = {name: getattr(frozen, name) for name in _KINDS if name != "images"}
    if with_images:
        assert frozen.images is not None  # what was drawn here has them
        arrays["images"] = frozen.images.numpy()
    path = Path(path)
    check_out(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)
            put_in_place(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or path}: {error.strerror or error}. Choose another {option('out')}"
        ) from error


def read_episodes(path: str | Path) -> Frozen:
    """Read a file of frozen episodes, a stranger's too: nothing in it is run, and it is checked as a whole.

    Raises:
        DataError: there is no such file, or it is damaged, altered, or no file of frozen episodes.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe waits for whoever writes into it, and a device has no end
            raise ValueError("it is a folder, a pipe or a device, not a file")
        if status.st_size > 2 * _LARGEST:
            raise ValueError(f"it has {status.st_size:,} bytes, more than any has")
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no numpy archive")
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
            size, packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
            if size > min(_LARGEST, max(_SMALL, _RATIO * packed)):
                raise ValueError(f"it claims {size} bytes")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                about = json.loads(str(archive["about"]))
                arrays = {name: archive[name] for name in _KINDS if name in archive}
        if not isinstance(about, dict) or about.get("format") != _FORMAT:
            named = about.get("format") if isinstance(about, dict) else about
            raise ValueError(f"its format is {shown(named)}, but this program reads {_FORMAT}")
        return _checked(about, arrays)
    except FileNotFoundError:
        raise DataError(f"{path} not found: write it with 'metaheed data episodes --out {path}'") from None
    except Exception as error:  # numpy and zipfile raise many kinds on damaged files; all mean the same here
        own = type(error) is ValueError
        said = str(error) if own else f"{type(error).__name__}: {error}"
        reason = brief(error.strerror if isinstance(error, OSError) and error.strerror else said, 200)
        raise DataError(
            f"{path} is not a whole file of frozen episodes ({reason}): write it anew with 'metaheed data episodes'"
        ) from error


def _checked(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Frozen:
    def require(condition: object, what: str) -> None:
        if not condition:
            raise ValueError(what)

    missing = [name for name in _KINDS if name != "images" and name not in arrays]
    require(not missing, f"it lacks {', '.join(missing)}")
    for name, array in arrays.items():
        require(array.dtype.kind == _KINDS[name], f"its {name} are {array.dtype}")
    for name, kind in _SCALARS.items():
        require(type(about.get(name)) is kind, f"its {name} is {shown(about.get(name))}")
    require(about["split"] in SPLITS, f"its split is {shown(about['split'])}")
    channels, height, width = (int(side) for side in about["image_shape"])
    mean, std = (tuple(map(float, about[name])) for name in ("mean", "std"))
    require(len(mean) == len(std) == channels, f"its mean and std are not those of {channels} channels")
    require(np.isfinite([*mean, *std]).all() and min(std) > 0, f"its mean and std are {mean} and {std}")
    tasks, rows, image_class = arrays["tasks"], arrays["rows"], arrays["image_class"]
    M, classes = len(rows), len(arrays["class_names"])
    require(tasks.shape[1:] == (about["ways"], about["shots"] + about["queries"]), f"its tasks are {tasks.shape}")
    require(min(tasks.size, M, about["ways"], about["shots"], about["queries"]) > 0, "its tasks are empty")
    require(len(tasks) > 1, "it has a single task, which has no interval")
    require(tasks.min() >= 0 and tasks.max() < M, "its tasks use images that it does not list")
    require(rows.shape == image_class.shape == arrays["image_sha256"].shape == (M,), "its lists of images differ")
    require(rows[0] >= 0 and (np.diff(rows) > 0).all(), "its rows do not increase")
    require(image_class[0] >= 0 and (np.diff(image_class) >= 0).all(), "its images are not class after class")
    require(image_class[-1] < classes, "its images are of classes that it does not list")
    of_task = image_class[tasks]
    require((of_task == of_task[:, :, :1]).all(), "a label of its tasks stands for two classes")
    require(_distinct(of_task[:, :, 0]), "two labels of a task stand for one class")
    require(_distinct(tasks.reshape(len(tasks), -1)), "a task uses an image twice")
    images = None
    if "images" in arrays:
        require(arrays["images"].dtype == np.uint8, f"its images are {arrays['images'].dtype}")
        require(arrays["images"].shape == (M, channels, height, width), f"its images are {arrays['images'].shape}")
        images = torch.from_numpy(arrays.pop("images"))
        require((_digests(images) == arrays["image_sha256"]).all(), "its images do not have the SHA-256 that it lists")
    scalars: dict[str, Any] = {name: about[name] for name in _SCALARS}
    lists: dict[str, Any] = arrays
    frozen = Frozen(**scalars, image_shape=(channels, height, width), mean=mean, std=std, images=images, **lists)
    require(frozen.episodes_sha256 == about.get("episodes_sha256"), "its tasks do not have the SHA-256 that it names")
    return frozen


def _distinct(values: np.ndarray) -> bool:
    """Whether no value stands twice in a row of (n, m)."""
    return bool((np.diff(np.sort(values, axis=1), axis=1) > 0).all())
