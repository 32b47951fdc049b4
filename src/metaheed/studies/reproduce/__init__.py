"""The paper's tables and figures, run anew."""

from metaheed.studies.reproduce.run import dry_run, make_slots, reproduce

__all__ = ["dry_run", "make_slots", "reproduce"]
