"""Convert a data set into a store, and verify a store."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from metaheed.data.images import SPLITS, Histogram, fingerprint_head
from metaheed.data.sources import (
    UNSCALED,
    Digests,
    Quiet,
    Source,
    SourceSplit,
    Watcher,
    describe_duplicates,
    raise_unreadable,
    readable_size,
)
from metaheed.data.store import (
    FORMAT,
    IDENTITY_SCALING,
    SUFFIX,
    Manifest,
    damaged_store_error,
    is_store,
    read_manifest,
    store_name,
    stores_under,
)
from metaheed.errors import DataError, MetaheedError, MissingDataError
from metaheed.files.opening import put_in_place, try_lock, write_synced

_EVERY = 5.0  # seconds after which the progress is recorded again
_AT_ONCE = 1 << 22  # bytes read at once when a finished file is scanned
_SPARE = 1 << 26  # bytes of disk that are left free


def prepare(source: Source, folder: str | Path, watcher: Watcher | None = None) -> Path:
    """Convert a source into a store in `folder`, or continue an interrupted conversion.

    Returns:
        The folder of the store.

    Raises:
        DataError: the source is damaged (all unreadable images are named at once), the disk is too small, another
            process is preparing the same store, or another store of that name exists; in these cases nothing unfinished
            is left behind. Or the operating system could not write a file; the unfinished store is then kept, and the
            next call continues it.
    """
    watcher = watcher or Quiet()
    settings = dict(source.settings)
    folder = Path(folder)
    path = folder / store_name(source.name, settings)
    part = path.with_name(path.name + ".part")
    for notice in source.notices:
        watcher.message(f"{source.name}: {notice}")
    with _system_errors_explained(path):
        folder.mkdir(parents=True, exist_ok=True)
    with _system_errors_explained(path), _locked(path.with_name(path.name + ".lock"), path):
        if path.exists():
            if is_store(path) and read_manifest(path).stamp == source.stamp:
                watcher.message(f"{path} is prepared already")
                return path
            raise DataError(
                f"{path} is there already, and was made from other files or settings: delete it, or choose another --to"
            )
        try:
            _fill(source, part, watcher)
            manifest = _finish(source, part, watcher)
        except MetaheedError:
            # The source must be repaired first, and what has been converted of it is then out of date.
            shutil.rmtree(part, ignore_errors=True)
            raise
        # JSON in ASCII, because the name of a folder, and so of a class, may hold characters that UTF-8 cannot encode.
        write_synced(part / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
        (part / "progress.json").unlink()
        put_in_place(part, path)
    return path


@contextlib.contextmanager
def _system_errors_explained(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise DataError(
            f"preparing {path} stopped ({error.strerror or error}{where}): make room or grant permission there, or "
            "choose another --to; the same command continues where it stopped"
        ) from error


@contextlib.contextmanager
def _locked(lock: Path, path: Path) -> Iterator[None]:
    """Hold the lock file of a store; raise DataError if another process holds it."""
    while True:
        file: IO[str] = lock.open("a")
        if not try_lock(file):
            file.close()
            raise DataError(f"{path} is being prepared by another process: wait for it, or stop it")
        with contextlib.suppress(OSError):
            if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                break
        file.close()  # the process that held the lock has just deleted the file: try again with a new one
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # some systems do not delete an open file
            lock.unlink()
        file.close()


def _fill(source: Source, part: Path, watcher: Watcher) -> None:
    """Write all images of the source to their rows in the unfinished store `part`."""
    part.mkdir(exist_ok=True)
    record = part / "progress.json"
    done, problems = _read_progress(record, source)
    present = sum(getattr(p.stat(), "st_blocks", 0) * 512 for p in part.iterdir())
    needed = sum(split.bytes for split in source.splits.values()) - present + _SPARE
    free = shutil.disk_usage(part).free
    if needed > free:
        raise DataError(
            f"{part.parent} has {readable_size(free)} free, but {source.name} needs {readable_size(needed)}: make "
            "room, or choose another --to"
        )
    if not record.exists():
        for split in SPLITS:
            _create(part / f"images_{split}.npy", source.splits[split])
    items = sum(split.items for split in source.splits.values())
    watcher.start(f"converting {source.name}", items, sum(done.values()))
    try:
        for split in SPLITS:
            with (part / f"images_{split}.npy").open("r+b", buffering=0) as file:
                _fill_split(source, split, file, record, done, problems, watcher)
    finally:
        watcher.stop()
    raise_unreadable(problems, source)


def _fill_split(
    source: Source,
    name: str,
    file: IO[bytes],
    record: Path,
    done: dict[str, int],
    problems: list[str],
    watcher: Watcher,
) -> None:
    """Write the images of one split that are not done yet, and record the progress from time to time."""
    split = source.splits[name]
    entry = int(np.prod(split.shape))
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    offset, saved = file.tell(), time.monotonic()
    if done[name] == split.items:
        return

    def save() -> None:
        os.fsync(file.fileno())
        values = {"stamp": source.stamp, "done": done, "problems": problems}
        write_synced(record.with_suffix(".new"), json.dumps(values).encode())
        put_in_place(record.with_suffix(".new"), record)

    for chunk in split.read(done[name]):
        # Consecutive rows are written with one call.
        for run in np.split(np.arange(len(chunk.rows)), np.flatnonzero(np.diff(chunk.rows) != 1) + 1):
            if len(run):
                file.seek(offset + int(chunk.rows[run[0]]) * entry)
                _write_all(file, np.ascontiguousarray(chunk.images[run]))
        problems += chunk.problems
        done[name] += chunk.items
        watcher.advance(chunk.items)
        if time.monotonic() - saved > _EVERY:
            save()
            saved = time.monotonic()
    if done[name] != split.items:
        raise DataError(f"{source.layout} has {done[name]} images for {name}, but its labels say {split.items}")
    save()


def _write_all(file: IO[bytes], images: np.ndarray) -> None:
    left = memoryview(images.data).cast("B")
    while left:
        left = left[file.write(left) :]


def _create(path: Path, split: SourceSplit) -> None:
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (sum(split.counts), *split.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + split.bytes)


def _read_progress(record: Path, source: Source) -> tuple[dict[str, int], list[str]]:
    """Return the items done of each split, and the problems found, from the record of an interrupted conversion.

    If the record is missing, damaged or of another source, what was written is deleted.
    """
    try:
        values: Any = json.loads(record.read_text(encoding="utf-8"))
        if values["stamp"] == source.stamp:
            return {split: int(values["done"][split]) for split in SPLITS}, list(values["problems"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is no record, or it is damaged: begin anew
    for file in record.parent.iterdir():
        file.unlink()
    return dict.fromkeys(SPLITS, 0), []


def _finish(source: Source, part: Path, watcher: Watcher) -> dict[str, Any]:
    """Scan the filled files once and return the manifest; images that appear in two classes are reported."""
    total = sum(sum(split.counts) for split in source.splits.values())
    histogram = Histogram(source.splits["train"].shape[0])
    digests, splits, images = {}, {}, {}
    watcher.start("checksums", total, 0)
    try:
        for name in SPLITS:
            split = source.splits[name]
            images[name] = np.load(part / f"images_{name}.npy", mmap_mode="r")
            fingerprint, digests[name] = scan(
                part / f"images_{name}.npy",
                split.classes,
                split.counts,
                watcher,
                histogram if name == "train" else None,
            )
            splits[name] = {"classes": split.classes, "counts": split.counts, "sha256": fingerprint}
    finally:
        watcher.stop()
    for line in describe_duplicates(images, source.splits, digests, listed=0 if source.published else 20):
        watcher.message(f"{source.name}: {line}")
    mean, std = histogram.statistics() if source.standardize else IDENTITY_SCALING
    return {
        "format": FORMAT,
        "name": source.name,
        "layout": source.layout,
        "stamp": source.stamp,
        "settings": dict(source.settings),
        "image_shape": source.splits["train"].shape,
        "mean": mean,
        "std": std,
        "splits": splits,
    }


def scan(
    path: Path,
    classes: tuple[str, ...],
    counts: tuple[int, ...],
    watcher: Watcher,
    histogram: Histogram | None = None,
) -> tuple[str, np.ndarray]:
    """Read the file of a split once, in little memory.

    Args:
        path: the file images_SPLIT.npy.
        classes, counts: the split's classes, and the number of images of each.
        watcher: told of every image that has been read.
        histogram: the images are added to it, if it is given.

    Returns:
        The fingerprint of the split, and a digest of each of its images, (n,) uint64.

    Raises:
        DataError: the file ends too early.
    """
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
        entry = int(np.prod(shape[1:]))
        digest = fingerprint_head(classes, counts, shape)
        digests = Digests(shape[0])
        at_once = max(1, _AT_ONCE // entry)
        for first in range(0, shape[0], at_once):
            count = min(at_once, shape[0] - first)
            data = file.read(count * entry)
            if len(data) != count * entry:
                raise damaged_store_error(path.parent, f"{path.name} ends too early")
            digest.update(data)
            images = np.frombuffer(data, np.uint8).reshape(count, *shape[1:])
            digests.add(images)
            if histogram is not None:
                histogram.add(images)
            watcher.advance(count)
    return digest.hexdigest(), digests.values


def verify(path: str | Path, watcher: Watcher | None = None) -> tuple[Manifest, list[str]]:
    """Check all files of a store against its manifest.

    Returns:
        The manifest, and a line of text for each image that appears in two classes.

    Raises:
        DataError: a count, a checksum, a mean or a standard deviation differs from the manifest's.
    """
    watcher, path = watcher or Quiet(), Path(path)
    manifest = read_manifest(path)
    images = {split: manifest.images(split) for split in SPLITS}
    digests = {}
    histogram = Histogram(manifest.shape[0])
    watcher.start(f"verifying {path}", sum(len(i) for i in images.values()), 0)
    try:
        for split, (classes, counts, recorded) in manifest.splits.items():
            counted = histogram if split == "train" else None
            fingerprint, digests[split] = scan(path / f"images_{split}.npy", classes, counts, watcher, counted)
            if fingerprint != recorded:
                raise damaged_store_error(
                    path, f"images_{split}.npy has the checksum {fingerprint}, but the manifest says {recorded}"
                )
    finally:
        watcher.stop()
    _check_statistics(manifest, histogram)
    shapes = {
        split: SourceSplit(classes, counts, manifest.shape, sum(counts), lambda start: iter(()))
        for split, (classes, counts, _) in manifest.splits.items()
    }
    return manifest, describe_duplicates(images, shapes, digests)


def _check_statistics(manifest: Manifest, histogram: Histogram) -> None:
    """Raise DataError unless the manifest's mean and standard deviation are those of the training images.

    Data sets in UNSCALED are not standardised; their manifest must have mean 0 and standard deviation 1.
    """
    for found, recorded, what in zip(
        histogram.statistics(), (manifest.mean, manifest.std), ("mean", "std"), strict=True
    ):
        if manifest.name in UNSCALED:
            found = IDENTITY_SCALING[what == "std"]
        if not np.allclose(found, recorded, rtol=1e-9, atol=1e-12):
            raise damaged_store_error(
                manifest.path, f"the manifest's {what} is {recorded}, but that of its training images is {found}"
            )


def stores_in(paths: Iterable[Path]) -> list[Path]:
    """Return the stores among the paths, and those that lie directly in one of them.

    Raises:
        MissingDataError: a path is not a store, and contains none.
    """
    found = []
    for path in paths:
        here = stores_under(path)
        if not here:
            unfinished = " (an unfinished one is there: run its 'metaheed data prepare' again)"
            raise MissingDataError(
                f"{path} is not a store, and contains none{unfinished if [*path.glob(f'*{SUFFIX}.part')] else ''}: "
                "make one with 'metaheed data prepare'"
            )
        found += here
    return found
