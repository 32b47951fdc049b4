"""How a run is executed: the execution is picked by device, network and size, built, and described in a line."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch

from metaheed.config import TASKS_AT_ONCE, ExecutionName, RunConfig, TrainingConfig
from metaheed.engine.batching import has_closed_form
from metaheed.engine.captured import Buffered
from metaheed.engine.executions.basic import Execution, T, map_looped, map_threaded, map_together
from metaheed.engine.executions.im2col import map_im2col
from metaheed.engine.executions.processes import AVAILABLE as PROCESSES_AVAILABLE
from metaheed.engine.executions.processes import Workers, workers_and_threads
from metaheed.engine.executions.streams import map_streamed
from metaheed.engine.steps import Interrupting, OneByOne, Steps, Streams
from metaheed.errors import ConfigError, option
from metaheed.learners.learner import Learner, NetworkLearner
from metaheed.rules.rule import OuterState, Rule, Tools
from metaheed.types import Episode, Params

_POOLS: weakref.WeakKeyDictionary[Learner, Workers] = weakref.WeakKeyDictionary()
"""The worker processes of each learner."""


@contextlib.contextmanager
def closing_workers() -> Iterator[None]:
    """A context that ends the worker processes of all executions when it ends; a later use starts new ones."""
    try:
        yield
    finally:
        for pool in list(_POOLS.values()):
            pool.close()


def build_execution(
    config: TrainingConfig, device: torch.device, learner: Learner, function: Callable[[Learner, Params, Episode], T]
) -> Execution[T]:
    """The execution of function(learner, θ, task) over the tasks of a batch, as configured or picked.

    Under the execution "processes" all functions of a learner share its workers.

    Raises:
        ConfigError: there is no execution of the configured name.
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
                return pool.map(function, meta, batch)  # the default argument keeps the learner alive

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
    """The execution that a configured name stands for. "auto" depends on device, network and number of tasks:

    - one task: looped;
    - on CUDA: vectorized; for a user's network streamed, which was measured as the fastest of the three executions for
      CUDA where there is no closed form;
    - on one thread of a CPU: vectorized if learner and network have a closed form, otherwise looped;
    - on several threads: processes if they have one (vectorized on other systems than Linux); without one, threaded for
      our own networks and looped for a user's, because threads ask something of the network (see `threaded`).

    Args:
        name: the configured name.
        device: where θ and the images lie.
        threads: the configured number of threads; PyTorch's own number if None.
        own_network: the network is the user's own.
        closed_form: learner and network have a closed form.
        tasks: the number of tasks in a batch, if it is known.
    """
    if name == "processes" and (device.type != "cpu" or not PROCESSES_AVAILABLE):
        return "vectorized"  # a config that was made on another machine
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
    """`pick_execution` for the network, learner and threads of a run, and for batches of so many tasks."""
    own_network = ":" in config.learner.backbone
    return pick_execution(name, device, config.training.threads, own_network, config.learner.has_closed_form, tasks)


def tasks_at_once(config: TrainingConfig, device: torch.device, tasks: int, learner: Learner) -> int:
    """How many of a meta-batch's tasks are in memory together, for a config whose execution is not auto."""
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
    """One line that says how a run with this config is executed, and which options override that.

    Args:
        config: the training config, whose execution is not auto.
        device: the run's device.
        tasks: the number of tasks in a meta-batch.
        learner: the run's learner.
        images_there: whether the images lie on the device.
    """
    at_once, threads = tasks_at_once(config, device, tasks, learner), config.threads or torch.get_num_threads()
    what = "a task" if at_once == 1 else f"{at_once} tasks"
    if device.type == "cpu":
        processes, each = workers_and_threads(threads, tasks) if config.execution == "processes" else (1, threads)
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
    """The object that makes a run's outer steps, over buffers or one by one: as configured or, by default, captured on
    CUDA.

    Args:
        config, device: the run's.
        rule, tools, streams, state: as for `OneByOne`.
        notice: is called with the reason if the steps cannot be captured.
        interrupting: as for `OneByOne`.
    """
    # Steps over buffers gather batches on the device, so the images must lie there.
    there = streams.lie_on(device)
    if not (there and _buffered(config, device)):
        if not there and _buffered(config, device):
            notice(
                f"the images do not fit into the memory of {device} and stay on the host, so the outer steps are made "
                "one by one and not captured in a CUDA graph"
            )
        return OneByOne(rule, tools, streams, state, interrupting)
    return Buffered(rule, tools, streams, state, config.block, _capturable(config, device), notice, interrupting)


def _buffered(config: TrainingConfig, device: torch.device) -> bool:
    return config.capture == "on" or (config.capture == "auto" and _capturable(config, device))


def _capturable(config: TrainingConfig, device: torch.device) -> bool:
    # A capture does not contain what other threads compute.
    return device.type == "cuda" and config.execution != "threaded"
