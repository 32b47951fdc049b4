"""Data sets as classes of uint8 images, and the episodes drawn from them."""

from collections.abc import Callable
from pathlib import Path

from metaheed.data import cifar, glyphs, omniglot
from metaheed.data.episodes import Episodes
from metaheed.data.images import SPLITS, Dataset, Split
from metaheed.errors import unknown

__all__ = ["DATASETS", "SPLITS", "Dataset", "Episodes", "Split", "check_name", "load_dataset"]

DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "glyphs": lambda root: glyphs.load(),
    "omniglot": omniglot.load,
    "cifar-fs": cifar.load,
}
"""Name -> loader, given the folder to look in."""


def check_name(name: str) -> None:
    """Raise ConfigError, with a suggestion, if no data set has that name."""
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)


def load_dataset(name: str, root: Path | None = None) -> Dataset:
    """A data set by name, read from `root` or from its customary subfolder.

    Raises:
        ConfigError: no data set has that name.
        DataError: its files are missing or damaged; says which, and where they are published.
    """
    check_name(name)
    return DATASETS[name](root)
