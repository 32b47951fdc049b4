"""metaheed reproduce: what is chosen, what is refused, and that the same command always goes on where things stand."""

import errno
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metaheed.config import ReproduceConfig, default_config
from metaheed.errors import ConfigError
from metaheed.running.folder import RunFolder
from metaheed.running.log import stream_lines
from metaheed.running.progress import BoardLines
from metaheed.studies import recipes
from metaheed.studies.paper import TABLES
from metaheed.studies.recipes import Recipe
from metaheed.studies.reproduce import make_slots
from metaheed.studies.reproduce.crew import Follower, Log, lock
from metaheed.studies.reproduce.estimate import cost_key, spread_over
from metaheed.studies.reproduce.plan import RecipeRun, Slot, ToyJob, make_jobs
from tests.conftest import ROOT, Begin
from tests.conftest import Run as Metaheed
from tests.report.making import make_run
from tests.warm import begin_stages_warm, wait_for

Write = Callable[..., None]
COMMON = ("--recipes", "recipes", "--trust", "--out", "out", "--tasks", "6", "--threads", "1")


@pytest.fixture
def write(in_folder: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a recipe of tiny tasks and a tiny network into recipes/; what is begun for it is begun in no time."""
    # The commands that are begun find the tiny network, and this package, where this process does.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    begin_stages_warm(monkeypatch.setattr)

    def make(name: str, algorithm: str = "maml", network: str = "Tiny") -> None:
        config = default_config(algorithm)
        config = replace(
            config,
            episodes=replace(config.episodes, queries=3),
            learner=replace(config.learner, backbone=f"tests.networks:{network}", adaptation_steps=1),  # type: ignore[call-arg]
            outer=replace(config.outer, meta_batch_size=2),
            training=replace(config.training, iterations=6, val_every=4, val_tasks=4),
        )
        recipes.write(Recipe(config, {"kind": "untuned"}), in_folder / "recipes" / f"{name}.yaml")

    return make


def table2(*arguments: object) -> tuple[object, ...]:
    return ("reproduce", "table2", *COMMON, *arguments)


WARM: dict[str, Any] = {"before": "from tests.warm import begin_stages_warm\nbegin_stages_warm()\n"}


def iterations(run: Path) -> list[int]:
    """Those that the log has, validations left out."""
    file = run / "metrics.jsonl"
    return [line["iteration"] for line in stream_lines(file) if "loss" in line] if file.exists() else []


def test_what_is_missing_is_run_and_what_is_there_is_not(
    write: Write, metaheed: Metaheed, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("plain")
    write("attended", "ta-maml")
    write("other", "anil")  # no row of Table 2
    status, out, err = metaheed("reproduce", "table2", *COMMON, "--dry-run")
    assert status == 0, err
    listed = re.findall(r"^(\S+)-seed0 +missing +\d+ s$", out, flags=re.MULTILINE)
    assert sorted(listed) == ["attended", "plain"]
    assert "2 runs: 2 missing" in out
    assert "2 measured now" in out
    assert "Recipes: 2 runs untuned" in out
    assert [p.name for p in (in_folder / "out").iterdir()] == ["times.json"], "nothing was begun"
    _, out, _ = metaheed("reproduce", "table2", *COMMON, "--dry-run")
    assert "2 measured before" in out

    status, out, err = metaheed("reproduce", "table2", *COMMON, "--jobs", 2)
    assert status == 0, err
    assert "out/report/report.html" in out
    assert (in_folder / "out" / "report" / "report.html").stat().st_size > 1000
    runs = {name: in_folder / "out" / f"{name}-seed0" for name in ("plain", "attended")}
    for name, run in runs.items():
        result = json.loads((run / "result.json").read_text())
        assert (result["tasks"], result["split"], result["checkpoint"]) == (6, "test", "best")
        assert iterations(run) == [1, 2, 3, 4, 5, 6]
        assert f"{name}-seed0: {result['accuracy']:.2%} ±" in err
        assert RunFolder(run).read_config().training.threads == 1
    began = [(in_folder / "out" / "logs" / f"{name}-seed0.log").read_text() for name in runs]
    assert all(log.count("$ ") == 2 for log in began), "trained once, judged once"

    before = {path: path.stat().st_mtime_ns for path in (in_folder / "out").glob("*-seed0/**/*")}
    status, _, err = metaheed("reproduce", "table2", *COMMON)
    assert (status, "2 runs: 2 done" in err) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in (in_folder / "out").glob("*-seed0/**/*")} == before

    # What is shorter than asked for is trained on, and judged again; now by commands as the system begins them.
    monkeypatch.setattr("metaheed.studies.reproduce.crew.subprocess", subprocess)
    status, out, _ = metaheed("reproduce", "table2", *COMMON, "--iterations", 5000, "--only", "ta-maml", "--dry-run")
    assert re.search(r"attended-seed0 +to be resumed at 6 of 5,000 +\d", out)
    assert "plain" not in out
    assert "1 as fast as the runs here have gone" in out
    status, _, err = metaheed("reproduce", "table2", *COMMON, "--iterations", 9, "--only", "attended")
    assert status == 0, err
    assert iterations(runs["attended"]) == [*range(1, 10)]
    assert len(iterations(runs["plain"])) == 6
    _, out, _ = metaheed("reproduce", "table2", *COMMON, "--dry-run")
    assert len(re.findall(r"seed0 +done$", out, flags=re.MULTILINE)) == 2, "nine iterations are six as well"


def test_stopped_by_a_signal_it_goes_on(write: Write, metaheed: Metaheed, begin: Begin, in_folder: Path) -> None:
    write("plain")
    write("attended", "ta-maml")
    runs = [in_folder / "out" / f"{name}-seed0" for name in ("plain", "attended")]
    process = begin(*table2("--iterations", 100_000, "--jobs", 2), **WARM)
    wait_for(lambda: all(len(iterations(run)) > 4 for run in runs), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "stopped with 0 of 2 done; the same command continues" in err
    assert "failed" not in err
    assert "Traceback" not in err
    done = [iterations(run)[-1] for run in runs]
    assert not any(RunFolder(run).is_held() for run in runs)
    _, out, _ = metaheed("reproduce", "table2", *COMMON, "--iterations", 100_000, "--dry-run")
    for run, each in zip(runs, done, strict=True):
        assert re.search(rf"{run.name} +to be resumed at {each:,} of 100,000", out), out
    status, _, err = metaheed("reproduce", "table2", *COMMON, "--iterations", done[1] + 2, "--only", "ta-maml")
    assert status == 0, err
    assert iterations(runs[1]) == [*range(1, done[1] + 3)]
    assert (in_folder / "out" / "report" / "report.html").exists()


def test_killed_it_goes_on_once_what_it_left_running_has_ended(
    write: Write, metaheed: Metaheed, begin: Begin, in_folder: Path
) -> None:
    write("plain")
    run = in_folder / "out" / "plain-seed0"
    first = begin(*table2("--iterations", 100_000), **WARM)
    wait_for(lambda: len(iterations(run)) > 4, first)
    first.kill()
    first.wait()
    left = int(re.findall(r"process (\d+)", (run / "run.lock").read_text())[0])
    try:
        _, out, _ = metaheed("reproduce", "table2", *COMMON, "--iterations", 100_000, "--dry-run")
        assert re.search(r"plain-seed0 +being trained elsewhere, at [\d,]+ of 100,000", out)
        second = begin(*table2("--iterations", 1), **WARM)
        wait_for(lambda: "plain-seed0 is being worked on by another process: waiting for it" in second.err, second)
        assert second.poll() is None
    finally:
        os.kill(left, signal.SIGKILL)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert iterations(run) == [*range(1, len(iterations(run)) + 1)], "none was done twice"
    assert (run / "result.json").exists()


def test_one_that_fails_does_not_end_the_others(write: Write, metaheed: Metaheed, in_folder: Path) -> None:
    write("broken", network="Absent")
    write("plain")
    status, out, err = metaheed("reproduce", "table2", *COMMON, "--jobs", 1)
    assert status == 1
    assert (in_folder / "out" / "plain-seed0" / "result.json").exists()
    assert (in_folder / "out" / "report" / "report.html").exists()
    last = err[err.index("error: ") :]
    assert "1 of 2 failed" in last
    # A run that was begun and cannot be ended, as one that diverges, does not vanish from the page.
    make_run(in_folder / "out" / "diverged-seed0", done=3)
    metaheed("reproduce", "table2", *COMMON, "--only", "plain")
    page = (in_folder / "out" / "report" / "report.md").read_text()
    assert re.search(r"\| out/diverged-seed0 \| unfinished: 3 of 4 iterations \|", page)
    log = Path("out/logs/broken-seed0.log")
    assert f"(log: {log})" in last
    reason = log.read_text().strip().splitlines()[-1].removeprefix("error: ")
    assert f"broken-seed0: {reason}" in last
    assert "Absent" in reason
    assert out == ""


def test_a_folder_that_cannot_be_is_named_with_the_remedy(write: Write, metaheed: Metaheed, in_folder: Path) -> None:
    write("plain")
    (in_folder / "file").touch()
    for out in ("file", "file/below"):
        status, _, err = metaheed("reproduce", "table2", *COMMON, "--out", out)
        assert status == 1
        assert err.startswith(f"error: cannot write {out}")
        assert "choose another folder" in err


def test_recipes_may_have_any_name(write: Write, metaheed: Metaheed, in_folder: Path) -> None:
    write("My Recipe ü")
    write("plain")
    status, out, err = metaheed("reproduce", "table2", *COMMON, "--only", "My Recipe ü", "MAML", "--dry-run")
    assert (status, "1 runs: 1 missing" in out) == (0, True), err
    assert out.startswith("My Recipe ü-seed0 ")


def test_two_at_once_do_nothing_twice(write: Write, begin: Begin, in_folder: Path) -> None:
    write("plain")
    both = [begin(*table2("--jobs", 1, "--iterations", 30), **WARM) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    log = (in_folder / "out" / "logs" / "plain-seed0.log").read_text()
    assert log.count("-m metaheed train --recipe ") == 1
    assert log.count("-m metaheed evaluate ") == 1
    assert iterations(in_folder / "out" / "plain-seed0") == [*range(1, 31)]
    assert all("report.html" in out for out, _ in ends)


def test_data_that_is_not_there_is_named_before_anything_begins(
    metaheed: Metaheed, in_folder: Path, cifar_folder: Path
) -> None:
    status, _, err = metaheed("reproduce", "table2", "--data-root", cifar_folder, "--out", "out")
    assert status == 1
    assert "miniimagenet, tieredimagenet is needed" in err
    assert f"'metaheed data download miniimagenet --data-root {cifar_folder}' says how to get it" in err
    assert "--only" in err
    status, _, err = metaheed("reproduce", "table1", "--out", "out", "--only", "omniglot", "cifar-fs")
    assert status == 1
    assert "'metaheed data download omniglot --data-root DATA' fetches it" in err
    assert "miniimagenet" not in err
    assert not (in_folder / "out").exists()


def test_a_dry_run_needs_no_data(metaheed: Metaheed) -> None:
    status, out, err = metaheed("reproduce", "table2", "--only", "fc100", "maml", "5way1shot", "--dry-run")
    assert status == 0, err
    assert re.search(r"fc100-5way1shot-maml-seed0 +missing +[\d.]+ (h|days).*\(its data set is not there\)", out)
    assert "'metaheed data download fc100 --data-root DATA' fetches it" in out


REFUSED = {
    ("reproduce", "table3"): "did you mean 'table2'",
    ("reproduce", "table2", "--only", "ta-mamal"): "unknown word in --only 'ta-mamal': did you mean 'ta-maml'?",
    ("reproduce", "table2", "--only", "omniglot"): "unknown word in --only 'omniglot'",
    ("reproduce", "table1", "--only", "omniglot", "5way1shot"): "table1 has no run that fits all these words",
    ("reproduce", "table2", "--only", "toy"): "unknown word in --only 'toy'",
    ("reproduce", "table2", "--seeds", "1", "1"): "--seeds is (1, 1), but each must be named once",
    ("reproduce", "table2", "--seeds", "-1"): "--seeds is -1",
    ("reproduce", "table2", "--recipes", "nowhere"): "--recipes nowhere holds no recipe",
    ("reproduce", "table2", "--device", "tpu"): "--device is 'tpu'",
    ("reproduce", "table2", "--iterations", "0"): "--iterations is 0",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...], metaheed: Metaheed, in_folder: Path) -> None:
    status, _, err = metaheed(*arguments, "--dry-run")
    assert status == 1
    assert REFUSED[arguments] in err
    assert not (in_folder / "runs").exists()


def test_a_run_of_other_settings_is_refused(write: Write, metaheed: Metaheed, in_folder: Path) -> None:
    write("plain")
    folder = RunFolder(in_folder / "out" / "plain-seed0")
    folder.path.mkdir(parents=True)
    config = recipes.read(in_folder / "recipes" / "plain.yaml").config
    folder.write_config(replace(config, outer=replace(config.outer, meta_lr=0.5)))
    status, _, err = metaheed("reproduce", "table2", *COMMON)
    assert status == 1
    assert "outer.meta_lr is 0.5 there and 0.001 here" in err
    # What belongs to a machine, or can be raised, makes no difference.
    training = replace(config.training, iterations=50, device="cuda:7", threads=9, checkpoint_every=1)
    folder.write_config(replace(config, training=training))
    assert metaheed("reproduce", "table2", *COMMON, "--dry-run")[0] == 0
    folder.write_config(replace(config, training=replace(training, seed=5)))
    status, _, err = metaheed("reproduce", "table2", *COMMON)
    assert (status, "training.seed is 5 there and 0 here" in err) == (1, True)


def test_two_recipes_of_one_name_are_refused(write: Write, metaheed: Metaheed, in_folder: Path) -> None:
    write("plain")
    write("deeper/plain")
    status, _, err = metaheed("reproduce", "table2", *COMMON)
    assert status == 1
    assert "have the same name" in err


def names(experiment: str, **settings: object) -> list[str]:
    return [job.name for job in make_jobs(experiment, ReproduceConfig(**settings))]  # type: ignore[arg-type]


def test_what_is_chosen() -> None:
    assert len(names("table1")) == 2 * 10
    assert len(names("table2")) == 7 * 8 == len(TABLES["table2"].values())
    assert names("table2", seeds=(3, 1), only=("miniimagenet", "5way1shot", "maml", "taml")) == [
        f"miniimagenet-5way1shot-{algorithm}-seed{seed}" for seed in (3, 1) for algorithm in ("maml", "taml")
    ]
    assert len(names("table2", only=("cifar-fs", "FC100"))) == 2 * 4 * 7
    assert names("table2", only=("fc100-10way5shot-ta-maml",)) == ["fc100-10way5shot-ta-maml-seed0"]
    assert names("figures", only=("toy",)) == ["toy"]
    figures = names("figures")
    assert figures[0] == "toy"
    assert len(figures) == 1 + 6
    assert all(name.startswith("miniimagenet-5way1shot-") for name in figures[1:])
    with pytest.raises(ConfigError, match="'nothing'"):
        names("figures", only=("nothing",))


def test_the_toy_is_done_when_its_files_are_there(tmp_path: Path) -> None:
    job, slot = ToyJob(tmp_path), Slot("cpu", 1)
    assert not job.look().done
    assert list(job.next(job.look(), slot).arguments) == ["toy", "--out", str(tmp_path)]
    for file in ("toy.json", "trajectories.png"):
        (tmp_path / file).touch()
    assert job.look().done


def test_commands_carry_where_to_compute(write: Write, in_folder: Path) -> None:
    write("plain")
    config = ReproduceConfig(recipes=Path("recipes"), data_root=Path("d"), out=Path("o"), iterations=7, seeds=(4,))
    (job,) = make_jobs("table2", config)
    assert isinstance(job, RecipeRun)
    stage = job.next(job.look(), Slot("cuda:1", 3))
    assert stage.what == "training"
    text = " ".join(stage.arguments)
    assert text == (
        "train --recipe o/recipes/plain.yaml --seed 4 --out o/plain-seed4 --threads 3 --iterations 7 "
        "--device cuda:1 --data-root d"
    )


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    slots = make_slots
    assert slots(ReproduceConfig(), 20) == [Slot("cpu", 1)] * 8
    assert slots(ReproduceConfig(), 3) == [Slot("cpu", 2)] * 3
    assert slots(ReproduceConfig(threads=4), 20) == [Slot("cpu", 4)] * 2
    assert slots(ReproduceConfig(jobs=3), 20) == [Slot("cpu", 2)] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [p.device for p in slots(ReproduceConfig(), 20)] == ["cuda:0", "cuda:1"]
    assert [p.device for p in slots(ReproduceConfig(jobs=3), 20)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [p.device for p in slots(ReproduceConfig(device="cuda:1"), 20)] == ["cuda:1"]
    assert [p.device for p in slots(ReproduceConfig(device="cpu"), 1)] == ["cpu"]


def test_a_log_that_is_cut_back_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    follower = Follower(file)

    def seen() -> tuple[int | None, float | None]:
        follower.look()
        return follower.iteration, follower.validation

    assert seen() == (None, None)
    file.write_text('{"iteration": 1, "loss": 1}\n{"iteration": 1, "validation_accuracy": 0.25}\n{"itera')
    assert seen() == (1, 0.25)
    with file.open("a") as more:
        more.write('tion": 2, "loss": 1}\n')
    assert seen() == (2, 0.25)
    file.write_text('{"iteration": 1, "loss": 1}\n')
    assert seen() == (1, 0.25)


@pytest.mark.parametrize(
    ("output", "status", "reason"),
    [
        ("iteration 3\nerror: too hot\n", 1, "too hot"),
        ("iteration 3\n", 2, "it ended with status 2 (iteration 3)"),
        ("", -9, "it was ended by SIGKILL"),
    ],
)
def test_why_a_command_failed(output: str, status: int, reason: str, tmp_path: Path) -> None:
    log = Log(tmp_path / "logs" / "a.log")
    log.begin(["earlier"])
    log.file.write(b"error: of an earlier command\n")
    log.begin(["train", "a b"])
    log.file.write(output.encode())
    log.file.close()
    assert log.reason(status) == reason
    assert "$ train 'a b'\n" in log.path.read_text()


def test_a_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    first = lock(tmp_path, "run")
    assert first is not None
    assert lock(tmp_path, "run") is None
    first.close()
    again = lock(tmp_path, "run")
    assert again is not None
    again.close()


def test_a_disk_without_locks_is_said_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match=r"no locks \(No locks available\); put the folder on another disk: .*alone.lock"):
        lock(tmp_path, "alone")


def test_time_of_several_at_once() -> None:
    assert spread_over([3, 1, 1, 1], 1) == 6
    assert spread_over([3, 1, 1, 1], 2) == 3
    assert spread_over([1, 1, 1, 3], 2) == 4, "in this order, as they are begun"


def test_rates_and_images_do_not_decide_what_a_step_costs() -> None:
    config = default_config("ta-maml", "cifar-fs")
    same = default_config("ta-maml", "fc100")
    same = replace(
        same,
        learner=replace(same.learner, fast_lr=0.3),  # type: ignore[call-arg]
        rule=replace(same.rule, attention_lr=0.01),  # type: ignore[call-arg]
        outer=replace(same.outer, meta_lr=0.01),
        training=replace(same.training, iterations=7, seed=2, threads=3),
    )
    shape, where = (3, 32, 32), "here"
    assert cost_key(config, shape, where) == cost_key(same, shape, where)
    other = replace(config, outer=replace(config.outer, meta_batch_size=8))
    for different in (
        cost_key(other, shape, where),
        cost_key(default_config("maml", "cifar-fs"), shape, where),
        cost_key(config, (3, 84, 84), where),
        cost_key(config, shape, "there"),
    ):
        assert different != cost_key(config, shape, where)


def test_elsewhere_it_is_told_in_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    board, clock = BoardLines(3), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    board.begin("one", "training", 10, 50)
    board.begin("two", "judging", 0, 50)
    for seconds, iteration in ((1, 10), (30, 12), (31, 13), (61, 30)):  # 12 is the first seen of this training
        clock[0] = seconds
        board.step("one", iteration, None)
    board.count(1)
    assert capsys.readouterr().err.splitlines() == [
        "one: training after iteration 10",
        "two: judging",
        "one: iteration 30/50  training  0.58 it/s  left 0:00:34",
        "1 of 3 done",
    ]


def test_help(metaheed: Metaheed) -> None:
    status, out, _ = metaheed("reproduce", "--help")
    assert status == 0
    assert "usage: metaheed reproduce" in out
    for option in ("--only", "--seeds", "--iterations", "--jobs", "--dry-run", "--recipes"):
        assert option in out
