"""Search for an algorithm's settings."""

from metaheed.studies.search.run import read_search, search

__all__ = ["read_search", "search"]
