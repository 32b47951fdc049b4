"""matplotlib, whatever the environment says of a screen: figures are made as files, and never shown.

matplotlib fails to import where MPLBACKEND names a backend that it does not have, so the variable is out of its sight
meanwhile. Every module here takes from this one what it needs of matplotlib.
"""

import os

_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib import colormaps, ft2font
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend

__all__ = ["Axes", "Figure", "colormaps", "ft2font", "matplotlib"]
