"""Data sets by name: find their files, load them, and list what is there."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from metaheed.config import EpisodeConfig, TrainingConfig
from metaheed.data.cache import cached_or_read
from metaheed.data.images import Dataset
from metaheed.data.sets import cifar, folder, glyphs, miniimagenet, omniglot, tieredimagenet
from metaheed.data.sources import Request, Source, Watcher, check_memory
from metaheed.data.store import SUFFIX, Manifest, find_store, open_store, read_manifest, store_name, stores_under
from metaheed.errors import DataError, MissingDataError, option, unknown

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
"""The name of each data set -> the function that finds it, in any of its layouts."""


def check_name(name: str) -> None:
    """Raise ConfigError, with a suggestion, if no data set has that name."""
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)


def find_source(name: str, request: Request) -> Source:
    """Find the files of a data set in the root or its customary subfolders, in any known layout.

    Raises:
        ConfigError: no data set has that name.
        MissingDataError: files are missing; the message says which, and where they are published.
        DataError: files are damaged.
    """
    check_name(name)
    root = None if request.root is None else Path(request.root)  # a caller in Python may give a str
    return DATASETS[name](request._replace(root=root))


def load_dataset(
    name: str,
    root: str | Path | None = None,
    image_size: int | None = None,
    split_seed: int | None = None,
    watcher: Watcher | None = None,
    cache: bool = TrainingConfig.data_cache,
) -> Dataset:
    """Load a data set by name.

    If there is a store of it under `root`, the store is mapped into memory. Otherwise the published files are read, or
    what an earlier reading of them left in the user's cache.

    Args:
        name: a key of DATASETS.
        root: the folder to look in; its customary subfolders are searched, too.
        image_size, split_seed: settings of the data set "folder" (your own pictures); see EpisodeConfig.
        watcher: told what is read and how far it is, and of images that appear in two classes.
        cache: whether decoded images are kept in the user's cache, and read from there; see TrainingConfig.data_cache.

    Raises:
        ConfigError: no data set has that name.
        DataError: files are missing or damaged; the message says which, and where they are published.
    """
    check_name(name)
    request = Request(None if root is None else Path(root), image_size, split_seed)
    path = _find_store(name, request)
    if path is not None:
        return open_store(path, request)
    return cached_or_read(find_source(name, request), watcher, cache)


def find_shape(
    name: str, root: str | Path | None = None, image_size: int | None = None, split_seed: int | None = None
) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that `load_dataset` would load; quick, since only names and labels are read.

    Raises:
        ConfigError, DataError: as in `load_dataset`, but damaged images are not noticed.
    """
    check_name(name)
    request = Request(None if root is None else Path(root), image_size, split_seed)
    path = _find_store(name, request)
    if path is not None:
        return read_manifest(path).shape
    source = find_source(name, request)
    check_memory(source)
    return source.splits["train"].shape


def _find_store(name: str, request: Request) -> Path | None:
    size = (request.image_size or EpisodeConfig.folder_image_size) if name == "folder" else None
    return find_store(name, request, size)


def survey(root: str | Path | None) -> Iterator[tuple[str, str, str]]:
    """List what is there of every data set under a root: its name, its state in words, and its counts in words.

    A data set is listed with its stores or, if it has none, with its files. The data set "folder" is listed with both,
    since each of its stores has images of one size.

    Raises:
        MissingDataError: the root does not exist.
    """
    root = None if root is None else Path(root)
    if root is not None and not root.exists():
        raise MissingDataError(
            f"{option('data_root')} {root} is not a folder or archive: nothing of that name is there"
        )
    stores: list[Manifest] = []
    for path in stores_under(root) if root is not None else []:
        try:
            manifest = read_manifest(path)
        except DataError as error:
            yield path.name.removesuffix(SUFFIX), f"cannot be used: {error}", ""
            continue
        if path == root or path.name == store_name(manifest.name, manifest.settings):  # else it would never be found
            stores.append(manifest)
    for name in DATASETS:
        found = [manifest for manifest in stores if manifest.name == name]
        for manifest in found:
            yield (
                name,
                f"the store {manifest.path}",
                _describe_counts([counts for _, counts, _ in manifest.splits.values()]),
            )
        if found and (name != "folder" or found[0].path == root):
            continue
        try:
            source = DATASETS[name](Request(root))
        except MissingDataError:
            if not found:
                yield name, "not found" if root else f"not looked for: no {option('data_root')}", ""
        except (DataError, OSError) as error:
            yield name, f"cannot be used: {error}", ""
        else:
            yield name, source.layout, _describe_counts([split.counts for split in source.splits.values()])


def _describe_counts(counts: Sequence[Sequence[int]]) -> str:
    return f"{'/'.join(str(len(split)) for split in counts)} classes, {sum(map(sum, counts))} images"
