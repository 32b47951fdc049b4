"""The tables of README and docs against the evidence, and the options that the experiments name."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT, Run
from tests.report.making import make_run


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


def test_commands_of_experiments_name_options_that_exist(metaheed: Run) -> None:
    pair = ("custom", "--learner", "maml", "--rule", "replayed")
    options = ""
    for command in (("train", "ta-maml"), ("train", *pair), ("search", "ta-maml")):
        status, out, _ = metaheed(*command, "--help-all")
        assert status == 0
        options += out
    script = "".join(path.read_text() for path in sorted((ROOT / "experiments").glob("*.sh")))
    used = set(re.findall(r"(--[a-z][a-z-]+)", script)) - {"--against", "--tasks"}
    for option in used - {"--resume", "--recipe", "--help", "--learner", "--rule"}:
        assert option in options, option
