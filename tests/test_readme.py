"""What the README says is run: its Python snippets, and its table against the evidence."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Run
from tests.test_training import SMALL

README = (ROOT / "README.md").read_text()


def test_snippets_run(in_folder: Path, monkeypatch: pytest.MonkeyPatch, metaheed: Run) -> None:
    network, training, loading = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (in_folder / "mynet.py").write_text(network)
    monkeypatch.syspath_prepend(str(in_folder))
    importlib.invalidate_caches()
    names: dict[str, object] = {}
    exec(training, names)  # the README's own code
    assert set(names["gradient"]) == set(names["meta"])  # type: ignore[call-overload]
    status, _, _ = metaheed(
        "train", "ta-maml", *SMALL, "--backbone", "mynet:Net", "--iterations", 2, "--out", "trained"
    )
    assert status == 0
    (path,) = re.findall(r'metaheed.load\("(.*)"\)', loading)
    names |= {"support_x": torch.rand(5, 1, 28, 28), "support_y": torch.arange(5), "query_x": torch.rand(9, 1, 28, 28)}
    exec(loading.replace(path, "trained"), names)
    assert names["logits"].shape == (9, 5)  # type: ignore[attr-defined]


def test_results_table_is_the_evidences() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        tool = importlib.import_module("results_table")
    finally:
        sys.path.pop(0)
    assert "README.md" in tool.TABLES
    for name, write in tool.TABLES.items():
        if (ROOT / name).exists():
            inside = (ROOT / name).read_text().split(tool.BEGIN)[1].split(tool.END)[0]
            assert inside == write(), name
            assert inside.count("\n") > 2, "the table has rows"


def test_commands_parse() -> None:
    """Every train command of the README and of the experiments names options that exist."""
    pair = ("custom", "--learner", "maml", "--rule", "replayed")
    options = "".join(
        subprocess.run(
            [sys.executable, "-m", "metaheed", *command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for command in (("train", "ta-maml"), ("train", *pair), ("search", "ta-maml"))
    )
    script = "".join(path.read_text() for path in sorted((ROOT / "experiments").glob("*.sh")))
    used = set(re.findall(r"(--[a-z][a-z-]+)", script)) - {"--against", "--tasks"}
    commands = re.findall(r"metaheed train (?:.*\\\n)*.*", README)  # with the lines they go on in
    used |= {o for command in commands for o in re.findall(r"(--[a-z][a-z-]+)", command)}
    for option in used - {"--resume", "--recipe", "--help", "--learner", "--rule"}:
        assert option in options, option
