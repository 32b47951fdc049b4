"""Data sets as classes of uint8 images, and the episodes drawn from them."""

from metaheed.data.episodes import Ahead, Episodes
from metaheed.data.images import SPLITS, Dataset, Split
from metaheed.data.registry import DATASETS, check_name, find_shape, find_source, load_dataset, survey
from metaheed.data.sources import Request, Source

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
