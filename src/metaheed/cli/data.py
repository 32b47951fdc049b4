"""metaheed data."""

import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from metaheed.cli.parse import parse_command
from metaheed.cli.waiting import loading_torch
from metaheed.config import (
    EpisodeConfig,
    FreezeConfig,
    TrainingConfig,
)
from metaheed.errors import Interrupted, unknown


@dataclass(frozen=True, kw_only=True)
class DataDownload:
    """Fetch a data set's published files; for those that may not be given away, say how to get them."""

    data: tyro.conf.Positional[str]
    """omniglot, cifar-fs, fc100; miniimagenet and tieredimagenet are explained."""
    data_root: Path = Path("data")
    """Folder to put the files into, for --data-root of other commands."""


@dataclass(frozen=True, kw_only=True)
class DataEpisodes:
    """Write frozen tasks to a file, for `metaheed evaluate RUN --episodes FILE` and for other libraries."""

    out: Path
    """The file, a numpy archive: docs/data.md says what is in it."""
    which: FreezeConfig = field(default_factory=FreezeConfig)


@dataclass(frozen=True, kw_only=True)
class DataPrepare:
    """Convert a data set once into a store that training maps into memory; goes on where an interrupted one stopped."""

    name: tyro.conf.Positional[str]
    """Data set: miniimagenet, tieredimagenet, cifar-fs, fc100, omniglot, omniglot-vinyals, folder, glyphs."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder of the published files; for folder: the folder, zip or tar of pictures. glyphs needs none."""
    to: Path | None = None
    """Folder in which the store is made; --from if not given, or the folder that holds it if it is a file."""
    image_size: int | None = None
    """Pixels a side of the pictures of folder; 84 if not given."""
    split_seed: int | None = None
    """Seed by which the classes of folder are divided if they are not divided yet; 0 if not given."""


@dataclass(frozen=True, kw_only=True)
class DataList:
    """List every data set, whether it was found and in which layout, and how many classes and images it has."""

    data_root: Path | None = None
    """Folder to look in; only the built-in data set is listed if not given."""


@dataclass(frozen=True, kw_only=True)
class DataVerify:
    """Go through stores: counts, checksums, and images that are in two classes or splits."""

    stores: tyro.conf.Positional[tuple[Path, ...]]
    """Stores, or folders that hold some."""


@dataclass(frozen=True, kw_only=True)
class DataShow:
    """A picture (PNG) of an episode, or of some classes."""

    name: tyro.conf.Positional[str]
    """Data set."""
    data_root: Path | None = None
    """Folder that holds its files, as in training."""
    image_size: int | None = None
    """Pixels a side of the pictures of folder, as in training; 84 if not given."""
    split_seed: int | None = None
    """Seed by which the classes of folder are divided, as in training; 0 if not given."""
    split: Literal["train", "val", "test"] = "train"
    """The split whose classes are shown."""
    classes: int | None = None
    """Show the first images of so many classes instead of an episode."""
    ways: int = EpisodeConfig.ways
    """N, the number of classes of the episode."""
    shots: int = EpisodeConfig.shots
    """K, the number of support images per class."""
    queries: int = EpisodeConfig.queries
    """Q, the number of query images per class. With --classes, Q + 1 images of each class are shown."""
    seed: int = TrainingConfig.seed
    """Training seed whose episodes are meant."""
    index: int = 0
    """Number of the episode, counted from 0."""
    out: Path = Path("data.png")
    """The picture to write."""


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """Divide a folder of classes by a seed: writes the lists train.txt, val.txt and test.txt into it."""

    folder: tyro.conf.Positional[Path]
    """The folder that holds a folder of images for each class."""
    seed: int = EpisodeConfig.folder_split_seed
    """Seed that decides which class goes into which split."""
    val: float = EpisodeConfig.folder_shares[0]
    """Share of the classes that go to validation, at least two classes."""
    test: float = EpisodeConfig.folder_shares[1]
    """Share of the classes that go to test, at least two classes."""
    overwrite: bool = False
    """Replace the lists if they exist."""


def run_data(arguments: list[str]) -> int:
    """metaheed data COMMAND."""
    commands: dict[str, tuple[Any, Callable[[Any], int]]] = {
        "prepare": (DataPrepare, _data_prepare),
        "list": (DataList, _data_list),
        "verify": (DataVerify, _data_verify),
        "show": (DataShow, _data_show),
        "split": (DataSplit, _data_split),
        "download": (DataDownload, _data_download),
        "episodes": (DataEpisodes, _data_episodes),
    }
    named = arguments[1:2]
    if named and named[0] in commands:
        kind, command = commands[named[0]]
        return command(parse_command(kind, f"data {named[0]}", arguments[1:]))
    if named and not named[0].startswith("-"):
        raise unknown("data command", named[0], commands)
    print("usage: metaheed data COMMAND [options]\n")
    for name, (kind, _) in commands.items():
        print(f"  metaheed data {name:9}{kind.__doc__}")
    return 0 if named in (["-h"], ["--help"]) else 2


def _data_prepare(command: DataPrepare) -> int:
    with loading_torch():
        from metaheed.data import Request, find_source
        from metaheed.data.preparing import prepare
        from metaheed.running.progress import make_watcher

    EpisodeConfig(data=command.name, image_size=command.image_size, split_seed=command.split_seed)
    source = find_source(command.name, Request(command.source, command.image_size, command.split_seed))
    to = command.to or command.source or Path()
    watcher = make_watcher()
    watcher.message(f"{command.name}: found {source.layout}")
    try:
        path = prepare(source, to.parent if to.is_file() else to, watcher)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on where it stood", signal.SIGINT) from None
    classes = "/".join(str(len(split.classes)) for split in source.splits.values())
    images = sum(sum(split.counts) for split in source.splits.values())
    print(
        f"{path} holds {classes} classes, {images} images; train with --data {command.name} --data-root "
        f"{shlex.quote(str(path.parent))}"
    )
    return 0


def _data_list(command: DataList) -> int:
    with loading_torch():
        from metaheed.data import survey

    for name, state, counts in survey(command.data_root):
        print(f"{name:18}{counts:38}{state}")
    return 0


def _data_verify(command: DataVerify) -> int:
    with loading_torch():
        from metaheed.data.preparing import stores_in, verify
        from metaheed.running.progress import make_watcher

    for path in stores_in(command.stores):
        manifest, notices = verify(path, make_watcher())
        classes = "/".join(str(len(classes)) for classes, _, _ in manifest.splits.values())
        images = sum(sum(counts) for _, counts, _ in manifest.splits.values())
        print(f"{path} is whole: {manifest.name}, {classes} classes, {images} images, all checksums as recorded")
        for line in notices or ["no image is in two classes"]:
            print(f"  {line}")
    return 0


def _data_show(command: DataShow) -> int:
    with loading_torch():
        from metaheed.data import Episodes, load_dataset
        from metaheed.data.show import draw_classes, draw_episode, write_png
        from metaheed.running.progress import make_watcher

    EpisodeConfig(data=command.name, image_size=command.image_size, split_seed=command.split_seed)
    watcher = make_watcher(brief=True)
    dataset = load_dataset(command.name, command.data_root, command.image_size, command.split_seed, watcher)
    if command.classes is None:
        shape = (command.ways, command.shots, command.queries)
        image, names = draw_episode(Episodes(dataset, command.split, *shape, command.seed), command.index)
    else:
        image, names = draw_classes(dataset, command.split, command.classes, command.queries + 1)
    write_png(image, command.out)
    for name in names:
        print(name)
    print(f"picture: {command.out}")
    return 0


def _data_split(command: DataSplit) -> int:
    from metaheed.data.sets.folder import write_lists

    lists = write_lists(command.folder, command.seed, command.val, command.test, command.overwrite)
    for split, names in lists.items():
        print(f"{command.folder / split}.txt: {len(names)} classes")
    return 0


def _data_download(command: DataDownload) -> int:
    from metaheed.data.reading.download import download
    from metaheed.running.progress import Transfers

    for path in download(command.data, command.data_root, Transfers()):
        print(path)
    return 0


def _data_episodes(command: DataEpisodes) -> int:
    with loading_torch():
        from metaheed.data import Episodes, load_dataset
        from metaheed.data.frozen import freeze, write_episodes
        from metaheed.running.progress import make_watcher

    which = command.which
    watcher = make_watcher(brief=True)
    dataset = load_dataset(which.data, which.data_root, which.image_size, which.split_seed, watcher)
    episodes = Episodes(dataset, which.split, which.ways, which.shots, which.queries, which.episode_seed)
    frozen = freeze(episodes, which.tasks)
    write_episodes(frozen, command.out, which.with_images)
    print(
        f"{command.out}: {which.tasks} tasks of {which.data} {which.split}, {which.ways}-way {which.shots}-shot, with "
        f"{which.queries} queries a class, that use {len(frozen.rows)} images"
    )
    return 0
