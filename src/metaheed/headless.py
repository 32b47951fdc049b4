"""matplotlib, whatever the environment says of a screen: figures are made as files, and never shown.

matplotlib fails to import where MPLBACKEND names a backend that it does not have, so the variable is out of its sight
meanwhile. It also reads a file matplotlibrc of the current folder, which may be a stranger's, and with which a figure
can ask for another program (LaTeX): figures are drawn with matplotlib's own settings. Every module here takes from
this one what it needs of matplotlib.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_settings = Path("matplotlibrc")
if _settings.exists() and not (_settings.is_file() or _settings.is_dir()):  # a pipe's writer would be waited for
    raise OSError(f"{_settings.absolute()} is a pipe or a device, and matplotlib would read it: remove it")

_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib import colormaps, ft2font
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend

__all__ = ["Axes", "Figure", "colormaps", "ft2font", "matplotlib", "own_settings"]


@contextlib.contextmanager
def own_settings(settings: Any = None) -> Iterator[None]:
    """Draw with matplotlib's own settings and these; a user's come back at the end."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings or {})
        yield
