"""The process that a run has to itself: device, threads, precision, memory. Importing the library touches nothing."""

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

from metaheed.config import CHUNKED, RunConfig, SequentialConfig, TrainingConfig
from metaheed.errors import ConfigError, MetaheedError, OutOfMemoryError, StartError, WorkerError, option
from metaheed.learners import Learner, NetworkLearner
from metaheed.outer import build_execution, explain_failure, tasks_at_once
from metaheed.types import Episode, Params


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
    """PyTorch's own threads for a run: as configured, or one where each task has its core; put back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if config.execution in ("threaded", "processes") else config.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """How CUDA multiplies float32: exactly as such (PyTorch's own choice for convolutions is TF32), or as TF32.

    PyTorch's switches are put back at the end.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # The older switches set PyTorch 2.9's newer ones with them, but not the other way round: so these are used, and the
    # newer ones put back where they were. The older cannot even be read where a user has set the newer.
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
    """A signal came where it may end what is being computed; no error, so that nothing takes it for one."""


class Signals(list[int]):
    """The signals that came."""

    def __init__(self) -> None:
        super().__init__()
        self.raises = False
        """Whether one that comes now raises StopRequested."""

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Around what changes nothing before its end, however long it takes: a signal is not waited with.

        Raises:
            StopRequested: one comes, or has come.
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
    """Collect SIGINT, SIGTERM and SIGHUP instead of dying of them; a second one interrupts at once.

    A SIGHUP that is ignored, as under nohup, stays so.
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
    """Whether PyTorch, NumPy or a library below them raised this for want of memory on a device or the host."""
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def memory_of(device: torch.device) -> int | None:
    """Bytes that a device has, or that the host and its swap have left for this process; none: nobody says."""
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
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container, by its two kinds
        with contextlib.suppress(OSError, ValueError):  # there is none, or "max"
            left.append(int((Path("/sys/fs/cgroup") / limit).read_text()))
    return min(left, default=None)


def check_batch_fits(
    config: RunConfig, device: torch.device, image_shape: tuple[int, int, int], parameters: int
) -> None:
    """Refuse a meta-batch that surely does not fit, before any of it is made.

    Counted is what is there at once whatever the execution: the batch's images and their rows and, but for a rule that
    takes one task at a time, a gradient for each task. What a task's own computation takes is not.

    Args:
        config: the run's.
        device: where it computes.
        image_shape: channels, height, width.
        parameters: bytes of θ.

    Raises:
        ConfigError: with what to set.
    """
    N, K, Q = config.episodes.train_shape
    B, images = config.outer.meta_batch_size, N * (K + Q)
    gradient = 0 if isinstance(config.rule, SequentialConfig) else parameters
    index, pixel = 8, 4  # bytes of an image's row in the data set, and of a number as float32
    on_host, on_device = images * index, images * math.prod(image_shape) * pixel + gradient
    need = {device: on_device, torch.device("cpu"): on_host}
    if device.type == "cpu":
        need = {device: on_host + on_device}
    for where, task in need.items():
        there = memory_of(where)
        if there is not None and B * task > there:
            raise ConfigError(
                f"{option('meta_batch_size')} is {B}: {images} images of {'×'.join(map(str, image_shape))} a task "
                f"and its gradient take at least {B * task / 2**30:,.1f} GiB in all, but {where} has "
                f"{there / 2**30:,.1f} GiB: set a smaller "
                f"{option('meta_batch_size')}, or fewer {option('ways')}, {option('shots')} or "
                f"{option('queries')}"
            )
    there, accuracy_and_loss = memory_of(torch.device("cpu")), 16
    if there is not None and config.training.val_tasks * accuracy_and_loss > there:
        raise ConfigError(
            f"{option('val_tasks')} is {config.training.val_tasks}: what they give does not fit into "
            f"{there / 2**30:,.1f} GiB of memory: set fewer"
        )


@contextlib.contextmanager
def memory_explained(
    config: RunConfig,
    device: torch.device,
    tasks: int,
    learner: Learner,
    task_bytes: Callable[[], int | None] = lambda: None,
) -> Iterator[None]:
    """Turn a want of memory into OutOfMemoryError: what was computed at once, and what to set.

    A killed worker's WorkerError is given the same remedy, for that is how Linux ends a process when memory runs out.

    Args:
        config: the run's, its execution chosen.
        device: where it computes.
        tasks: of the batch.
        learner: the run's.
        task_bytes: what one task needs, where that has been measured.
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
            # What this process holds counts: the next one will have it.
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
def failures_explained(
    config: RunConfig, device: torch.device, learner: Learner, meta: Params, task: Callable[[], Episode], judging: bool
) -> Iterator[None]:
    """Turn what a user's own network raises into ConfigError, with what helps; what the system lacks passes.

    Args:
        config: the run's, its execution chosen.
        device: where it computes.
        learner: the run's.
        meta: θ, on the device.
        task: gives a batch of one task, for trying what helps.
        judging: tasks are judged; otherwise their gradients are computed.
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
    """Whether Python or PyTorch raised this because the system starts no further thread."""
    return any(sign in str(error) for sign in ("can't start new thread", "Resource temporarily unavailable"))


@contextlib.contextmanager
def starts_explained() -> Iterator[None]:
    """Turn a thread that cannot be started into StartError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, StartError) or not cannot_start(error):
            raise
        raise StartError(str(error)) from error


def suggest_chunk(at_once: int, available: int | None, task_bytes: int | None) -> int:
    """How many tasks to compute at once where `at_once` were too many: what fits in nine tenths of the bytes available,
    where both are known and say that these did not fit, else half; at least 1.
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
    if not getattr(learner, "recompute", True):  # a learner that can compute its inner steps twice instead
        advice.append(option("recompute", True))
    if not getattr(learner, "first_order", True):
        advice.append(option("first_order", True))
    if hasattr(learner, "adaptation_steps"):
        advice.append(f"fewer {option('adaptation_steps')}")
    advice.append(f"fewer {option('queries')}")
    return f"try {', '.join(advice)} or a smaller {option('backbone')} in a new run"


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
    # torch.use_deterministic_algorithms(True, warn_only=True) turns the same switch, but first imports all of Inductor,
    # which takes seconds, to set there what this variable sets whenever Inductor is imported.
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.set_deterministic_debug_mode("warn")
    # The mode also fills every new tensor against reads of uninitialised memory, which costs time and finds only bugs.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined,unused-ignore]


def peak_memory(device: torch.device) -> int | None:
    """The most memory held so far, in bytes; none: this system does not say.

    On CUDA the device's, by PyTorch's count. Else resident memory of this process and of its workers: the sum of each
    one's peak, so that what they share is counted in each.
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
        with contextlib.suppress(OSError):  # a thread, or a worker of it, that has just ended
            total += sum(map(_peak_resident, (thread / "children").read_text().split()))
    return total


def _peak_resident(process: str) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def describe_processor(device: torch.device) -> str:
    """The name of what computes there: of the GPU, or of the CPU as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
