"""What the site needs beyond its plugins: code from its source, formulas, notebooks, links, and no network.

- A line `{{ source PATH NAME... }}` of a page becomes the code of these classes, functions or methods (`Class.method`)
  in that file, without their docstrings: pages include code and never copy it.
- $...$ and $$...$$ become MathML, which browsers draw by themselves.
- The notebooks of examples/notebooks/ become pages, with what their cells print and draw.
- A path of the repository in code (`results/`) becomes a link to it.
- The build fails if a page would load a script, a style, a font or a picture from the network, or let a script of the
  theme ask there.
"""

import ast
import html
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import notebooks

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "examples", "experiments", "results", "src", "tests", "tools")
"""Folders of the repository that a page may name in code and is then linked to."""
_SOURCE = re.compile(r"^\{\{ source (\S+) ([\w. ]+) \}\}$", flags=re.MULTILINE)
_FORMULA = re.compile(r'<(?:span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</(?:span|div)>', flags=re.DOTALL)
_CODE = re.compile(rf"<code>((?:{'|'.join(FOLDERS)})/[\w./-]*)</code>(?!</a>)")
_LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\s\"'>]*"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect|icon|modulepreload))[^>]*"
    r"\bhref=[\"']?(?:https?:)?//[^\s\"'>]*"
)
_LOADED_BY_STYLE = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\s\"']*")


def on_files(files: Any, config: Any) -> Any:
    """Add the notebooks' pages."""
    from mkdocs.structure.files import File

    for path in sorted(notebooks.FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            cells, _ = notebooks.run(path, Path(folder))
        where = path.relative_to(ROOT).as_posix()
        content = f"{notebooks.to_markdown(cells)}\nThe notebook is `{where}`.\n"
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the code in that a page asks for."""
    return with_sources(markdown)


def on_page_content(content: str, config: Any, **_: Any) -> str:
    """Turn formulas into MathML, and paths into links."""
    content = _FORMULA.sub(lambda found: _mathml(html.unescape(found[1]), found[0].startswith("<div")), content)
    return _CODE.sub(lambda found: _linked(found, config["extra"]["repository"]), content)


def on_post_build(config: Any) -> None:
    """Refuse a site that loads something from the network."""
    from mkdocs.exceptions import PluginError

    if config["repo_url"]:
        raise PluginError("repo_url is set, for which the theme's script asks the repository's host: leave it out")
    loaded = loaded_from_network(Path(config["site_dir"]))
    if loaded:
        raise PluginError("pages load from the network: " + "; ".join(loaded[:10]))


def with_sources(markdown: str) -> str:
    """A page with the code in place of each `{{ source PATH NAME... }}`.

    Raises:
        ValueError: there is no such file, or no such name in it.
    """
    return _SOURCE.sub(lambda found: _fenced(found[1], found[2].split()), markdown)


def _fenced(path: str, names: list[str]) -> str:
    if not (ROOT / path).is_file():
        raise ValueError(f"a page includes {path}, which does not exist")
    text = (ROOT / path).read_text(encoding="utf-8")
    code = "\n\n".join(_code(text, ast.parse(text), path, name) for name in names)
    return f'```python title="{path}"\n{code}\n```'


def _code(text: str, tree: ast.Module, path: str, name: str) -> str:
    node: Any = tree
    for part in name.split("."):
        node = next((child for child in node.body if _is_named(child, part)), None)
        if node is None:
            raise ValueError(f"a page includes {name} of {path}, which has no such name")
    lines = text.splitlines()
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    kept = range(first, node.end_lineno + 1)
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
        doc = node.body[0]
        kept = [k for k in kept if not doc.lineno <= k <= (doc.end_lineno or doc.lineno)]  # type: ignore[assignment]
    code = "\n".join(lines[k - 1] for k in kept)
    indent = " " * node.col_offset
    return "\n".join(line.removeprefix(indent) for line in code.splitlines()).rstrip()


def _is_named(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Name) and target.id == name for target in targets)
    return getattr(node, "name", None) == name


def _mathml(formula: str, block: bool) -> str:
    from latex2mathml.converter import convert

    return str(convert(formula, display="block" if block else "inline")).replace(
        ' xmlns="http://www.w3.org/1998/Math/MathML"', ""
    )


def _linked(found: re.Match[str], repository: str) -> str:
    path = ROOT / found[1]
    if not path.exists():
        return found[0]
    return f'<a href="{repository}/{"tree" if path.is_dir() else "blob"}/main/{found[1]}">{found[0]}</a>'


def loaded_from_network(site: Path) -> list[str]:
    """What the pages and styles of a built site load from elsewhere: "FILE: TAG"."""
    found = []
    for suffix, pattern in ((".html", _LOADED), (".css", _LOADED_BY_STYLE)):
        for path in sorted(site.rglob(f"*{suffix}")):
            text = path.read_text(encoding="utf-8")
            found += [f"{path.relative_to(site)}: {match[0]}" for match in pattern.finditer(text)]
    return found
