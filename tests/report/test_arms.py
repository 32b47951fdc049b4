"""Which runs belong together, which are paired, and what is said of the others."""

import math
from pathlib import Path
from typing import Any

import pytest

from metaheed.errors import RunError
from metaheed.studies.report.arms import Arm, group
from metaheed.studies.report.pairs import attention_pairs, control_pairs, metalstm_pairs
from metaheed.studies.report.reading import Found, find
from tests.report.making import TASKS, make_run, shifted


def arms_of(folder: Path) -> list[Arm]:
    return group(find([folder]).runs)[0]


def test_seeds_of_one_config_are_an_arm_wherever_they_were_computed(tmp_path: Path) -> None:
    make_run(tmp_path / "b", seed=1, training={"threads": 8, "execution": "processes", "out": Path("elsewhere")})
    make_run(tmp_path / "deep" / "er" / "a", seed=0, learner={"recompute": True})
    (arm,) = arms_of(tmp_path)
    assert (arm.label, [run.seed for run in arm.runs]) == ("MAML", [0, 1])
    assert (arm.setting.data, arm.setting.ways, arm.setting.shots) == ("cifar-fs", 5, 1)


def test_a_shape_of_test_tasks_is_the_same_given_or_by_default(tmp_path: Path) -> None:
    make_run(tmp_path / "usual", seed=0)
    make_run(tmp_path / "given", seed=1, episodes={"test_ways": 5, "test_shots": 1, "test_queries": 15})
    (arm,) = arms_of(tmp_path)
    assert [run.seed for run in arm.runs] == [0, 1]
    # So where training alone has fewer queries, that is all that prevents a pair.
    assert reason(tmp_path / "few", episodes={"queries": 5, "test_queries": 15}) == "queries is 5 against 15"


def test_options_of_the_rule_are_arms_of_their_own(tmp_path: Path) -> None:
    make_run(tmp_path / "plain", "ta-maml")
    make_run(tmp_path / "reuse", "ta-maml", rule={"attention_reuse_probe": True})
    make_run(tmp_path / "omit", "ta-maml", rule={"attention_omit": "grad_norm"})
    found = {arm.label: arm for arm in arms_of(tmp_path)}
    assert list(found) == ["TA-MAML", "TA-MAML (attention-reuse-probe)", "TA-MAML (attention-omit grad_norm)"]
    assert [arm.plain_rule for arm in found.values()] == [True, False, False]
    assert [arm.tasks_per_iteration for arm in found.values()] == [8, 4, 8]


def test_labels_name_what_tells_arms_apart(tmp_path: Path) -> None:
    make_run(tmp_path / "short")
    make_run(tmp_path / "long", training={"iterations": 6})
    make_run(tmp_path / "fast", learner={"fast_lr": 0.4}, training={"iterations": 6})
    labels = {arm.label for arm in arms_of(tmp_path)}
    assert labels == {
        "MAML [iterations 4, fast-lr 0.1]",
        "MAML [iterations 6, fast-lr 0.1]",
        "MAML [iterations 6, fast-lr 0.4]",
    }


@pytest.mark.parametrize(
    ("algorithm", "label", "tasks", "updates"),
    [
        ("maml", "MAML", 4, 1),
        ("taml", "TAML", 4, 1),
        ("ta-metalstm++", "TA-MetaLSTM++", 8, 1),
        ("metalstm", "MetaLSTM", 4, 4),
        ("uniform-2b-maml", "MAML, uniform over 2B tasks", 8, 1),
        ("loss-softmax-metasgd", "MetaSGD, softmax of the loss", 4, 1),
        ("replayed-maml", "MAML, replayed and permuted", 4, 1),
        ("ta-protonet", "TA-ProtoNet", 8, 1),
    ],
)
def test_names_and_tasks_seen(algorithm: str, label: str, tasks: int, updates: int, tmp_path: Path) -> None:
    make_run(tmp_path / "run", algorithm)
    (arm,) = arms_of(tmp_path)
    assert (arm.label, arm.tasks_per_iteration, arm.updates_per_iteration) == (label, tasks, updates)


def test_replayed_runs_of_several_seeds_are_one_arm(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / str(seed), "replayed-maml", seed, rule={"replay": Path(f"/runs/ta-maml-seed{seed}")})
    (arm,) = arms_of(tmp_path)
    assert len(arm.runs) == 2


def test_replays_of_different_algorithms_are_never_averaged(tmp_path: Path) -> None:
    for seed, options in enumerate(({}, {"attention_reuse_probe": True})):
        make_run(tmp_path / f"ta{seed}", "ta-maml", seed, rule=options)
        make_run(tmp_path / f"replay{seed}", "replayed-maml", seed, rule={"replay": Path(f"/elsewhere/ta{seed}")})
    found = {arm.label: [*arm.results] for arm in arms_of(tmp_path) if arm.rule == "replayed"}
    assert found == {
        "MAML, replayed and permuted [replay TA-MAML]": [0],
        "MAML, replayed and permuted [replay TA-MAML (attention-reuse-probe)]": [1],
    }
    # What is not among the runs tells nothing apart.
    alone = group(find([tmp_path / "replay0", tmp_path / "replay1", tmp_path / "ta1"]).runs)[0]
    assert [len(arm.runs) for arm in alone if arm.rule == "replayed"] == [2]


def test_replayed_weights_control_those_that_are_replayed(tmp_path: Path) -> None:
    make_run(tmp_path / "ta0", "ta-maml", 0)
    make_run(tmp_path / "reuse", "ta-maml", 0, rule={"attention_reuse_probe": True})
    make_run(tmp_path / "replay", "replayed-maml", 0, rule={"replay": Path("/elsewhere/ta0")})
    pairs = control_pairs(arms_of(tmp_path))
    assert [c.arm.label for c in pairs.compared] == ["TA-MAML"]
    reasons = {(m.label, m.against): m.reason for m in pairs.missing}
    found = reasons["TA-MAML (attention-reuse-probe)", "MAML, replayed and permuted"]
    assert found == "it replays the weights of TA-MAML"


def test_own_images_of_different_folders_are_different_arms(tmp_path: Path) -> None:
    for seed, (place, accuracies) in enumerate((("a/cats", TASKS), ("b/cats", TASKS), ("a/cars", None))):
        episodes = {"data": "folder", "data_root": Path("/photos", place)}
        make_run(tmp_path / str(seed), seed=seed, episodes=episodes, accuracies=accuracies)
    labels = {arm.label: [run.seed for run in arm.runs] for arm in arms_of(tmp_path)}
    assert labels == {"MAML [images cats]": [0, 1], "MAML [images cars]": [2]}


def test_paired_difference_by_hand(tmp_path: Path) -> None:
    for seed, shift in enumerate((0.01, 0.02, 0.06)):
        make_run(tmp_path / f"m{seed}", "maml", seed)
        make_run(tmp_path / f"t{seed}", "ta-maml", seed, shifted(shift))
    pairs = attention_pairs(arms_of(tmp_path))
    assert not pairs.missing
    (comparison,) = pairs.compared
    assert (comparison.arm.label, comparison.against.label, comparison.notes) == ("TA-MAML", "MAML", ())
    d = comparison.difference
    assert d.per_seed == pytest.approx({0: 0.01, 1: 0.02, 2: 0.06})
    assert d.mean == pytest.approx(0.03)
    assert d.half_width == pytest.approx(4.30265 * 0.0007**0.5 / 3**0.5, rel=1e-5)
    # Over tasks the differences, averaged over seeds, are 0.03 ± 0.01 in turn.
    assert d.tasks_half_width == pytest.approx(1.96 * (4 * 0.01**2 / 3) ** 0.5 / 2, rel=1e-4)
    assert d.p_value == pytest.approx(0.1885, abs=5e-5)


def reason(folder: Path, **changes: Any) -> str:
    """Why TA-MAML, so changed, is not paired with MAML."""
    make_run(folder / "m")
    make_run(folder / "t", "ta-maml", **changes)
    pairs = attention_pairs(arms_of(folder))
    assert not pairs.compared
    (missing,) = pairs.missing
    assert missing.label.startswith("TA-MAML")
    return missing.reason


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training": {"iterations": 6}}, "iterations is 6 against 4"),
        ({"learner": {"adaptation_steps": 1}}, "adaptation-steps is 1 against 5"),
        ({"learner": {"backbone": "conv4-64"}}, "backbone is conv4-64 against conv4-32"),
        ({"learner": {"first_order": True}}, "first-order is True against False"),
        ({"outer": {"meta_batch_size": 8}}, "meta-batch-size is 8 against 4"),
        ({"episodes": {"queries": 5}}, "queries is 5 against 15"),
        ({"training": {"val_tasks": 30}}, "val-tasks is 30 against 300"),
        ({"result": {"episodes_sha256": "f" * 64}}, "other test episodes"),
        ({"result": {"checkpoint": "last", "iteration": 4}}, "checkpoint judged: last against best"),
        ({"seed": 3}, "no seed in common: seed 3 against seed 0"),
        ({"accuracies": None}, "it is not judged"),
    ],
)
def test_each_mismatch_is_named(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in reason(tmp_path, **changes)


def test_a_counterpart_that_is_not_there_or_not_judged(tmp_path: Path) -> None:
    make_run(tmp_path / "t", "ta-maml")
    (missing,) = attention_pairs(arms_of(tmp_path)).missing
    assert (missing.against, missing.reason) == ("MAML", "there is no such run in this setting")
    make_run(tmp_path / "m", "maml", accuracies=None)
    (missing,) = attention_pairs(arms_of(tmp_path)).missing
    assert (missing.against, missing.reason) == ("MAML", "it is not judged")


def test_rates_may_differ_and_are_said(tmp_path: Path) -> None:
    make_run(tmp_path / "m")
    make_run(tmp_path / "t", "ta-maml", learner={"fast_lr": 0.25}, outer={"meta_lr": 0.002})
    (comparison,) = attention_pairs(arms_of(tmp_path)).compared
    assert comparison.notes == ("fast-lr is 0.25 against 0.1", "meta-lr is 0.002 against 0.001")


def test_of_several_counterparts_the_nearest(tmp_path: Path) -> None:
    make_run(tmp_path / "far", learner={"fast_lr": 0.4})
    make_run(tmp_path / "near")
    make_run(tmp_path / "t", "ta-maml")
    (comparison,) = attention_pairs(arms_of(tmp_path)).compared
    assert comparison.against.label == "MAML [fast-lr 0.1]"
    make_run(tmp_path / "between", "ta-maml", seed=0, learner={"fast_lr": 0.2})
    missing = attention_pairs(arms_of(tmp_path)).missing
    assert {m.against for m in missing} == {"MAML [fast-lr 0.1]", "MAML [fast-lr 0.4]"}
    assert all("several that would do" in m.reason for m in missing)


def test_seeds_that_one_side_lacks_are_named(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        make_run(tmp_path / f"m{seed}", "maml", seed)
    for seed in (1, 2, 5):
        make_run(tmp_path / f"t{seed}", "ta-maml", seed)
    (comparison,) = attention_pairs(arms_of(tmp_path)).compared
    assert set(comparison.difference.per_seed) == {1, 2}
    assert comparison.notes == (
        "seed 5 of TA-MAML left out because the other arm lacks it",
        "seed 0 of MAML left out because the other arm lacks it",
    )


def test_families(tmp_path: Path) -> None:
    for algorithm in ("metalstm", "metalstm++", "ta-metalstm++", "maml", "taml", "ta-anil"):
        make_run(tmp_path / algorithm, algorithm)
    arms = arms_of(tmp_path)
    names = {(c.arm.label, c.against.label) for c in metalstm_pairs(arms).compared}
    assert names == {("MetaLSTM++", "MetaLSTM")}
    pairs = attention_pairs(arms)
    assert {(c.arm.label, c.against.label) for c in pairs.compared} == {
        ("TAML", "MAML"),
        ("TA-MetaLSTM++", "MetaLSTM++"),
    }
    assert [(m.label, m.against) for m in pairs.missing] == [("TA-ANIL", "ANIL")]


def test_controls(tmp_path: Path) -> None:
    for algorithm in ("maml", "ta-maml", "uniform-2b-maml", "loss-softmax-maml", "replayed-maml", "uniform-2b-metasgd"):
        make_run(tmp_path / algorithm, algorithm)
    make_run(tmp_path / "reuse", "ta-maml", rule={"attention_reuse_probe": True})
    controls = ("uniform over 2B tasks", "softmax of the loss", "replayed and permuted")
    expected = {
        (attended, f"MAML, {control}")
        for attended in ("TA-MAML", "TA-MAML (attention-reuse-probe)")
        for control in controls
    } | {(f"MAML, {control}", "MAML") for control in controls}
    pairs = control_pairs(arms_of(tmp_path))
    assert {(c.arm.label, c.against.label) for c in pairs.compared} == expected
    assert [m.label for m in pairs.missing] == ["MetaSGD, uniform over 2B tasks"]


def test_test_tasks_of_another_setting_are_another_setting(tmp_path: Path) -> None:
    make_run(tmp_path / "five")
    make_run(tmp_path / "three", result={"ways": 3})
    assert [arm.setting.ways for arm in arms_of(tmp_path)] == [3, 5]


def test_a_seed_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path / "a", accuracies=TASKS)
    make_run(tmp_path / "b", accuracies=shifted(0.1))
    found = find([tmp_path, tmp_path / "a", tmp_path / "b" / ".."])
    assert len(found.runs) == 2, "folders named twice count once"
    (arm,), doubled = group(found.runs)
    assert [run.path.name for run in arm.runs] == ["a"]
    assert doubled == [(str(tmp_path / "b"), f"a second run of that config with seed 0; {tmp_path / 'a'} is used")]


def only(found: Found) -> str | None:
    (run,) = found.runs
    return run.problem


def test_unfinished_and_unjudged_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "cut", done=3, validations={2: 0.3})
    assert only(find([tmp_path / "cut"])) == "unfinished: 3 of 4 iterations"
    make_run(tmp_path / "last", validations={2: 0.3})
    assert only(find([tmp_path / "last"])) == "unfinished: not validated after its last iteration"
    make_run(tmp_path / "unjudged", seed=1, accuracies=None)
    assert only(find([tmp_path / "unjudged"])) == "not judged: run 'metaheed evaluate' on it"
    make_run(tmp_path / "stale", seed=2, result={"iteration": 2})
    assert "judged at iteration 2, but its best checkpoint is now of iteration 4" in str(
        only(find([tmp_path / "stale"]))
    )
    make_run(tmp_path / "another", seed=3, result={"seed": 4})
    assert only(find([tmp_path / "another"])) == "its result.json is of maml with seed 4"
    make_run(tmp_path / "val", seed=4, result={"split": "val"})
    assert only(find([tmp_path / "val"])) == "its result.json is of the split val"
    (arm,) = arms_of(tmp_path)
    assert {run.path.name for run in arm.runs} == {"unjudged", "stale", "another", "val"}
    assert not arm.results


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "algorithm: [", "is not a config of this program"),
        ("metrics.jsonl", '{"iteration": 1}\n{"iter\n', "cannot be read"),
        ("metrics.jsonl", '{"iteration": "1"}\n', "iteration is '1'"),
        ("metrics.jsonl", '{"iteration": 1, "validation_accuracy": 40}\n', "accuracy 40"),
        ("metrics.jsonl", None, "cannot be read"),
        ("result.json", "{", "cannot be read"),
        ("result.json", '{"accuracy": 0.5}', "lacks accuracies"),
        ("timing.jsonl", "{\n", "only the cost of the run is in it"),
    ],
)
def test_damaged_runs_are_named(file: str, content: str | None, message: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run", timing=[{"iterations": 4, "seconds": 2.0}])
    if content is None:
        (tmp_path / "run" / file).unlink()
    else:
        (tmp_path / "run" / file).write_text(content)
    found = find([tmp_path])
    assert not found.runs
    ((name, why),) = found.unreadable
    assert name == str(tmp_path / "run")
    assert message in why


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracies": [0.5, 1.5], "tasks": 2}, "from 0 to 1"),
        ({"accuracy": 0.9}, "tasks' mean is 0.5"),
        ({"accuracy": math.nan}, "its accuracy is nan"),
        ({"half_width_95": math.nan}, "half_width_95 is nan"),
        ({"half_width_95": math.inf}, "half_width_95 is inf"),
        ({"ways": "5"}, "ways is '5'"),
        ({"trained_on": ["cifar-fs"]}, "its trained_on is"),
    ],
)
def test_results_that_cannot_be(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run", result=changes)
    ((_, why),) = find([tmp_path]).unreadable
    assert message in why


def test_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run folder \(one with a config.yaml\)"):
        find([tmp_path])
    with pytest.raises(RunError, match="is not a folder"):
        find([tmp_path / "nowhere"])


def test_trials_of_a_search_are_read_where_they_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    for number in range(3):
        trial = tmp_path / "search" / "trials" / f"{number:03d}"
        make_run(trial, accuracies=None, learner={"fast_lr": 0.1 * (number + 2)})
    (tmp_path / "search" / "search.yaml").write_text("search: {}\n")
    found = find([tmp_path])
    assert [run.path.name for run in found.runs] == ["run"]
    assert found.studies == ((str(tmp_path / "search"), "trials of a search (3): name a trial's folder to see it"),)
    assert [run.path.name for run in find([trial, tmp_path]).runs] == ["002", "run"]
    with pytest.raises(RunError, match="trials of a search"):
        find([tmp_path / "search"])


def test_another_programs_config_hides_no_runs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("site: mine\n")
    make_run(tmp_path / "deep" / "run")
    found = find([tmp_path])
    assert [run.path.name for run in found.runs] == ["run"]
    assert [name for name, _ in found.unreadable] == [str(tmp_path)]


def test_linked_runs_are_found_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "disk" / "run")
    named = tmp_path / "named"
    named.mkdir()
    (named / "link").symlink_to(run)
    (named / "round").symlink_to(named)
    assert [run.path.name for run in find([named]).runs] == ["link"]
    assert len(find([named, tmp_path]).runs) == 1


def test_cost_is_of_the_place_where_most_was_computed(tmp_path: Path) -> None:
    here = {"device": "cpu", "processor": "P", "threads": 1, "execution": "looped", "peak_bytes": 2**20}
    there = {**here, "execution": "processes", "threads": 2}
    lines = [
        {"iterations": 1, "seconds": 9.0, **here},
        *({"iterations": 2, "seconds": s, **there} for s in (1.0, 4.0, 1.2)),
    ]
    lines += [{"iterations": 9, "seconds": s, **there} for s in (0.0, -5.0, math.nan, math.inf, None)]
    make_run(tmp_path / "run", timing=lines)
    (run,) = find([tmp_path]).runs
    assert run.cost is not None
    assert run.cost.seconds == pytest.approx(0.6), "the median stretch"
    assert (run.cost.peak_bytes, run.cost.where) == (2**20, "cpu, P, 2 threads, processes")


def test_names_are_one_harmless_line(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a\nb\x1b[31m\u202ec")
    (run,) = find([path]).runs
    assert run.name == str(tmp_path / "a�b�[31m�c")
