"""Training in blocks, memory that runs out, precision: through the command line, without CUDA."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import metaheed.engine.choose as package_outer
from metaheed.config import CHUNKED, RunConfig, default_config, from_dict, to_dict
from metaheed.files.seals import seal_text, unseal_text
from metaheed.learners import MAML, Learner
from metaheed.outer import map_looped, map_together
from metaheed.running.process import float32_products, suggest_chunk, translate_memory_errors
from metaheed.types import Episode, Params
from tests.conftest import Begin, Run
from tests.networks import Tiny
from tests.test_training import KILLER, SMALL, content
from tests.warm import wait_for

BLOCKS = [*SMALL, "--iterations", "10", "--capture", "on"]


def results(run: Path) -> dict[str, str]:
    """What a run leaves, but for its config."""
    return {name: value for name, value in content(run).items() if name != "config.yaml"}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs of ten iterations, step by step."""
    from metaheed.cli.entry import main

    folder, runs = tmp_path_factory.mktemp("single"), dict[tuple[str, ...], Path]()

    def run(*algorithm: str) -> Path:
        if algorithm not in runs:
            runs[algorithm] = folder / str(len(runs))
            assert main(["train", *algorithm, *SMALL, "--iterations", "10", "--out", str(runs[algorithm])]) == 0
        return runs[algorithm]

    return run


@pytest.mark.parametrize(
    ("algorithm", "block"),
    [
        *((("ta-maml", "--attention-reuse-probe"), block) for block in (1, 4, 100)),
        *(((name,), 4) for name in ("ta-maml", "metalstm", "taml")),
    ],
)
def test_blocks_leave_the_same_files(
    algorithm: tuple[str, ...], block: int, single: Callable[..., Path], metaheed: Run, tmp_path: Path
) -> None:
    status, _, err = metaheed("train", *algorithm, *BLOCKS, "--block", block, "--out", tmp_path / "run")
    assert status == 0
    assert f"not captured, in blocks of at most {block} iterations; --execution and --capture override" in err
    assert results(tmp_path / "run") == results(single(*algorithm))


@pytest.mark.parametrize("kill_at", [9, 27])
def test_killed_within_a_block_it_ends_the_same(
    kill_at: int, single: Callable[..., Path], metaheed: Run, begin: Begin, tmp_path: Path
) -> None:
    """Killed at the n-th sync, rename or line; and resumed with other blocks, which changes nothing either."""
    run, reuse = tmp_path / "run", ("ta-maml", "--attention-reuse-probe")
    arguments = ["train", *reuse, *BLOCKS, "--out", str(run)]
    died = begin(*arguments, program=KILLER.format(kill_at=kill_at))
    assert died.wait() == -signal.SIGKILL, died.err
    config = unseal_text((run / "config.yaml").read_bytes())
    (run / "config.yaml").write_bytes(seal_text(config.replace(b"block: 100", b"block: 2")))
    assert metaheed("train", "--resume", run)[0] == 0
    assert results(run) == results(single(*reuse))


def test_a_signal_ends_a_block(metaheed: Run, begin: Begin, tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = [*BLOCKS, "--iterations", 100_000, "--val-every", 90_000, "--checkpoint-every", 90_000, "--block", 10_000]
    process = begin("train", "maml", *long, "--out", run)
    tasks = run / "tasks.jsonl"
    wait_for(lambda: tasks.exists() and tasks.stat().st_size, process)  # the first step, by itself
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    done = tasks.read_text().count("\n")
    assert f"stopped after iteration {done}" in err
    status, _, _ = metaheed("train", "--resume", run, "--iterations", done + 2, "--capture", "off")
    assert status == 0
    metaheed("train", "maml", *long, "--iterations", done + 2, "--capture", "off", "--out", tmp_path / "other")
    assert tasks.read_bytes() == (tmp_path / "other" / "tasks.jsonl").read_bytes()


def test_numbers_not_finite_are_found_within_a_block(metaheed: Run, tmp_path: Path) -> None:
    """At the same iteration in the same words, what came before it logged, nothing after it checkpointed."""
    exploding = [*SMALL, "--backbone", "tests.networks:Exploding", "--iterations", 60, "--meta-lr", 1e-2]
    exploding += ["--fast-lr", 0.01, "--checkpoint-every", 50, "--val-every", 50]
    said = []
    for capture in ("off", "on"):
        status, _, err = metaheed("train", "maml", *exploding, "--capture", capture, "--out", tmp_path / capture)
        assert status == 1
        said.append(err.split("error: ")[1])
    assert said[0] == said[1]
    assert " of task 1 of the training batch is not finite" in said[0]
    iteration = int(said[0].removeprefix("iteration ").split(":")[0])
    assert iteration > 3
    for name in ("metrics.jsonl", "tasks.jsonl"):
        logs = [(tmp_path / capture / name).read_text() for capture in ("off", "on")]
        assert logs[0] == logs[1]
        assert logs[0].count("\n") == iteration - 1
    assert not (tmp_path / "on" / "checkpoints").exists()


def scarce(most: int) -> Callable[..., Any]:
    """An execution of tasks at once that has memory for `most`."""
    original = map_together

    def make(learner: Learner, function: Callable[..., Any], chunk_size: int | None = None) -> Any:
        run = original(learner, function, chunk_size)

        def limited(meta: Params, batch: Episode) -> Any:
            if min(chunk_size or len(batch.support_y), len(batch.support_y)) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return run(meta, batch)

        return limited

    return make


ROOMY = [*SMALL, "--meta-batch-size", 5, "--iterations", 6, "--execution", "vectorized"]


@pytest.mark.parametrize("capture", ["on", "off"])
def test_too_little_memory_is_explained(
    capture: str, metaheed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", "maml", *ROOMY, "--capture", capture, "--out", tmp_path / "run"]
    monkeypatch.setattr(package_outer, "map_together", scarce(2))
    status, _, err = metaheed(*arguments)
    assert status == 1
    assert "error: the memory of cpu does not hold 5 tasks at once, as the execution vectorized computes" in err
    assert "set --chunk-size 2. Checkpoints, if any, are kept" in err
    assert not (tmp_path / "run").exists(), "a run that has not begun"
    assert metaheed(*arguments, "--chunk-size", 2)[0] == 0
    monkeypatch.setattr(package_outer, "map_together", scarce(1))
    status, _, err = metaheed("train", "--resume", tmp_path / "run", "--iterations", 8)
    assert (status, "does not hold 2 tasks at once" in err, "set --chunk-size 1." in err) == (1, True, True)
    assert metaheed("train", "--resume", tmp_path / "run", "--iterations", 8, "--chunk-size", 1)[0] == 0


def test_too_little_memory_for_one_task(metaheed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_outer, "map_together", scarce(0))
    status, _, err = metaheed("train", "maml", *ROOMY, "--out", tmp_path / "run")
    assert (status, "does not hold 1 task at once" in err) == (1, True)
    assert "try --recompute, --first-order, fewer --adaptation-steps, fewer --queries or a smaller --backbone" in err


@pytest.mark.parametrize(
    ("execution", "remedy"),
    [
        ("vectorized", "set chunk_size=8"),
        ("im2col", "set chunk_size=8"),
        ("streamed", "set execution='vectorized'.*chunk_size=8"),
        ("threaded", "set execution='looped'"),
    ],
)
def test_every_execution_has_its_remedy(execution: Any, remedy: str) -> None:
    from dataclasses import replace

    from metaheed.errors import OutOfMemoryError

    config = default_config("maml", "omniglot")
    config = replace(config, training=replace(config.training, execution=execution, threads=4))
    text = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried …"
    cpu, learner = torch.device("cpu"), MAML(Tiny(5, (1, 28, 28)))
    with pytest.raises(OutOfMemoryError, match=remedy), translate_memory_errors(config, cpu, 16, learner):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match=r"^other$"), translate_memory_errors(config, cpu, 16, learner):
        raise RuntimeError("other")


def test_a_chunk_is_suggested_from_what_is_known() -> None:
    assert [suggest_chunk(n, None, None) for n in (1, 2, 5, 16)] == [1, 1, 2, 8]
    assert suggest_chunk(16, 10 * 2**30, 2**30) == 9
    assert suggest_chunk(4, 10 * 2**30, 2**30) == 2, "a measure that what failed contradicts is none"
    assert suggest_chunk(4, 2**20, 2**30) == 1


def switches() -> list[object]:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision]
    return [matmul.allow_tf32, cudnn.allow_tf32]


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_multiplied_as_asked_for_and_only_in_the_run(
    tf32: bool, metaheed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, inside = switches(), list[object]()
    original = map_looped

    def noting(per_task: Callable[..., Any]) -> Any:
        run = original(per_task)

        def noted(meta: Params, batch: Episode) -> Any:
            inside.append(switches())
            # The older names, which a user's network may read, must not contradict the newer ones.
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
            return run(meta, batch)

        return noted

    monkeypatch.setattr(package_outer, "map_looped", noting)
    asked = ["--tf32"] if tf32 else []
    assert metaheed("train", "maml", *SMALL, "--iterations", 2, *asked, "--out", tmp_path / "run")[0] == 0
    metaheed("evaluate", tmp_path / "run", "--tasks", 2)
    assert inside
    assert inside[0] != before or not tf32
    assert all(values == inside[0] for values in inside)
    assert switches() == before


def test_switches_of_precision_are_put_back_whatever_they_were() -> None:
    def fail() -> None:
        with float32_products(True):
            inside.append(switches())
            raise ZeroDivisionError

    inside, before = list[object](), switches()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert switches() == before != inside[0]
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        return
    matmul.fp32_precision = "tf32"  # after which the older switch cannot be read
    try:
        set_by_user = switches()
        with float32_products(False):
            assert not matmul.allow_tf32
        assert switches() == set_by_user
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before[0]
    assert switches() == before


def test_a_run_is_resumed_under_another_execution(single: Callable[..., Path], metaheed: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(single("ta-maml"), run)
    status, _, err = metaheed("train", "--resume", run, "--iterations", 12, "--execution", "im2col")
    assert (status, "execution: im2col, 2 tasks at a time on 1 thread; --execution overrides" in err) == (0, True)
    assert from_dict(yaml.safe_load((run / "config.yaml").read_text())).training.execution == "im2col"
    lines = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [*range(1, 13)]
    status, _, err = metaheed("train", "--resume", run, "--iterations", 13, "--execution", "looped", "--chunk-size", 2)
    assert (status, "the looped execution has no chunks" in err) == (1, True)
    status, _, err = metaheed("train", "maml", *SMALL, "--iterations", 1, "--chunk-size", 1, "--out", tmp_path / "new")
    assert (status, "execution: vectorized, a task at a time" in err) == (0, True)


@pytest.mark.parametrize("execution", CHUNKED)
def test_executions_train_alike(execution: str, single: Callable[..., Path], metaheed: Run, tmp_path: Path) -> None:
    """The first losses are those of another execution, to rounding."""
    run = tmp_path / "run"
    options = [*SMALL, "--iterations", 3, "--execution", execution, "--chunk-size", 1]
    assert metaheed("train", "ta-maml", *options, "--out", run)[0] == 0
    for ours, theirs in zip(_losses(run), _losses(single("ta-maml")), strict=False):
        assert ours == pytest.approx(theirs, rel=1e-4)


def _losses(run: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    return [line["query_loss"] + line["grad_norm"] for line in lines]


def test_a_config_from_before_these_settings_is_read() -> None:
    config: RunConfig = default_config("ta-maml")
    values = yaml.safe_load(yaml.safe_dump(to_dict(config)))
    for name in ("capture", "block", "tf32"):
        del values["training"][name]
    assert from_dict(values) == config
