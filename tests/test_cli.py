"""The command line's own answers: help, mistakes, and the demo."""

import subprocess
import sys
from pathlib import Path

import pytest

from metaheed.studies.demo import demo
from tests.conftest import ROOT, Begin, Run
from tests.test_training import SMALL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "mamll"], "unknown algorithm 'mamll': did you mean 'maml'"),
        (["trian", "maml"], "unknown command 'trian': did you mean 'train'"),
        (["train", "maml", "--data", "omnigloot"], "unknown data set 'omnigloot': did you mean 'omniglot'"),
        (["train", "maml", "--data", "omniglot"], "omniglot needs --data-root"),
        (["train", "maml", "--data", "cifar-fs", "--data-root", "nowhere"], "nowhere is not a folder"),
        (["train", "maml", "--backbone", "conv4-31"], "unknown backbone 'conv4-31': did you mean 'conv4-32'"),
        (["train", "maml", "--backbone", "tests.networks:WithDropout"], "has dropout 0.5"),
        (["train", "maml", "--ways", "161"], "161 ways, but split 'val' of glyphs has 160 classes"),
        (["train", "maml", "--ways", "605", "--test-ways", "5"], "605 ways, but split 'train' of glyphs has 604"),
        (["train", "maml", "--shots", "10"], "10 shots + 15 queries = 25 images per class, but class 'U+"),
        (["train", "maml", "--test-shots", "15", "--test-queries", "6"], "15 shots + 6 queries = 21 images"),
        (["train", "maml", "--test-ways", "6"], "--test-ways is 6, but maml's head has one output for each of the 5"),
        (["train", "maml", "--ways", "1"], "--ways is 1, but it must be at least 2"),
        (["train", "maml", "--shots", "0"], "--shots is 0, but it must be at least 1"),
        (["train", "maml", "--fast-lr", "-0.1"], "--fast-lr is -0.1, but it must be a finite number above 0"),
        (["train", "maml", "--meta-lr", "0"], "--meta-lr is 0.0, but it must be a finite number above 0"),
        (["train", "maml", "--meta-lr", "nan"], "--meta-lr is nan, but it must be a finite number above 0"),
        (["train", "ta-maml", "--attention-lr", "-1"], "--attention-lr is -1.0, but it must be a finite number"),
        (["train", "maml", "--meta-batch-size", "0"], "--meta-batch-size is 0, but it must be at least 1"),
        (["train", "maml", "--iterations", "-5"], "--iterations is -5, but it must be at least 1"),
        (["train", "maml", "--seed", "-1"], "--seed is -1, but it must be at least 0"),
        (["train", "maml", "--clip-norm", "0"], "--clip-norm is 0.0, but it must be a finite number above 0"),
        (["train", "maml", "--chunk-size", "2", "--execution", "looped"], "has no chunks"),
        (["train", "maml", "--device", "tpu"], "--device is 'tpu', but it must be cpu, cuda, cuda:N or auto"),
        (["train", "maml", "--device", "cuda:99"], "--device is 'cuda:99', but PyTorch finds"),
        (["train", "--resume", "nowhere"], "nowhere is not a run folder"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["evaluate", "nowhere", "--tasks", "1"], "--tasks is 1, but it must be at least 2"),
        (["compare", "a", "--against", "b"], "a has no result.json"),
        (["report", "nowhere", "--out", "r"], "nowhere is not a folder: name run folders"),
        (["report", "nowhere", "--out", "r", "--thresholds", "101"], "each must be a percentage above 0"),
        (["compare", "a", "--against", "b", "--data", "omniglot"], "a is not a run folder"),
        (["data", "downlaod"], "unknown data command 'downlaod': did you mean 'download'"),
        (["data", "download", "omniglt"], "unknown data set to download 'omniglt': did you mean 'omniglot'"),
        (["data", "episodes", "--data", "omniglot", "--out", "f"], "omniglot needs --data-root"),
        (["data", "episodes", "--tasks", "1", "--out", "f"], "--tasks is 1, but it must be at least 2"),
        (["data", "episodes", "--ways", "600", "--out", "f"], "600 ways, but split 'test' of glyphs has"),
    ],
)
def test_mistakes_get_a_line_and_leave_nothing(
    arguments: list[str], message: str, metaheed: Run, in_folder: Path
) -> None:
    status, out, err = metaheed(*arguments)
    assert status in (1, 2)
    text = " ".join((out + err).replace("│", " ").split())
    assert message in text
    assert "tyro" not in text
    assert not list(in_folder.iterdir())


def test_options_of_another_algorithm_are_not_swallowed(metaheed: Run) -> None:
    status, out, err = metaheed("train", "maml", "--attention-lr", "0.1")
    assert status == 1
    assert "attention-lr" in out + err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "ta-maml"],
        ["evaluate"],
        ["compare"],
        ["report"],
        ["demo"],
        ["data", "download"],
        ["data", "episodes"],
    ],
)
def test_help(arguments: list[str], metaheed: Run) -> None:
    status, out, _ = metaheed(*arguments, "--help-all")
    assert status == 0
    assert f"usage: metaheed {arguments[0]}" in out
    if arguments == ["data", "episodes"]:
        assert "--with-images" in out
    if arguments == ["train"]:
        assert "--resume RUN" in out
    if arguments[-1] == "ta-maml":
        for option in (
            *("--data ", "--data-root", "--ways", "--shots", "--queries", "--iterations", "--meta-batch-size"),
            *("--adaptation-steps", "--fast-lr", "--meta-lr", "--attention-lr", "--seed", "--device", "--backbone"),
            *("--out", "--test-ways", "--test-shots", "--test-queries", "--tensorboard"),
        ):
            assert option in out


def test_usage(metaheed: Run) -> None:
    assert metaheed("--help")[0] == 0
    assert metaheed()[0] == 2
    assert metaheed("--version")[1].startswith("metaheed 0.")


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, metaheed.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_plain_lines_when_not_a_terminal(begin: Begin, in_folder: Path) -> None:
    done = begin("train", "maml", *SMALL, "--iterations", "5", "--out", "run")
    assert done.wait() == 0, done.err
    assert "iteration 5/5  loss" in done.err
    assert "it/s  left 0:00:00" in done.err
    assert "validation after 4" in done.err
    assert "validation after 5" in done.err, "one more after the last iteration"
    assert "\x1b" not in done.err
    assert done.out == "run is trained; judge it with 'metaheed evaluate run'\n"


def test_a_network_beside_the_user_is_found(begin: Begin, in_folder: Path) -> None:
    (in_folder / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, ways, image_shape):\n"
        "        super().__init__(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, ways))\n"
    )
    arguments = ["train", "maml", *SMALL, "--backbone", "mine:Net", "--iterations", "2", "--out", "run"]
    process = begin(*arguments, before="import sys\nsys.path[0] = '/'\n")
    assert process.wait() == 0, process.err


def test_real_files_of_small_data_sets(cifar_folder: Path, omniglot_zips: Path, metaheed: Run, tmp_path: Path) -> None:
    for data, root, queries in (("cifar-fs", cifar_folder, 3), ("omniglot", omniglot_zips, 1)):
        run = tmp_path / data
        arguments = ["--data", data, "--data-root", root, *SMALL, "--queries", queries, "--iterations", 2]
        assert metaheed("train", "ta-maml", *arguments, "--out", run)[0] == 0
        assert metaheed("evaluate", run, "--tasks", 5)[0] == 0


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    figure = demo(tmp_path / "demo", iterations=2, seed=0, tasks=10)
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "untrained",
        "before adaptation",
        "after adaptation",
        "MAML",
        "TA-MAML",
        "TA-MAML minus MAML on the same",
    ):
        assert text in out
    assert "covers test tasks only, one training seed" in out
    from PIL import Image

    with Image.open(figure) as picture:
        assert picture.format == "PNG"
        assert picture.width > 800
    demo(tmp_path / "demo", iterations=2, seed=0, tasks=10)
    assert "is finished" in capsys.readouterr().err, "what is there is not done again"
    from metaheed.errors import RunError

    with pytest.raises(RunError, match=r"demo of other settings"):
        demo(tmp_path / "demo", iterations=3, seed=0, tasks=10)


def test_makefile_offers_the_two_commands() -> None:
    targets = (ROOT / "Makefile").read_text()
    assert "\ndemo:" in targets
    assert "\ntest:" in targets


def test_a_command_does_not_wait_for_what_it_does_not_use() -> None:
    """Deterministic mode is on, and PyTorch's compiler, which takes seconds to import, was not imported for it."""
    code = (
        "import sys, torch, metaheed.cli.parse as parse; parse.tune_process(); "
        "assert torch.are_deterministic_algorithms_enabled(); "
        "assert torch.is_deterministic_algorithms_warn_only_enabled(); "
        "sys.exit('torch._dynamo' in sys.modules or 'torch._inductor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
