"""Notebooks without Jupyter: their cells, what these print and draw when they are run, and the Markdown of both.

The code cells of a notebook are run one after another in one namespace, as a kernel would run them; magic commands are
not known. A test runs every notebook of examples/notebooks/, and the site shows them with what they printed.
"""

import ast
import base64
import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"


class Cell(NamedTuple):
    """A cell of a notebook, and what it gave when it was run."""

    is_code: bool
    source: str
    printed: str = ""
    figures: tuple[bytes, ...] = ()
    """PNGs."""


def read(path: Path) -> list[Cell]:
    """The cells of a notebook, not run."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [Cell(cell["cell_type"] == "code", "".join(cell["source"])) for cell in cells]


def run(path: Path, folder: Path) -> tuple[list[Cell], dict[str, object]]:
    """The cells of a notebook after they were run in a folder, and the names that they left.

    Raises:
        Exception: whatever a cell raises.
    """
    matplotlib.use("agg")
    names: dict[str, object] = {"__name__": "__main__"}
    with _in(folder):
        return [_run(cell, names, f"{path.name}, cell {k}") for k, cell in enumerate(read(path))], names


def _run(cell: Cell, names: dict[str, object], where: str) -> Cell:
    if not cell.is_code:
        return cell
    statements, value = ast.parse(cell.source).body, None
    last = statements.pop() if isinstance(statements[-1], ast.Expr) else None
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(ast.Module(statements, []), where, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
        if value is not None:
            print(repr(value))
    return cell._replace(printed=said.getvalue(), figures=tuple(_figures()))


def _figures() -> Iterator[bytes]:
    from matplotlib import pyplot as plt

    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=110, bbox_inches="tight")
        yield picture.getvalue()
    plt.close("all")


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def to_markdown(cells: list[Cell]) -> str:
    """The cells one below the other; figures stand in the text itself."""
    parts = []
    for cell in cells:
        parts.append(f"```python\n{cell.source}\n```" if cell.is_code else cell.source)
        if cell.printed.strip():
            parts.append(f"```text\n{cell.printed.rstrip()}\n```")
        parts += [f"![](data:image/png;base64,{base64.b64encode(figure).decode()})" for figure in cell.figures]
    return "\n\n".join(parts) + "\n"
