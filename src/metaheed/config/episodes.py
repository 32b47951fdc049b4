"""Settings of the images and tasks: for training, for freezing tasks into a file, and for judging."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from metaheed.config.checks import at_least, check_types, require
from metaheed.config.presets import USUAL


def _check_folder(config: "EpisodeConfig | FreezeConfig") -> None:
    at_least(config, 8, "image_size", most=1024)
    at_least(config, 0, "split_seed", most=2**63 - 1)
    for name, what in (("image_size", "images of its own size"), ("split_seed", "a split of its own")):
        value = getattr(config, name)
        require(
            value is None or config.data == "folder",
            name,
            value,
            f"{config.data} has {what}: leave it out, or use --data folder",
        )


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """Which images, and how tasks are made of them."""

    folder_image_size: ClassVar[int] = 84
    folder_split_seed: ClassVar[int] = 0
    folder_shares: ClassVar[tuple[float, float]] = (0.16, 0.20)  # of the classes, for val and test: miniImageNet's
    data: str = "glyphs"
    """Data set: glyphs (built in, needs no files), miniimagenet, tieredimagenet, cifar-fs, fc100, omniglot (the paper's
    split), omniglot-vinyals (another split of it), or folder (pictures of one's own)."""
    data_root: Path | None = None
    """Folder that holds the published files, or what 'metaheed data prepare' made of them, itself or in their customary
    subfolder (omniglot/, cifar-100-python/); for folder: the folder, zip or tar of pictures. glyphs needs none."""
    image_size: int | None = None
    """Pixels a side to which the pictures of --data folder are resized; none: 84. Other data sets have their own."""
    split_seed: int | None = None
    """Seed by which the classes of --data folder are divided into train, val and test where neither its layout nor
    lists beside it divide them; none: 0."""
    ways: int = 5
    """N, classes in a training task."""
    shots: int = 1
    """K, support images per class in a training task."""
    queries: int = USUAL.queries
    """Q, query images per class in a training task."""
    test_ways: int | None = None
    """N in validation and test tasks; none: as in training. It may not exceed --ways, except with ProtoNet, whose
    head has no fixed size."""
    test_shots: int | None = None
    """K in validation and test tasks; none: as in training."""
    test_queries: int | None = None
    """Q in validation and test tasks; none: as in training."""

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
    """Of --data folder, as in training."""
    split_seed: int | None = None
    """Of --data folder, as in training."""
    split: Literal["test", "val"] = "test"
    """Whose classes."""
    ways: int = EpisodeConfig.ways
    """N, classes in a task."""
    shots: int = EpisodeConfig.shots
    """K, support images per class."""
    queries: int = EpisodeConfig.queries
    """Q, query images per class."""
    tasks: int = 300
    """How many."""
    episode_seed: int = 0
    """Which; the same number gives the same ones, those that evaluate draws included."""
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
    """Frozen tasks to judge on; none: 300, or all of --episodes."""
    split: Literal["test", "val"] | None = None
    """Whose classes; none: test, or those of --episodes."""
    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint chosen on validation, or the newest."""
    episode_seed: int | None = None
    """Which frozen tasks; the same number gives every run the same ones. None: 0, or those of --episodes."""
    ways: int | None = None
    """N; none: the run's own test setting. At another one (of --shots and --queries, too) the result is in a file
    like result-5way5shot15query.json, and result.json is left alone."""
    shots: int | None = None
    """K; none: the run's own test setting."""
    queries: int | None = None
    """Q; none: the run's own test setting."""
    data: str | None = None
    """Another data set than the run was trained on (cross-domain). Its images are made of the run's size and channels,
    and standardised as in training; the result is written to result-on-DATA.json. None: the run's own."""
    episodes: Path | None = None
    """A file of frozen tasks, written by 'metaheed data episodes'; it decides data set, split, N, K, Q and tasks."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 2, "tasks", "ways")
        at_least(self, 0, "episode_seed", most=2**63 - 1)
        at_least(self, 1, "shots", "queries")
        if self.episodes is not None:
            for name in ("data", "split", "ways", "shots", "queries", "tasks", "episode_seed"):
                value = getattr(self, name)
                require(value is None, name, value, f"--episodes {self.episodes} decides it: leave it out")
