"""Searching an algorithm's settings with Optuna."""

from metaheed.studies.search.run import read_search, search

__all__ = ["read_search", "search"]
