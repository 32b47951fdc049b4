"""Settings of the process that a run computes in: device, threads, precision, signals and memory.

Importing the module changes none of them.
"""

import contextlib
import ctypes
import math
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from metaheed.config import CHUNKED, RunConfig, TrainingConfig
from metaheed.errors import ConfigError, MetaheedError, OutOfMemoryError, StartError, WorkerError, option
from metaheed.learners import Learner, NetworkLearner
from metaheed.outer import build_execution, explain_failure, tasks_at_once
from metaheed.types import Episode, Params


def pick_device(name: str, fall_back: bool = False) -> torch.device:
    """The device that cpu, cuda, cuda:N or auto stands for.

    Args:
        name: the value of --device.
        fall_back: return the CPU if this machine does not have the device, instead of raising.

    Raises:
        ConfigError: the name is none of these, or this machine does not have the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        device = None
    if device is not None and device.type == "cpu" and not device.index:
        return torch.device("cpu")
    if device is None or device.type != "cuda":
        raise ConfigError(f"{option('device')} is {name[:60]!r}, but it must be cpu, cuda, cuda:N or auto")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        if fall_back:
            return torch.device("cpu")
        raise ConfigError(
            f"{option('device')} is {name!r}, but PyTorch finds {count} CUDA devices here: use "
            f"{option('device', 'cpu')}"
        )
    return device


@contextlib.contextmanager
def cpu_threads(config: TrainingConfig) -> Iterator[None]:
    """Set PyTorch's number of threads for a run and restore it at the end.

    It is one where the execution gives each task a core of its own, else as configured.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if config.execution in ("threaded", "processes") else config.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Let CUDA compute float32 products in full precision or as TF32 (PyTorch's default for convolutions).

    PyTorch's switches are restored at the end.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # Setting the older switches also sets those that PyTorch 2.9 added, but not the other way round. So the older ones
    # are set, and both are restored. If the user has set a newer one, reading the older one raises RuntimeError.
    old = [(matmul, "allow_tf32"), (cudnn, "allow_tf32")]
    new = [(part, "fp32_precision") for part in (matmul, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None))]
    before: list[tuple[Any, str, Any]] = []
    for part, name in [*old, *new]:
        with contextlib.suppress(RuntimeError, AttributeError):
            before.append((part, name, getattr(part, name)))
    for part, name in old:
        setattr(part, name, tf32)
    try:
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


class StopRequested(BaseException):
    """A signal came while it may interrupt the computation. No Exception, so that no handler of errors catches it."""


class Signals(list[int]):
    """The numbers of the signals that have come."""

    def __init__(self) -> None:
        super().__init__()
        self.raises = False
        """Whether a signal that comes now raises StopRequested at once."""

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """A block in which a signal takes effect at once. It must change nothing before its end, however long it takes.

        Raises:
            StopRequested: a signal comes in the block, or has come before.
        """
        try:
            self.raises = True
            if self:
                raise StopRequested
            yield
        finally:
            self.raises = False


@contextlib.contextmanager
def signals_received() -> Iterator[Signals]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of being ended by them; a second signal raises KeyboardInterrupt.

    SIGHUP stays ignored if it was, as under nohup.
    """
    received = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        if received.raises:
            raise StopRequested

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch, NumPy or a library below them raised the error because memory ran out."""
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def available_memory(device: torch.device) -> int | None:
    """Bytes of memory that a CUDA device has, or that are left on the host with its swap; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    left: list[int] = []
    with contextlib.suppress(OSError, ValueError, KeyError):  # not Linux
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        size = {name.rstrip(":"): int(number) * 1024 for name, number, *_ in lines}
        left.append(size["MemAvailable"] + size["SwapFree"])
    if not left:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # Windows
            left.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # a container's limit: cgroup versions 2 and 1
        with contextlib.suppress(OSError, ValueError):  # there is no limit, or it reads "max"
            left.append(int((Path("/sys/fs/cgroup") / limit).read_text()))
    return min(left, default=None)


def check_batch_fits(
    config: RunConfig, device: torch.device, image_shape: tuple[int, int, int], parameters: int
) -> None:
    """Refuse a meta-batch that cannot fit into memory, before any of it is allocated.

    What every execution holds at once is counted: the batch's images, their rows in the data set and, unless the rule
    takes one task at a time, a gradient for each task. The memory that computing a task takes is not counted.

    Args:
        config: the run's config.
        device: the device that the run computes on.
        image_shape: (channels, height, width).
        parameters: size of θ in bytes.

    Raises:
        ConfigError: it does not fit; the message says what to set.
    """
    N, K, Q = config.episodes.train_shape
    B, images = config.outer.meta_batch_size, N * (K + Q)
    gradient = 0 if config.rule.updates(B) > 1 else parameters  # one task's gradient at a time is the network's own
    index, pixel = 8, 4  # bytes of an image's row number in the data set, and of a float32
    on_host, on_device = images * index, images * math.prod(image_shape) * pixel + gradient
    need = {device: on_device, torch.device("cpu"): on_host}
    if device.type == "cpu":
        need = {device: on_host + on_device}
    for where, task in need.items():
        there = available_memory(where)
        if there is not None and B * task > there:
            raise ConfigError(
                f"{option('meta_batch_size')} is {B}: {images} images of {'×'.join(map(str, image_shape))} a task "
                f"and its gradient take at least {B * task / 2**30:,.1f} GiB in all, but {where} has "
                f"{there / 2**30:,.1f} GiB: set a smaller "
                f"{option('meta_batch_size')}, or fewer {option('ways')}, {option('shots')} or "
                f"{option('queries')}"
            )
    there, accuracy_and_loss = available_memory(torch.device("cpu")), 16
    if there is not None and config.training.val_tasks * accuracy_and_loss > there:
        raise ConfigError(
            f"{option('val_tasks')} is {config.training.val_tasks}: their results do not fit into "
            f"{there / 2**30:,.1f} GiB of memory: set fewer"
        )


@contextlib.contextmanager
def translate_memory_errors(
    config: RunConfig,
    device: torch.device,
    tasks: int,
    learner: Learner,
    task_bytes: Callable[[], int | None] = lambda: None,
) -> Iterator[None]:
    """Turn errors of exhausted memory into OutOfMemoryError, which says what was computed at once and what to set.

    The WorkerError of a killed worker gets the same remedy, because Linux kills a process when memory runs out.

    Args:
        config: the run's config, with the execution resolved.
        device: the device that it computes on.
        tasks: number of tasks in a batch.
        learner: the run's learner.
        task_bytes: returns the memory that one task needs, or None if it has not been measured.

    Raises:
        OutOfMemoryError, WorkerError: in place of the error in the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        killed = isinstance(error, WorkerError) and error.status == -signal.SIGKILL
        if isinstance(error, OutOfMemoryError) or not (killed or is_out_of_memory(error)):
            raise
        at_once = tasks_at_once(config.training, device, tasks, learner)
        available = None
        if device.type == "cuda":
            # What this process holds is counted as available, because it will be free for the next one.
            available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        size = f" ({available / 2**30:.1f} GiB)" if available is not None else ""
        remedy = _less_memory(config, at_once, suggest_chunk(at_once, available, task_bytes()))
        if isinstance(error, WorkerError):
            raise WorkerError(error.status, f"{remedy}. Checkpoints, if any, are kept") from error
        what = "task" if at_once == 1 else "tasks"
        raise OutOfMemoryError(
            f"the memory of {device}{size} does not hold {at_once} {what} at once, as the execution "
            f"{config.training.execution} computes batches of {tasks}: {remedy}. "
            "Checkpoints, if any, are kept"
        ) from error


@contextlib.contextmanager
def translate_network_errors(
    config: RunConfig, device: torch.device, learner: Learner, meta: Params, task: Callable[[], Episode], judging: bool
) -> Iterator[None]:
    """Turn the errors of a user's own network into ConfigError with a remedy. Errors of memory and threads pass.

    Args:
        config: the run's config, with the execution resolved.
        device: the device that it computes on.
        learner: the run's learner.
        meta: θ on the device.
        task: returns a batch of one task, on which remedies are tried.
        judging: whether the block evaluates tasks; otherwise it computes their gradients.

    Raises:
        ConfigError: in place of the network's error.
    """
    try:
        yield
    except MetaheedError:
        raise
    except Exception as error:  # a user's network may raise anything
        systems = isinstance(error, RuntimeError) and (is_out_of_memory(error) or cannot_start(error))
        if systems or not isinstance(learner, NetworkLearner) or learner.backbone.is_ours:
            raise
        executed = partial(build_execution, config.training, device)
        explained = explain_failure(error, learner, meta, task(), executed, config.training.execution, judging)
        raise ConfigError(f"backbone {config.learner.backbone!r}: {explained}") from error


def cannot_start(error: RuntimeError) -> bool:
    """Whether Python or PyTorch raised the error because the system starts no further thread."""
    return any(sign in str(error) for sign in ("can't start new thread", "Resource temporarily unavailable"))


@contextlib.contextmanager
def translate_start_errors() -> Iterator[None]:
    """Turn the error of a thread that cannot be started into StartError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, StartError) or not cannot_start(error):
            raise
        raise StartError(str(error)) from error


def suggest_chunk(at_once: int, available: int | None, task_bytes: int | None) -> int:
    """How many tasks to compute at once after `at_once` were too many; at least 1.

    If the available bytes and the bytes of a task are known and give a smaller number, as many as fit into nine tenths
    of the memory; else half of `at_once`.
    """
    fitting = int(0.9 * available / task_bytes) if available is not None and task_bytes else at_once
    return max(1, fitting if fitting < at_once else at_once // 2)


def _less_memory(config: RunConfig, at_once: int, chunk: int) -> str:
    execution = config.training.execution
    if at_once > 1 and execution in CHUNKED:
        return f"set {option('chunk_size', chunk)}"
    if at_once > 1 and execution == "threaded":
        return f"set {option('execution', 'looped')}"
    if at_once > 1:
        return f"set {option('execution', 'vectorized')} {option('chunk_size', chunk)}"
    learner, advice = config.learner, []
    if not getattr(learner, "recompute", True):  # the learner can recompute its inner steps instead of storing them
        advice.append(option("recompute", True))
    if not getattr(learner, "first_order", True):
        advice.append(option("first_order", True))
    if hasattr(learner, "adaptation_steps"):
        advice.append(f"fewer {option('adaptation_steps')}")
    advice.append(f"fewer {option('queries')}")
    return f"try {', '.join(advice)} or a smaller {option('backbone')} in a new run"


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free, so that the tensors of the next step reuse it.

    By default glibc returns large blocks to the system, and every new allocation causes page faults, which take a
    quarter to a third of the time of a second-order step on a CPU. Without glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)
        # One arena for all threads, because the others hold blocks of at most 64 MB and return them.
        mallopt(arena_max, 1)


def make_deterministic() -> None:
    """Make CUDA give the same bits every time: deterministic kernels, and no choice of algorithms by timing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    # PyTorch's compiler reads this variable when it is imported, by a network that is compiled. Telling it in PyTorch's
    # usual way (use_deterministic_algorithms) imports it here and now, which takes longer than all else at a start.
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(True, warn_only=True)
    else:
        torch.set_deterministic_debug_mode("warn")
    # By default the mode also fills new tensors, which costs time and only helps to find reads of uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined,unused-ignore]


def peak_memory(device: torch.device) -> int | None:
    """The largest amount of memory held so far, in bytes; None if the system does not tell.

    On CUDA it is the device memory that PyTorch allocated. On a CPU it is the sum of the peaks of resident memory of
    this process and its workers, in which shared memory is counted once for each.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    processes = Path("/proc/self/task")
    if not processes.exists():
        try:
            import resource
        except ImportError:  # Windows
            return None
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return own * (1 if platform.system() == "Darwin" else 1024)
    total = _peak_resident("self")
    for thread in processes.iterdir():
        with contextlib.suppress(OSError):  # a thread or one of its workers has just ended
            total += sum(map(_peak_resident, (thread / "children").read_text().split()))
    return total


def _peak_resident(process: str) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def describe_processor(device: torch.device) -> str:
    """The name of the GPU, or of the CPU as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
