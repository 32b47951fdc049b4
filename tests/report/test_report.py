"""The page, its Markdown and its figures, through the command line as a user makes them."""

import html
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import metaheed.studies.report.write as package
from metaheed.config import ReportConfig, ToyConfig
from metaheed.errors import RunError
from metaheed.studies.report import report
from tests.conftest import ROOT, Run
from tests.report.making import batch, make_run, shifted, write_lines
from tests.test_training import SMALL

EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """Checks that elements are closed in their order; collects tags, attributes, tables and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data


def page_of(out: Path) -> Page:
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    return Page(text)


def rows_with(page: Page, *cells: str) -> list[list[str]]:
    return [row for row in page.rows if set(cells) <= set(row)]


def attention_lines(count: int = 4) -> list[dict[str, object]]:
    weights = [0.1, 0.2, 0.3, 0.4]
    return [
        batch(
            i, [1, 2, 3, 4], weights, initial_loss=[2.0] * 4, grad_norm=[4, 3, 2, 1], query_accuracy=[0.5, 0.4, 0.4, 0]
        )
        for i in range(1, count + 1)
    ]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """MAML, TA-MAML and the 2B control with three seeds, TAML with one."""
    folder = tmp_path / "study"
    for seed, shift in enumerate((0.01, 0.02, 0.06)):
        make_run(folder / f"maml{seed}", "maml", seed)
        make_run(folder / f"ta{seed}", "ta-maml", seed, shifted(shift), tasks=attention_lines())
        make_run(folder / f"2b{seed}", "uniform-2b-maml", seed, shifted(0.1 + shift / 100))
    make_run(folder / "taml", "taml", 0, shifted(-0.05))
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, for tests that read tables and text alone: drawing is most of a report's time."""
    monkeypatch.setattr(package, "all_figures", lambda *_: [])


@pytest.mark.usefixtures("undrawn")
def test_differences_p_values_and_labels(study: Path, metaheed: Run, tmp_path: Path) -> None:
    status, out, _ = metaheed("report", study, "--out", tmp_path / "r")
    assert (status, out) == (0, f"report: {tmp_path / 'r' / 'report.html'}\n")
    page = page_of(tmp_path / "r")
    (row,) = rows_with(page, "TA-MAML", "MAML", "+3.00")
    # One of two tests of its table: TAML has one seed, and so none. 0.1885 is its own p, and Holm's of one test.
    assert row == [
        *("cifar-fs 5-way 1-shot", "TA-MAML", "MAML", "53.00 against 50.00", "3", "+3.00", "6.57"),
        *("0.188", "0.188", "1.13", "8 against 4", "—", ""),
    ]
    (row,) = rows_with(page, "TAML", "MAML", "-5.00")
    assert row[4:10] == ["1", "-5.00", "— (one seed)", "—", "—", "1.13 (test tasks only, one training seed)"]
    (row,) = rows_with(page, "TA-MAML", "MAML, uniform over 2B tasks", "-7.03")
    assert row[10] == "8 against 8 (equal)"
    # Two tests in the family of controls: the smaller p is doubled.
    (other,) = rows_with(page, "MAML, uniform over 2B tasks", "MAML", "+10.03")
    assert (other[7], other[8]) == ("< 0.001", "< 0.001")
    text = (tmp_path / "r" / "report.md").read_text()
    assert "test tasks only, one training seed" in text
    assert "Holm: adjusted over the 1 test of this table" in text
    assert "Holm: adjusted over the 2 tests of this table" in text


def test_the_papers_tables_with_missing_cells(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / "in" / f"m{seed}", "metalstm++", seed, shifted(seed / 10), data="miniimagenet")
    # Neither is a cell of the table: an option of the rule, and training on other ways.
    make_run(tmp_path / "in" / "reuse", "ta-maml", data="miniimagenet", rule={"attention_reuse_probe": True})
    make_run(
        tmp_path / "in" / "ways", "maml", data="miniimagenet", episodes={"ways": 10, "test_ways": 5}, result={"ways": 5}
    )
    report([tmp_path / "in"], tmp_path / "out")
    page = page_of(tmp_path / "out")
    for table in (1, 2):
        paper, ours = [row for row in page.rows if row[:1] == ["MetaLSTM++"] and row[1] in ("paper", "ours")][
            2 * table - 2 : 2 * table
        ]
        assert paper[:4] == ["MetaLSTM++", "paper", "48.00", "62.73"]
        # 50 and 60: mean 55, t(0.975, 1) · 10/2 = 63.53.
        assert ours[:4] == ["MetaLSTM++", "ours", "55.00 ± 63.53 (2 seeds)", "—"]
        assert set(ours[3:]) == {"—"}
        assert len(ours) == {1: 12, 2: 10}[table]
    for row in page.rows:
        if row[:2] in (["TA-MAML", "ours"], ["MAML", "ours"]):
            assert set(row[2:]) == {"—"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "1 of 20 cells are filled" in text
    assert "1 of 56 cells are filled" in text
    assert "cannot be 95% intervals" in text
    assert "Figure 1: not drawn" in text


@pytest.mark.usefixtures("undrawn")
def test_what_is_not_as_in_the_paper_is_said_below_its_tables(tmp_path: Path) -> None:
    small: dict[str, Any] = {"learner": {"backbone": "conv4-64"}, "episodes": {"queries": 3}}
    make_run(tmp_path / "in" / "m", "maml", data="miniimagenet", learner={"fast_lr": 0.3})
    make_run(tmp_path / "in" / "t", "taml", data="miniimagenet", **small)
    make_run(tmp_path / "in" / "long", "metasgd", data="miniimagenet", training={"iterations": 6})
    report([tmp_path / "in"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "ours were 4, 6. " in text
    said = "Not as in the paper but for rates and iterations: miniimagenet 5-way 1-shot TAML: queries 3 instead of 15, "
    assert f"{said}test-queries 3 instead of 15, backbone conv4-64 instead of conv4-32. " in text
    cells = {row[0]: row[2] for row in page_of(tmp_path / "out").rows if row[1:2] == ["ours"] and row[2] != "—"}
    assert cells == {
        **dict.fromkeys(("MAML", "TAML"), "50.00 (1 seed)4 iterations"),
        "MetaSGD": "50.00 (1 seed)6 iterations",
    }


@pytest.mark.usefixtures("undrawn")
def test_settings_that_the_paper_lacks_have_a_table_of_their_own(tmp_path: Path) -> None:
    for data, shift in (("cifar-fs", 0.1), ("fc100", 0.2), ("miniimagenet", 0.0)):
        make_run(tmp_path / "in" / data, "ta-maml", accuracies=shifted(shift), data=data)
    make_run(tmp_path / "in" / "other", "ta-maml", data="glyphs", accuracies=None)
    report([tmp_path / "in"], tmp_path / "out")
    rows = [row for row in page_of(tmp_path / "out").rows if len(row) == 3]
    assert rows[0] == ["", "cifar-fs5-way 1-shot", "fc1005-way 1-shot"]
    assert ["TA-MAML", "60.00 (1 seed)", "70.00 (1 seed)"] in rows
    assert ["MAML", "—", "—"] in rows
    assert "2 of 16 cells are filled" in (tmp_path / "out" / "report.md").read_text()
    report([tmp_path / "in" / "miniimagenet"], tmp_path / "paper")
    assert "that the paper's tables lack" not in (tmp_path / "paper" / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_the_papers_differences_beside_ours(tmp_path: Path) -> None:
    for algorithm in ("maml", "ta-maml", "taml"):
        make_run(tmp_path / "in" / algorithm, algorithm, data="miniimagenet")
    make_run(tmp_path / "in" / "reuse", "ta-maml", data="miniimagenet", rule={"attention_reuse_probe": True})
    report([tmp_path / "in"], tmp_path / "out")
    found = {row[1]: row[11] for row in page_of(tmp_path / "out").rows if len(row) == 13 and row[2] == "MAML"}
    assert found == {"TA-MAML": "+2.26", "TAML": "+0.16", "TA-MAML (attention-reuse-probe)": "—"}


@pytest.mark.usefixtures("undrawn")
def test_mismatches_are_named_on_the_page(tmp_path: Path) -> None:
    make_run(tmp_path / "in" / "m")
    make_run(tmp_path / "in" / "t", "ta-maml", training={"iterations": 6}, tasks=attention_lines(6))
    make_run(tmp_path / "in" / "cut", "maml", 7, done=3)
    make_run(tmp_path / "in" / "unjudged", "maml", 8, accuracies=None)
    report([tmp_path / "in"], tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert rows_with(page, "TA-MAML", "MAML", "iterations is 6 against 4")
    assert rows_with(page, str(tmp_path / "in" / "cut"), "unfinished: 3 of 4 iterations")
    assert rows_with(page, str(tmp_path / "in" / "unjudged"), "not judged: run 'metaheed evaluate' on it")
    assert not rows_with(page, "TA-MAML", "MAML", "+0.00")


def test_one_run_is_enough(tmp_path: Path, metaheed: Run) -> None:
    run = make_run(tmp_path / "run")
    assert metaheed("report", run, "--out", tmp_path / "out")[0] == 0
    page = page_of(tmp_path / "out")
    (row,) = rows_with(page, "MAML", "0: 50.00")
    assert row[2:8] == ["4", "1", "50.00", "—", "25.00", "4"]
    names = sorted(p.name for p in (tmp_path / "out" / "figures").iterdir())
    assert names == ["figure3-cifar-fs-5way1shot.png", "figure3-cifar-fs-5way1shot.svg"]


@pytest.mark.usefixtures("undrawn")
def test_iterations_to_an_accuracy(tmp_path: Path, metaheed: Run) -> None:
    slow = {2: 0.2, 4: 0.30, 6: 0.40, 8: 0.50}
    quick = {2: 0.3, 4: 0.45, 6: 0.46, 8: 0.47}
    steps: dict[str, Any] = {"training": {"iterations": 8}}
    make_run(tmp_path / "in" / "m0", "maml", 0, validations=slow, **steps)
    make_run(tmp_path / "in" / "m1", "maml", 1, validations={k: v - 0.02 for k, v in slow.items()}, **steps)
    make_run(tmp_path / "in" / "t", "ta-maml", 0, validations=quick, tasks=attention_lines(8), **steps)
    arguments = ["report", tmp_path / "in", "--out", tmp_path / "out"]
    assert metaheed(*arguments, "--thresholds", 37.5, 48.5)[0] == 0
    page = page_of(tmp_path / "out")
    by_arm = {(row[1], row[2]): row[3:] for row in page.rows if len(row) == 10 and row[1] in ("37.50", "48.50")}
    assert by_arm == {
        ("37.50", "MAML"): ["6", "6", "1.00", "24", "1.00", "0, 1", "2 of 2, median 6"],
        ("37.50", "TA-MAML"): ["4", "4", "0.67", "32", "1.33", "0", "1 of 1, median 4"],
        ("48.50", "MAML"): ["8", "8", "1.00", "32", "1.00", "0, 1", "1 of 2, median 8"],
        ("48.50", "TA-MAML"): ["not reached", "—", "—", "—", "—", "—", "0 of 1"],
    }
    # Without --thresholds: 5 points and 1 point below the best of MAML's mean curve, 0.49.
    assert metaheed(*arguments)[0] == 0
    assert {row[1] for row in page_of(tmp_path / "out").rows if len(row) == 10 and row[2] == "TA-MAML"} == {
        "44.00",
        "48.00",
    }
    status, _, err = metaheed(*arguments, "--thresholds", 0)
    assert (status, "each must be a percentage above 0" in err) == (1, True)


@pytest.mark.usefixtures("undrawn")
def test_multiples_are_over_the_seeds_that_both_sides_have(tmp_path: Path) -> None:
    slow, quick = {2: 0.1, 4: 0.3, 6: 0.4, 8: 0.6}, {2: 0.5, 4: 0.6, 6: 0.6, 8: 0.7}
    steps: dict[str, Any] = {"training": {"iterations": 8}}
    lines: dict[str, Any] = {"tasks": attention_lines(8)}
    make_run(tmp_path / "in" / "m0", "maml", 0, validations=slow, **steps)
    make_run(tmp_path / "in" / "m1", "maml", 1, validations=quick, **steps)
    make_run(tmp_path / "in" / "t1", "ta-maml", 1, validations=quick, **lines, **steps)
    other: dict[str, Any] = {"rule": {"attention_standardize": True}, **lines, **steps}
    make_run(tmp_path / "in" / "e0", "ta-maml", 0, validations=slow, **other)
    make_run(tmp_path / "in" / "e2", "ta-maml", 2, validations=quick, **other)
    make_run(tmp_path / "in" / "r2", "taml", 2, validations=quick, **steps)
    report([tmp_path / "in"], tmp_path / "out", ReportConfig(thresholds=(40.0,)))
    by_arm = {row[2]: row[3:9] for row in page_of(tmp_path / "out").rows if len(row) == 10 and row[1] == "40.00"}
    assert by_arm == {
        "MAML": ["4", "4", "1.00", "16", "1.00", "0, 1"],
        "TA-MAML": ["2", "2", "1.00", "16", "2.00", "1"],
        "TA-MAML (attention-standardize)": ["4", "4", "1.00", "32", "2.00", "0"],
        "TAML": ["2", "2", "—", "8", "—", "—"],
    }


@pytest.mark.usefixtures("undrawn")
def test_of_several_uniform_arms_the_nearest_is_the_measure(tmp_path: Path) -> None:
    slow, quick = {2: 0.2, 4: 0.3}, {2: 0.3, 4: 0.4}
    make_run(tmp_path / "in" / "a", "maml", learner={"fast_lr": 0.01}, validations=slow)
    make_run(tmp_path / "in" / "b", "maml", learner={"fast_lr": 0.3}, validations=quick)
    make_run(tmp_path / "in" / "t", "ta-maml", learner={"fast_lr": 0.3}, validations=quick, tasks=attention_lines())
    report([tmp_path / "in"], tmp_path / "out", ReportConfig(thresholds=(30.0,)))
    rows = page_of(tmp_path / "out").rows
    ratios = {row[2]: (row[3], row[5]) for row in rows if len(row) == 10 and row[1] == "30.00"}
    assert ratios == {
        "MAML [fast-lr 0.01]": ("4", "1.00"),
        "MAML [fast-lr 0.3]": ("2", "1.00"),
        "TA-MAML": ("2", "1.00"),
    }


@pytest.mark.usefixtures("undrawn")
def test_cost(tmp_path: Path) -> None:
    here = {"device": "cpu", "processor": "P", "threads": 1, "execution": "looped"}

    def timing(seconds: float, mebibytes: int) -> list[dict[str, object]]:
        return [{"iteration": 4, "iterations": 4, "seconds": seconds, "peak_bytes": mebibytes * 2**20, **here}]

    make_run(tmp_path / "in" / "m", timing=timing(2.0, 100))
    make_run(tmp_path / "in" / "t0", "ta-maml", 0, tasks=attention_lines(), timing=timing(4.0, 150))
    make_run(tmp_path / "in" / "t1", "ta-maml", 1, tasks=attention_lines(), timing=timing(4.4, 150))
    make_run(tmp_path / "in" / "taml", "taml")
    report([tmp_path / "in"], tmp_path / "out")
    page = page_of(tmp_path / "out")
    place = "cpu, P, 1 thread, looped"
    (row,) = rows_with(page, "MAML", place)
    assert row[2:] == ["4", "1", "16", "0.500", "1.00", "100", "1.00", place]
    (row,) = rows_with(page, "TA-MAML", place)
    assert row[2:] == ["8", "1", "32", "1.050 (1.000 – 1.100)", "2.10", "150", "1.50", place]
    (row,) = rows_with(page, "TAML", "not recorded")
    assert row[2:] == ["4", "1", "16", "not recorded", "—", "not recorded", "—", "—"]


def test_training_records_its_cost(metaheed: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert metaheed("train", "ta-maml", *SMALL, "--iterations", 5, "--out", run)[0] == 0
    assert metaheed("train", "--resume", run, "--iterations", 7)[0] == 0
    lines = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [3, 4, 5, 6, 7]
    assert sum(line["iterations"] for line in lines) == 7
    assert all(line["seconds"] > 0 and line["peak_bytes"] > 10 * 2**20 and line["threads"] == 1 for line in lines)
    assert metaheed("evaluate", run, "--tasks", 5)[0] == 0
    assert metaheed("report", run, "--out", tmp_path / "out")[0] == 0
    (row,) = [row for row in page_of(tmp_path / "out").rows if row[1:2] == ["TA-MAML"] and "1 thread" in row[-1]]
    assert float(row[5].split()[0]) > 0
    assert "figure5-glyphs-5way1shot.svg" in {p.name for p in (tmp_path / "out" / "figures").iterdir()}


def test_correlations_and_figures(study: Path, tmp_path: Path) -> None:
    report([study], tmp_path / "out")
    page = page_of(tmp_path / "out")
    for words, value in (
        ("gradient norm", "-1.000"),
        ("loss after adaptation", "+1.000"),
        ("loss after / before", "+1.000"),
    ):
        (row,) = rows_with(page, "TA-MAML", words)
        assert row[3] == "3"
        assert row[4].startswith(value)
        assert row[5] == "0 of 12"
    (row,) = rows_with(page, "TA-MAML", "100%")
    assert row[2:] == ["3", "0.250", "0.100", "0.400", "0.112", "0.112", "100%", "1.00 of 4"]
    pictures = sorted((tmp_path / "out" / "figures").glob("*.png"))
    assert [p.name[:8] for p in pictures] == ["figure3-", "figure4-", "figure5-"]
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.width >= 700
        svg = picture.with_suffix(".svg").read_bytes()
        assert ET.fromstring(svg).tag.endswith("svg")
        assert len(svg) < 500_000
        assert b"<dc:date>" not in svg


def test_figure_1_is_the_toys(metaheed: Run, tmp_path: Path) -> None:
    make_run(tmp_path / "in" / "run")
    assert metaheed("toy", "--out", tmp_path / "in" / "toy", "--iterations", 3)[0] == 0
    assert metaheed("report", tmp_path / "in", "--out", tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert f"Read from {tmp_path / 'in' / 'toy' / 'toy.json'}" in html.unescape(text)
    assert (tmp_path / "out" / "figures" / "figure1-toy.png").exists()
    assert metaheed("report", tmp_path / "in" / "run", "--out", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "figures" / "figure1-toy.png").exists(), "it is computed only if asked for"


def test_what_is_no_toy_or_a_second_one_is_named_and_left_out(
    metaheed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "in" / "run")
    (tmp_path / "in" / "game").mkdir()
    (tmp_path / "in" / "game" / "toy.json").write_text('{"optima": 3}')
    monkeypatch.setattr(package, "ToyConfig", lambda: ToyConfig(iterations=2))
    report([tmp_path / "in"], tmp_path / "computed", ReportConfig(toy=True))
    assert "Computed with the defaults" in (tmp_path / "computed" / "report.md").read_text()
    (row,) = rows_with(page_of(tmp_path / "computed"), str(tmp_path / "in" / "game"))
    assert "is not what 'metaheed toy' writes" in row[1]
    for name in ("toy", "toy2"):
        assert metaheed("toy", "--out", tmp_path / "in" / name, "--iterations", 3)[0] == 0
    report([tmp_path / "in"], tmp_path / "out")
    assert f"Read from {tmp_path / 'in' / 'toy' / 'toy.json'}" in html.unescape(
        (tmp_path / "out" / "report.html").read_text()
    )
    (row,) = rows_with(page_of(tmp_path / "out"), str(tmp_path / "in" / "toy2"))
    assert row[1] == f"a second toy; figure 1 is of {tmp_path / 'in' / 'toy'}"


def test_the_toy_is_computed_if_it_is_asked_for_and_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "ToyConfig", lambda: ToyConfig(iterations=2))
    make_run(tmp_path / "run")
    said: list[str] = []
    report([tmp_path / "run"], tmp_path / "out", ReportConfig(toy=True), say=said.append)
    assert (tmp_path / "out" / "figures" / "figure1-toy.svg").exists()
    assert any("toy of figure 1" in line for line in said)


def test_nothing_from_a_file_is_markup(tmp_path: Path) -> None:
    evil = '<img src=x onerror=alert(1)> "&amp; `x` | [a](x:y) $\\frac$ {{ 7*7 }} \x1b'
    data = "<script>alert(1)</script> $x_"
    folder = tmp_path / evil
    make_run(folder / "maml", data=data)
    make_run(folder / "ta", "ta-maml", data=data, tasks=attention_lines())
    make_run(folder / "broken")
    (folder / "broken" / "config.yaml").write_text(f"algorithm: {json.dumps(evil)}\n")
    backbone = "<b>m:Net</b>"
    make_run(folder / "net", "ta-maml", 1, data=data, learner={"backbone": backbone}, tasks=attention_lines())
    report([folder], tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("data:image/svg+xml;base64,") for name, value in page.attributes if name == "src")
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    shown = evil.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert any(shown in cell for row in page.rows for cell in row), "as text it is shown"
    assert any(data in cell for row in page.rows for cell in row)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert "[a](" not in text
    columns = 0
    for line in text.splitlines():
        found = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert 0 in (columns, found) or columns == found, line
        columns = found
    for path in (tmp_path / "out" / "figures").iterdir():
        assert re.fullmatch(r"figure\d-[A-Za-z0-9-]+\.(png|svg)", path.name)
        if path.suffix == ".svg":
            assert not [e for e in ET.fromstring(path.read_bytes()).iter() if str(e.tag).endswith("script")]


def test_the_page_stands_alone_and_is_in_order(study: Path, tmp_path: Path) -> None:
    report([study], tmp_path / "out")
    page = page_of(tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    for name, value in page.attributes:
        if name in ("src", "href", "action", "data", "srcset"):
            assert value.startswith(("#", "data:")), (name, value)
    assert "@import" not in text
    assert "url(" not in text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in page.attributes if name == "href"} <= set(ids)
    assert {"lang", "alt", "charset"} <= {name for name, _ in page.attributes}
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    markdown = (tmp_path / "out" / "report.md").read_text()
    linked = re.findall(r"!\[[^\n]*\]\((figures/[^)]+)\)", markdown)
    assert len(linked) == 3
    assert all((tmp_path / "out" / name).exists() for name in linked)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_runs_give_the_same_bytes_and_replace_what_was_there(study: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        report([study], tmp_path / name)
    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "two")
    for path in [*study.glob("ta*")][1:]:
        (path / "result.json").unlink()
    (tmp_path / "one" / "figures" / "figure4-older.png").write_bytes(b"of an earlier report")
    report([study], tmp_path / "one")
    after = contents(tmp_path / "one")
    assert after["report.html"] != first["report.html"]
    assert after.keys() == first.keys(), "figures of an earlier report do not stay"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "study", "two"], "nothing is left beside it"


def test_whole_or_not_at_all(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report([study], tmp_path / "out")
    before = contents(tmp_path / "out")

    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device", "out")

    monkeypatch.setattr(package, "to_markdown", fail)
    for out in (tmp_path / "out", tmp_path / "new" / "deep"):
        with pytest.raises(RunError, match="No space left"):
            report([study], out)
    assert contents(tmp_path / "out") == before
    assert not [*(tmp_path / "new").iterdir()]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_folder_of_something_else_is_not_replaced(study: Path, metaheed: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for out in (study, tmp_path / "mine"):
        status, _, err = metaheed("report", study, "--out", out)
        assert status == 1
        assert "is no part of a report: it would be lost, so choose another --out" in err
        assert out.exists()
    (tmp_path / "file").write_text("x")
    assert "is not a folder: choose another --out" in metaheed("report", study, "--out", tmp_path / "file")[2]
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_the_current_folder_is_not_replaced(
    study: Path, metaheed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    status, _, err = metaheed("report", study, "--out", ".")
    assert (status, "is the current folder, which cannot be replaced: name a folder in it" in err) == (1, True)
    assert not list((tmp_path / "here").iterdir())


def test_no_run_named_is_an_error(metaheed: Run, tmp_path: Path) -> None:
    status, _, err = metaheed("report", "--out", tmp_path / "out")
    assert (status, err) == (1, "error: no run was named: name run folders, or folders that hold some\n")


def test_no_judged_run_is_an_error(metaheed: Run, tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "one", accuracies=None)
    make_run(tmp_path / "a" / "two", done=1, accuracies=None)
    status, _, err = metaheed("report", tmp_path / "a", "--out", tmp_path / "out")
    assert status == 1
    assert "none of the 2 runs that were found is finished and judged" in err
    assert "not judged: run 'metaheed evaluate' on it" in err
    (tmp_path / "b").mkdir()
    assert "no run folder (one with a config.yaml)" in metaheed("report", tmp_path / "b", "--out", tmp_path / "out")[2]
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_read_leave_the_accuracies(tmp_path: Path) -> None:
    make_run(tmp_path / "in" / "m")
    make_run(tmp_path / "in" / "t", "ta-maml", tasks=attention_lines(3))
    (run,) = [path for path in (tmp_path / "in").iterdir() if path.name == "t"]
    report([tmp_path / "in"], tmp_path / "out")
    page = page_of(tmp_path / "out")
    (row,) = [row for row in page.rows if row[:1] == [str(run)] and len(row) == 2]
    assert "tasks.jsonl has 3 batches of 4 iterations" in row[1]
    assert rows_with(page, "TA-MAML", "MAML", "+0.00")
    assert "Figure 4: there is no finished run under attention" in (tmp_path / "out" / "report.md").read_text()


def test_the_evidence_of_this_repository(tmp_path: Path) -> None:
    results = ROOT / "results"
    report([results / "first_runs", results / "eight_algorithms"], tmp_path / "out")
    page = page_of(tmp_path / "out")
    (row,) = [row for row in page.rows if row[1:3] == ["TA-MetaLSTM++", "MetaLSTM++"]]
    assert row[5] == "+0.68"
    config = yaml.safe_load((results / "first_runs" / "cifar-fs-5way1shot-maml-seed0" / "config.yaml").read_text())
    (row,) = rows_with(page, "cifar-fs 5-way 1-shot", "TA-MAML", "MAML", "+0.69")
    assert row[9] == "0.60 (test tasks only, one training seed)"
    assert f"{config['training']['iterations']:,}" == "2,000"
    with Image.open(
        io.BytesIO((tmp_path / "out" / "figures" / "figure4-omniglot-5way1shot.png").read_bytes())
    ) as image:
        assert image.format == "PNG"
    sizes = [p.stat().st_size for p in (tmp_path / "out" / "figures").iterdir()]
    assert max(sizes) < 600_000


def test_lines_of_tasks_are_not_kept(tmp_path: Path) -> None:
    """A log is read a thousand batches at a time: memory does not grow with it."""
    import tracemalloc

    from metaheed.studies.report.measures import attention_log

    write_lines(tmp_path / "t", [batch(i, [1.0, 2.0] * 8, [1 / 16] * 16) for i in range(1, 8001)])
    tracemalloc.start()
    attention_log(tmp_path / "t")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20, "bytes; all lines at once would take some 25 MB"


def titles(out: Path, level: str) -> list[str]:
    return re.findall(rf"^{level} (.*)$", (out / "report.md").read_text(), flags=re.MULTILINE)


def test_ones_own_results_come_first_and_nothing_is_empty(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    report([tmp_path / "run"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert titles(tmp_path / "out", "##")[0] == "Your results"
    assert "(none)" not in text
    assert "(none)" not in (tmp_path / "out" / "report.html").read_text()
    absent = {"Differences", "Table 1 of the paper, and ours", "Table 2 of the paper, and ours", "Controls", "Left out"}
    assert not absent & {*titles(tmp_path / "out", "##"), *titles(tmp_path / "out", "###")}


def test_one_dot_is_no_figure(tmp_path: Path) -> None:
    steps: dict[str, Any] = {"training": {"iterations": 4, "val_every": 4}}
    make_run(tmp_path / "in" / "m", validations={4: 0.4}, **steps)
    report([tmp_path / "in"], tmp_path / "out")
    assert not [*(tmp_path / "out" / "figures").iterdir()]
    assert "Figure 3: there is no finished run with two validations" in (tmp_path / "out" / "report.md").read_text()


def test_long_names_are_numbered_and_said_in_a_legend(tmp_path: Path) -> None:
    make_run(tmp_path / "in" / "m")
    options: dict[str, Any] = {"attention_reuse_probe": True, "attention_standardize": True}
    make_run(tmp_path / "in" / "t", "ta-maml", rule=options, tasks=attention_lines())
    report([tmp_path / "in"], tmp_path / "out")
    page = page_of(tmp_path / "out")
    stands_for = "TA-MAML (attention-standardize, attention-reuse-probe)"
    assert ["cifar-fs 5-way 1-shot", "TA-MAML #1", stands_for] in page.rows
    assert max(len(row[1]) for row in page.rows if len(row) > 3) <= 32
    assert rows_with(page, "TA-MAML #1", "MAML", "+0.00")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("seeds", "said"), [(1, None), (2, "one degree of freedom"), (3, "two degrees of freedom")])
def test_an_interval_over_few_seeds_is_explained_beside_it(tmp_path: Path, seeds: int, said: str | None) -> None:
    for seed in range(seeds):
        make_run(tmp_path / "in" / f"m{seed}", seed=seed, accuracies=shifted(seed / 10))
    report([tmp_path / "in"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    own = text.split("## Your results")[1].split("\n## ")[0]
    assert ("degree" in own) == (said is not None)
    assert said is None or said in own
