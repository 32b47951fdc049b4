"""The interface between the benchmark and a library that it times."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from metaheed.types import Params


class Entry(NamedTuple):
    """One algorithm of one library, ready to train."""

    step: Callable[[int], None]
    """t -> one whole outer iteration on training batch t: from images in memory to the next θ. This is timed."""
    gradient: Callable[[], tuple[Params, Tensor]]
    """The last step's meta-gradient Σ_i w_i g_i, with the names of `tasks.start`, and the weights w, (B,)."""
