"""Write a report as one self-contained HTML page, and as Markdown that links to the figures.

Text read from files is never interpreted as markup: the HTML template escapes it, and this module escapes characters
with a meaning in Markdown.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2

from metaheed.studies.report.figures import Picture
from metaheed.studies.report.table import MISSING, Table

FIGURES = "figures"
"""Name of the folder with the figures, in the report's folder."""


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: tuple[Table | Picture | Note, ...]

    @property
    def anchor(self) -> str:
        """The target of links to this section."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Report:
    """The content of a page."""

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]


def to_html(report: Report) -> str:
    """The report as one HTML page with its figures embedded."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["kind"] = lambda block: type(block).__name__
    template = environment.from_string(
        resources.files("metaheed.studies.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.render(report=report, missing=MISSING, numeric=_is_number)


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _is_number(cell: str) -> bool:
    """Whether a cell is laid out as a number."""
    return cell == MISSING or bool(re.match(r"[<+-]? ?\d", cell))


def to_markdown(report: Report) -> str:
    """The report as Markdown that links to the files in figures/."""
    parts = [f"# {_escaped(report.title)}", *map(_escaped, report.summary)]
    for section in report.sections:
        parts.append(f"## {_escaped(section.title)}")
        for block in section.blocks:
            match block:
                case Note():
                    parts.append(_escaped(block.text))
                case Table():
                    parts += [f"### {_escaped(block.title)}", _escaped(block.caption), markdown_table(block)]
                case Picture():
                    image = f"![{_escaped(block.alternative)}]({FIGURES}/{block.name}.png)"
                    parts += [f"### {_escaped(block.title)}", image, _escaped(block.caption)]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """The columns and rows of a table as Markdown, without title and caption."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(_escaped, cells))} |"

    return "\n".join([line(table.columns), "|" + "---|" * len(table.columns), *map(line, table.rows)])


def _escaped(text: str) -> str:
    """Text on one line, with the characters escaped that have a meaning in Markdown."""
    text = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", "<br>")
