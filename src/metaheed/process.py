"""What is set for the whole process: by the command line only, never by importing the library."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import torch

from metaheed.config import TrainingConfig
from metaheed.errors import ConfigError


def pick_device(name: str, fall_back: bool = False) -> torch.device:
    """The device behind cpu, cuda, cuda:N or auto.

    Args:
        name: as given by the user.
        fall_back: use the CPU where the device is not here, instead of raising.

    Raises:
        ConfigError: not a device of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {name!r}, but it must be cpu, cuda, cuda:N or auto")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        if fall_back:
            return torch.device("cpu")
        raise ConfigError(f"--device is {name!r}, but PyTorch finds {count} CUDA devices here: use --device cpu")
    return device


@contextlib.contextmanager
def cpu_threads(config: TrainingConfig) -> Iterator[None]:
    """PyTorch's own threads for a run: as configured, or one where each task has its core; put back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if config.execution in ("threaded", "processes") else config.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free, for the next step's tensors.

    By default it gives large blocks back to the system and faults them in afresh at the next allocation, which costs a
    second-order step on a CPU a quarter to a third of its time. Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)
        # One arena for all threads: the others hold blocks of at most 64 MB, and give them back.
        mallopt(arena_max, 1)


def make_deterministic() -> None:
    """Same bits every time on CUDA too: deterministic kernels, no choice of algorithm by timing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # The mode also fills every new tensor against reads of uninitialised memory, which costs time and finds only bugs.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined,unused-ignore]
