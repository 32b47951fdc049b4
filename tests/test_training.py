"""The training loop through the command line: run folder, resume after any death, signals, faults."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import metaheed as package
import metaheed.engine.estimate as estimate
from metaheed.config import MAMLConfig, default_config, from_dict, to_dict
from metaheed.data import Dataset, load_dataset
from metaheed.engine.executions import processes
from metaheed.engine.executions.processes import AVAILABLE
from metaheed.running import session as training
from metaheed.running.folder import RunFolder
from metaheed.running.reporter import Reporter
from metaheed.running.train import train
from tests.conftest import ROOT, Begin, Run, edit
from tests.warm import wait_for

SMALL = [
    *("--backbone", "tests.networks:Tiny", "--adaptation-steps", "2", "--queries", "3", "--meta-batch-size", "2"),
    *("--val-every", "4", "--val-tasks", "12", "--checkpoint-every", "3", "--threads", "1"),
]
FILES = ("config.yaml", "metrics.jsonl", "tasks.jsonl")
CHECKPOINTS = ("last.safetensors", "previous.safetensors", "best.safetensors")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "metaheed", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}


def content(run: Path) -> dict[str, str]:
    """Hashes of everything a run leaves, but for where it was written to."""
    files = {name: (run / name).read_bytes() for name in FILES[1:]}
    files |= {name: (run / "checkpoints" / name).read_bytes() for name in CHECKPOINTS}
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["training"]["out"], config["learner"]["backbone_path"]
    files["config.yaml"] = json.dumps(config).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs of ten iterations."""
    from metaheed.cli.entry import main

    folder = tmp_path_factory.mktemp("whole")
    runs = {}
    os.environ["METAHEED_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    for algorithm in ("maml", "ta-maml"):
        runs[algorithm] = folder / algorithm
        assert main(["train", algorithm, *SMALL, "--iterations", "10", "--out", str(runs[algorithm])]) == 0
    return runs


@pytest.mark.parametrize("algorithm", ["maml", "ta-maml"])
def test_run_folder(algorithm: str, whole: dict[str, Path]) -> None:
    run = whole[algorithm]
    config = from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    assert config.algorithm == algorithm
    assert config.training.iterations == 10
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "validation_accuracy" in line]
    assert [line["iteration"] for line in steps] == list(range(1, 11))
    assert [line["iteration"] for line in validations] == [4, 8, 10]
    tasks = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in tasks] == list(range(1, 11))
    for step, line in zip(steps, tasks, strict=True):
        assert set(line) == {"iteration", "query_loss", "query_accuracy", "initial_loss", "grad_norm", "weights"}
        assert sum(line["query_loss"]) / 2 == pytest.approx(step["loss"], rel=1e-6)
        assert sum(line["weights"]) == pytest.approx(1, abs=1e-6)
        assert (line["weights"] == [0.5, 0.5]) == (algorithm == "maml")
    best = max(validations, key=lambda line: line["validation_accuracy"])
    weights = load_file(run / "checkpoints" / "best.safetensors")
    learner, meta = package.load(run)
    assert all(torch.equal(weights[name], meta[name]) for name in meta)
    assert list(learner.init(torch.Generator())) == list(meta)
    _, about = RunFolder(run).read_weights("best")
    assert about["iteration"] == best["iteration"]


def test_same_seed_same_bits_and_other_seed_others(whole: dict[str, Path], metaheed: Run, tmp_path: Path) -> None:
    metaheed("train", "ta-maml", *SMALL, "--iterations", 10, "--out", tmp_path / "again")
    metaheed("train", "ta-maml", *SMALL, "--iterations", 10, "--out", tmp_path / "other", "--seed", 1)
    assert content(tmp_path / "again") == content(whole["ta-maml"])
    assert content(tmp_path / "other")["tasks.jsonl"] != content(whole["ta-maml"])["tasks.jsonl"]


def test_both_rules_see_the_same_training_batches_from_the_same_start(whole: dict[str, Path]) -> None:
    first = [json.loads((run / "tasks.jsonl").read_text().splitlines()[0]) for run in whole.values()]
    for name in ("query_loss", "query_accuracy", "grad_norm"):
        assert first[0][name] == first[1][name]
    # A forward pass that only attention needs.
    assert first[0]["initial_loss"] == [None] * len(first[1]["initial_loss"])
    assert all(loss > 0 for loss in first[1]["initial_loss"])


KILLER = """
import os, signal, sys
from pathlib import Path
import metaheed.running.log as runs
count = 0
def dying(original):
    def call(*arguments, **options):
        global count
        count += 1
        if count == {kill_at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return call
os.fsync = dying(os.fsync)
Path.replace = dying(Path.replace)
runs.JsonLines.write = dying(runs.JsonLines.write)
from metaheed.cli.entry import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kill_at", [1, 2, 4, 9, 11, 12, 13, 27, 42])
def test_killed_at_any_moment_it_ends_bit_for_bit_the_same(
    kill_at: int, whole: dict[str, Path], metaheed: Run, begin: Begin, tmp_path: Path
) -> None:
    """Killed at the n-th sync, rename or line: in the config, before the first checkpoint, within one, between two."""
    run = tmp_path / "run"
    arguments = ["train", "ta-maml", *SMALL, "--iterations", "10", "--out", str(run)]
    died = begin(*arguments, program=KILLER.format(kill_at=kill_at))
    assert died.wait() == -signal.SIGKILL, died.err
    if not (run / "config.yaml").exists():  # killed while it was written: there is no run, and a new one may begin
        status, _, err = metaheed("train", "--resume", run)
        assert (status, "not a run folder" in err) == (1, True)
        status, _, _ = metaheed(*arguments)
    else:
        status, _, _ = metaheed("train", "--resume", run)
    assert status == 0
    assert content(run) == content(whole["ta-maml"])
    assert not [*run.rglob("*.part")]


def test_killed_twice_by_the_clock(metaheed: Run, begin: Begin, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = ("train", "maml", *SMALL, "--iterations", "400", "--out", run)
    for arguments in (first, ("train", "--resume", run)):
        before = _lines(run)
        process = begin(*arguments)
        wait_for(lambda: _lines(run) >= before + 8, process)  # noqa: B023  # called here and now
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = _lines(run)
    status, _, _ = metaheed("train", "--resume", run, "--iterations", done + 2)
    assert status == 0
    metaheed("train", "maml", *SMALL, "--iterations", done + 2, "--out", tmp_path / "straight")
    assert content(run) == content(tmp_path / "straight")


def _lines(run: Path) -> int:
    file = run / "tasks.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    number: signal.Signals, metaheed: Run, begin: Begin, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = begin("train", "maml", *SMALL, "--iterations", 100_000, "--checkpoint-every", 90_000, "--out", run)
    wait_for(lambda: _lines(run) >= 6, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"continue with 'metaheed train --resume {run}'" in err
    assert "Traceback" not in err
    done = _lines(run)
    status, _, err = metaheed("train", "--resume", run, "--iterations", done + 3)
    assert (status, f"after iteration {done}" in err) == (0, True)
    # --checkpoint-every was given twice; the later one counts.
    straight = [*SMALL, "--checkpoint-every", 90_000, "--iterations", done + 3]
    metaheed("train", "maml", *straight, "--out", tmp_path / "straight")
    one, other = content(run), content(tmp_path / "straight")
    del one["previous.safetensors"], other["previous.safetensors"]  # the signal's own checkpoint lies between
    assert one == other


def test_a_finished_run_says_so(whole: dict[str, Path], metaheed: Run) -> None:
    before = content(whole["maml"])
    status, _, err = metaheed("train", "--resume", whole["maml"])
    assert (status, "is finished: all 10 iterations are done" in err) == (0, True)
    assert content(whole["maml"]) == before


def test_iterations_may_be_raised_not_lowered(whole: dict[str, Path], metaheed: Run, tmp_path: Path) -> None:
    shutil.copytree(whole["ta-maml"], tmp_path / "run")
    status, _, err = metaheed("train", "--resume", tmp_path / "run", "--iterations", 9)
    assert (status, "has done 10: it can be raised, not lowered" in err) == (1, True)
    assert metaheed("train", "--resume", tmp_path / "run", "--iterations", 13)[0] == 0
    assert _lines(tmp_path / "run") == 13
    metaheed("train", "ta-maml", *SMALL, "--iterations", 13, "--out", tmp_path / "straight")
    theta = [load_file(tmp_path / run / "checkpoints" / "last.safetensors") for run in ("run", "straight")]
    assert all(torch.equal(theta[0][n], theta[1][n]) for n in theta[1] if not n.startswith("best."))


def test_a_folder_that_holds_a_run_is_refused(whole: dict[str, Path], metaheed: Run) -> None:
    before = content(whole["maml"])
    status, _, err = metaheed("train", "maml", *SMALL, "--out", whole["maml"])
    assert status == 1
    assert "holds a run already" in err
    assert "--resume" in err
    assert content(whole["maml"]) == before


def test_the_lock_of_the_living_refuses_and_of_the_dead_does_not(metaheed: Run, begin: Begin, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = begin("train", "maml", *SMALL, "--iterations", 100_000, "--out", run)
    wait_for(lambda: _lines(run) >= 2, process)
    for arguments in (("train", "--resume", run), ("train", "maml", *SMALL, "--out", run)):
        status, _, err = metaheed(*arguments)
        assert (status, f"trained by another process (process {process.pid})" in err) == (1, True)
    process.kill()
    process.wait()
    assert metaheed("train", "--resume", run, "--iterations", _lines(run) + 2)[0] == 0


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(
    damage: str, whole: dict[str, Path], metaheed: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole["ta-maml"], run)
    last = run / "checkpoints" / "last.safetensors"
    data = bytearray(last.read_bytes())
    data[-10] ^= 1
    content_of = {"truncated": data[:-50], "flipped": data, "empty": b"", "other": b"PK\x03\x04" * 99}
    last.write_bytes(bytes(content_of[damage]))
    status, _, err = metaheed("train", "--resume", run)
    assert status == 0
    assert "last.safetensors" in err
    assert "falling back to the one before" in err
    one, other = content(run), content(whole["ta-maml"])
    del one["previous.safetensors"], other["previous.safetensors"]  # now the repaired successor of another one
    assert one == other


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_run_can_be_read_at_any_moment_while_it_writes(
    hard_links: bool, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others read a run while it trains (evaluate, info, a dry run): around each rename there is a whole checkpoint."""
    shutil.copytree(whole["maml"], tmp_path / "run")
    checkpoint, _ = RunFolder(tmp_path / "run").read_checkpoint()
    assert checkpoint is not None
    seen: list[int] = []

    def look() -> None:
        found, notices = RunFolder(tmp_path / "run").read_checkpoint()
        assert found is not None
        assert not notices
        seen.append(found.progress.iteration)
        assert RunFolder(tmp_path / "run").last.exists() or not hard_links

    rename = Path.replace

    def watched(path: Path, target: Path) -> Path:
        look()
        renamed = rename(path, target)
        look()
        return renamed

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "hard links are not supported")

    monkeypatch.setattr(Path, "replace", watched)
    if not hard_links:
        monkeypatch.setattr(os, "link", refused)
    folder = RunFolder(tmp_path / "run")
    for iteration in (11, 12):
        folder.write_checkpoint(replace(checkpoint, progress=checkpoint.progress._replace(iteration=iteration)))
        if iteration == 11:  # as a death between two renames leaves it
            folder.previous.unlink()
            folder.previous.hardlink_to(folder.last) if hard_links else shutil.copy(folder.last, folder.previous)
    assert sorted(set(seen)) == [10, 11, 12]
    assert not list(folder.checkpoints.glob("*.part"))
    folder.last.write_bytes(b"junk")
    found, _ = folder.read_checkpoint()
    assert found is not None
    assert found.progress.iteration == 11


def test_with_no_whole_checkpoint_left_it_starts_anew(whole: dict[str, Path], metaheed: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole["maml"], run)
    for name in CHECKPOINTS:
        (run / "checkpoints" / name).write_bytes(b"junk")
    status, _, err = metaheed("evaluate", run)
    assert (status, "no checkpoint to read" in err) == (1, True)
    status, _, err = metaheed("train", "--resume", run)
    assert (status, "starting at iteration 0" in err) == (0, True)
    assert content(run) == content(whole["maml"])


def test_a_damaged_best_checkpoint_is_found_in_the_last(whole: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(whole["maml"], tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "best.safetensors").write_bytes(b"junk")
    _, expected = package.load(whole["maml"])
    _, found = package.load(tmp_path / "run")
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_logs_cut_short_are_refused(whole: dict[str, Path], metaheed: Run, tmp_path: Path) -> None:
    shutil.copytree(whole["maml"], tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:40])
    status, _, err = metaheed("train", "--resume", tmp_path / "run", "--iterations", 12)
    assert (status, "has been altered" in err) == (1, True)


def test_a_checkpoint_of_another_architecture(whole: dict[str, Path], metaheed: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole["maml"], run)
    edit(run / "config.yaml", "tests.networks:Tiny", "conv4-32")
    for arguments in (("train", "--resume", run, "--iterations", 12), ("evaluate", run)):
        status, _, err = metaheed(*arguments)
        assert (status, "has another architecture: '1.bias'" in err) == (1, True)


@pytest.mark.parametrize(
    ("old", "new", "offender"),
    [
        ("meta_batch_size: 2", "meta_batch_size: 3", "attention.layers.0.weight"),
        ("attention_architecture: paper", "attention_architecture: equivariant", "attention.layers.0.weight"),
        ("meta_optimizer: adam", "meta_optimizer: sgd", "count"),
    ],
)
def test_a_checkpoint_of_other_settings(
    old: str, new: str, offender: str, whole: dict[str, Path], metaheed: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole["ta-maml"], run)
    edit(run / "config.yaml", old, new)
    before = content(run)
    status, _, err = metaheed("train", "--resume", run, "--iterations", 12)
    assert (status, f"has another architecture: '{offender}'" in err) == (1, True), err
    assert content(run) == before


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("RandomEachTime", "gave the same task the losses"),
        ("NoSecondDerivative", "cannot be meta-learned under the execution looped"),
    ],
)
def test_networks_that_cannot_be_meta_learned_are_refused(
    network: str, message: str, metaheed: Run, tmp_path: Path
) -> None:
    arguments = [*SMALL, "--backbone", f"tests.networks:{network}", "--out", tmp_path / "run"]
    status, _, err = metaheed("train", "maml", *arguments)
    assert (status, message in err) == (1, True), err
    assert not (tmp_path / "run").exists()


def test_a_non_finite_validation_stops_too(metaheed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = estimate.evaluate_adapted

    def poisoned(learner: object, meta: object, episode: object) -> tuple[torch.Tensor, torch.Tensor]:
        loss, accuracy = original(learner, meta, episode)  # type: ignore[arg-type]
        return loss * float("nan"), accuracy

    monkeypatch.setattr("metaheed.running.session.evaluate_adapted", poisoned)
    status, _, err = metaheed("train", "maml", *SMALL, "--iterations", 10, "--out", tmp_path / "run")
    assert (status, "validation after iteration 4: the loss of task 1 of the val tasks is not finite" in err) == (
        1,
        True,
    )


def test_a_lost_listener_does_not_end_a_training(whole: dict[str, Path], begin: Begin, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    run = tmp_path / "run"
    process = begin("train", "maml", *SMALL, "--iterations", 10, "--out", run, errors=write)
    os.close(write)
    assert process.wait() == 0
    assert content(run) == content(whole["maml"])


def test_a_run_is_continued_from_anywhere(begin: Begin, tmp_path: Path) -> None:
    """The folder of the user's own network is recorded."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "own_network.py").write_text("from tests.networks import Tiny as Net")
    arguments = [*SMALL, "--backbone", "own_network:Net", "--iterations", "3", "--out", "run"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    first = begin("train", "maml", *arguments, environment=environment, folder=tmp_path / "home")
    assert first.wait() == 0, first.err
    resumed = ("train", "--resume", tmp_path / "home" / "run", "--iterations", 5)
    second = begin(*resumed, environment=environment, folder=Path("/"))
    assert second.wait() == 0, second.err
    assert _lines(tmp_path / "home" / "run") == 5


def test_zero_iterations_are_refused(whole: dict[str, Path], metaheed: Run) -> None:
    status, _, err = metaheed("train", "--resume", whole["maml"], "--iterations", 0)
    assert (status, "--iterations is 0, but it must be at least 1" in err) == (1, True)


def test_a_checkpoint_of_another_program(whole: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(whole["maml"], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for name in CHECKPOINTS:
        save_file({"a": torch.zeros(2)}, folder / name)
    from metaheed.errors import RunError

    with pytest.raises(RunError, match=r"is not a checkpoint"):
        package.load(tmp_path / "run")
    with pytest.raises(RunError, match=r"'bset', but it must be 'best' or 'last'"):
        package.load(tmp_path / "run", "bset")


def test_non_finite_loss_stops_with_iteration_and_task(metaheed: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [
        *SMALL,
        "--backbone",
        "tests.networks:Exploding",
        "--iterations",
        60,
        "--meta-lr",
        1e-2,
        "--fast-lr",
        0.01,
    ]
    status, _, err = metaheed("train", "maml", *arguments, "--out", run)
    assert status == 1
    assert "of the training batch is not finite" in err
    iteration = int(err.split("error: iteration ")[1].split(":")[0])
    assert iteration > 3
    assert " of task 1 " in err
    checkpoint, notices = RunFolder(run).read_checkpoint()
    assert checkpoint is not None
    assert not notices
    assert 3 <= checkpoint.progress.iteration < iteration
    assert all(bool(torch.isfinite(p).all()) for p in checkpoint.state.meta.values())
    # Nothing has changed, so the same happens again, in the same words.
    assert metaheed("train", "--resume", run)[2].split("error: ")[1] == err.split("error: ")[1]


def test_a_full_disk_is_reported_and_survived(
    whole: dict[str, Path], metaheed: Run, begin: Begin, tmp_path: Path
) -> None:
    """A limit on file sizes stands for the full disk: writes fail in the same way."""
    run = tmp_path / "run"
    limit = (whole["maml"] / "tasks.jsonl").stat().st_size * 3 // 4
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    died = begin("train", "maml", *SMALL, "--iterations", 10, "--out", run, before=limited)
    assert died.wait() == 1
    assert "error: cannot write" in died.err
    assert (run / "config.yaml").exists(), "what has begun is not thrown away"
    assert metaheed("train", "--resume", run)[0] == 0
    assert content(run)["last.safetensors"] == content(whole["maml"])["last.safetensors"]
    assert "Traceback" not in died.err
    assert not [*run.rglob("*.part")]


def test_a_folder_that_cannot_be_written(metaheed: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", Path("/proc/run")):
        status, _, err = metaheed("train", "maml", *SMALL, "--out", out)
        assert (status, f"error: cannot write {out}" in err) == (1, True), err


def test_a_refused_start_leaves_nothing(metaheed: Run, tmp_path: Path) -> None:
    for wrong in (["--ways", 700], ["--data", "omniglot"], ["--backbone", "tests.networks:WithDropout"]):
        status, _, _ = metaheed("train", "maml", *SMALL, *wrong, "--out", tmp_path / "run")
        assert status == 1
        assert not (tmp_path / "run").exists()


def test_defaults_make_the_folder_name(metaheed: Run, in_folder: Path) -> None:
    metaheed("train", "ta-maml", *SMALL, "--iterations", 1, "--seed", 3)
    assert (in_folder / "runs" / "glyphs-5way1shot-ta-maml-seed3" / "config.yaml").exists()


def test_tensorboard_events(metaheed: Run, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    assert metaheed("train", "ta-maml", *SMALL, "--iterations", 4, "--tensorboard", "--out", run)[0] == 0
    assert metaheed("train", "--resume", run, "--iterations", 6)[0] == 0
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("validation/accuracy")] == [4, 6]


def test_config_round_trip() -> None:
    for algorithm in ("maml", "ta-maml"):
        config = default_config(algorithm)
        assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("learner", {"name": "mamml"}), r"unknown learner 'mamml': did you mean 'maml'"),
        (("trainng", {}), r"unknown group of the config 'trainng': did you mean 'training'"),
        (("outer", {"meta_lrr": 1.0}), r"unknown field of outer 'meta_lrr': did you mean 'meta_lr'"),
        (("outer", {"meta_lr": "fast"}), r"meta_lr is 'fast', but it must be a number"),
        (("outer", [1]), r"outer is \[1\], but it must be a mapping"),
        (("algorithm", "taml"), r"algorithm is 'taml', but its learner and rule make 'maml'"),
    ],
)
def test_a_hand_edited_config_is_explained(change: tuple[str, object], message: str, tmp_path: Path) -> None:
    from metaheed.errors import RunError

    values = to_dict(default_config("maml"))
    values[change[0]] = change[1]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(RunError, match=message):
        RunFolder(tmp_path).read_config()
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(RunError, match=r"is not a config"):
        RunFolder(tmp_path).read_config()


def _refused(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def _no_fork() -> int:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


@pytest.mark.parametrize(
    "options",
    [
        ["--execution", "looped"],
        ["--execution", "threaded", "--threads", 2],
        ["--execution", "looped", "--capture", "on"],
        pytest.param(
            ["--execution", "processes", "--threads", 2, "--backbone", "conv4-32"],
            marks=pytest.mark.skipif(not AVAILABLE, reason="processes are forked on Linux only"),
        ),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_a_system_that_starts_no_more_is_explained(
    options: list[object], metaheed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under ulimit -u, which root has not."""
    load_dataset("glyphs")  # it is drawn by threads, too, where it is not in the cache yet
    monkeypatch.setattr(threading.Thread, "start", _refused)
    monkeypatch.setattr(os, "fork", _no_fork)
    status, _, err = metaheed("train", "maml", *SMALL, "--iterations", 9, *options, "--out", tmp_path / "run")
    assert status == 1
    reason = r"\[Errno 11\] Resource temporarily unavailable" if "processes" in options else "can't start new thread"
    said = rf"error: the system starts no further thread or process here \({reason}\): set fewer --threads or another "
    assert re.search(said + r"--execution \(looped .*\(ulimit -u\)\n$", err), err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not AVAILABLE, reason="processes are forked on Linux only")
def test_a_worker_killed_in_training_is_said(metaheed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, original = [], processes._Worker.begin

    def begin(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        began.append(self._pid)
        if len(began) == 9:
            os.kill(self._pid, signal.SIGKILL)

    monkeypatch.setattr(processes._Worker, "begin", begin)
    small = [*SMALL, "--queries", 1, "--backbone", "conv4-32", "--execution", "processes", "--threads", 2]
    small += ["--adaptation-steps", 1, "--val-tasks", 4]
    status, _, err = metaheed("train", "maml", *small, "--iterations", 9, "--out", tmp_path / "run")
    assert status == 1
    assert (
        "error: a worker process was killed (signal 9), which most often means that memory ran out; if so: set " in err
    )
    assert "--execution vectorized --chunk-size 1. Checkpoints, if any, are kept" in err
    assert metaheed("train", "--resume", tmp_path / "run")[0] == 0


class Resident(Reporter):
    """Resident memory in bytes after every iteration."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def step(self, iteration: int, loss: float, accuracy: float) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.bytes.append(pages * os.sysconf("SC_PAGE_SIZE"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what is resident")
@pytest.mark.parametrize(
    ("algorithm", "iterations", "options"),
    [("maml", 100, {"execution": "looped"}), ("ta-maml", 100, {"execution": "vectorized", "capture": "on"})],
    ids=["step by step", "in blocks"],
)
def test_memory_stays_flat(
    algorithm: str,
    iterations: int,
    options: dict[str, Any],
    small_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """θ is 120 KB: one copy of it kept at every iteration makes more than 5 MB; without, it is a quarter of one."""
    monkeypatch.setattr(training, "load_dataset", lambda *_, **__: small_dataset)
    config = default_config(algorithm)
    options = {"val_every": 20, "val_tasks": 2, "block": 20, "threads": 1, "device": "cpu", **options}
    config = replace(
        config,
        episodes=replace(config.episodes, ways=2, queries=1),
        learner=MAMLConfig(adaptation_steps=1),
        outer=replace(config.outer, meta_batch_size=1),
        training=replace(config.training, iterations=iterations, out=tmp_path / "run", **options),
    )
    resident = Resident()
    train(config, resident)
    assert len(resident.bytes) == iterations
    assert max(resident.bytes[60:]) - max(resident.bytes[20:60]) < 2.5e6
