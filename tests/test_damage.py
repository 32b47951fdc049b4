"""Damage to a run: flipped bits, other programs' changes, signals, want of memory, values that nothing means."""

import ast
import errno
import gc
import json
import os
import re
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tools.flip_bits import flip, make_runs, readers

import metaheed.running.process
from metaheed.config import RunConfig, default_config
from metaheed.data import Dataset, Episodes, Prefetcher
from metaheed.engine.steps import OneByOne
from metaheed.errors import ConfigError, Interrupted, OutOfMemoryError, RunError
from metaheed.files import opening as files
from metaheed.files import seals
from metaheed.learners import MAML
from metaheed.outer import TaskAttention
from metaheed.running.folder import RunFolder
from metaheed.running.process import Signals, StopRequested, check_batch_fits, is_out_of_memory, translate_memory_errors
from metaheed.running.reporter import Reporter
from metaheed.running.train import resume, train
from metaheed.studies.report.reading import read_run
from tests.conftest import ROOT, Run, as_format_1
from tests.networks import Tiny


def small(out: Path, algorithm: str = "maml", **training: Any) -> RunConfig:
    config = default_config(algorithm)
    of_learner: dict[str, Any] = {"backbone": "tests.networks:Tiny", "backbone_path": ROOT, "adaptation_steps": 1}
    learner = replace(config.learner, **of_learner)
    settings: dict[str, Any] = {
        **{"iterations": 6, "val_every": 3, "val_tasks": 2, "checkpoint_every": 2},
        **{"device": "cpu", "threads": 1, "execution": "looped", "out": out},
    }
    return replace(
        config,
        learner=learner,
        episodes=replace(config.episodes, ways=2, queries=1),
        outer=replace(config.outer, meta_batch_size=2),
        training=replace(config.training, **{**settings, **training}),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_runs(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(made[0], tmp_path / "run")
    return tmp_path / "run"


class TestBits:
    def test_each_flipped_bit_is_noticed_or_changes_nothing(self, made: tuple[Path, Path]) -> None:
        for path, read in readers(*made).items():
            found = flip(path, read, share=60 / (8 * path.stat().st_size), seed=path.stat().st_size)
            assert found["passed"] == 0, path
            assert found["noticed"] > 0, path

    def test_each_bit_of_a_seal(self) -> None:
        """Those that could make a sealed file look like one of an earlier version."""
        content = seals.seal_text(b"training:\n  val_every: 5\n")
        for bit in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            try:
                assert seals.unseal_text(bytes(damaged)) == b"training:\n  val_every: 5\n", "the last newline's bits"
            except ValueError:
                continue
        values = seals.seal_values({"accuracy": 0.5, "data": "glyphs"})
        text = json.dumps(values, indent=1).encode()
        for bit in range(8 * len(text)):
            damaged = bytearray(text)
            damaged[bit // 8] ^= 1 << bit % 8
            try:
                assert seals.unseal_values(json.loads(damaged)) == {"accuracy": 0.5, "data": "glyphs"}
            except ValueError:
                continue

    def test_an_earlier_version_s_files_are_read(self, run: Path) -> None:
        folder = RunFolder(run)
        config, expected, _ = folder.read_config(), folder.read_weights("last")[0], folder.read_checkpoint()
        for path in (run / "checkpoints").iterdir():
            as_format_1(path)
        for file in ("config.yaml",):
            (run / file).write_bytes(seals.unseal_text((run / file).read_bytes()))
        for file in ("result.json", "classes.json"):
            (run / file).write_text(json.dumps(seals.unseal_values(json.loads((run / file).read_text()))))
        assert folder.read_config() == config
        assert all(torch.equal(p, expected[name]) for name, p in folder.read_weights("last")[0].items())
        (run / "classes.json").unlink()
        assert resume(run, iterations=5) == run
        checkpoint, _ = folder.read_checkpoint()
        assert checkpoint is not None
        assert len(checkpoint.progress.metrics_sha256) == 64, "recorded from now on"

    def test_an_edited_config_says_what_to_do(self, run: Path, metaheed: Run) -> None:
        file = run / "config.yaml"
        text = file.read_text()
        file.write_text(text.replace("iterations: 3", "iterations: 4"))
        status, _, err = metaheed("train", "--resume", run)
        assert (status, err.count("\n")) == (1, 1)
        assert "was altered since it was written" in err
        assert "delete its last line" in err
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
        assert RunFolder(run).read_config().training.iterations == 4
        file.write_text(text + "# mine\n")
        assert metaheed("train", "--resume", run)[0] == 1

    @pytest.mark.parametrize("log", ["metrics.jsonl", "tasks.jsonl"])
    def test_a_zero_filled_log(self, log: str, run: Path, metaheed: Run) -> None:
        (run / log).write_bytes(bytes((run / log).stat().st_size))
        for more in ((), ("--iterations", 5)):
            status, _, err = metaheed("train", "--resume", run, *more)
            assert (status, f"{log} does not begin with the" in err) == (1, True), err

    def test_a_damaged_last_checkpoint_is_not_judged_as_another(self, run: Path, metaheed: Run) -> None:
        (run / "checkpoints" / "last.safetensors").write_bytes(b"junk")
        status, _, err = metaheed("evaluate", run, "--checkpoint", "last", "--tasks", 3)
        assert (status, "is damaged" in err, "train --resume" in err) == (1, True, True)
        assert metaheed("evaluate", run, "--tasks", 3)[0] == 0, "the best one is whole"

    @pytest.mark.parametrize(
        "change",
        [
            {"image_shape": None},
            {"image_shape": [1, 28]},
            {"image_shape": [1, 10**9, 10**9]},
            {"image_shape": "abc"},
            {"pixels": [1, 2]},
            {"pixels": [[0.5], [0.0]]},
            {"iteration": "x"},
        ],
        ids=str,
    )
    def test_what_an_old_checkpoint_says_of_itself(self, change: dict[str, Any], run: Path, metaheed: Run) -> None:
        for path in (run / "checkpoints").iterdir():
            as_format_1(path, lambda about: about.update(change))
        for which in ("best", "last"):
            status, _, err = metaheed("evaluate", run, "--tasks", 3, "--checkpoint", which)
            assert (status, err.count("\n")) == (1, 1)
            assert next(iter(change)) in err
            assert len(err) < 900

    @pytest.mark.parametrize("log", ["metrics.jsonl", "tasks.jsonl"])
    def test_a_report_notices_a_changed_log(self, log: str, run: Path) -> None:
        """A digit that is another: the line is whole, and the curve would be wrong."""
        assert read_run(run).problem is None
        text = (run / log).read_text()
        (run / log).write_text(text.replace('"iteration": 1', '"iteration": 2', 1))
        with pytest.raises(RunError, match=f"{log} does not begin with"):
            read_run(run)
        (run / "checkpoints" / "last.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
        with pytest.raises(RunError, match=log):  # by what the one before says
            read_run(run)

    def test_files_of_two_runs(self, run: Path, tmp_path: Path, metaheed: Run) -> None:
        """Each whole, and of the same shapes: the seed tells them apart."""
        other = tmp_path / "other"
        config = small(other)
        train(replace(config, training=replace(config.training, seed=5, iterations=3)))
        for name in ("config.yaml", "checkpoints/best.safetensors", "checkpoints/last.safetensors"):
            mixed = tmp_path / "mixed"
            shutil.copytree(run, mixed)
            shutil.copy(other / name, mixed / name)
            for command in (("evaluate", mixed, "--tasks", 3), ("train", "--resume", mixed, "--iterations", 5)):
                status, _, err = metaheed(*command)
                if (name, command[0]) in (
                    ("checkpoints/best.safetensors", "train"),  # written anew from the last one
                    ("checkpoints/last.safetensors", "evaluate"),  # not read
                ):
                    assert status == 0
                else:
                    assert (status, "belongs to the run" in err, "-seed5" in err) == (1, True, True)
                    assert err.count("\n") == 1
            shutil.rmtree(mixed)


class TestMeddling:
    """Another program at the run's folder."""

    CASES: ClassVar[dict[str, Callable[[Path], object]]] = {
        "folder": shutil.rmtree,
        "metrics removed": lambda run: (run / "metrics.jsonl").unlink(),
        "metrics cut": lambda run: os.truncate(run / "metrics.jsonl", 20),
        "metrics appended to": lambda run: _append(run / "metrics.jsonl"),
        "tasks replaced": lambda run: _replace(run / "tasks.jsonl"),
        "tasks overwritten": lambda run: _overwrite(run / "tasks.jsonl"),
        "checkpoint replaced": lambda run: (run / "checkpoints" / "last.safetensors").write_bytes(b"other"),
        "checkpoint removed": lambda run: (run / "checkpoints" / "last.safetensors").unlink(),
        "config changed": lambda run: _append(run / "config.yaml"),
        "lock": lambda run: (run / "run.lock").unlink(),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_it_is_noticed(self, case: str, tmp_path: Path) -> None:
        run, meddle = tmp_path / "run", self.CASES[case]

        class Meddler(Reporter):
            def step(self, iteration: int, loss: float, accuracy: float) -> None:
                if iteration == 5:
                    meddle(run)

        with pytest.raises(RunError, match=r"by another program while the run trained|cannot write"):
            train(small(run), Meddler())
        if case != "folder":
            assert (run / "config.yaml").exists()

    def test_another_s_new_run_in_its_place_is_left_alone(self, tmp_path: Path) -> None:
        run = tmp_path / "run"

        class Meddler(Reporter):
            def step(self, iteration: int, loss: float, accuracy: float) -> None:
                shutil.rmtree(run)
                run.mkdir()
                for name in ("config.yaml", "run.lock"):
                    (run / name).write_text("another's")

        with pytest.raises(RunError):
            train(small(run, checkpoint_every=1), Meddler())
        assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "run.lock"]


def _append(path: Path) -> None:
    with path.open("a") as file:
        file.write("{}\n")


def _replace(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


def _overwrite(path: Path) -> None:
    time.sleep(0.02)  # beyond the clock of file systems
    with path.open("r+b") as file:
        file.write(b"[")


def test_every_rename_brings_its_folder_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (ROOT / "src" / "metaheed").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and isinstance(node, ast.Call):
                renames = called.attr == "rename" or (called.attr == "replace" and len(node.args) == 1)
                named = ast.unparse(called)
                # `dataclasses.replace` takes keywords beside its one argument
                assert not (renames and not node.keywords) or path.name == "opening.py", f"{path}: {named}"
    synced: list[os.stat_result] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number)))
    (tmp_path / "part").write_text("x")
    files.put_in_place(tmp_path / "part", tmp_path / "whole")
    assert [s.st_ino for s in synced] == [tmp_path.stat().st_ino] * (os.name != "nt")


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
    def test_within_a_step_it_abandons_the_step(
        self, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the middle of a step's draw; the resumed run has the bits of one that was left alone."""
        train(small(tmp_path / "whole"))
        rows, left = Episodes.rows, iter(range(13))

        def counted(episodes: Episodes, index: int) -> Any:
            if threading.current_thread() is threading.main_thread() and next(left, None) is None:
                signal.raise_signal(number)
                time.sleep(30)  # nobody waits for it
            return rows(episodes, index)

        monkeypatch.setattr(Episodes, "rows", counted)
        monkeypatch.setattr(Prefetcher, "batch", lambda ahead, first, count: ahead._episodes.batch(first, count))
        began = time.monotonic()
        with pytest.raises(Interrupted) as stop:
            train(small(tmp_path / "run"))
        assert time.monotonic() - began < 20
        assert stop.value.signal_number == number
        monkeypatch.undo()
        assert 0 < _iteration(tmp_path / "run") < 6
        resume(tmp_path / "run")
        for file in ("metrics.jsonl", "tasks.jsonl", "checkpoints/last.safetensors"):
            assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()

    def test_nohup(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with metaheed.running.process.signals_received() as received:
                signal.raise_signal(signal.SIGHUP)
                assert received == []
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_second_one_interrupts_and_one_before_stops_at_once(self) -> None:
        with metaheed.running.process.signals_received() as received:
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(StopRequested), received.interrupting():
                raise AssertionError("not begun")
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            assert not received.raises

    def test_a_step_in_work_is_left_as_it_was(self, small_dataset: Dataset) -> None:
        """Whatever a step had computed when it was stopped, the state is that of the last whole one."""
        received = Signals()
        steps = OneByOne.__new__(OneByOne)
        steps._interrupting, steps._tools, steps.state = received.interrupting, object(), "before"  # type: ignore[assignment]

        class Rule:
            def step(self, *_: Any) -> Any:
                raise StopRequested

        steps._rule = Rule()  # type: ignore[assignment]
        with pytest.raises(StopRequested):
            next(iter(steps.advance(0, 1, lambda: False)))
        assert steps.state == "before"  # type: ignore[comparison-overlap]

    def test_a_thread_that_draws_is_not_waited_for(self, small_dataset: Dataset) -> None:
        ahead = Prefetcher(Episodes(small_dataset, "train", 5, 1, 3, seed=3))
        ahead.batch(0, 2)
        ahead._next = (
            (2, 10**6),
            ahead._pool.submit(ahead._episodes.draw, 2, 10**6, ahead._is_closed),
        )
        began = time.monotonic()
        ahead.close()
        assert time.monotonic() - began < 5


def _iteration(run: Path) -> int:
    checkpoint, _ = RunFolder(run).read_checkpoint()
    return checkpoint.progress.iteration if checkpoint else 0


class TestMemory:
    def test_a_batch_beyond_it_is_refused_before_it_is_made(self, metaheed: Run, in_folder: Path) -> None:
        for command in ("train", "search"):
            began = time.monotonic()
            status, _, err = metaheed(command, "maml", "--meta-batch-size", 10**8, "--out", "run")
            assert (status, err.count("\n")) == (1, 1), err
            assert re.search(r"--meta-batch-size is 100000000: .* GiB .*--ways, --shots or --queries", err)
            assert time.monotonic() - began < 60
            assert not (in_folder / "run").exists()

    def test_only_what_surely_does_not_fit_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        config, cpu = small(tmp_path), torch.device("cpu")
        # Two tasks of four images of 100 float32, their rows, and a gradient of 40 bytes.
        need = 2 * (4 * 100 * 4 + 4 * 8 + 40)
        monkeypatch.setattr(metaheed.running.process, "available_memory", lambda device: need)
        check_batch_fits(config, cpu, (1, 10, 10), 40)
        monkeypatch.setattr(metaheed.running.process, "available_memory", lambda device: need - 1)
        with pytest.raises(ConfigError, match="meta_batch_size is 2"):
            check_batch_fits(config, cpu, (1, 10, 10), 40)
        monkeypatch.setattr(metaheed.running.process, "available_memory", lambda device: None)
        check_batch_fits(config, cpu, (1, 10, 10), 40)

    def test_what_this_machine_has(self) -> None:
        left = metaheed.running.process.available_memory(torch.device("cpu"))
        assert left is None or left > 2**27

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            MemoryError("Unable to allocate 9 TiB"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        ],
    )
    def test_its_message_says_what_to_set(
        self, error: Exception, tmp_path: Path, metaheed: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert is_out_of_memory(error)
        config = small(tmp_path)
        explained = translate_memory_errors(config, torch.device("cpu"), 2, None)  # type: ignore[arg-type]
        with pytest.raises(OutOfMemoryError, match=r"does not hold .*: .*(set|try) "), explained:
            raise error

        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr("metaheed.running.compare.compare", fail)
        status, _, err = metaheed("compare", "a", "--against", "b")
        assert (status, err.count("\n")) == (1, 1)
        assert "set a smaller --meta-batch-size" in err


def test_nothing_of_a_run_is_left_without_a_collection(tmp_path: Path) -> None:
    """Cycles would keep each run's images and weights until Python looks for them."""

    def alive() -> int:
        kinds = (Dataset, Episodes, TaskAttention, OneByOne, MAML, Tiny)
        return sum(type(o) in kinds for o in gc.get_objects())

    def go(number: int) -> None:
        train(small(tmp_path / str(number), "ta-maml", iterations=2, capture=("auto", "on")[number % 2]))

    go(0)  # libraries keep what their first use made
    gc.collect()
    before = alive()
    gc.disable()
    try:
        for number in range(1, 4):
            go(number)
        assert alive() <= before
    finally:
        gc.enable()


class TestReadOnly:
    @pytest.fixture
    def locked(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A run on a disk that takes nothing; by hand, since permissions do not bind every user of tests."""
        opened = Path.open

        def refused(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if run in path.parents and mode.strip("rb"):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return opened(path, mode, *arguments, **options)

        monkeypatch.setattr(Path, "open", refused)
        return run

    def test_it_is_judged(self, locked: Path, metaheed: Run, tmp_path: Path) -> None:
        before = (locked / "result.json").read_bytes()
        status, out, err = metaheed("evaluate", locked, "--tasks", 4)
        assert (status, "over 4 tasks" in out) == (0, True)
        assert "the result is not kept there (--out FILE keeps it elsewhere)" in err
        assert (locked / "result.json").read_bytes() == before
        status, out, err = metaheed("evaluate", locked, "--tasks", 4, "--out", tmp_path / "new" / "mine.json")
        assert (status, err) == (0, f"the result is in {tmp_path / 'new' / 'mine.json'}\n")
        assert json.loads((tmp_path / "new" / "mine.json").read_text())["tasks"] == 4
        status, _, err = metaheed("evaluate", locked, "--tasks", 4, "--out", tmp_path)
        assert (status, "it is a folder" in err) == (1, True)

    @pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
    def test_what_out_must_not_replace(self, run: Path, metaheed: Run, tmp_path: Path) -> None:
        """What is no file, and what the run consists of, which another name must not hide."""
        os.mkfifo(tmp_path / "pipe")
        config = (run / "config.yaml").read_bytes()
        own = ["config.yaml", "metrics.jsonl", "checkpoints/best.safetensors", "checkpoints/../run.lock"]
        for out in (tmp_path / "pipe", *(run / name for name in own)):
            status, printed, err = metaheed("evaluate", run, "--tasks", 3, "--out", out)
            assert (status, printed, err.count("\n")) == (1, "", 1), out
            assert "it is a pipe" in err or "is a file of the run itself" in err
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
        assert (run / "config.yaml").read_bytes() == config
        kept = tmp_path / "mine.part"
        assert metaheed("evaluate", run, "--tasks", 3, "--out", kept)[0] == 0
        assert json.loads(kept.read_text())["tasks"] == 3


HUGE = 10**30
TINY = ("--backbone", "tests.networks:Tiny", "--iterations", 1, "--val-tasks", 2, "--threads", 1, "--queries", 1)


def _inputs() -> Iterator[tuple[Any, ...]]:
    whole = (
        *("iterations", "meta-batch-size", "ways", "shots", "queries", "val-every", "val-tasks", "checkpoint-every"),
        *("threads", "chunk-size", "block", "adaptation-steps", "test-ways"),
    )
    for option in whole:
        for value in (0, -1, HUGE, "x", "", "nan", "1.5"):
            yield "train", "maml", f"--{option}", value
    for value in (-1, 2**64, HUGE, "", "x"):
        yield "train", "maml", "--seed", value
    for option in ("meta-lr", "fast-lr", "clip-norm"):
        for value in ("nan", "inf", "-inf", 0, -1, "", "x"):
            yield "train", "maml", f"--{option}", value
    for value in ("cpu:7", "cpu:-1", "cuda:99", "meta", "mps", "", "gpu", "cuda:x", "\n"):
        yield "train", "maml", *TINY, "--device", value
        yield "search", "maml", *TINY, "--trials", 1, "--device", value
    for value in ("", "a\nb", "a\0b", "a\x1b[0m"):
        for option in ("out", "data", "data-root", "backbone", "device"):
            yield "train", "maml", f"--{option}", value
    for option in ("trials", "search-seed", "lost-after", "halving-factor"):
        for value in (-1, HUGE, "", "x"):
            yield "search", "maml", f"--{option}", value
    yield "search", "maml", *TINY, "--trials", 1, "--out", "s\udcff/run"
    for command in ("evaluate", "report", "compare"):
        yield command, ""
        yield command, "a\0b"
    for option in ("tasks", "ways", "shots", "queries", "episode-seed"):
        for value in (-1, HUGE, ""):
            yield "evaluate", "nowhere", f"--{option}", value
    yield "toy", "--out", ""
    yield "demo", "--out", ""
    yield "demo", "--iterations", HUGE
    yield "demo", "--seed", -1


INPUTS = [*_inputs()]


def test_values_that_nothing_means(metaheed: Run, in_folder: Path) -> None:
    """Each is refused, quickly, in a line that is none of Python's, and leaves nothing behind."""
    assert len(INPUTS) > 150
    wrong = []
    for arguments in INPUTS[::3]:
        status, out, err = metaheed(*arguments)
        lines = err.strip().splitlines()
        # The parser draws a box around what it does not understand, and ends with 2.
        tidy = status == 2 or (status == 1 and len(lines) == 1 and lines[0].startswith("error: ") and len(err) < 600)
        if out or not tidy or [*in_folder.iterdir()]:
            wrong.append((arguments, status, err[-300:], [*in_folder.iterdir()]))
            for path in in_folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not wrong, "\n".join(map(str, wrong))


def test_one_validation_task_has_no_interval(metaheed: Run, in_folder: Path) -> None:
    status, _, err = metaheed("train", "maml", *TINY, "--val-tasks", 1, "--out", "run")
    assert status == 0
    assert re.search(r"validation after 1: \d+\.\d\d% on one task, which has no interval \(best", err)


def test_capture_without_cuda_is_said_in_one_line(metaheed: Run, in_folder: Path) -> None:
    for algorithm in ("maml", "ta-maml"):
        status, _, err = metaheed("train", algorithm, *TINY, "--capture", "on", "--device", "cpu", "--out", algorithm)
        assert (status, "not captured, in blocks" in err) == (0, True), err


def test_no_module_imports_matplotlib_itself() -> None:
    for path in (ROOT / "src" / "metaheed").rglob("*.py"):
        direct = re.findall(r"^\s*(?:from|import) matplotlib", path.read_text(), flags=re.MULTILINE)
        assert not direct or path.name == "headless.py", path


def test_a_backend_that_matplotlib_does_not_have(tmp_path: Path) -> None:
    import subprocess
    import sys

    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    code = "import os, metaheed.headless; print(os.environ['MPLBACKEND'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MPLBACKEND": "bogus", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "bogus\n"), done.stderr
