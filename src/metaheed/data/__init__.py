"""Data sets as classes of uint8 images, and the episodes drawn from them."""

from collections.abc import Callable, Iterator
from pathlib import Path

from metaheed.config import EpisodeConfig
from metaheed.data import cifar, folder, glyphs, miniimagenet, omniglot, tieredimagenet
from metaheed.data.episodes import Ahead, Episodes
from metaheed.data.images import SPLITS, Dataset, Split
from metaheed.data.sources import Request, Source, Watcher, check_memory, in_memory
from metaheed.data.store import find_store, open_store, read_manifest
from metaheed.errors import DataError, MissingDataError, unknown

__all__ = [
    "DATASETS",
    "SPLITS",
    "Ahead",
    "Dataset",
    "Episodes",
    "Request",
    "Source",
    "Split",
    "check_name",
    "find_shape",
    "find_source",
    "load_dataset",
    "survey",
]

DATASETS: dict[str, Callable[[Request], Source]] = {
    "glyphs": lambda request: glyphs.find(),
    "omniglot": omniglot.find_paper,
    "omniglot-vinyals": omniglot.find_vinyals,
    "cifar-fs": cifar.find_fs,
    "fc100": cifar.find_fc100,
    "miniimagenet": miniimagenet.find,
    "tieredimagenet": tieredimagenet.find,
    "folder": folder.find,
}
"""Name -> what finds it, in whichever layout it lies."""


def check_name(name: str) -> None:
    """Raise ConfigError, with a suggestion, if no data set has that name."""
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)


def find_source(name: str, request: Request) -> Source:
    """The published files of a data set, recognised by what lies under the root or its customary subfolder.

    Raises:
        ConfigError: no data set has that name.
        MissingDataError: its files are not there; says which, and where they are published.
        DataError: they are damaged.
    """
    check_name(name)
    return DATASETS[name](request)


def load_dataset(
    name: str,
    root: Path | None = None,
    image_size: int | None = None,
    split_seed: int | None = None,
    watcher: Watcher | None = None,
) -> Dataset:
    """A data set by name: from its store under `root` if there is one, mapped into memory; else its files are read.

    Args:
        name: a key of DATASETS.
        root: where to look; its customary subfolder is tried, too.
        image_size, split_seed: of a folder of pictures; see EpisodeConfig.
        watcher: told of images that appear in two classes.

    Raises:
        ConfigError: no data set has that name.
        DataError: its files are missing or damaged; says which, and where they are published.
    """
    check_name(name)
    request = Request(root, image_size, split_seed)
    path = _find_store(name, request)
    return open_store(path, request) if path is not None else in_memory(find_source(name, request), watcher)


def find_shape(
    name: str, root: Path | None = None, image_size: int | None = None, split_seed: int | None = None
) -> tuple[int, int, int]:
    """The image shape of what `load_dataset` would load, found by reading names and labels only: quickly.

    Raises:
        As `load_dataset`, but for images that are damaged.
    """
    check_name(name)
    request = Request(root, image_size, split_seed)
    path = _find_store(name, request)
    if path is not None:
        return read_manifest(path).shape
    source = find_source(name, request)
    check_memory(source)
    return source.splits["train"].shape


def _find_store(name: str, request: Request) -> Path | None:
    size = (request.image_size or EpisodeConfig.folder_image_size) if name == "folder" else None
    return find_store(name, request, size)


def survey(root: Path | None) -> Iterator[tuple[str, str, str]]:
    """Name, state and counts of every data set under a root."""
    for name in DATASETS:
        try:
            path = _find_store(name, Request(root))
            if path is not None:
                counts = {split: counts for split, (_, counts, _) in read_manifest(path).splits.items()}
                state = f"the store {path}"
            else:
                source = DATASETS[name](Request(root))
                counts = {split: part.counts for split, part in source.splits.items()}
                state = source.layout
        except MissingDataError:
            yield name, "not found" if root else "not looked for: no --data-root", ""
        except DataError as error:
            yield name, f"cannot be used: {error}", ""
        else:
            classes = "/".join(str(len(counts[split])) for split in SPLITS)
            yield name, state, f"{classes} classes, {sum(map(sum, counts.values()))} images"
