"""The command line: one file a group of commands.

Heavy imports are made inside the commands, so that --help and mistakes answer at once.
"""

from metaheed.cli.entry import main

__all__ = ["main"]
