"""Settings of the outer step and of the training loop."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from metaheed.config.checks import at_least, check_types, positive, require
from metaheed.config.presets import USUAL
from metaheed.errors import option


@dataclass(frozen=True, kw_only=True)
class OuterConfig:
    """The outer step on θ."""

    meta_batch_size: int = USUAL.meta_batch_size
    """B, the number of tasks in a meta-batch."""
    meta_lr: float = 1e-3
    """β, the learning rate of the outer step."""
    meta_optimizer: Literal["adam", "sgd"] = "adam"
    """The outer optimiser."""
    clip_norm: float | None = None
    """Clip the combined gradient to this Euclidean norm before the outer step. No clipping if not given."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 1, "meta_batch_size")
        positive(self, "meta_lr", "clip_norm")


ExecutionName = Literal["auto", "looped", "threaded", "vectorized", "processes", "im2col", "streamed"]


CHUNKED = ("vectorized", "im2col")
"""Executions that can run a part of the meta-batch at a time."""


TASKS_AT_ONCE = 4
"""In closed form, in a process. More side by side save nothing and take memory."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop."""

    iterations: int = 5000
    """Number of outer steps (the paper: 55,000)."""
    seed: int = 0
    """Seed of the training tasks and of the start of θ and δ. Evaluation tasks are the same for all seeds."""
    out: Path | None = None
    """Run folder; runs/DATA-NwayKshot-ALGORITHM-seedSEED if not given."""
    val_every: int = 500
    """Number of iterations between validations; one more follows the last iteration."""
    val_tasks: int = 300
    """Number of frozen validation tasks. The checkpoint with the best mean accuracy on them is kept as best."""
    checkpoint_every: int = 100
    """Number of iterations between checkpoints; the newest two are kept."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:N, or auto, which takes cuda if there is one."""
    threads: int | None = None
    """Number of CPU threads. If not given, PyTorch chooses, and the number is recorded, because the order of summation
    depends on it."""
    execution: ExecutionName = "auto"
    """How the tasks of a batch are computed. looped: one after another; threaded: each on one of --threads threads;
    vectorized: all in one program; processes: on worker processes, as many as there are tasks and --threads, each
    vectorized (Linux, CPU); im2col: vectorized, with products of patch matrices; streamed: each on its own CUDA
    stream. auto takes vectorized on CUDA, but streamed for your own network; on a CPU it takes processes if learner and
    network have a closed form, threaded for ProtoNet, and looped for your own network or a single task. The choice is
    printed at the start."""
    chunk_size: int | None = None
    """Number of tasks computed at once by the executions vectorized and im2col; auto then takes vectorized. If not
    given, it is the whole meta-batch, but a few tasks on a CPU if learner and network have a closed form."""
    log_initial_loss: bool = False
    """Also log every task's loss before adaptation under rules that do not need it, which are all but attended. It
    takes one more forward pass of the query set for each task."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Compute blocks of iterations on the device alone, captured in a CUDA graph; auto does so on CUDA. A network that
    cannot be captured is trained step by step, and a notice says so. Without CUDA, on computes the same blocks without
    a graph, with the same results."""
    block: int = 100
    """Largest number of captured iterations in a block. Logs are written at its end. A block also ends at each
    validation and checkpoint; the results do not depend on this number."""
    tf32: bool = False
    """Let CUDA round the factors of products to TF32's 10 bits, which is faster and less exact than float32. No effect
    on a CPU."""
    check_gradient: bool = True
    """Compare the meta-gradient of one small task with finite differences in float64 before your own network is
    trained, which finds operations whose derivatives are wrong. It takes a few passes over eight images."""
    cached_after: ClassVar[float] = 3.0  # seconds that reading a data set takes before it is worth keeping
    data_cache: bool = True
    """Keep a data set that took more than three seconds to read and decode in the user's cache, and read it from there
    next time. The cache is the folder METAHEED_CACHE if that is set, else ~/.cache/metaheed. The results are the
    same."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder; needs the extra metaheed[tensorboard]."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 0, "seed", most=2**63 - 1)
        at_least(self, 1, "iterations", "val_every", "val_tasks", "checkpoint_every", "chunk_size")
        at_least(self, 1, "threads", "block", most=10_000)
        require(
            self.chunk_size is None or self.execution in ("auto", *CHUNKED),
            "chunk_size",
            self.chunk_size,
            f"the {self.execution} execution has no chunks: leave it out, or set {option('execution', 'vectorized')}",
        )


@dataclass(frozen=True, kw_only=True)
class TrialConfig(TrainingConfig):
    """The training loop of each trial of a search: what is meant otherwise there."""

    iterations: int = 5000
    """Number of outer steps of each trial."""
    seed: int = 0
    """Training seed, the same in every trial, so that the training tasks and the start of θ and δ are the same, too."""
    out: Path | None = None
    """Study folder; runs/search-DATA-NwayKshot-ALGORITHM if not given."""
