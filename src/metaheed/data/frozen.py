"""Frozen episodes: tasks with copies of their images, written to and read from a file.

With such a file, any program can be evaluated on the same tasks. It is a numpy archive without pickles, which
`numpy.load(FILE)` reads. For T tasks that use M images in all, it holds:

    about         0-d text: JSON of data, split, ways, shots, queries, tasks, episode_seed, image_shape (C, H, W), mean
                  and std (metaheed scales pixels channel by channel: divide by 255, subtract mean, divide by std),
                  split_sha256 (of all images of the split), episodes_sha256 (as in result.json)
    tasks         (T, N, K+Q) int32: indices into the M images; axis 1 is the label, the first K columns the support set
    rows          (M,) int64: the row of each image in its split, increasing
    image_class   (M,) int32: the class of each image, as an index into class_names
    class_names   (classes,) text
    image_sha256  (M,) text: the SHA-256 of each image's pixels, uint8 in the order (C, H, W)
    images        (M, C, H, W) uint8; only if the file was made --with-images

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
from metaheed.data.output import write_output
from metaheed.data.reading.names import composed
from metaheed.errors import DataError, brief, option, shown

_FORMAT = 1
_LARGEST = 1 << 33  # bytes of all arrays; 600 tasks of 84×84 RGB images need one eighth of it
# An archive of more than _SMALL unpacked bytes is refused if they are more than _RATIO times the packed ones: pictures
# and hashes hardly shrink.
_SMALL, _RATIO = 1 << 26, 200
_SCALARS: dict[str, type] = {
    **{"data": str, "split": str, "split_sha256": str},
    **{"ways": int, "shots": int, "queries": int, "episode_seed": int},
}
_KINDS = {"tasks": "i", "rows": "i", "image_class": "i", "class_names": "U", "image_sha256": "U", "images": "u"}


@dataclass(frozen=True)
class FrozenTasks:
    """Tasks, with the images that they use or the checksums of these images."""

    data: str
    split: str
    ways: int
    shots: int
    queries: int
    episode_seed: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """The mean and standard deviation of each channel, with which the data set's pixels are scaled."""
    split_sha256: str
    """The fingerprint of the whole split."""
    tasks: np.ndarray
    """(T, N, K+Q): indices into the images."""
    rows: np.ndarray
    """(M,): the row of each image in the split."""
    image_class: np.ndarray
    """(M,): indices into the class names."""
    class_names: np.ndarray
    """(classes,): the names of the classes that the tasks use."""
    image_sha256: np.ndarray
    """(M,): the SHA-256 of each image, in hexadecimal."""
    images: Tensor | None
    """(M, C, H, W) uint8; None if the images must be taken from the data set."""

    @property
    def episodes_sha256(self) -> str:
        """The same as `Episodes.fingerprint` of the drawn tasks."""
        return fingerprint(self.split_sha256, (self.ways, self.shots, self.queries), self.rows[self.tasks])

    def with_images_from(self, dataset: Dataset) -> "FrozenTasks":
        """Return a copy that holds the images, which are taken from the data set.

        Raises:
            DataError: the data set does not have exactly the images that the tasks use.
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
        images = _gather(split, self.rows)
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
    """Episodes that give frozen tasks instead of drawing tasks.

    Args:
        frozen: the tasks.
        images: their images, (M, C, H, W) uint8; batches are made on the device of the images.
        mean, std: the mean and standard deviation of each channel, with which the pixels are scaled.
    """

    def __init__(self, frozen: FrozenTasks, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        counts = np.bincount(frozen.image_class, minlength=len(frozen.class_names)).tolist()
        self.split = Split(frozen.split, tuple(frozen.class_names.tolist()), tuple(counts), images)
        self.dataset = Dataset(frozen.data, {frozen.split: self.split}, mean, std)
        self.ways, self.shots, self.queries, self.seed = frozen.ways, frozen.shots, frozen.queries, frozen.episode_seed
        self._frozen = frozen

    def rows(self, index: int) -> np.ndarray:
        """(N, K+Q) int64: the image rows of task `index`. The first K columns are its support set."""
        rows: np.ndarray = self._frozen.tasks[index].astype(np.int64)
        return rows

    def fingerprint(self, count: int) -> str:
        """The fingerprint that the first `count` tasks have when they are drawn from their data set."""
        return dataclasses.replace(self._frozen, tasks=self._frozen.tasks[:count]).episodes_sha256


def freeze(episodes: Episodes, count: int) -> FrozenTasks:
    """Copy the first `count` tasks and their images."""
    drawn = np.stack([episodes.rows(index) for index in range(count)])
    rows, tasks = np.unique(drawn, return_inverse=True)
    split, dataset = episodes.split, episodes.dataset
    classes, image_class = np.unique(np.searchsorted(split.starts, rows, side="right") - 1, return_inverse=True)
    images = _gather(split, rows)
    channels, height, width = images.shape[1:]
    return FrozenTasks(
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


def _gather(split: Split, rows: np.ndarray) -> Tensor:
    return split.images.index_select(0, torch.from_numpy(rows).to(split.images.device)).cpu()


def _digests(images: Tensor) -> np.ndarray:
    return np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images.numpy()])


def write_episodes(frozen: FrozenTasks, path: str | Path, with_images: bool) -> None:
    """Write a file of frozen episodes, whole or not at all; the same tasks give the same bytes.

    Raises:
        ConfigError: the path does not name a file, or something other than a file is there.
        DataError: it cannot be written.
    """
    about = {name: getattr(frozen, name) for name in _SCALARS}
    about |= {"tasks": len(frozen.tasks), "image_shape": frozen.image_shape, "mean": frozen.mean, "std": frozen.std}
    about |= {"episodes_sha256": frozen.episodes_sha256, "format": _FORMAT}
    arrays: dict[str, Any] = {name: getattr(frozen, name) for name in _KINDS if name != "images"}
    if with_images:
        assert frozen.images is not None  # tasks from `freeze` have images
        arrays["images"] = frozen.images.numpy()
    about_json = np.array(json.dumps(about))
    write_output(Path(path), lambda file: np.savez_compressed(file, about=about_json, **arrays))


def read_episodes(path: str | Path) -> FrozenTasks:
    """Read a file of frozen episodes. It may come from a stranger: nothing in it is run, and all of it is checked.

    Raises:
        DataError: the file does not exist, is damaged or altered, or is not a file of frozen episodes.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer, and a device may have no end
            raise ValueError("it is a folder, a pipe or a device, not a file")
        if status.st_size > 2 * _LARGEST:
            raise ValueError(f"it has {status.st_size:,} bytes, more than any file of frozen episodes")
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is not a numpy archive")
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
    except Exception as error:  # numpy and zipfile raise many kinds of errors for damaged files
        own = type(error) is ValueError
        said = str(error) if own else f"{type(error).__name__}: {error}"
        reason = brief(error.strerror if isinstance(error, OSError) and error.strerror else said, 200)
        raise DataError(
            f"{path} is not a whole file of frozen episodes ({reason}): write it anew with 'metaheed data episodes'"
        ) from error


def _checked(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> FrozenTasks:
    """Make the tasks from the content of a file; raise ValueError if any of it is impossible or inconsistent."""

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
    require(len(tasks) > 1, "it has a single task, which gives no confidence interval")
    require(tasks.min() >= 0 and tasks.max() < M, "its tasks use images that it does not list")
    require(rows.shape == image_class.shape == arrays["image_sha256"].shape == (M,), "its lists of images differ")
    require(rows[0] >= 0 and (np.diff(rows) > 0).all(), "its rows do not increase")
    require(image_class[0] >= 0 and (np.diff(image_class) >= 0).all(), "its images are not ordered by class")
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
    frozen = FrozenTasks(**scalars, image_shape=(channels, height, width), mean=mean, std=std, images=images, **lists)
    require(frozen.episodes_sha256 == about.get("episodes_sha256"), "its tasks do not have the SHA-256 that it names")
    return frozen


def _distinct(values: np.ndarray) -> bool:
    """Whether the values within each row of an (n, m) array are distinct."""
    return bool((np.diff(np.sort(values, axis=1), axis=1) > 0).all())
