"""The two folders that metaheed keeps outside of runs and data: its cache, and what it remembers about the user."""

import os
from pathlib import Path

import platformdirs

from metaheed.errors import ConfigError, shown


def cache_folder() -> Path | None:
    """Return the folder for files that can be made again: $METAHEED_CACHE, or else the platform's cache folder.

    On Linux, the latter is $XDG_CACHE_HOME/metaheed, or else ~/.cache/metaheed. None if the user has no home folder.
    """
    chosen = os.environ.get("METAHEED_CACHE")
    if chosen:
        return Path(chosen)
    try:
        return platformdirs.user_cache_path("metaheed")
    except RuntimeError:  # the user has no home folder
        return None


def state_folder() -> Path | None:
    """Return the folder that remembers what this user allowed: $METAHEED_STATE, or else the platform's state folder.

    On Linux, the latter is $XDG_STATE_HOME/metaheed, or else ~/.local/state/metaheed. None if the user has no home
    folder.

    Raises:
        ConfigError: METAHEED_STATE is not an absolute path, so that it could mean another folder each time.
    """
    chosen = os.environ.get("METAHEED_STATE")
    if chosen:
        if not Path(chosen).is_absolute():
            raise ConfigError(f"METAHEED_STATE is {shown(chosen)}, but it must be an absolute path")
        return Path(chosen)
    try:
        return platformdirs.user_state_path("metaheed")
    except RuntimeError:  # the user has no home folder
        return None
