"""Data sets, as classes of uint8 images, and the episodes that are drawn from them."""

from metaheed.data.episodes import Episodes, Prefetcher
from metaheed.data.images import SPLITS, Dataset, Split
from metaheed.data.registry import DATASETS, check_name, find_shape, find_source, load_dataset, survey
from metaheed.data.sources import Request, Source

__all__ = [
    "DATASETS",
    "SPLITS",
    "Dataset",
    "Episodes",
    "Prefetcher",
    "Request",
    "Source",
    "Split",
    "check_name",
    "find_shape",
    "find_source",
    "load_dataset",
    "survey",
]
