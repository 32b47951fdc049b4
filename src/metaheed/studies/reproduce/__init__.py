"""Reproducing the paper's tables and figures."""

from metaheed.studies.reproduce.run import dry_run, make_slots, reproduce

__all__ = ["dry_run", "make_slots", "reproduce"]
