import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from metaheed.config import default_config
from metaheed.engine.executions.processes import AVAILABLE, Workers
from metaheed.errors import ConfigError, WorkerError
from metaheed.learners import MAML, Conv4, Learner, MetaLSTM
from metaheed.outer import evaluate_adapted, task_gradient, vectorized
from metaheed.running.process import translate_memory_errors
from metaheed.types import Episode, Params
from tests.conftest import ROOT, make_batch

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="processes are forked on Linux only")

SHAPE = (1, 16, 16)


def learner_and_meta() -> tuple[Learner, Params]:
    learner = MAML(Conv4(3, SHAPE, hidden=4), adaptation_steps=2, fast_lr=0.1)
    return learner, learner.init(torch.Generator().manual_seed(0))


def failing(learner: Learner, meta: Params, task: Episode) -> torch.Tensor:
    raise ConfigError("this task cannot be done")


class OddError(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def failing_oddly(learner: Learner, meta: Params, task: Episode) -> torch.Tensor:
    raise OddError(1, 2)


def dying(learner: Learner, meta: Params, task: Episode) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.parametrize("tasks", [2, 5, 9])
def test_bits_are_those_of_the_same_tasks_together(tasks: int) -> None:
    learner, meta = learner_and_meta()
    workers = Workers(learner, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for count in (2, tasks):  # more than there was room for, the second time
            batch = make_batch(count, 3, 1, 2, SHAPE, torch.float32)
            gradient, info = workers.map(task_gradient, meta, batch)
            shares = [Episode(*share) for share in zip(*(torch.tensor_split(p, 2) for p in batch), strict=True)]
            parts = [vectorized(learner, 4)(meta, share) for share in shares if len(share.support_y)]
            for name in meta:
                assert torch.equal(gradient[name], torch.cat([g[name] for g, _ in parts]))
            assert torch.equal(info.grad_norm, torch.cat([i.grad_norm for _, i in parts]))
            losses, _ = workers.map(evaluate_adapted, meta, batch)
            assert torch.equal(losses, info.query_loss)
    finally:
        torch.set_num_threads(before)
        workers.close()


def test_metalstm_too() -> None:
    learner = MetaLSTM(Conv4(3, SHAPE, hidden=4), adaptation_steps=2)
    meta = learner.init(torch.Generator().manual_seed(0))
    batch = make_batch(3, 3, 1, 2, SHAPE, torch.float32)
    gradient, _ = Workers(learner, 2).map(task_gradient, meta, batch)
    expected, _ = vectorized(learner)(meta, batch)
    for name in meta:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-3, atol=1e-6)


def test_errors_come_back_and_workers_go_on() -> None:
    learner, meta = learner_and_meta()
    workers = Workers(learner, 2)
    batch = make_batch(4, 3, 1, 2, SHAPE, torch.float32)
    with pytest.raises(ConfigError, match="this task cannot be done"):
        workers.map(failing, meta, batch)
    with pytest.raises(RuntimeError, match="OddError: 1 and 2"):
        workers.map(failing_oddly, meta, batch)
    with pytest.raises(WorkerError, match=r"was killed \(signal 9\).* most often .*memory .*if so: use fewer threads"):
        workers.map(dying, meta, batch)
    assert torch.isfinite(workers.map(task_gradient, meta, batch)[1].query_loss).all()
    with pytest.raises(ConfigError, match="worker processes of 0 threads"):
        Workers(learner, 0)


def threads_here(learner: Learner, meta: Params, task: Episode) -> torch.Tensor:
    return torch.full(task.query_y.shape[:-1], float(torch.get_num_threads()))


def threads_begun(learner: Learner, meta: Params, task: Episode) -> torch.Tensor:
    for _ in range(3):
        large = torch.ones(1 << 20).exp() @ torch.ones(1 << 20, 2)
    begun = len(list(Path("/proc/self/task").iterdir()))
    return torch.full(task.query_y.shape[:-1], float(begun)) + 0 * large.sum()


@pytest.mark.parametrize(
    ("threads", "tasks", "each"), [(1, 3, 1), (2, 1, 2), (2, 2, 1), (3, 2, 1), (8, 2, 4), (8, 3, 2)]
)
def test_threads_are_shared_out(threads: int, tasks: int, each: int) -> None:
    learner, meta = learner_and_meta()
    workers = Workers(learner, threads)
    batch = make_batch(tasks, 3, 1, 2, SHAPE, torch.float32)
    assert workers.map(threads_here, meta, batch).tolist() == [each] * tasks
    assert len(workers._running) == min(threads, tasks)
    more = make_batch(threads, 3, 1, 2, SHAPE, torch.float32)
    assert workers.map(threads_here, meta, more).tolist() == [1] * threads
    assert workers.map(threads_here, meta, batch).tolist() == [each] * tasks


THREADED = """
import torch
from metaheed.outer import vectorized
from tests.outer.test_processes import *
torch.set_num_threads(2)
learner, meta = learner_and_meta()
batch = make_batch(1, 3, 1, 2, SHAPE, torch.float32)
threads_begun(learner, meta, batch)  # so that the process that is forked has threads of OpenMP's
expected, _ = vectorized(learner)(meta, batch)
workers = Workers(learner, 2)
begun = workers.map(threads_begun, meta, batch)
assert begun.item() >= 3, begun  # the one that serves, the one that works, and a second one at work
gradient, _ = workers.map(task_gradient, meta, batch)
for name in meta:
    torch.testing.assert_close(gradient[name], expected[name], rtol=1e-3, atol=1e-5)
print("done")
"""


@pytest.mark.slow
def test_a_workers_threads_work_where_the_forked_process_had_some_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])},
    )
    assert done.stdout.split() == ["done"], done.stderr


def test_no_more_workers_than_tasks() -> None:
    learner, meta = learner_and_meta()
    workers = Workers(learner, 3)
    workers.map(task_gradient, meta, make_batch(2, 3, 1, 2, SHAPE, torch.float32))
    first = [worker._pid for worker in workers._running]
    assert len(first) == 2
    workers.map(task_gradient, meta, make_batch(3, 3, 1, 2, SHAPE, torch.float32))
    assert [worker._pid for worker in workers._running][:2] == first
    assert len(workers._running) == 3


class Held(io.StringIO):
    """A stream in whose midst another thread writes, for ever."""

    def write(self, text: str) -> int:
        raise AssertionError("this would wait for ever")


def writing(learner: Learner, meta: Params, task: Episode) -> torch.Tensor:
    print("to standard output")
    print("to standard error: ±", file=sys.stderr)
    return torch.ones(task.query_y.shape[:-1])


@pytest.mark.parametrize("held", [Held, lambda: None], ids=["held", "closed"])
def test_workers_wait_for_no_stream_of_the_process_that_was_forked(
    held: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    learner, meta = learner_and_meta()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", held())
        patched.setattr(sys, "stderr", held())
        Workers(learner, 2).map(writing, meta, make_batch(2, 3, 1, 2, SHAPE, torch.float32))
    written = capfd.readouterr()
    times = 0 if held() is None else 2
    assert written.out.count("to standard output") == times
    assert written.err.count("to standard error") == times


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_workers_do_not_keep_the_modes_of_their_first_use(mode: Callable[[], AbstractContextManager[None]]) -> None:
    learner, meta = learner_and_meta()
    workers = Workers(learner, 2)
    batch = make_batch(2, 3, 1, 2, SHAPE, torch.float32)
    with mode():
        workers.map(evaluate_adapted, meta, batch)
    gradient, _ = workers.map(task_gradient, meta, batch)
    expected, _ = Workers(learner, 2).map(task_gradient, meta, batch)
    for name in meta:
        assert torch.equal(gradient[name], expected[name])


def test_a_killed_worker_may_have_had_too_little_memory_and_another_death_is_said() -> None:
    config = default_config("maml", "glyphs")
    config = replace(config, training=replace(config.training, execution="processes", threads=2))
    cpu = torch.device("cpu")
    remedy = (
        r"^a worker process was killed \(signal 9\), which most often means that memory ran out; if so: "
        r"set execution='vectorized' chunk_size=2\. Checkpoints, if any, are kept$"
    )
    with (
        pytest.raises(WorkerError, match=remedy) as caught,
        translate_memory_errors(config, cpu, 4, learner_and_meta()[0]),
    ):
        raise WorkerError(-9)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with (
        pytest.raises(WorkerError, match=r"was killed \(signal 11\): use"),
        translate_memory_errors(config, cpu, 4, learner_and_meta()[0]),
    ):
        raise WorkerError(-11)
    with (
        pytest.raises(WorkerError, match=r"ended unexpectedly \(status 1\): use"),
        translate_memory_errors(config, cpu, 4, learner_and_meta()[0]),
    ):
        raise WorkerError(1)


def test_workers_end_with_their_owner() -> None:
    learner, meta = learner_and_meta()
    workers = Workers(learner, 2)
    workers.map(task_gradient, meta, make_batch(2, 3, 1, 2, SHAPE, torch.float32))
    pids = [worker._pid for worker in workers._running]
    assert all(map(alive, pids))
    del workers
    assert not any(map(alive, pids))


SCRIPT = """
import os, torch
from tests.outer.test_processes import SHAPE, Workers, learner_and_meta, make_batch, task_gradient
learner, meta = learner_and_meta()
workers = Workers(learner, 2)
batch = make_batch(2, 3, 1, 2, SHAPE, torch.float32)
workers.map(task_gradient, meta, batch)
print(*(worker._pid for worker in workers._running), flush=True)
while True:
    workers.map(task_gradient, meta, batch)
"""


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
