"""What is stepped and timed."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from metaheed.types import Params


class Entry(NamedTuple):
    """One algorithm of one library, ready to train."""

    step: Callable[[int], None]
    """t -> one whole outer iteration on training batch t: from images in memory to the next θ. This is timed."""
    gradient: Callable[[], tuple[Params, Tensor]]
    """Of the last step: Σ_i w_i g_i by the names of `tasks.start`, and w, (B,)."""
