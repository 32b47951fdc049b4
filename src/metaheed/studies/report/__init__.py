"""Reports that show runs as tables and figures."""

from metaheed.studies.report.write import report

__all__ = ["report"]
