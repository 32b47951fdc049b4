"""Settings of the outer step and of the training loop."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from metaheed.config.checks import at_least, check_types, positive, require
from metaheed.config.presets import USUAL


@dataclass(frozen=True, kw_only=True)
class OuterConfig:
    """The outer step on θ."""

    meta_batch_size: int = USUAL.meta_batch_size
    """B, tasks in a meta-batch."""
    meta_lr: float = 1e-3
    """β, the rate of the outer step."""
    meta_optimizer: Literal["adam", "sgd"] = "adam"
    """The outer optimiser."""
    clip_norm: float | None = None
    """Clip the combined gradient to this Euclidean norm before the outer step; none: do not."""

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
    """Outer steps in all (the paper: 55,000)."""
    seed: int = 0
    """Decides θ's and δ's start and every training task; evaluation tasks are the same for all seeds."""
    out: Path | None = None
    """Run folder; none: runs/DATA-NwayKshot-ALGORITHM-seedSEED."""
    val_every: int = 500
    """Iterations between validations; one more follows the last iteration."""
    val_tasks: int = 300
    """Frozen validation tasks; the checkpoint with their best mean accuracy is kept as best."""
    checkpoint_every: int = 100
    """Iterations between checkpoints; the newest two are kept."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    threads: int | None = None
    """CPU threads; none: PyTorch's choice, which is then recorded, for the sums' order depends on it."""
    execution: ExecutionName = "auto"
    """How the tasks of a batch are run: looped, one after another; threaded, each on one of --threads threads;
    vectorized, as one program; processes, on as many as there are tasks and --threads, each vectorized (Linux, CPU);
    im2col, vectorized with products of patch matrices; streamed, each on a CUDA stream of its own. auto: on CUDA
    vectorized; on a CPU processes where learner and network have a closed form, threaded for ProtoNet, looped for a
    network of one's own or one task.
    Printed at the start."""
    chunk_size: int | None = None
    """Tasks at once under the executions vectorized (auto's choice where this is given) and im2col; none: the whole
    meta-batch, but a few on a CPU where learner and network have a closed form."""
    log_initial_loss: bool = False
    """Log every task's loss before adaptation also under rules that do not need it (all but attended): a forward pass
    of the query set more for each task."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Make the steps in blocks, on the device alone, captured in a CUDA graph; auto: on CUDA. A network that cannot be
    captured is trained step by step, with a notice. on without CUDA: the same blocks without a graph, the same bits."""
    block: int = 100
    """Captured iterations between two looks at the device, at most: what is logged in between is logged then. A block
    ends at each validation and checkpoint, too; the results are the same at any number."""
    tf32: bool = False
    """Let CUDA round what it multiplies to TF32's 10 bits: faster, and less exact than float32. No effect on a CPU."""
    check_gradient: bool = True
    """Before training on a network of one's own, compare the meta-gradient of one small task with finite differences in
    float64, which finds operations whose derivatives are wrong. It takes a few passes over eight images."""
    cached_after: ClassVar[float] = 3.0  # seconds that reading a data set takes before it is worth keeping
    data_cache: bool = True
    """Keep a data set that took more than three seconds to read and decode in the user's cache, and read it from there
    next time: METAHEED_CACHE if that is set, else ~/.cache/metaheed. The results are the same."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (needs the extra metaheed[tensorboard])."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 0, "seed", most=2**63 - 1)
        at_least(self, 1, "iterations", "val_every", "val_tasks", "checkpoint_every", "chunk_size")
        at_least(self, 1, "threads", "block", most=10_000)
        require(
            self.chunk_size is None or self.execution in ("auto", *CHUNKED),
            "chunk_size",
            self.chunk_size,
            f"the {self.execution} execution has no chunks: leave it out, or set --execution vectorized",
        )


@dataclass(frozen=True, kw_only=True)
class TrialConfig(TrainingConfig):
    """The training loop of each trial of a search: what is meant otherwise there."""

    iterations: int = 5000
    """Outer steps of each trial."""
    seed: int = 0
    """Training seed, the same in every trial: θ's and δ's start and the training tasks are then the same, too."""
    out: Path | None = None
    """Study folder; none: runs/search-DATA-NwayKshot-ALGORITHM."""
