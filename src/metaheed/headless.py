"""Import matplotlib without a screen: figures are written to files and never shown.

Every other module of the package imports what it needs of matplotlib from here, for two reasons:

- The import fails if the environment variable MPLBACKEND names a backend that is not installed. The variable is
  therefore removed while matplotlib is imported.
- matplotlib reads a file named matplotlibrc in the current folder. That file may come from a stranger, and its settings
  can start another program (LaTeX). Figures are therefore drawn with matplotlib's default settings.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_settings = Path("matplotlibrc")
if _settings.exists() and not (_settings.is_file() or _settings.is_dir()):  # reading a pipe would wait for its writer
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
    """Draw with matplotlib's default settings, changed by `settings`; the user's settings are restored at the end."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings or {})
        yield
