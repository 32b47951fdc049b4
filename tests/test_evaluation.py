"""Judging and comparing runs, through the command line as a user does, and the statistics by hand."""

import ctypes
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import metaheed as package
from metaheed.data import Dataset, Episodes, load_dataset
from metaheed.files.seals import unseal_values
from metaheed.learners import MAML
from metaheed.outer import evaluate_adapted, map_looped
from metaheed.running.compare import ONE_SEED, compare
from metaheed.running.evaluate import evaluate
from metaheed.running.statistics import interval, t_interval
from tests.conftest import Begin, Run
from tests.networks import Tiny
from tests.test_training import SMALL


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """MAML and TA-MAML with two seeds each, evaluated."""
    from metaheed.cli.entry import main

    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for algorithm in ("maml", "ta-maml"):
        for seed in (0, 1):
            path = folder / f"{algorithm}-{seed}"
            arguments = [*SMALL, "--test-queries", "5", "--iterations", "5", "--seed", str(seed), "--out", str(path)]
            assert main(["train", algorithm, *arguments]) == 0
            assert main(["evaluate", str(path), "--tasks", "40"]) == 0
            made[algorithm, seed] = path
    return made


@pytest.fixture
def copies(runs: dict[tuple[str, int], Path], tmp_path: Path) -> dict[tuple[str, int], Path]:
    made = {key: tmp_path / path.name for key, path in runs.items()}
    for key, path in runs.items():
        shutil.copytree(path, made[key])
    return made


def test_result(runs: dict[tuple[str, int], Path]) -> None:
    result = json.loads((runs["maml", 1] / "result.json").read_text())
    accuracies = np.array(result["accuracies"])
    assert len(accuracies) == result["tasks"] == 40
    assert result["accuracy"] == pytest.approx(accuracies.mean(), abs=1e-6)
    assert result["half_width_95"] == pytest.approx(1.96 * accuracies.std(ddof=1) / 40**0.5, rel=1e-4)
    assert (result["ways"], result["shots"], result["queries"], result["seed"]) == (5, 1, 5, 1)
    assert (result["algorithm"], result["data"], result["split"], result["checkpoint"]) == (
        *("maml", "glyphs", "test", "best"),
    )
    assert result["initial_accuracy"] == pytest.approx(0.2, abs=0.1)


def test_accuracies_are_those_of_the_best_checkpoint_on_the_frozen_tasks(runs: dict[tuple[str, int], Path]) -> None:
    learner, meta = package.load(runs["maml", 0])
    episodes = Episodes(load_dataset("glyphs"), "test", 5, 1, 5, seed=0)
    result = json.loads((runs["maml", 0] / "result.json").read_text())
    assert result["episodes_sha256"] == episodes.fingerprint(40)
    for index in (0, 17, 39):
        episode = episodes[index]
        adapted = learner.adapt(meta, episode.support_x, episode.support_y)
        right = learner.predict(adapted, episode.query_x).argmax(1) == episode.query_y
        assert float(right.double().mean()) == pytest.approx(result["accuracies"][index], abs=1e-6)


def test_json_and_words(runs: dict[tuple[str, int], Path], metaheed: Run) -> None:
    status, out, _ = metaheed("evaluate", runs["maml", 0], "--tasks", 40, "--json")
    assert status == 0
    assert json.loads(out) == json.loads((runs["maml", 0] / "result.json").read_text())
    status, out, _ = metaheed("evaluate", runs["maml", 0], "--tasks", 40)
    result = json.loads((runs["maml", 0] / "result.json").read_text())
    assert f"{result['accuracy']:.2%} ± {result['half_width_95']:.2%} over 40 tasks" in out


def test_other_settings(copies: dict[tuple[str, int], Path], metaheed: Run) -> None:
    run = copies["maml", 0]
    before = (run / "result.json").read_bytes()
    options = ["--ways", 3, "--shots", 2, "--queries", 4, "--tasks", 10, "--checkpoint", "last", "--episode-seed", 5]
    status, out, _ = metaheed("evaluate", run, *options, "--json")
    result = json.loads(out)
    assert (status, result["ways"], result["shots"], result["queries"], result["iteration"]) == (0, 3, 2, 4, 5)
    assert result["episodes_sha256"] == Episodes(load_dataset("glyphs"), "test", 3, 2, 4, 5).fingerprint(10)
    assert json.loads((run / "result-3way2shot4query.json").read_text()) == result
    assert metaheed("evaluate", run, "--split", "val", "--tasks", 10)[0] == 0
    assert metaheed("evaluate", run, "--split", "val", "--shots", 2, "--tasks", 10)[0] == 0
    assert (run / "result.json").read_bytes() == before, "no other result must pass for that of the run's own setting"
    assert json.loads((run / "result-val.json").read_text())["split"] == "val"
    assert json.loads((run / "result-5way2shot5query-val.json").read_text())["shots"] == 2
    assert metaheed("evaluate", run, "--ways", 5, "--queries", 5, "--tasks", 12)[0] == 0, "its own setting, by name"
    assert json.loads((run / "result.json").read_text())["tasks"] == 12


def test_runs_are_compared_at_other_settings(copies: dict[tuple[str, int], Path], metaheed: Run) -> None:
    sides = (copies["ta-maml", 0], "--against", copies["maml", 0])
    own = metaheed("compare", *sides, "--json")[1]
    status, _, err = metaheed("compare", *sides, "--shots", 2)
    assert (status, "has no result-5way2shot5query.json: run 'metaheed evaluate" in err) == (1, True)
    assert "--shots 2' first" in err
    for algorithm in ("maml", "ta-maml"):
        assert metaheed("evaluate", copies[algorithm, 0], "--shots", 2, "--tasks", 30)[0] == 0
    a, b = (json.loads((copies[n, 0] / "result-5way2shot5query.json").read_text()) for n in ("ta-maml", "maml"))
    at_two = json.loads(metaheed("compare", *sides, "--shots", 2, "--json")[1])
    assert at_two["mean"] == pytest.approx(np.mean(a["accuracies"]) - np.mean(b["accuracies"]), abs=1e-6)
    assert metaheed("compare", *sides, "--json")[1] == own, "the default is the runs' own setting"


def test_tasks_can_be_run_otherwise_than_in_training(copies: dict[tuple[str, int], Path], metaheed: Run) -> None:
    run = copies["maml", 0]
    results = []
    for options in ([], ["--execution", "looped"], ["--execution", "processes"], ["--chunk-size", 3]):
        status, out, _ = metaheed("evaluate", run, "--tasks", 10, *options, "--json")
        assert status == 0
        results.append(json.loads(out))
    for result in results[1:]:
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
    status, _, err = metaheed("evaluate", run, "--execution", "fast")
    assert (status, "looped" in err) == (2, True)


def test_more_ways_than_the_head_has(runs: dict[tuple[str, int], Path], metaheed: Run) -> None:
    status, _, err = metaheed("evaluate", runs["maml", 0], "--ways", 6)
    assert (status, "one output for each of the 5 training classes" in err) == (1, True)


def test_training_seeds_share_the_frozen_tasks(runs: dict[tuple[str, int], Path]) -> None:
    assert len({json.loads((run / "result.json").read_text())["episodes_sha256"] for run in runs.values()}) == 1


def test_compare_one_seed(runs: dict[tuple[str, int], Path], metaheed: Run) -> None:
    status, out, _ = metaheed("compare", runs["ta-maml", 0], "--against", runs["maml", 0])
    assert status == 0
    assert ONE_SEED == "covers test tasks only, one training seed"
    assert f"({ONE_SEED})" in out
    a, b = (np.array(json.loads((runs[n, 0] / "result.json").read_text())["accuracies"]) for n in ("ta-maml", "maml"))
    mean, half_width = interval(a - b)
    assert f"{100 * mean:+.2f} ± {100 * half_width:.2f} points" in out


def test_compare_two_seeds(runs: dict[tuple[str, int], Path], metaheed: Run) -> None:
    left, right = ([runs[name, seed] for seed in (0, 1)] for name in ("ta-maml", "maml"))
    status, out, _ = metaheed("compare", *left, "--against", *right[::-1], "--json")
    assert status == 0
    found = json.loads(out)
    accuracies = {
        key: np.array(json.loads((run / "result.json").read_text())["accuracies"]) for key, run in runs.items()
    }
    d = [float((accuracies["ta-maml", s] - accuracies["maml", s]).mean()) for s in (0, 1)]
    assert found["per_seed"] == {"0": pytest.approx(d[0]), "1": pytest.approx(d[1])}
    assert found["mean"] == pytest.approx(np.mean(d))
    assert found["half_width"] == pytest.approx(12.7062 * abs(d[0] - d[1]) / 2, rel=1e-4)  # s/√2 = |d0−d1|/2
    assert "t-interval over 2 per-seed differences" in found["covers"]


def test_compare_refuses_what_cannot_be_paired(copies: dict[tuple[str, int], Path], metaheed: Run) -> None:
    def refused(*arguments: object) -> str:
        status, out, err = metaheed("compare", *arguments)
        assert (status, out) == (1, "")
        return err

    maml0, maml1, ta0 = copies["maml", 0], copies["maml", 1], copies["ta-maml", 0]
    assert "seeds 0 and 1" in refused(ta0, "--against", maml1)
    assert "seeds [0] are compared with seeds [0, 1]" in refused(ta0, "--against", maml0, maml1)
    assert "both have seed 0" in refused(ta0, maml0, "--against", maml1)
    assert "stands on both sides" in refused(maml0, "--against", maml0)
    assert "different algorithms (ta-maml, maml)" in refused(ta0, maml1, "--against", maml0, copies["ta-maml", 1])
    metaheed("evaluate", ta0, "--tasks", 40, "--checkpoint", "last")
    assert "different kinds of checkpoint" in refused(ta0, "--against", maml0)
    metaheed("evaluate", ta0, "--tasks", 41)
    assert "were evaluated on different tasks" in refused(ta0, "--against", maml0)
    (ta0 / "result.json").write_text('{"accuracy": 1.0}')
    assert "lacks accuracies, algorithm, checkpoint, episodes_sha256, seed, tasks" in refused(ta0, "--against", maml0)
    (ta0 / "result.json").write_text("{")
    assert "cannot be read" in refused(ta0, "--against", maml0)
    (ta0 / "result.json").unlink()
    assert f"run 'metaheed evaluate {ta0}' first" in refused(ta0, "--against", maml0)


def test_evaluating_what_is_no_run(metaheed: Run, tmp_path: Path) -> None:
    status, _, err = metaheed("evaluate", tmp_path)
    assert (status, "is not a run folder" in err) == (1, True)


def test_interval_by_hand() -> None:
    mean, half_width = interval([0.2, 0.4, 0.6, 0.8])
    assert mean == pytest.approx(0.5)
    assert half_width == pytest.approx(1.96 * (0.2 / 3) ** 0.5 / 2)


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # printed tables, two-sided 95%
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (10, 2.22814), (30, 2.04227)],
)
def test_t_interval_against_printed_tables(freedom: int, quantile: float) -> None:
    values = [*range(freedom + 1)]
    error = statistics.stdev(values) / len(values) ** 0.5
    assert t_interval(values)[1] / error == pytest.approx(quantile, rel=1e-5)


def test_t_interval_by_hand() -> None:
    mean, half_width = t_interval([0.01, 0.03, 0.05])
    assert mean == pytest.approx(0.03)
    assert half_width == pytest.approx(4.30265 * 0.02 / 3**0.5, rel=1e-5)


def test_pairing_matters(copies: dict[tuple[str, int], Path]) -> None:
    """The same accuracies in another order: the mean stays, the interval does not."""
    a, b = copies["ta-maml", 0], copies["maml", 0]
    one = unseal_values(json.loads((a / "result.json").read_text()))
    one |= {"accuracies": [0.2, 0.9] * 20, "accuracy": 0.55}
    (b / "result.json").write_text(json.dumps(one))
    (a / "result.json").write_text(json.dumps({**one, "accuracies": [0.3, 1.0] * 20, "accuracy": 0.65}))
    assert compare([a], [b]).half_width == pytest.approx(0, abs=1e-9)
    (a / "result.json").write_text(json.dumps({**one, "accuracies": [1.0, 0.3] * 20, "accuracy": 0.65}))
    assert compare([a], [b]).mean == pytest.approx(0.1)
    assert compare([a], [b]).half_width > 0.2


MEMORY = """
import ctypes, torch
from functools import partial
from metaheed.data import Episodes, load_dataset
from metaheed.running.evaluate import evaluate
from metaheed.learners import MAML, Conv4
from metaheed.outer import evaluate_adapted, map_looped
class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
torch.set_num_threads(1)
learner = MAML(Conv4(5, (1, 28, 28), hidden=8), adaptation_steps=2)
meta = learner.init(torch.Generator().manual_seed(0))
episodes = Episodes(load_dataset("glyphs"), "test", 5, 1, 5, 0)
used = []
def note(done):
    if done in (20, 80):
        info = mallinfo2()
        used.append(info.uordblks + info.hblkhd)
evaluate(map_looped(partial(evaluate_adapted, learner)), meta, episodes, 80, note)
print(used[1] - used[0])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not say what is in use")
def test_memory_is_flat_over_tasks(begin: Begin) -> None:
    """By what the allocator has given out, which hides nothing, as resident memory does behind what was freed before.

    A kept φ is 8 KB a task, a kept graph more.
    """
    process = begin(program=MEMORY)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert int(out) < 60 * 4_000, "bytes of growth from the 20th to the 80th task"


def test_evaluation_keeps_no_graph(small_dataset: Dataset) -> None:
    learner = MAML(Tiny(3, (1, 16, 16)))
    meta = {n: p.requires_grad_() for n, p in learner.init(torch.Generator()).items()}
    episodes = Episodes(small_dataset, "test", 3, 1, 3, 0)
    loss, accuracy = evaluate_adapted(learner, meta, episodes[0])
    assert not loss.requires_grad
    assert not accuracy.requires_grad
    outcomes = evaluate(map_looped(lambda m, e: evaluate_adapted(learner, m, e)), meta, episodes, 23)
    assert outcomes.accuracies.shape == (23,)
    assert float(outcomes.losses[0]) == pytest.approx(float(loss))
