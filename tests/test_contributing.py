"""CONTRIBUTING.md's examples, carried out: each adds a file and rows to a copy of the package, and works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILE = re.compile(r"new file `(?P<file>[^`]+)`:\n\n```python\n(?P<text>.*?)```", re.DOTALL)
ROW = re.compile(
    r"In `(?P<file>[^`]+)`,\s(?P<where>before|after) `(?P<line>[^`]+)`:\n\n```(?:python|text)\n(?P<text>.*?)```",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package to which all the examples were added."""
    copy = tmp_path_factory.mktemp("contributed")
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for example in FILE.finditer(TEXT):
        assert not (copy / example["file"]).exists()
        (copy / example["file"]).write_text(example["text"], encoding="utf-8")
    for example in ROW.finditer(TEXT):
        path = copy / example["file"]
        text, line = path.read_text(encoding="utf-8"), example["line"] + "\n"
        assert text.count(line) == 1, example["line"]
        added = example["text"]
        path.write_text(text.replace(line, line + added if example["where"] == "after" else added + line), "utf-8")
    return copy


@pytest.mark.parametrize("section", ["A learner", "A batch rule", "A data set"])
def test_each_is_one_file_and_rows_in_at_most_two(section: str) -> None:
    text = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    assert len(FILE.findall(text)) == 1
    assert 1 <= len({row["file"] for row in ROW.finditer(text)}) <= 2


def test_they_train_and_are_judged(package: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (240, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "doodles.npz", images=images, labels=np.arange(240) % 24)
    setting = ["--learner", "sign-maml", "--rule", "trimmed", "--data", "doodles", "--data-root", str(tmp_path)]
    size = ["--iterations", "2", "--val-tasks", "2", "--queries", "2", "--adaptation-steps", "1", "--threads", "1"]
    code = (
        "import sys; from metaheed.cli import main; import metaheed; print(metaheed.__file__);"
        f"sys.exit(main(['train', 'custom', *{setting}, *{size}, '--out', 'run'])"
        "or main(['evaluate', 'run', '--tasks', '4']) or main(['data', 'list', '--data-root', '.']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(package / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(package) in done.stdout
    assert "trimmed-sign-maml on doodles test" in done.stdout
