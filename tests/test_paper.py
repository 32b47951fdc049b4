"""The paper's tables: as printed, whole, and of algorithms and presets that this package has."""

import re
from pathlib import Path

import pytest

from metaheed.config import ALGORITHMS, PRESETS
from metaheed.errors import ConfigError
from metaheed.studies import paper
from metaheed.studies.paper import Cell
from tests.conftest import ROOT

SCIENCE = ROOT.parent / "shared" / "science.md"


@pytest.mark.skipif(not SCIENCE.exists(), reason="the paper's numbers are not at hand")
@pytest.mark.parametrize(("name", "title"), [("table1", "Table 1"), ("table2", "Table 2")])
def test_tables_are_the_papers(name: str, title: str) -> None:
    text = Path(SCIENCE).read_text(encoding="utf-8").split(f"| {title} |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    printed = {row[0].lower(): tuple(map(float, row[1:])) for row in rows}
    assert printed == paper.TABLES[name].rows
    names, data = re.findall(r"(mini|tiered|Omniglot)? ?(\d+)w(\d)s", text.splitlines()[0]), ""
    columns = []
    for prefix, ways, shots in names:
        data = {"mini": "miniimagenet", "tiered": "tieredimagenet", "Omniglot": "omniglot", "": data}[prefix]
        columns.append((data, int(ways), int(shots)))
    assert tuple(columns) == paper.TABLES[name].columns


def test_cells() -> None:
    count = {"table1": 2 * (8 + 2 + 8), "table2": 7 * (8 + 8), "figures": 6 * 3}
    for experiment in paper.EXPERIMENTS:
        cells = paper.experiment_cells(experiment)
        assert len(cells) == len({*cells}) == count[experiment]
        assert {c.algorithm for c in cells} == {*paper.experiment_algorithms(experiment)}
    assert len(paper.all_cells()) == 8 * 16 + 2 * 2
    for cell in paper.all_cells():
        assert cell.algorithm in ALGORITHMS
        assert (cell.ways, cell.shots) in PRESETS[cell.data], cell
    assert (
        {*paper.LABELS}
        == {c.algorithm for c in paper.all_cells()}
        == {*paper.COUNTERPART} | {"maml", "metasgd", "metalstm"}
    )
    with pytest.raises(ConfigError, match="did you mean 'table2'"):
        paper.experiment_cells("table3")


def test_accuracy() -> None:
    assert paper.accuracy(Cell("tieredimagenet", 10, 5, "ta-metalstm++")) == 51.35
    assert paper.accuracy(Cell("omniglot", 20, 1, "metalstm")) == 90.63
    assert paper.accuracy(Cell("cifar-fs", 5, 1, "maml")) is None
