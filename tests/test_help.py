"""Help pages: what decides a run first, whole sentences, at once."""

import dataclasses
import itertools
import re

import pytest

from metaheed.cli.data import DataDownload, DataEpisodes, DataList, DataPrepare, DataShow, DataSplit, DataVerify
from metaheed.cli.help import _explanations, help_page
from metaheed.cli.hints import options
from metaheed.cli.judge import Compare, Evaluate
from metaheed.cli.search import Search, SearchResume
from metaheed.cli.studies import Demo, Report, Reproduce, Toy
from metaheed.cli.train import Resume
from metaheed.config import LEARNERS, RULES, TrialConfig, default_pair
from tests.conftest import Run

COMMANDS = (Evaluate, Compare, Resume, SearchResume, Report, Reproduce, Demo, Toy)
DATA = (DataDownload, DataEpisodes, DataList, DataPrepare, DataShow, DataSplit, DataVerify)


def test_what_decides_a_run_comes_first_and_the_rest_is_advanced(metaheed: Run) -> None:
    status, short, _ = metaheed("train", "ta-maml", "--help")
    assert status == 0
    listed = re.findall(r"^  (--[a-z0-9-]+)", short, flags=re.MULTILINE)
    assert 10 <= len(listed) <= 16
    assert {"--data", "--ways", "--shots", "--fast-lr", "--attention-lr", "--iterations"} <= {*listed}
    assert "metaheed train ta-maml --help-all" in short
    _, full, _ = metaheed("train", "ta-maml", "--help-all")
    assert {*re.findall(r"^  (--[a-z0-9-]+)", full, flags=re.MULTILINE)} == {
        f"--{name}" for name in options(default_pair("maml", "attended"))
    }
    assert full.index("--iterations") < full.index("advanced:") < full.index("--tf32")


@pytest.mark.parametrize("kind", [*COMMANDS, *DATA, Search, TrialConfig], ids=lambda kind: kind.__name__)
def test_every_option_is_explained_in_whole_sentences(kind: type) -> None:
    assert_plain(kind)


@pytest.mark.parametrize("kind", [*LEARNERS.values(), *RULES.values()], ids=lambda kind: kind.__name__)
def test_learners_and_rules_are_explained_in_whole_sentences(kind: type) -> None:
    assert_plain(kind)


def assert_plain(kind: type) -> None:
    texts = _explanations(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            continue
        text = texts.get(field.name, "")
        if text:
            assert text.rstrip().endswith("."), text
        assert not re.search(r"\bnone:", text, flags=re.IGNORECASE), f"{field.name}: {text}"
    page = help_page(kind, "command", None, every=True)
    assert "(default: None)" not in page
    for name in options(kind):
        assert f"--{name}" in page or name.upper().rstrip("S") in page, name


def test_sentences_break_at_the_screens_edge_only(metaheed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _, page, _ = metaheed("train", "maml", "--help")
    lines = page.splitlines()
    assert max(map(len, lines)) <= 100
    for line, following in itertools.pairwise(lines):
        word = following.split()[0] if following.startswith(" " * 26) else ""
        assert not word or len(line) + 1 + len(word) > 100 or not line.startswith(" " * 2), (line, following)


def test_algorithms_are_listed_where_one_is_wanted(metaheed: Run) -> None:
    for command in ("train", "search"):
        status, page, _ = metaheed(command, "--help")
        assert status == 0
        assert f"usage: metaheed {command} ALGORITHM" in page
        assert "  ta-metalstm++" in page
