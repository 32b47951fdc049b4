"""The user's cache of decoded data sets: what took seconds to read is kept as a store and mapped into memory later.

    CACHE/NAME-KEY.metaheed/      for CACHE see files/places.py

The key covers the files' sizes and times, the settings, and the versions of what decodes, so that changed files are
read anew. A cache that cannot be read or written costs one line, and nothing else: the files are there.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL

from metaheed.config import TrainingConfig
from metaheed.data.images import Dataset
from metaheed.data.sources import Quiet, Source, Watcher, read_into_memory, readable_size
from metaheed.data.store import FORMAT, SUFFIX, Manifest, open_store, read_manifest
from metaheed.errors import DataError, option
from metaheed.files.opening import put_in_place, write_synced
from metaheed.files.places import cache_folder

_VERSION = 1  # of what decodes pixels; part of the key
_SPARE = 1 << 28  # bytes of disk that stay free
_ABANDONED = 86400  # seconds after which nobody is still writing what is half-written


def cached_or_read(source: Source, watcher: Watcher | None = None, cache: bool = TrainingConfig.data_cache) -> Dataset:
    """The data set of a source: from the cache if it is there, else read into memory, and kept if that took long.

    Args:
        source: where the files are.
        watcher: told what is read, how far it is, and what is kept.
        cache: whether the cache may be read and written. The pixels, and so all results, are the same either way.

    Raises:
        DataError: a file is damaged, or the whole is larger than memory allows.
    """
    watcher = watcher or Quiet()
    if not cache or source.keeps_itself:
        return read_into_memory(source, watcher)
    folder = cache_folder()
    if folder is None:  # a user without a home
        return read_into_memory(source, watcher)
    path = _path(source, folder)
    if _is_there(path):
        try:
            dataset = open_store(path)
        except DataError as error:
            watcher.message(f"{source.name}: the cache {path} cannot be used ({error}); the files are read instead")
            shutil.rmtree(path, ignore_errors=True)
        else:
            for notice in source.notices:
                watcher.message(f"{source.name}: {notice}")
            return dataset.renamed(f"{source.layout}, decoded before and kept in {path}")
    begun = time.monotonic()
    dataset = read_into_memory(source, watcher)
    if time.monotonic() - begun >= TrainingConfig.cached_after:
        _keep(dataset, source, path, watcher)
    return dataset


def _is_there(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a folder that this user may not look into
        return False


def _path(source: Source, folder: Path) -> Path:
    """A folder for each state of the files; the layout names where they lie."""
    decided = (_VERSION, FORMAT, PIL.__version__, source.stamp, source.layout)
    key = hashlib.sha256(repr(decided).encode(errors="surrogateescape")).hexdigest()[:16]
    return folder / f"{source.name}-{key}{SUFFIX}"


def _keep(dataset: Dataset, source: Source, path: Path, watcher: Watcher) -> None:
    """Write a data set into the cache, and remove what the cache held of the same files in an earlier state."""
    size = sum(split.images.nbytes for split in dataset.splits.values())
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size + _SPARE:
            raise OSError(f"{readable_size(size)} are needed, and {readable_size(free)} are free there")
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".part"))
        for name, split in dataset.splits.items():
            np.save(part / f"images_{name}.npy", split.images.numpy(), allow_pickle=False)
        write_synced(part / "manifest.json", (json.dumps(_manifest(dataset, source), indent=1) + "\n").encode())
        if not path.exists():  # else another process was faster
            put_in_place(part, path)
            watcher.message(
                f"{source.name}: kept as decoded in {path} ({readable_size(size)}), so that the next start is quick; "
                f"{option('data_cache', False)} switches this off"
            )
    except OSError as error:
        watcher.message(f"{source.name}: not kept in the cache {path.parent} ({error}); it is read anew next time")
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    _clean(source, path)


def _clean(source: Source, path: Path) -> None:
    """Remove what the cache holds of the same files in an earlier state, and what a process left that was killed."""
    if not _is_there(path):
        return
    for other in path.parent.glob(f"{source.name}-*{SUFFIX}"):
        if other != path and _is_outdated(other, source):
            shutil.rmtree(other, ignore_errors=True)
    for part in path.parent.glob(f"{source.name}-*.part"):
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            if time.time() - part.stat().st_mtime > _ABANDONED:
                shutil.rmtree(part, ignore_errors=True)


def _manifest(dataset: Dataset, source: Source) -> dict[str, object]:
    return {
        "format": FORMAT,
        "name": dataset.name,
        "layout": source.layout,
        "stamp": source.stamp,
        "settings": dict(source.settings),
        "image_shape": dataset.image_shape,
        "mean": dataset.mean,
        "std": dataset.std,
        "splits": {
            name: {"classes": split.classes, "counts": split.counts, "sha256": split.fingerprint}
            for name, split in dataset.splits.items()
        },
    }


def _is_outdated(path: Path, source: Source) -> bool:
    """Whether a cache was made from the same files and settings, before the files changed."""
    try:
        found: Manifest = read_manifest(path)
    except DataError:
        return False
    same = (found.name, found.layout, found.settings) == (source.name, source.layout, dict(source.settings))
    return same and found.stamp != source.stamp
