"""Networks and weights of a user's own, through the command line."""

import shutil
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import metaheed as package
from metaheed.config import (
    AttendedConfig,
    EvaluationConfig,
    MetaLSTMConfig,
    ReportConfig,
    RunConfig,
    default_config,
)
from metaheed.data import Episodes, find_shape, find_source, load_dataset, survey
from metaheed.data.frozen import freeze, read_episodes, write_episodes
from metaheed.data.preparing import verify
from metaheed.data.reading.download import download
from metaheed.data.sources import Request
from metaheed.data.store import open_store, stores_under
from metaheed.errors import ConfigError, MetaheedError, MissingDataError
from metaheed.learners import MAML, Conv4, MetaSGD, NetworkLearner
from metaheed.running.compare import compare
from metaheed.running.evaluate import evaluate_run
from metaheed.running.folder import RunFolder
from metaheed.running.results import read_result
from metaheed.running.starting import read_weights
from metaheed.running.train import resume
from metaheed.studies.recipes import Recipe, read, read_folder, write
from metaheed.studies.report import report
from metaheed.studies.search import read_search
from tests.conftest import Run
from tests.networks import Tiny
from tests.test_training import SMALL

TINY = [*SMALL, "--backbone", "tests.networks:Tiny", "--iterations", 1, "--val-every", 1, "--val-tasks", 2]
OURS = [*SMALL, "--backbone", "conv4-32", "--val-every", 1, "--val-tasks", 2]


@pytest.mark.parametrize(
    ("algorithm", "network", "said"),
    [
        ("maml", "FusedWeightNorm", r"meta-gradient of the network is wrong"),
        ("maml", "FusedWeightNorm", r"the first derivative is right, so the second derivative of an operation"),
        ("maml", "Distances", r"What helps: it works with --first-order; write the operation in plain tensor"),
        ("metasgd", "Distances", r"it works with --first-order"),
        ("maml", "Attending", r"it works with --first-order; attention has second derivatives with torch.nn.attention"),
        ("maml", "Checkpointed", r"remove torch.utils.checkpoint from it, and save memory with --recompute"),
        ("maml", "WithBackwardHook", r"What helps: remove the backward hooks of its 1"),
        ("maml", "ReentrantlyCheckpointed", r"remove torch.utils.checkpoint from it, and save memory with --recompute"),
        ("maml", "WithoutGradient", "it is zero everywhere, so take torch.no_grad() or detach() out"),
        ("maml", "ThroughNumPy", r"compute with tensors in its forward, not with NumPy"),
        ("maml", "KeepsItsWeight", r"keeps something of a call in kept and uses it in the next"),
        ("maml", "Tuple", r"returns a tuple of 2 values"),
        ("maml", "parallel", r"hand over the module inside it, network.module"),
    ],
)
def test_a_network_that_cannot_be_trained_is_told_what_helps(
    algorithm: str, network: str, said: str, metaheed: Run, tmp_path: Path
) -> None:
    options = [*SMALL, "--backbone", f"tests.networks:{network}", "--threads", 1, "--out", tmp_path / "run"]
    status, _, err = metaheed("train", algorithm, *options)
    assert status == 1
    assert said in err.splitlines()[-1], err
    assert "--execution looped" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [("--first-order",), ("--no-check-gradient",)])
def test_the_check_of_the_gradient_is_skipped_where_it_says_nothing(
    options: tuple[str, ...], metaheed: Run, tmp_path: Path
) -> None:
    named = [*TINY, "--backbone", "tests.networks:FusedWeightNorm", "--out", tmp_path / "run", *options]
    status, _, err = metaheed("train", "maml", *named)
    assert status == 0, err


@pytest.mark.parametrize("algorithm", ["maml", "metalstm++"])
def test_vmap_that_fails_is_one_line_in_training_and_in_judging(algorithm: str, metaheed: Run, tmp_path: Path) -> None:
    named = [*TINY, "--backbone", "tests.networks:LooksAtItsNumbers", "--out", tmp_path / "run"]
    status, _, err = metaheed("train", algorithm, *named, "--execution", "vectorized")
    assert (status, "under the execution vectorized" in err, "it works with --execution looped" in err) == (
        1,
        True,
        True,
    ), err
    assert metaheed("train", algorithm, *named)[0] == 0
    status, out, err = metaheed("evaluate", tmp_path / "run", "--tasks", 4, "--execution", "vectorized")
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert "cannot be judged under the execution vectorized" in err
    assert "it works with --execution looped" in err
    assert metaheed("evaluate", tmp_path / "run", "--tasks", 4)[0] == 0


def test_weights_that_a_network_was_built_with_are_kept(metaheed: Run, tmp_path: Path) -> None:
    named = [*TINY, "--backbone", "tests.networks:given_weights", "--meta-lr", 1e-12, "--out", tmp_path / "run"]
    assert metaheed("train", "maml", *named)[0] == 0
    _, meta = package.load(tmp_path / "run", "last")
    assert float((meta["body.0.conv.weight"] - 0.01).abs().max()) < 1e-6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of MAML on Conv4 with 32 filters."""
    from metaheed.cli.entry import main

    run = tmp_path_factory.mktemp("trained") / "run"
    options = [*OURS, "--iterations", 2, "--out", run]
    assert main(["train", "maml", *map(str, options)]) == 0
    return run


def test_after_load_the_network_inside_has_the_trained_weights(trained: Path) -> None:
    learner, meta = package.load(trained)
    assert isinstance(learner, NetworkLearner)
    for module in (learner.backbone.module, learner.module(meta)):
        assert all(torch.equal(p, meta[name]) for name, p in module.named_parameters())


START = [*OURS, "--iterations", 1, "--meta-lr", 1e-12]


@pytest.mark.parametrize("algorithm", ["maml", "metasgd", "metalstm++", "ta-maml"])
def test_a_run_starts_from_another(algorithm: str, trained: Path, metaheed: Run, tmp_path: Path) -> None:
    _, meta = package.load(trained)
    status, _, err = metaheed("train", algorithm, *START, "--init-from", trained, "--out", tmp_path / "run")
    assert (status, f"starting from {trained}: " in err) == (0, True), err
    learner, found = package.load(tmp_path / "run", "last")
    start = learner.initial(found)
    assert all(torch.allclose(start[name], meta[name], atol=1e-6) for name in meta)


def test_a_run_starts_from_a_file_and_needs_it_no_more(trained: Path, metaheed: Run, tmp_path: Path) -> None:
    _, meta = package.load(trained)
    file = tmp_path / "weights.safetensors"
    save_file({f"module.encoder.{name}": p for name, p in meta.items()} | {"other": torch.ones(3)}, file)
    run = tmp_path / "run"
    status, _, err = metaheed("train", "maml", *START, "--init-from", file, "--out", run, "--meta-lr", 0.01)
    assert (status, "18 of 18 parameters" in err) == (0, True), err
    kept = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "tasks.jsonl")}
    _, theta = package.load(run, "last")
    file.unlink()
    for each in (run / "checkpoints").iterdir():
        each.unlink()
    assert metaheed("train", "--resume", run)[0] == 0
    assert {name: (run / name).read_bytes() for name in kept} == kept
    assert all(torch.equal(p, theta[name]) for name, p in package.load(run, "last")[1].items())


def test_a_head_of_other_ways_is_drawn(trained: Path, metaheed: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, _, err = metaheed("train", "maml", *START, "--ways", 3, "--init-from", trained, "--out", run)
    assert (status, "16 of 18 parameters; the head (head.weight, head.bias) is drawn anew" in err) == (0, True), err
    _, meta = package.load(trained)
    _, found = package.load(run, "last")
    assert torch.allclose(found["body.3.conv.weight"], meta["body.3.conv.weight"], atol=1e-6)
    assert found["head.weight"].shape[0] == 3


def test_weights_that_do_not_fit_are_refused_and_leave_nothing(trained: Path, metaheed: Run, tmp_path: Path) -> None:
    wrong, damaged, pickled = tmp_path / "w.safetensors", tmp_path / "d.safetensors", tmp_path / "p.pth"
    save_file({"a": torch.ones(2)}, wrong)
    damaged.write_bytes(b"no such thing")
    torch.save({"a": torch.ones(2)}, pickled)
    nans = tmp_path / "n.safetensors"
    meta = package.load(trained)[1]
    save_file({name: p * float("nan") for name, p in meta.items()}, nans)
    whole, twice = tmp_path / "i.safetensors", tmp_path / "t.safetensors"
    save_file({name: p.long() for name, p in meta.items()}, whole)
    save_file({f"{k}.{name}": p + k for name, p in meta.items() for k in (1, 2)}, twice)
    for source, message in (
        (wrong, "does not fit the network: 'body.0.conv.weight' is absent there and (32, 1, 3, 3) in the network"),
        (damaged, "is no safetensors file"),
        (pickled, "a pickle can run code"),
        (nans, "not finite"),
        (whole, "is of type torch.int64, but weights are floating-point"),
        (twice, "the network's weights twice, under '1.' and under '2.'"),
        (tmp_path / "none", "there is no such file"),
        (tmp_path, "has no checkpoint to read"),
    ):
        status, _, err = metaheed("train", "maml", *START, "--init-from", source, "--out", tmp_path / "run")
        assert (status, len(err.strip().splitlines()[-1:]), message in err) == (1, 1, True), err
        assert not (tmp_path / "run").exists()
    status, _, err = metaheed(
        "train", "maml", *START, "--backbone", "conv4-64", "--init-from", trained, "--out", tmp_path / "run"
    )
    assert (status, "'body.0.conv.weight' is (32, 1, 3, 3) there and (64, 1, 3, 3)" in err) == (1, True)


def test_the_leak_of_the_release_is_refused_where_the_release_has_none(metaheed: Run, tmp_path: Path) -> None:
    for algorithm in ("ta-metalstm++",):
        status, _, err = metaheed("train", algorithm, *SMALL, "--faithful-to-release", "--out", tmp_path / "run")
        assert (status, "has this leak for maml and metasgd only, not for metalstm" in err) == (1, True), err
    with pytest.raises(ConfigError, match=r"only, not for metalstm"):
        RunConfig(learner=MetaLSTMConfig(), rule=AttendedConfig(faithful_to_release=True))


def test_python_users_are_warned_at_their_own_line() -> None:
    network = nn.Sequential(Tiny(3, (1, 16, 16)), nn.BatchNorm1d(3))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        MAML(network)
        MetaSGD(network)
    assert [Path(w.filename).name for w in said] == [Path(__file__).name] * 2


def test_a_network_loaded_for_a_run_does_not_change_it(trained: Path, metaheed: Run, tmp_path: Path) -> None:
    """Conv4 notices given weights; a run's own start is drawn all the same."""
    again = tmp_path / "again"
    options = [*OURS, "--iterations", 2, "--out", again]
    assert metaheed("train", "maml", *options)[0] == 0
    for which in ("best", "last"):
        one, other = (RunFolder(path).read_weights(which)[0] for path in (trained, again))
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert isinstance(package.load(again)[0].backbone.module, Conv4)  # type: ignore[attr-defined]


def test_paths_may_be_strings_everywhere(trained: Path, metaheed: Run, tmp_path: Path) -> None:
    run, out = str(shutil.copytree(trained, tmp_path / "run")), str(tmp_path / "out")
    assert resume(run, data_root=str(tmp_path)) == Path(run)
    config = EvaluationConfig(tasks=3, ways=3)
    evaluate_run(run, config, data_root=str(tmp_path), out=f"{out}/result.json")
    evaluate_run(run, EvaluationConfig(tasks=3))
    assert read_result(run)["tasks"] == 3
    again = str(shutil.copytree(run, tmp_path / "again"))
    assert compare([run], [again]).mean == 0
    assert report([run], f"{out}/report", ReportConfig(toy=False)).is_file()
    assert RunFolder(run).read_config() == RunFolder(Path(run)).read_config()
    frozen = freeze(Episodes(load_dataset("glyphs", str(tmp_path)), "test", 3, 1, 1, seed=0), 2)
    write_episodes(frozen, f"{out}/e.npz", with_images=True)
    assert read_episodes(f"{out}/e.npz").episodes_sha256 == frozen.episodes_sha256
    write(Recipe(default_config("maml"), {"kind": "untuned"}), f"{out}/recipes/maml.yaml")
    assert read(f"{out}/recipes/maml.yaml").config == default_config("maml")
    assert [*read_folder(f"{out}/recipes")] == ["maml"]
    assert len([*survey(str(tmp_path))]) > 1
    assert read_weights(run).keys() == package.load(run)[1].keys()
    with pytest.raises(MissingDataError):
        find_shape("omniglot", str(tmp_path))
    with pytest.raises(MissingDataError):
        find_source("omniglot", Request(str(tmp_path)))  # type: ignore[arg-type]  # a user's string
    for wrong in (
        lambda: verify(out),
        lambda: open_store(out),
        lambda: read_search(out),
        lambda: download("miniimagenet", out, Mock()),
    ):
        with pytest.raises(MetaheedError):
            wrong()
    assert stores_under(out) == []
