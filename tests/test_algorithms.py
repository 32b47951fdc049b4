"""Every algorithm from the command line: trained, resumed to the same bits, judged; presets; what is refused."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from metaheed.config import (
    ALGORITHMS,
    LEARNERS,
    PRESETS,
    RULES,
    default_config,
    default_pair,
    from_dict,
    preset,
    to_dict,
)
from metaheed.engine.executions.processes import AVAILABLE
from metaheed.errors import ConfigError
from metaheed.outer import pick_execution
from tests.conftest import Run

TINY = [
    *("--backbone", "tests.networks:Tiny", "--queries", "3", "--meta-batch-size", "3", "--val-tasks", "4"),
    *("--val-every", "3", "--checkpoint-every", "3", "--threads", "1"),
]
CASES: dict[str, list[str]] = {
    **{name: [name] for name in ALGORITHMS},
    "probe reuse": ["ta-maml", "--attention-reuse-probe"],
    "probe reuse, metalstm": ["ta-metalstm++", "--attention-reuse-probe", "--attention-jacobian", "optimizer"],
    "an input omitted": ["ta-maml", "--attention-omit", "query_loss", "--attention-architecture", "equivariant"],
    "taml-metasgd": ["custom", "--learner", "metasgd", "--rule", "equity", "--equity-index", "gini"],
    "taml-protonet": ["custom", "--rule=equity", "--learner=protonet"],
    "2B": ["custom", "--learner", "maml", "--rule", "uniform-2b"],
    "softmax": ["custom", "--learner", "anil", "--rule", "loss-softmax", "--loss-temperature", "0.2"],
    "fomaml": ["maml", "--first-order"],
}


def _bytes(run: Path) -> dict[str, str]:
    files = ["metrics.jsonl", "tasks.jsonl", *(f"checkpoints/{n}.safetensors" for n in ("last", "best", "previous"))]
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files}


@pytest.mark.parametrize("case", sorted(CASES))
def test_trained_resumed_and_judged(case: str, metaheed: Run, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert metaheed("train", *CASES[case], *TINY, "--iterations", 6, "--out", one)[0] == 0
    assert metaheed("train", *CASES[case], *TINY, "--iterations", 3, "--out", two)[0] == 0
    assert metaheed("train", "--resume", two, "--iterations", 6)[0] == 0
    assert _bytes(one) == _bytes(two)
    status, out, _ = metaheed("evaluate", one, "--tasks", 4, "--json")
    assert status == 0
    result = json.loads(out)
    assert len(result["accuracies"]) == 4
    config = from_dict(yaml.safe_load((one / "config.yaml").read_text()))
    assert result["algorithm"] == config.algorithm
    if case in ALGORITHMS:
        assert config.algorithm == case
        assert config.outer.clip_norm == (0.25 if "lstm" in case else None)
    changed = [(one / "checkpoints" / n).read_bytes() for n in ("last.safetensors", "previous.safetensors")]
    assert changed[0] != changed[1]


def test_every_pair_has_a_config_that_survives_yaml() -> None:
    for learner in LEARNERS:
        for rule in RULES:
            config = default_pair(learner, rule, "omniglot", 20, 1)
            assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
            assert config.algorithm in ALGORITHMS or config.algorithm == f"{rule}-{learner}"
    with pytest.raises(ConfigError, match=r"unknown rule 'equty': did you mean 'equity'"):
        default_pair("maml", "equty")


def test_presets_of_the_paper(metaheed: Run) -> None:
    """T = 5 but 2 for 10-way 5-shot; B = 4 but 16 on Omniglot; Q = 15."""
    for data, cells in PRESETS.items():
        for (ways, shots), cell in cells.items():
            assert cell.meta_batch_size == (16 if data.startswith("omniglot") else 4)
            assert cell.adaptation_steps == (2 if (ways, shots) == (10, 5) else 5)
            assert cell.queries == 15
    assert {(5, 1), (5, 5), (10, 1), (10, 5)} == set(PRESETS["miniimagenet"]) == set(PRESETS["tieredimagenet"])
    assert {(20, 1), (20, 5)} <= set(PRESETS["omniglot"])
    assert preset("omniglot", 7, 3).meta_batch_size == 16
    assert preset("glyphs", 5, 1) == preset("cifar-fs", 5, 1)
    config = default_config("ta-maml", "cifar-fs", 10, 5)
    assert config.learner.own_settings()["adaptation_steps"] == 2
    for arguments in (["maml"], ["custom", "--learner", "maml", "--rule", "uniform"]):
        _, out, _ = metaheed("train", *arguments, "--data=cifar-fs", "--ways", "10", "--shots", "5", "--help")
        text = " ".join(out.replace("│", " ").split())
        assert (
            "--adaptation-steps INT T, the number of gradient steps on the support set, the same in training and test. "
            in text
        )
        assert "test. (default: 2)" in text
        _, out, _ = metaheed("train", *arguments, "--data", "omniglot", "--help")
        assert "the number of tasks in a meta-batch. (default: 16)" in " ".join(out.replace("│", " ").split())


def test_replayed_weights_are_the_logged_ones_permuted(metaheed: Run, tmp_path: Path) -> None:
    attended = tmp_path / "attended"
    assert metaheed("train", "ta-maml", *TINY, "--iterations", 6, "--out", attended)[0] == 0
    replaying = ["train", "custom", "--learner", "maml", "--rule", "replayed", *TINY, "--replay", attended]
    assert metaheed(*replaying, "--iterations", 6, "--out", tmp_path / "replay")[0] == 0
    weights = [
        [json.loads(line)["weights"] for line in (run / "tasks.jsonl").read_text().splitlines()]
        for run in (attended, tmp_path / "replay")
    ]
    assert weights[0] != weights[1]
    for logged, used in zip(*weights, strict=True):
        assert sorted(used) == pytest.approx(sorted(logged), rel=1e-6)
    for more, message in (
        (["--iterations", 7], "logged the weights of 6 batches of 3 tasks, but this run needs 7 of 3"),
        (
            ["--iterations", 6, "--seed", 1],
            "with seed 0 and meta-batches of 3; this one, with seed 1 and 3, can replay",
        ),
        (["--iterations", 6, "--meta-batch-size", 4], "this one, with seed 0 and 4, can replay an attended run of"),
        (["--iterations", 6, "--queries", 2], "of the same learner, tasks, seed and meta-batch size only"),
        (["--iterations", 6, "--replay", tmp_path / "replay"], "is a run of replayed-maml"),
        (["--iterations", 6, "--replay", tmp_path / "nowhere"], "is not a run folder"),
    ):
        status, _, err = metaheed(*replaying, *more, "--out", tmp_path / "refused")
        assert (status, message in err) == (1, True), err
        assert not (tmp_path / "refused").exists()
    # The same bits after a break.
    assert metaheed(*replaying, "--iterations", 3, "--out", tmp_path / "cut")[0] == 0
    attended.rename(tmp_path / "moved")  # what a run replays it has a copy of
    assert metaheed("train", "--resume", tmp_path / "cut", "--iterations", 6)[0] == 0
    assert _bytes(tmp_path / "cut") == _bytes(tmp_path / "replay")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["custom"], "train custom needs both --learner and --rule"),
        (["custom", "--learner", "maml"], "train custom needs both --learner and --rule"),
        (["custom", "--learner", "mamml", "--rule", "uniform"], "unknown learner 'mamml': did you mean 'maml'"),
        (["custom", "--learner", "maml", "--rule", "unifrom"], "unknown rule 'unifrom': did you mean 'uniform'"),
        (["custom", "--learner", "maml", "--rule", "replayed"], "--replay is missing"),
        (["taml", "--equity-lambda", "-1"], "--equity-lambda is -1.0, but it must be a finite number of at least 0"),
        (["taml", "--equity-parameter", "2"], "theil has no parameter: leave it out"),
        (["taml", "--equity-index", "atkinson", "--equity-parameter", "0"], "atkinson's ε must be above 0"),
        (["custom", "--learner", "protonet", "--rule", "equity", "--equity-losses", "query"], "use adapted"),
        (["metalstm", "--hidden-size", "0"], "--hidden-size is 0, but it must be at least 1"),
        (["metalstm", "--forget-bias", "5", "4"], "the lower one first"),
        (["anil", "--head", "haed"], "unknown head 'haed': did you mean 'head'"),
        (["protonet", "--head", "body"], "ProtoNet replaces the network's linear head"),
        (["protonet", "--fast-lr", "0.1"], "fast-lr"),
        (["metasgd", "--fast-lr", "-0.1"], "--fast-lr is -0.1"),
        (["maml", "--ways", "many"], "invalid"),
    ],
)
def test_mistakes_get_a_line_and_leave_nothing(
    arguments: list[str], message: str, metaheed: Run, in_folder: Path
) -> None:
    status, out, err = metaheed("train", *arguments)
    assert status in (1, 2)
    text = " ".join((out + err).replace("│", " ").split())
    assert message in text
    assert "tyro" not in text
    assert not list(in_folder.iterdir())


def test_custom_help(metaheed: Run) -> None:
    status, out, _ = metaheed("train", "custom", "--help")
    assert status == 0
    assert all(name in out for name in (*LEARNERS, *RULES))
    status, out, _ = metaheed("train", "custom", "--learner", "metalstm", "--rule", "equity", "--help-all")
    assert status == 0
    assert all(option in out for option in ("--hidden-size", "--equity-lambda", "--clip-norm", "--ways"))


@pytest.mark.slow
def test_toy(metaheed: Run, tmp_path: Path) -> None:
    status, out, _ = metaheed("toy", "--out", tmp_path / "toy", "--iterations", 150)
    assert status == 0
    assert "MetaLSTM: 600 outer steps" in out
    assert "MetaLSTM++: 150 outer steps" in out
    numbers = json.loads((tmp_path / "toy" / "toy.json").read_text())
    for name, steps in (("MetaLSTM", 600), ("MetaLSTM++", 150)):
        points = numbers[name]["points"]
        assert len(points) == steps + 1
        assert points[0] == [-2.5, 3.5]
        assert numbers[name]["path_length"] >= numbers[name]["displacement"] > 0
    assert numbers["MetaLSTM"]["path_length"] > numbers["MetaLSTM++"]["path_length"]
    assert numbers["MetaLSTM"]["last_task_bias"] > numbers["MetaLSTM"]["last_task_bias_half_width"]
    assert abs(numbers["MetaLSTM++"]["last_task_bias"]) < 1e-5, "the mean of gradients knows no order"
    from PIL import Image

    with Image.open(tmp_path / "toy" / "trajectories.png") as picture:
        assert picture.format == "PNG"
    short = [metaheed("toy", "--out", tmp_path / "short", "--iterations", 3) for _ in range(2)]
    assert short[0] == short[1]
    assert metaheed("toy", "--iterations", 1)[0] in (1, 2)


def test_a_task_a_thread_gives_the_bits_of_one_after_another(metaheed: Run, tmp_path: Path) -> None:
    """Each task is computed on one PyTorch thread either way."""
    before = torch.get_num_threads()
    for name, threads in (("one", 1), ("two", 2)):
        execution = ["--execution", "looped" if threads == 1 else "threaded", "--threads", threads]
        arguments = [*TINY[:-2], "--iterations", 4, *execution, "--out", tmp_path / name]
        assert metaheed("train", "ta-maml", *arguments)[0] == 0
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")
    cpu = torch.device("cpu")
    assert pick_execution("auto", cpu, 2) == ("processes" if AVAILABLE else "vectorized")
    assert pick_execution("auto", cpu, 1) == "vectorized"
    assert pick_execution("auto", cpu, 2, closed_form=False) == "threaded"
    assert pick_execution("auto", cpu, 1, closed_form=False) == "looped"
    assert pick_execution("auto", cpu, 2, own_network=True) == "looped"
    assert pick_execution("auto", torch.device("cuda"), 2) == "vectorized"
    results = [json.loads(metaheed("evaluate", tmp_path / name, "--tasks", 4, "--json")[1]) for name in ("one", "two")]
    assert results[0]["accuracies"] == results[1]["accuracies"]
    assert torch.get_num_threads() == before
    status, out, err = metaheed("train", "maml", "--execution", "threaded", "--chunk-size", 2)
    assert status != 0
    assert "the threaded execution has no chunks" in " ".join((out + err).replace("│", " ").split())
