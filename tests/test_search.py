"""Searching through the command line: what is drawn, left, gone on with, shared among processes, and refused."""

import contextlib
import csv
import io
import json
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from optuna.samplers import TPESampler
from PIL import Image

from metaheed.config import SearchConfig, default_config, default_pair
from metaheed.errors import RunError
from metaheed.studies import recipes
from metaheed.studies.search.database import sqlite_url
from metaheed.studies.search.draws import configured, used
from tests.conftest import Begin, Run
from tests.test_training import SMALL as TRAINED
from tests.warm import wait_for

SMALL = [*TRAINED, "--adaptation-steps", "1", "--val-tasks", "8"]
RANGES = {"fast_lr": (1e-2, 5e-1), "meta_lr": (1e-4, 1e-2), "attention_lr": (1e-4, 1e-2), "equity_lambda": (1e-2, 1.0)}


def rows(study: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((study / "trials.csv").read_text())))


def drawn(study: Path) -> list[list[str]]:
    return [[row[name] for name in RANGES] for row in rows(study)]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> int:
    file = run / "tasks.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of ten trials."""
    from metaheed.cli.entry import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAHEED_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        out = tmp_path_factory.mktemp("search") / "a study {1}"
        assert main(["search", "ta-maml", *SMALL, "--trials", "10", "--iterations", "4", "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def _without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search draws its trials after each of them, which takes longer than the trials of these tests do.

    `study` was drawn: a fixture of the module is made before this one.
    """
    monkeypatch.setattr("metaheed.studies.search.results.parallel_figure", lambda *_: None)


UNDRAWN = "import metaheed.studies.search.results as r\nr.parallel_figure = lambda *_: None\n"
"""The same, ahead of a process's program."""


def test_what_a_search_leaves(study: Path) -> None:
    trials = rows(study)
    assert [row["trial"] for row in trials] == [str(number) for number in range(10)]
    assert {row["state"] for row in trials} == {"complete"}
    for number, row in enumerate(trials):
        run = study / "trials" / f"{number:03d}"
        validations = [line["validation_accuracy"] for line in lines(run) if "validation_accuracy" in line]
        assert float(row["validation_accuracy"]) == max(validations), "its value is its best validation"
        assert int(row["iterations"]) == steps(run) == 4
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["learner"]["fast_lr"] == float(row["fast_lr"])
        assert config["outer"]["meta_lr"] == float(row["meta_lr"])
        assert config["rule"]["attention_lr"] == float(row["attention_lr"])
        assert config["training"]["seed"] == 0
        assert not list(run.glob("result*"))
    best = max(range(10), key=lambda number: (float(trials[number]["validation_accuracy"]), -number))
    kept = [path.parent.name for path in study.glob("trials/*/checkpoints")]
    assert kept == [f"{best:03d}"], "only the best keeps its checkpoints"
    recipe = recipes.read(study / "best.yaml")
    expected = {
        "kind": "searched",
        "study": "search-glyphs-5way1shot-ta-maml",
        "trials": 10,
        "iterations": 4,
        "seed": 0,
        "validation_accuracy": float(trials[best]["validation_accuracy"]),
        "trial": best,
    }
    assert {name: recipe.provenance[name] for name in expected} == expected
    assert recipe.config.outer.meta_lr == float(trials[best]["meta_lr"])
    assert not [*study.rglob("*.part")]
    assert not [*(study / "workers").iterdir()]


def test_draws_are_log_uniform_within_their_ranges(study: Path) -> None:
    for name, (low, high) in RANGES.items():
        values = np.log([float(row[name]) for row in rows(study)])
        assert np.log(low) <= values.min() <= values.max() <= np.log(high)
        assert len(set(values)) == 10
        assert abs(values.mean() - np.log(low * high) / 2) < 0.35 * np.log(high / low), "about the middle of the scale"
    recorded = [0.39322941459850896, 0.005427029457445065, 0.0009370337115873339, 0.03819340121793939]
    assert [float(value) for value in drawn(study)[0]] == pytest.approx(recorded, rel=1e-12)
    columns = np.log(np.array(drawn(study), dtype=float))
    assert np.abs(np.corrcoef(columns.T) - np.eye(4)).max() < 0.9, "each setting has its own draw"


@pytest.mark.parametrize("name", ["parallel_coordinate.png", "importances.png"])
def test_figures_are_not_blank(name: str, study: Path) -> None:
    with Image.open(study / name) as picture:
        assert picture.width > 500
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert (pixels.min(axis=2) < 128).mean() > 0.002, "dark strokes"


def test_the_recipe_trains_to_the_validation_accuracy_it_was_chosen_for(
    study: Path, metaheed: Run, tmp_path: Path
) -> None:
    recipe, run = study / "best.yaml", tmp_path / "run"
    assert metaheed("train", "--recipe", recipe, "--threads", 1, "--checkpoint-every", 3, "--out", run)[0] == 0
    best = max(line.get("validation_accuracy", 0) for line in lines(run))
    assert best == recipes.read(recipe).provenance["validation_accuracy"]


def test_a_finished_search_says_so_and_leaves_the_same(study: Path, metaheed: Run) -> None:
    before = (study / "trials.csv").read_bytes()
    status, out, err = metaheed("search", "--resume", study)
    assert status == 0
    assert "10 of 10 trials are done" in err
    assert "10 trials, 40 iterations in all" in out
    assert f"metaheed train --recipe {shlex.quote(str(study / 'best.yaml'))}" in out
    assert (study / "trials.csv").read_bytes() == before


def test_more_trials_may_be_asked_for(study: Path, metaheed: Run, tmp_path: Path) -> None:
    more = tmp_path / "more"
    shutil.copytree(study, more)
    status, _, err = metaheed("search", "--resume", more, "--trials", 11)
    assert (status, "10 of 11 trials are done" in err) == (0, True)
    assert rows(more)[:10] == rows(study)
    assert len(rows(more)) == 11
    assert recipes.read(more / "best.yaml").provenance["trials"] == 11


def test_all_algorithms_draw_the_same(study: Path, metaheed: Run, tmp_path: Path) -> None:
    status, _, err = metaheed("search", "taml", *SMALL, "--trials", 2, "--iterations", 1, "--out", tmp_path / "taml")
    assert status == 0
    assert "drawn too, but not used by taml: attention_lr" in err
    assert drawn(tmp_path / "taml") == drawn(study)[:2]
    other = [*SMALL, "--trials", 2, "--iterations", 1, "--search-seed", 1, "--out", tmp_path / "other"]
    assert metaheed("search", "taml", *other)[0] == 0
    assert not {*map(tuple, drawn(tmp_path / "other"))} & {*map(tuple, drawn(study))}


def test_what_is_searched_is_applied_where_it_belongs() -> None:
    values = {"fast_lr": 0.3, "meta_lr": 0.004, "attention_lr": 0.005, "equity_lambda": 0.6}
    metasgd = configured(default_config("ta-metasgd"), values)
    assert metasgd.learner.own_settings()["fast_lr"] == 0.3
    assert metasgd.outer.meta_lr == 0.004
    expected = {
        "maml": ["fast_lr", "meta_lr"],
        "taml": ["fast_lr", "meta_lr", "equity_lambda"],
        "ta-metasgd": ["fast_lr", "meta_lr", "attention_lr"],
        "metalstm": ["meta_lr"],
        "ta-metalstm++": ["meta_lr", "attention_lr"],
        "protonet": ["meta_lr"],
    }
    for algorithm, names in expected.items():
        assert used(default_config(algorithm), SearchConfig()) == names
    assert used(default_pair("protonet", "equity"), SearchConfig()) == ["meta_lr", "equity_lambda"]


def test_processes_at_once_draw_and_train_what_one_would(study: Path, begin: Begin, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    workers = [begin("search", "ta-maml", *SMALL, "--trials", 4, "--iterations", 4, "--out", out) for _ in range(3)]
    for worker in workers:
        _, err = worker.communicate(timeout=400)
        assert worker.returncode == 0, err
        assert "Traceback" not in err
    assert drawn(out) == drawn(study)[:4]
    for row, alone in zip(rows(out), rows(study), strict=False):
        assert row == alone
    assert sorted(path.name for path in (out / "trials").iterdir()) == [f"{number:03d}" for number in range(4)]
    for number in range(4):
        for file in ("metrics.jsonl", "tasks.jsonl"):
            mine, theirs = (folder / "trials" / f"{number:03d}" / file for folder in (out, study))
            assert mine.read_bytes() == theirs.read_bytes()
    assert len([*out.glob("trials/*/checkpoints")]) == 1


LONG = [*SMALL, "--val-every", "20", "--checkpoint-every", "5", "--iterations", "40"]


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two longer trials, uninterrupted."""
    from metaheed.cli.entry import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAHEED_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        out = tmp_path_factory.mktemp("long")
        assert main(["search", "maml", *LONG, "--trials", "2", "--out", str(out)]) == 0
    return out


def same_trials(one: Path, other: Path) -> bool:
    files = [Path("trials.csv")] + [
        Path("trials", f"{n:03d}", f"{f}.jsonl") for n in (0, 1) for f in ("metrics", "tasks")
    ]
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


def test_of_two_processes_one_is_killed_and_the_other_ends_its_trial(long: Path, begin: Begin, tmp_path: Path) -> None:
    out = tmp_path / "out"
    workers = [begin("search", "maml", *LONG, "--trials", 2, "--out", out, before=UNDRAWN) for _ in range(2)]
    trial = out / "trials" / "001"  # begun when both are at work, or one has done the other trial
    wait_for(lambda: steps(trial) >= 10, workers[0])
    holder = (trial / "run.lock").read_text()
    victim, survivor = sorted(workers, key=lambda worker: str(worker.pid) not in holder)
    victim.kill()
    done = steps(trial)
    victim.communicate()
    _, err = survivor.communicate(timeout=400)
    assert survivor.returncode == 0, err
    assert 10 <= done < 40
    assert f"resuming {trial} after iteration" in err
    assert same_trials(out, long)


def test_a_killed_process_elsewhere_is_missed(long: Path, metaheed: Run, begin: Begin, tmp_path: Path) -> None:
    """Its machine cannot be looked at: there are only its signs of life, which have stopped."""
    out = tmp_path / "out"
    arguments = ["search", "maml", *LONG, "--trials", 2, "--lost-after", 2, "--out", out]
    killed = begin(*arguments, before=UNDRAWN)
    wait_for(lambda: steps(out / "trials" / "000") >= 10, killed)
    killed.kill()
    killed.communicate()
    for file in (out / "workers").iterdir():
        file.unlink()
    began = time.monotonic()
    status, _, err = metaheed(*arguments)
    assert status == 0
    assert time.monotonic() - began > 2
    order = [err.index("trial 1: fast_lr"), err.index(f"resuming {out / 'trials' / '000'}")]
    assert order == sorted(order), "meanwhile it did another trial"
    assert same_trials(out, long)


def test_a_signal_ends_it_cleanly(long: Path, metaheed: Run, begin: Begin, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = begin("search", "maml", *LONG, "--trials", 2, "--out", out, before=UNDRAWN)
    wait_for(lambda: steps(out / "trials" / "000") >= 6, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err
    assert "stopped in trial 0 after iteration" in err
    assert f"metaheed search --resume {out}" in err
    status, _, err = metaheed("search", "--resume", out)
    assert (status, "0 of 2 trials are done" in err) == (0, True)
    assert same_trials(out, long)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, where the program is at hand."""
    psycopg = pytest.importorskip("psycopg")
    initdb, server = shutil.which("initdb"), shutil.which("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not at hand")
    user = _unprivileged() if os.geteuid() == 0 else None  # it does not run as root
    folder = Path(tempfile.mkdtemp(prefix="metaheed-postgres-"))
    if user is not None:
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"postgresql://test@127.0.0.1:{port}/postgres"
    data = str(folder / "data")
    made = [initdb, "-D", data, "-U", "test", "-A", "trust", "--no-sync"]
    subprocess.run(made, user=user, cwd=folder, check=True, capture_output=True)
    options = ["-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-F"]
    process = subprocess.Popen(
        [server, *options], user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(1500):
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url):
                break
            time.sleep(0.02)
        yield url.replace("postgresql", "postgresql+psycopg")
    finally:
        process.send_signal(signal.SIGINT)  # a fast shutdown
        process.wait()
        shutil.rmtree(folder)


def _unprivileged() -> str:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    pytest.skip("there is no user to run PostgreSQL as")


def test_machines_share_a_database_server(postgres: str, study: Path, begin: Begin, tmp_path: Path) -> None:
    """Each has a study folder of its own."""
    outs = [tmp_path / name for name in ("one", "two")]
    search = ["search", "ta-maml", *SMALL, "--trials", 4, "--iterations", 4, "--storage", postgres]
    workers = [begin(*search, "--out", out, before=UNDRAWN) for out in outs]
    for worker in workers:
        _, err = worker.communicate(timeout=400)
        assert worker.returncode == 0, err
        assert "Traceback" not in err
    for out in outs:
        assert rows(out) == rows(study)[:4]
        assert recipes.read(out / "best.yaml").provenance["trials"] == 4
    trained = [path.name for out in outs for path in out.glob("trials/*")]
    assert sorted(trained) == [f"{number:03d}" for number in range(4)], "each by one"


def test_a_machine_that_dies_is_replaced_by_another(
    postgres: str, long: Path, metaheed: Run, begin: Begin, tmp_path: Path
) -> None:
    search = ["search", "maml", *LONG, "--trials", 2, "--lost-after", 4, "--storage", postgres, "--study", "dying"]
    killed = begin(*search, "--out", tmp_path / "killed", before=UNDRAWN)
    wait_for(lambda: steps(tmp_path / "killed" / "trials" / "000") >= 10, killed)
    killed.kill()
    killed.communicate()
    other = begin(*search, "--out", tmp_path / "one", before=UNDRAWN)
    status, _, err = metaheed(*search, "--out", tmp_path / "two")
    assert status == 0, err
    _, err = other.communicate(timeout=400)
    assert other.returncode == 0, err
    trained = sorted(path for name in ("one", "two") for path in tmp_path.glob(f"{name}/trials/*"))
    assert sorted(path.name for path in trained) == ["000", "001"], "each by one"
    for path in trained:
        assert (path / "metrics.jsonl").read_bytes() == (long / "trials" / path.name / "metrics.jsonl").read_bytes()


def test_a_server_that_is_not_there(metaheed: Run, in_folder: Path) -> None:
    pytest.importorskip("psycopg")
    storage = "postgresql+psycopg://user:secret@127.0.0.1:1/db"
    status, out, err = metaheed("search", "maml", *SMALL, "--storage", storage)
    assert status == 1
    assert "the database postgresql+psycopg://user:***@127.0.0.1:1/db cannot be used: connection failed" in err
    assert "secret" not in out + err
    assert not list(in_folder.iterdir())


def test_two_folders_on_one_database(study: Path, metaheed: Run, tmp_path: Path) -> None:
    """As two machines have it: each its own folder, and the trials of both in each one's results."""
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    arguments = ["search", "ta-maml", *SMALL, "--iterations", 4, "--storage", storage]
    assert metaheed(*arguments, "--trials", 2, "--out", tmp_path / "one")[0] == 0
    assert metaheed(*arguments, "--trials", 3, "--out", tmp_path / "two")[0] == 0
    assert rows(tmp_path / "two") == rows(study)[:3]
    assert [path.name for path in (tmp_path / "two" / "trials").iterdir()] == ["002"]
    assert recipes.read(tmp_path / "two" / "best.yaml").provenance["trials"] == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ["--meta-lr-range", "0.001", "0.01"],
            "was begun with meta-lr-range 0.0001 0.01, and this search has 0.001 0.01",
        ),
        (["--iterations", "5"], "was begun with iterations 4, and this search has 5"),
        (["--seed", "1"], "was begun with seed 0, and this search has 1"),
        (["--search-seed", "1"], "was begun with search-seed 0, and this search has 1"),
        (["--sampler", "tpe"], "was begun with sampler random, and this search has tpe"),
        (["--shots", "2"], "was begun with"),
    ],
)
def test_another_search_under_the_same_name_is_refused(
    changed: list[str], message: str, study: Path, metaheed: Run
) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*.*") if path.is_file()}
    arguments = [
        *SMALL,
        "--trials",
        12,
        "--iterations",
        4,
        "--out",
        study,
        "--study",
        "search-glyphs-5way1shot-ta-maml",
    ]
    status, _, err = metaheed("search", "ta-maml", *arguments, *changed)
    assert status == 1
    assert message in err
    assert "choose another --out" in err
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*.*") if path.is_file()}.keys() == before.keys()
    assert len(rows(study)) == 10
    assert metaheed("search", "maml", *arguments)[0] == 1


def test_a_refused_search_leaves_nothing_in_a_shared_database(study: Path, metaheed: Run, tmp_path: Path) -> None:
    shared = ["--storage", f"sqlite:///{tmp_path / 'shared.db'}", "--study", "S"]
    arguments = ["search", "ta-maml", *SMALL, "--iterations", 4, "--trials", 1]
    status, _, err = metaheed(*arguments, *shared, "--out", study, "--meta-lr-range", 0.001, 0.002)
    assert (status, f"{study} was begun with study" in err) == (1, True)
    assert metaheed(*arguments, *shared, "--out", tmp_path / "mine")[0] == 0


def test_importances_are_of_what_can_differ(metaheed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaheed.studies.search.results.ENOUGH_FOR_IMPORTANCES", 2)
    fixed = ["--fast-lr-range", 0.1, 0.1, "--meta-lr-range", 0.001, 0.001]
    arguments = ["search", "ta-maml", *SMALL, "--iterations", 1, "--trials", 2, "--out", tmp_path / "one"]
    _, out, err = metaheed(*arguments, *fixed)
    assert "importances.png needs at least two settings that are searched" in out + err
    assert not (tmp_path / "one" / "importances.png").exists()
    still = ["--fast-lr-range", 0.1, 0.1, "--meta-lr-range", 1e-12, 1e-11]
    _, out, err = metaheed(*arguments[:-1], tmp_path / "level", *still)
    assert "importances.png needs trials that differ in accuracy" in out + err
    assert not (tmp_path / "level" / "importances.png").exists()


def test_a_trial_that_diverges_counts_and_is_recorded(metaheed: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    network = [*SMALL, "--backbone", "tests.networks:Exploding", "--fast-lr-range", 0.01, 0.01]
    search = [
        "search",
        "maml",
        *network,
        "--meta-lr-range",
        0.0001,
        0.1,
        "--trials",
        5,
        "--iterations",
        6,
        "--out",
        out,
    ]
    status, text, err = metaheed(*search)
    assert status == 0
    failed = [row for row in rows(out) if row["state"] == "failed"]
    whole = [row for row in rows(out) if row["state"] == "complete"]
    assert len(failed) + len(whole) == 5
    assert failed
    assert whole
    assert min(float(row["meta_lr"]) for row in failed) > max(float(row["meta_lr"]) for row in whole)
    assert all("is not finite" in row["reason"] and row["validation_accuracy"] == "" for row in failed)
    assert all(int(row["iterations"]) < 6 for row in failed)
    assert f"5 trials, {len(failed)} failed" in text
    assert "failed: iteration" in err
    assert metaheed(*search)[0] == 0, "and is not tried again"
    assert len(rows(out)) == 5


def test_where_all_diverge_there_is_no_recipe(metaheed: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    network = [*SMALL, "--backbone", "tests.networks:Exploding", "--meta-lr-range", 0.1, 0.1]
    status, text, _ = metaheed("search", "maml", *network, "--trials", 2, "--iterations", 6, "--out", out)
    assert status == 1
    assert "no trial was trained to its end, so there is no best.yaml" in text
    assert [row["state"] for row in rows(out)] == ["failed", "failed"]
    assert not (out / "best.yaml").exists()


def write_folder(root: Path, test_seed: int) -> Path:
    """Pictures of six classes a split; those of test depend on the seed."""
    for place, split in enumerate(("train", "val", "test")):
        generator = np.random.default_rng(test_seed if split == "test" else place)
        for label in range(6):
            folder = root / split / f"{split}{label}"
            folder.mkdir(parents=True)
            for index in range(5):
                Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


def test_nothing_depends_on_the_test_split(metaheed: Run, tmp_path: Path) -> None:
    for name, seed in (("one", 10), ("other", 11)):
        data = ["--data", "folder", "--data-root", write_folder(tmp_path / f"{name} data", seed), "--image-size", 20]
        arguments = [*SMALL, *data, "--trials", 2, "--iterations", 4, "--out", tmp_path / name]
        assert metaheed("search", "ta-maml", *arguments)[0] == 0
    for file in ("trials.csv", "best.yaml", "trials/000/metrics.jsonl", "trials/001/tasks.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    assert not [*tmp_path.rglob("result*.json")]


def test_successive_halving_stops_trials_early(metaheed: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    halving = ["--pruner", "halving", "--halving-start", 2, "--halving-factor", 2, "--val-every", 2]
    arguments = [*SMALL, *halving, "--trials", 6, "--iterations", 12, "--out", out]
    status, text, err = metaheed("search", "maml", *arguments)
    assert status == 0
    stopped = [row for row in rows(out) if row["state"] == "stopped"]
    whole = [row for row in rows(out) if row["state"] == "complete"]
    assert len(stopped) + len(whole) == 6
    assert stopped
    assert whole
    assert {int(row["iterations"]) for row in whole} == {12}
    assert {int(row["iterations"]) for row in stopped} <= {2, 4, 8}
    spent = sum(int(row["iterations"]) for row in rows(out))
    assert f"6 trials, {len(stopped)} stopped early, {spent} iterations in all" in text
    assert f"importances.png needs 10 complete trials, and there are {len(whole)}" in text
    assert "stopped after iteration" in err
    assert str(recipes.read(out / "best.yaml").provenance["trial"]) in {row["trial"] for row in whole}


def test_tpe_goes_on_as_if_it_had_not_been_stopped(
    metaheed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: Path
) -> None:
    # The first draws of a TPE are random: usually ten, here three.
    monkeypatch.setattr("metaheed.studies.search.draws.TPESampler", partial(TPESampler, n_startup_trials=3))
    tpe = ["search", "maml", *SMALL, "--sampler", "tpe", "--iterations", 1]
    assert metaheed(*tpe, "--trials", 6, "--out", tmp_path / "straight")[0] == 0
    assert metaheed(*tpe, "--trials", 4, "--out", tmp_path / "parts")[0] == 0
    assert metaheed("search", "--resume", tmp_path / "parts", "--trials", 6)[0] == 0
    assert drawn(tmp_path / "parts") == drawn(tmp_path / "straight")
    assert len({*map(tuple, drawn(tmp_path / "parts"))}) == 6
    assert drawn(tmp_path / "parts") != drawn(study)[:6]


def test_a_network_of_ours_on_worker_processes(metaheed: Run, tmp_path: Path) -> None:
    arguments = [
        "--ways",
        2,
        "--threads",
        2,
        "--queries",
        2,
        "--val-tasks",
        4,
        "--meta-batch-size",
        2,
        "--adaptation-steps",
        1,
    ]
    search = ["search", "custom", "--learner", "maml", "--rule", "loss-softmax", *arguments]
    status, _, err = metaheed(*search, "--trials", 2, "--iterations", 2, "--out", tmp_path / "out")
    assert status == 0
    assert "not used by loss-softmax-maml: attention_lr, equity_lambda" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "mamll"], "unknown algorithm 'mamll': did you mean 'maml'"),
        (["search", "maml", "--fast-lr", "0.1"], "--fast-lr is searched: bound it by --fast-lr-range LOW HIGH"),
        (["search", "ta-maml", "--attention_lr=0.1"], "--attention-lr is searched"),
        (["search", "maml", "--trials", "0"], "--trials is 0, but it must be at least 1"),
        (
            ["search", "maml", "--meta-lr-range", "0.1", "0.01"],
            "must be two finite numbers above 0, the lower one first",
        ),
        (["search", "maml", "--fast-lr-range", "0", "0.01"], "must be two finite numbers above 0"),
        (["search", "maml", "--halving-factor", "1"], "--halving-factor is 1, but it must be at least 2"),
        (["search", "maml", "--pruner", "halving", "--iterations", "500"], "there is no validation before the end"),
        (["search", "maml", "--data", "omniglot"], "omniglot needs --data-root"),
        (["search", "maml", "--ways", "161"], "161 ways, but split 'val' of glyphs has 160 classes"),
        (["search", "maml", "--backbone", "conv4-31"], "unknown backbone 'conv4-31'"),
        (["search", "maml", *SMALL, "--backbone", "tests.networks:RandomEachTime"], "gave the same task the losses"),
        (["search", "maml", "--device", "cuda:99"], "--device is 'cuda:99'"),
        (["search", "maml", "--storage", "nonsense"], "--storage is 'nonsense', but it must be a database's URL"),
        (["search", "maml", "--storage", "sqlite://"], "would be kept in memory and lost: name a file"),
        (["search", "maml", "--storage", "sqlite:///no/where.db"], "is not a folder"),
        (["search", "maml", "--storage", "acme://u:secret@host/db"], "acme is no database that SQLAlchemy knows"),
        (["search", "maml", "--storage", "mssql+pymssql://u:secret@host/db"], "pip install pymssql"),
        (["search", "--resume", "nowhere"], "nowhere is not a study folder"),
    ],
)
def test_mistakes_get_a_line_and_leave_nothing(
    arguments: list[str], message: str, metaheed: Run, in_folder: Path
) -> None:
    status, out, err = metaheed(*arguments)
    assert status in (1, 2)
    assert message in " ".join((out + err).replace("│", " ").split())
    assert "secret" not in out + err
    assert not list(in_folder.iterdir())


def test_the_study_stays_in_its_folder_whatever_that_is_called(metaheed: Run, in_folder: Path) -> None:
    out = Path("100%25 ü {x}?y=z")
    try:
        sqlite_url(out)
    except RunError:
        out = Path("100%25 ü {x}")  # as far as SQLAlchemy before 2.1 goes
    status, text, err = metaheed("search", "maml", *SMALL, "--trials", 1, "--iterations", 1, "--out", out)
    assert status == 0, err
    assert [path.name for path in in_folder.iterdir()] == [out.name]
    assert (out / "study.db").stat().st_size > 0
    assert f"metaheed train --recipe '{out}/best.yaml'" in text, "as a shell takes it"
    assert metaheed("search", "--resume", out, "--trials", 2)[0] == 0
    assert [row["state"] for row in rows(out)] == ["complete"] * 2


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be(out: str, metaheed: Run, in_folder: Path) -> None:
    (in_folder / "file").touch()
    status, _, err = metaheed("search", "maml", *SMALL, "--out", out)
    assert status == 1
    assert f"the study folder {out} cannot be made" in err
    assert "choose another --out" in err.lower()


def test_a_file_that_is_no_database(metaheed: Run, in_folder: Path) -> None:
    (in_folder / "study.db").write_bytes(b"junk" * 500)
    status, _, err = metaheed("search", "maml", *SMALL, "--storage", "sqlite:///study.db", "--out", "out")
    assert (status, "study.db cannot be used: file is not a database" in err) == (1, True)
    assert not (in_folder / "out").exists()


def test_a_password_is_not_written_down(metaheed: Run, study: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(study, elsewhere)
    values = yaml.safe_load((elsewhere / "search.yaml").read_text())
    assert values["search"]["storage"] is None
    values["search"]["storage"] = "postgresql://user:***@host/db"
    (elsewhere / "search.yaml").write_text(yaml.safe_dump(values))
    status, _, err = metaheed("search", "--resume", elsewhere)
    assert (status, "keeps no password: name the database again (--storage URL)" in err) == (1, True)
    status, _, err = metaheed("search", "--resume", elsewhere, "--storage", f"sqlite:///{elsewhere / 'study.db'}")
    assert (status, "10 of 10 trials are done" in err) == (0, True)


def test_help(metaheed: Run) -> None:
    status, out, _ = metaheed("search", "--help")
    assert status == 0
    assert "usage: metaheed search" in out
    assert "--resume STUDY" in out
    status, out, _ = metaheed("search", "ta-maml", "--help-all")
    assert status == 0
    for option in (
        *("--trials", "--sampler", "--pruner", "--halving-factor", "--halving-start", "--storage", "--study"),
        *("--search-seed", "--lost-after", "--fast-lr-range", "--meta-lr-range", "--attention-lr-range"),
        *("--equity-lambda-range", "--iterations", "--data ", "--data-root", "--seed", "--out", "--device"),
    ):
        assert option in out
    assert "Study folder" in out
    status, out, _ = metaheed("search", "custom", "--help")
    assert (status, "search custom --learner LEARNER --rule RULE" in out) == (0, True)
    assert metaheed("search", "--resume", "x", "--help")[0] == 0
