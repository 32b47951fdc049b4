"""How a run is executed: picked by device, network and size, built, and described in a line."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch

from metaheed.config import (
    TASKS_AT_ONCE,
    ExecutionName,
    RunConfig,
    TrainingConfig,
)
from metaheed.engine.batching import has_closed_form
from metaheed.engine.captured import Buffered
from metaheed.engine.executions.basic import (
    Execution,
    T,
    map_looped,
    map_threaded,
    map_together,
)
from metaheed.engine.executions.im2col import map_im2col
from metaheed.engine.executions.processes import AVAILABLE as PROCESSES_AVAILABLE
from metaheed.engine.executions.processes import Workers, shared_out
from metaheed.engine.executions.streams import map_streamed
from metaheed.engine.steps import Interrupting, OneByOne, Steps, Streams
from metaheed.errors import ConfigError, option
from metaheed.learners.learner import Learner, NetworkLearner
from metaheed.rules.rule import OuterState, Rule, Tools
from metaheed.types import Episode, Params

_POOLS: weakref.WeakKeyDictionary[Learner, Workers] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def workers_ended() -> Iterator[None]:
    """Ends at its own end the worker processes of all executions; a later use starts new ones."""
    try:
        yield
    finally:
        for pool in list(_POOLS.values()):
            pool.close()


def build_execution(
    config: TrainingConfig, device: torch.device, learner: Learner, function: Callable[[Learner, Params, Episode], T]
) -> Execution[T]:
    """How function(learner, θ, task) is run over the tasks of a batch: as configured, or by device and network.

    Under the execution "processes" all functions of a learner share its workers.
    """
    workers = config.threads or torch.get_num_threads()
    module = learner.backbone.module if isinstance(learner, NetworkLearner) else None
    own_network = not type(module).__module__.startswith("metaheed.")
    match pick_execution(config.execution, device, config.threads, own_network, has_closed_form(learner)):
        case "looped":
            return map_looped(partial(function, learner))
        case "threaded":
            return map_threaded(learner, function, workers)
        case "vectorized":
            return map_together(learner, function, config.chunk_size)
        case "processes":
            pool = _POOLS.get(learner)
            if pool is None or pool.threads != workers:
                pool = _POOLS[learner] = Workers(learner, workers)

            def run(meta: Params, batch: Episode, learner: Learner = learner, pool: Workers = pool) -> T:
                return pool.map(function, meta, batch)  # and keeps the learner, which the pool does not

            return run
        case "im2col":
            return map_im2col(partial(function, learner), config.chunk_size)
        case "streamed":
            return map_streamed(partial(function, learner))
    raise ConfigError(f"no execution is called {config.execution!r}")


def pick_execution(
    name: ExecutionName,
    device: torch.device,
    threads: int | None,
    own_network: bool = False,
    closed_form: bool = True,
    tasks: int | None = None,
) -> ExecutionName:
    """The execution behind a configured name. What auto is, by device, network and number of tasks at once, B:

    - with one task: looped;
    - on CUDA: vectorized; for a user's network streamed, which was the fastest of the three made for CUDA where there
      is no closed form;
    - on one thread of a CPU: vectorized where learner and network have a closed form, else looped;
    - on several: processes where they have one (on Linux; elsewhere vectorized), threaded for the rest of our own
      networks, and looped for a user's: see `threaded` on what threads ask of it.
    """
    if name == "processes" and (device.type != "cpu" or not PROCESSES_AVAILABLE):
        return "vectorized"  # a run of another machine
    if name != "auto":
        return name
    if tasks == 1:
        return "looped"
    if device.type == "cuda":
        return "streamed" if own_network else "vectorized"
    several = (threads or torch.get_num_threads()) > 1
    if closed_form and not own_network:
        return "processes" if several and PROCESSES_AVAILABLE else "vectorized"
    return "threaded" if several and not own_network else "looped"


def pick_for_run(config: RunConfig, name: ExecutionName, device: torch.device, tasks: int) -> ExecutionName:
    """`pick_execution` for a run's network, learner and threads, and batches of so many tasks."""
    own_network = ":" in config.learner.backbone
    return pick_execution(name, device, config.training.threads, own_network, config.learner.has_closed_form, tasks)


def tasks_at_once(config: TrainingConfig, device: torch.device, tasks: int, learner: Learner) -> int:
    """How many of a meta-batch's tasks are in memory together under the execution of a config where it is not auto."""
    match config.execution:
        case "vectorized" if device.type == "cpu" and has_closed_form(learner):
            return min(tasks, config.chunk_size or TASKS_AT_ONCE)
        case "vectorized" | "im2col":
            return min(tasks, config.chunk_size or tasks)
        case "threaded":
            return min(tasks, config.threads or torch.get_num_threads())
        case "processes":
            return min(tasks, (config.threads or torch.get_num_threads()) * TASKS_AT_ONCE)
        case "streamed":
            return tasks
    return 1


def describe_execution(
    config: TrainingConfig, device: torch.device, tasks: int, learner: Learner, images_there: bool = True
) -> str:
    """A line on how a run with this config, its images on the device or not, is executed, and what overrides it."""
    at_once, threads = tasks_at_once(config, device, tasks, learner), config.threads or torch.get_num_threads()
    what = "a task" if at_once == 1 else f"{at_once} tasks"
    if device.type == "cpu":
        processes, each = shared_out(threads, tasks) if config.execution == "processes" else (1, threads)
        where = "1 thread each" if config.execution == "threaded" else f"{each} thread{'s' * (each > 1)}"
        if config.execution == "processes":
            where = f"{processes} process{'es' * (processes > 1)} of {where}"
    else:
        where = str(device)
    line = f"execution: {config.execution}, {what} at a time on {where}"
    if not (images_there and _buffered(config, device)):
        return f"{line}; {option('execution')} overrides"
    form = "captured" if _capturable(config, device) else "not captured"
    overriding = f"{option('execution')} and {option('capture')} override"
    return f"{line}, {form}, in blocks of at most {config.block} iterations; {overriding}"


def build_steps(
    config: TrainingConfig,
    device: torch.device,
    rule: Rule,
    tools: Tools,
    streams: Streams,
    state: OuterState,
    notice: Callable[[str], None],
    interrupting: Interrupting = contextlib.nullcontext,
) -> Steps:
    """How a run's outer steps are made: as configured, or captured on CUDA.

    Args:
        config, device: the run's.
        rule, tools, streams, state: as for `OneByOne`.
        notice: told why a step could not be captured.
        interrupting: as for `OneByOne`.
    """
    # Over buffers, batches are gathered where their rows are.
    there = streams.lie_on(device)
    if not (there and _buffered(config, device)):
        if not there and _buffered(config, device):
            notice(
                f"the images are too large for the memory of {device} and stay on the host, so that the outer step is "
                "made step by step, not captured in a CUDA graph"
            )
        return OneByOne(rule, tools, streams, state, interrupting)
    return Buffered(rule, tools, streams, state, config.block, _capturable(config, device), notice, interrupting)


def _buffered(config: TrainingConfig, device: torch.device) -> bool:
    return config.capture == "on" or (config.capture == "auto" and _capturable(config, device))


def _capturable(config: TrainingConfig, device: torch.device) -> bool:
    # What other threads compute is not captured.
    return device.type == "cuda" and config.execution != "threaded"
