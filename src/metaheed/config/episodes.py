"""Settings of the images and tasks: for training, for freezing tasks into a file, and for judging."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from metaheed.config.checks import at_least, check_types, require
from metaheed.config.presets import USUAL
from metaheed.errors import option


def _check_folder(config: "EpisodeConfig | FreezeConfig") -> None:
    at_least(config, 8, "image_size", most=1024)
    at_least(config, 0, "split_seed", most=2**63 - 1)
    for name, what in (("image_size", "images of its own size"), ("split_seed", "a split of its own")):
        value = getattr(config, name)
        require(
            value is None or config.data == "folder",
            name,
            value,
            f"{config.data} has {what}: leave it out, or use {option('data', 'folder')}",
        )


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """Which images, and how tasks are made of them."""

    folder_image_size: ClassVar[int] = 84
    folder_split_seed: ClassVar[int] = 0
    folder_shares: ClassVar[tuple[float, float]] = (0.16, 0.20)  # of the classes, for val and test: miniImageNet's
    data: str = "glyphs"
    """Data set: glyphs (built in, needs no files), miniimagenet, tieredimagenet, cifar-fs, fc100, omniglot (split like
    the paper's), omniglot-vinyals (the split of Vinyals et al.), or folder (your own pictures)."""
    data_root: Path | None = None
    """Folder that holds the published files, or the store that 'metaheed data prepare' made of them; a customary
    subfolder such as omniglot/ or cifar-100-python/ is found, too. For --data folder: the folder, zip or tar of
    pictures. glyphs needs none."""
    image_size: int | None = None
    """Pixels a side to which the pictures of --data folder are resized; 84 if not given. Other data sets have a size of
    their own."""
    split_seed: int | None = None
    """Seed by which the classes of --data folder are divided into train, val and test, if neither its layout nor
    lists beside it divide them; 0 if not given."""
    ways: int = 5
    """N, the number of classes in a training task."""
    shots: int = 1
    """K, the number of support images per class in a training task."""
    queries: int = USUAL.queries
    """Q, the number of query images per class in a training task."""
    test_ways: int | None = None
    """N in validation and test tasks; that of training if not given. It may not exceed --ways, except with ProtoNet,
    whose head has no fixed size."""
    test_shots: int | None = None
    """K in validation and test tasks; that of training if not given."""
    test_queries: int | None = None
    """Q in validation and test tasks; that of training if not given."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 2, "ways", "test_ways")
        at_least(self, 1, "shots", "queries", "test_shots", "test_queries")
        _check_folder(self)

    @property
    def train_shape(self) -> tuple[int, int, int]:
        """(ways, shots, queries) of training tasks."""
        return self.ways, self.shots, self.queries

    @property
    def test_shape(self) -> tuple[int, int, int]:
        """(ways, shots, queries) of validation and test tasks."""
        return (
            self.ways if self.test_ways is None else self.test_ways,
            self.shots if self.test_shots is None else self.test_shots,
            self.queries if self.test_queries is None else self.test_queries,
        )


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Which frozen tasks are written to a file."""

    data: str = EpisodeConfig.data
    """Data set."""
    data_root: Path | None = None
    """Folder that holds its files, as in training."""
    image_size: int | None = None
    """Pixels a side of the pictures of --data folder, as in training; 84 if not given."""
    split_seed: int | None = None
    """Seed by which the classes of --data folder are divided, as in training; 0 if not given."""
    split: Literal["test", "val"] = "test"
    """The split whose classes the tasks are drawn from."""
    ways: int = EpisodeConfig.ways
    """N, the number of classes in a task."""
    shots: int = EpisodeConfig.shots
    """K, the number of support images per class."""
    queries: int = EpisodeConfig.queries
    """Q, the number of query images per class."""
    tasks: int = 300
    """Number of tasks."""
    episode_seed: int = 0
    """Seed of the tasks: the same number gives the same tasks, those that evaluate draws included."""
    with_images: bool = False
    """Put the images that the tasks use into the file, so that whoever reads it needs no data set."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 2, "tasks", "ways")
        at_least(self, 0, "episode_seed", most=2**63 - 1)
        at_least(self, 1, "shots", "queries")
        _check_folder(self)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a trained run is judged."""

    tasks: int | None = None
    """Number of frozen tasks to judge on; 300 if not given, or all those in --episodes."""
    split: Literal["test", "val"] | None = None
    """The split whose classes the tasks are drawn from; test if not given, or that of --episodes."""
    checkpoint: Literal["best", "last"] = "best"
    """best: the checkpoint with the best validation accuracy; last: the newest one."""
    episode_seed: int | None = None
    """Seed of the frozen tasks: the same number gives every run the same tasks; 0 if not given, or that of
    --episodes."""
    ways: int | None = None
    """N, the number of classes in a task; that of the run's test setting if not given. If --ways, --shots or --queries
    differ from it, the result is written to a file like result-5way5shot15query.json, and result.json is left alone."""
    shots: int | None = None
    """K, the number of support images per class; that of the run's test setting if not given."""
    queries: int | None = None
    """Q, the number of query images per class; that of the run's test setting if not given."""
    data: str | None = None
    """Judge on this data set instead of the one that the run was trained on (cross-domain). Its images are converted to
    the run's size and channels and standardised as in training; the result is written to result-on-DATA.json."""
    episodes: Path | None = None
    """Judge on the tasks in this file, which 'metaheed data episodes' wrote. It decides data set, split, N, K, Q and
    the tasks."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 2, "tasks", "ways")
        at_least(self, 0, "episode_seed", most=2**63 - 1)
        at_least(self, 1, "shots", "queries")
        if self.episodes is not None:
            for name in ("data", "split", "ways", "shots", "queries", "tasks", "episode_seed"):
                value = getattr(self, name)
                require(
                    value is None, name, value, f"{option('episodes', str(self.episodes))} decides it: leave it out"
                )
