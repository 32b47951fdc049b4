"""A word while PyTorch is imported, which takes seconds, so that no command is silent meanwhile."""

import contextlib
import sys
from collections.abc import Iterator

_ERASE = "\r\x1b[K"


@contextlib.contextmanager
def loading_torch() -> Iterator[None]:
    """Say on a terminal, until the block ends, that PyTorch is being loaded; say nothing elsewhere."""
    shown = "torch" not in sys.modules and sys.stderr is not None and sys.stderr.isatty()
    if shown:
        print("loading PyTorch …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print(_ERASE, end="", file=sys.stderr, flush=True)
