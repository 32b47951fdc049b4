"""The tables of docs/data.md: a test for each row, a row for each case."""

import re
from collections.abc import Mapping

from tests.conftest import ROOT


def rows(heading: str) -> list[str]:
    """The first cells of the table of errors ("what you see") below a heading, without their backticks."""
    section = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = section.split("\n| what you see |")[1]
    found = re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)
    assert found, heading
    return found


def assert_each_has_a_case(heading: str, cases: Mapping[str, object]) -> None:
    assert sorted(rows(heading)) == sorted(cases)


def assert_seen(row: str, text: str) -> None:
    """The row's words stand in the text, … standing for anything."""
    pattern = ".+?".join(re.escape(part.strip()) for part in row.split("…") if part.strip())
    assert re.search(pattern.replace("\\ ", r"\s+"), text, flags=re.DOTALL), f"{row!r} is not in {text!r}"
