"""What the README says is run: its Python snippets, and its table against the evidence."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, Run
from tests.report.making import make_run
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


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("results_table")
    finally:
        sys.path.pop(0)


def test_runs_that_are_in_no_row_are_named(tool: ModuleType, tmp_path: Path) -> None:
    study = tmp_path / "study"
    made: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("a", 0, {}),
        ("again", 0, {}),
        ("cut", 1, {"done": 3}),
        ("raw", 2, {"accuracies": None}),
    )
    for name, seed, options in made:
        make_run(study / name, "maml", seed, **options)
    rows, _, below = tool.table(study, tmp_path / "nowhere").removeprefix(tool.HEADER).partition("\n\n")
    assert rows.startswith("| `results/study` | cifar-fs | 5-way 1-shot | MAML | 4 | 0 | 50.00 ± 25.00 | — |")
    assert below == (
        "In no row: `results/study/cut` (unfinished: 3 of 4 iterations); `results/study/raw` (not judged: run "
        "'metaheed evaluate' on it); `results/study/again` (a second run of that config with seed 0; a is used).\n"
    )


def test_results_table_is_the_evidences(tool: ModuleType) -> None:
    assert "README.md" in tool.TABLES
    for name, tables in tool.TABLES.items():
        text = (ROOT / name).read_text()
        assert tool.filled(text, tables) == text, name
        for part in text.split(tool.BEGIN)[1:]:
            assert part.split(tool.END)[0].count("\n|") > 1, f"a table of {name} has rows"


def test_runs_of_another_length_are_no_measure(tool: ModuleType, tmp_path: Path) -> None:
    make_run(tmp_path / "short", "maml")
    make_run(tmp_path / "long", "maml", training={"iterations": 8})
    make_run(tmp_path / "attended", "ta-maml")
    rows = tool.seed_by_seed(tmp_path).splitlines()[2:]
    assert [row.split(" | ")[3] for row in rows if row.startswith("| TA-MAML")] == ["0: +0.00 ± 0.00"]
    assert [row.split(" | ")[3] for row in rows if row.startswith("| MAML")] == ["—", "—"]


@pytest.mark.parametrize("text", ["a{0}b", "a{0}b{1}c{1}d", "a{0}b{1}c{0}d{1}", "a{1}b"])
def test_markers_that_do_not_pair_are_refused(text: str, tool: ModuleType) -> None:
    assert tool.filled(f"a{tool.BEGIN}old{tool.END}b", [lambda: "new"]) == f"a{tool.BEGIN}new{tool.END}b"
    with pytest.raises(SystemExit, match="for 1 tables"):
        tool.filled(text.format(tool.BEGIN, tool.END), [lambda: "new"])


def test_commands_parse() -> None:
    """Every train command of the README and of the experiments names options that exist."""
    pair = ("custom", "--learner", "maml", "--rule", "replayed")
    options = "".join(
        subprocess.run(
            [sys.executable, "-m", "metaheed", *command, "--help-all"], capture_output=True, text=True, check=True
        ).stdout
        for command in (("train", "ta-maml"), ("train", *pair), ("search", "ta-maml"))
    )
    script = "".join(path.read_text() for path in sorted((ROOT / "experiments").glob("*.sh")))
    used = set(re.findall(r"(--[a-z][a-z-]+)", script)) - {"--against", "--tasks"}
    commands = re.findall(r"metaheed train (?:.*\\\n)*.*", README)  # with the lines they go on in
    used |= {o for command in commands for o in re.findall(r"(--[a-z][a-z-]+)", command)}
    for option in used - {"--resume", "--recipe", "--help", "--help-all", "--learner", "--rule"}:
        assert option in options, option
