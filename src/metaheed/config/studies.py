"""Settings of searches, reproductions, the toy and reports."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metaheed.config.checks import at_least, check_types, positive, require
from metaheed.config.episodes import FreezeConfig


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Which runs of an experiment are made, and how."""

    only: tuple[str, ...] = ()
    """Words that choose runs: data sets (miniimagenet, cifar-fs), settings (5way1shot), algorithms (ta-maml), toy (of
    the figures), or whole recipes by name. Words of the same kind form a union; different kinds intersect. If not
    given, every cell on the paper's own data sets is chosen; cifar-fs and fc100 must be named."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds; each gives a run of its own. With several, the seed is the unit of every comparison."""
    iterations: int | None = None
    """Number of outer steps of every run; the recipe's if not given (55,000 in the paper). Runs with fewer are trained
    on."""
    tasks: int = FreezeConfig.tasks
    """Number of frozen test tasks that every run is judged on (the paper: 300)."""
    out: Path = Path("runs/reproduce")
    """Folder of the runs, their logs and the report."""
    data_root: Path | None = None
    """Folder that holds the data sets, as in training."""
    recipes: Path | None = None
    """A folder of your own recipes, taken instead of the package's: all those whose algorithm the experiment has."""
    jobs: int | None = None
    """Number of runs trained at a time. If not given, one on each GPU, or as many as there are cores for --threads
    each."""
    threads: int | None = None
    """Number of CPU threads of each run. If not given, the cores are divided by --jobs; without --jobs each run has one
    core. A run that is continued keeps its number."""
    device: str = "auto"
    """cpu, cuda:N, or auto: every GPU in turn where there are some (also: cuda), else the CPU."""
    trust: bool = False
    """Let the code of the networks run that your own recipes name, if you have not allowed it before."""
    dry_run: bool = False
    """Only list the runs, what each of them still needs, and how long that would take on this machine."""

    def __post_init__(self) -> None:
        check_types(self)
        for seed in self.seeds:
            require(0 <= seed < 2**63, "seeds", seed, "a seed must be a whole number of at least 0, below 2**63")
        require(bool(self.seeds), "seeds", self.seeds, "there must be one")
        require(len({*self.seeds}) == len(self.seeds), "seeds", self.seeds, "each must be named once")
        at_least(self, 1, "iterations")
        at_least(self, 2, "tasks")
        at_least(self, 1, "jobs", "threads", most=10_000)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Which configurations are tried, and where the study is kept. All ranges are sampled for every algorithm, and
    unused values are ignored, so that the same seed draws the same values for all algorithms. The ranges replace
    --fast-lr, --meta-lr, --attention-lr and --equity-lambda, which cannot be given."""

    trials: int = 30
    """Number of configurations that all workers try together; it may be raised later."""
    sampler: Literal["random", "tpe"] = "random"
    """How configurations are drawn. random: log-uniformly, from --search-seed and the trial's number alone, so that
    several workers draw what one would; tpe: Optuna's multivariate TPE, which learns from finished trials."""
    pruner: Literal["none", "halving"] = "none"
    """halving stops trials early by successive halving on their validation accuracy. Stopped trials count as trials."""
    halving_factor: int = 3
    """η of --pruner halving: at each rung about one trial in η goes on, for η times as many iterations."""
    halving_start: int | None = None
    """Number of iterations before the first rung of --pruner halving; a tenth of --iterations if not given. A rung is
    judged at the first validation (--val-every) at or after it."""
    storage: str | None = None
    """Database that holds the study, as an SQLAlchemy URL: workers that name the same one, on any machine, work on one
    study. The SQLite file study.db in the study folder if not given."""
    study: str | None = None
    """Name of the study in the database; search-DATA-NwayKshot-ALGORITHM if not given."""
    search_seed: int = 0
    """Seed of the configurations that are drawn."""
    lost_after: int = 120
    """Number of seconds without a sign of life after which another worker takes a trial over. On one machine, the end
    of a process is seen at once."""
    fast_lr_range: tuple[float, float] = (1e-2, 5e-1)
    """Bounds of α, which is drawn log-uniformly; for MetaSGD it is where every learned rate starts. The same number
    twice fixes it."""
    meta_lr_range: tuple[float, float] = (1e-4, 1e-2)
    """Bounds of β, which is drawn log-uniformly."""
    attention_lr_range: tuple[float, float] = (1e-4, 1e-2)
    """Bounds of γ, which is drawn log-uniformly."""
    equity_lambda_range: tuple[float, float] = (1e-2, 1.0)
    """Bounds of λ, which is drawn log-uniformly."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 1, "trials", "halving_start", "lost_after", most=10**6)
        at_least(self, 2, "halving_factor", most=100)
        at_least(self, 0, "search_seed", most=2**63 - 1)
        for name in ("storage", "study"):
            require(getattr(self, name) != "", name, "", "it must not be empty")
        for name, (low, high) in self.ranges.items():
            require(
                0 < low <= high < math.inf,
                f"{name}_range",
                (low, high),
                "it must be two finite numbers above 0, the lower one first",
            )

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Field of the learner, rule or outer step -> the bounds between which it is drawn."""
        return {
            "fast_lr": self.fast_lr_range,
            "meta_lr": self.meta_lr_range,
            "attention_lr": self.attention_lr_range,
            "equity_lambda": self.equity_lambda_range,
        }


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """MetaLSTM against MetaLSTM++ on four problems of two parameters."""

    iterations: int = 150
    """Number of meta-batches."""
    meta_lr: float = 1.0
    """β, the learning rate of MetaLSTM's outer step. MetaLSTM++ has B times that, because it makes one step where
    MetaLSTM makes B."""
    meta_optimizer: Literal["sgd", "adam"] = "sgd"
    """The outer optimiser. SGD shows each task's own pull; Adam's momentum averages over the tasks before it."""
    seed: int = 0
    """Seed of the points, the order of tasks and the start of the learned optimiser."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 2, "iterations")
        at_least(self, 0, "seed", most=10**12)
        positive(self, "meta_lr")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What a report shows beside what it finds."""

    thresholds: tuple[float, ...] = ()
    """Validation accuracies in % for which the report shows how long each algorithm took to reach them. If not given, 5
    points and 1 point below the best of the counterpart without attention."""
    toy: bool = False
    """Draw the toy figure (the paper's Figure 1), which takes half a minute, even if none of the folders holds one that
    'metaheed toy' wrote."""

    def __post_init__(self) -> None:
        check_types(self)
        inside = all(0 < threshold <= 100 for threshold in self.thresholds)
        require(inside, "thresholds", self.thresholds, "each must be a percentage above 0 and at most 100")
