"""What README and docs/ say is run or checked: snippets, commands, notebooks, links, included code, and who to cite."""

import importlib
import inspect
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tools import notebooks, site_hooks

import metaheed as package
from metaheed.config import ALGORITHMS
from tests.conftest import ROOT, Run

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
SITE, REPOSITORY = "https://metaheed.github.io/metaheed/", "https://github.com/metaheed/metaheed"
PUBLIC = ("metaheed", *(f"metaheed.{name}" for name in ("learners", "outer", "data", "types", "errors", "config")))


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", _text(page), flags=re.DOTALL | re.MULTILINE)


def _commands(text: str) -> list[list[str]]:
    """The metaheed commands of indented blocks, without what is said beside them."""
    lines = re.findall(r"^ {4}(metaheed .*)$", text.replace("\\\n", ""), flags=re.MULTILINE)
    return [shlex.split(re.split(r"\s{3,}(?![-\s])", line)[0])[1:] for line in lines]


@pytest.fixture
def trained(in_folder: Path, metaheed: Run) -> None:
    """The run of the first page, as far as loading needs it."""
    small = ("--iterations", 1, "--val-tasks", 2, "--meta-batch-size", 2, "--adaptation-steps", 1, "--queries", 2)
    assert metaheed("train", "ta-maml", *small, "--threads", 1)[0] == 0


@pytest.fixture
def _importable(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(in_folder))
    yield
    sys.modules.pop("mynet", None)


@pytest.mark.parametrize("page", [page for page in ("README.md", *PAGES) if _snippets(page)])
@pytest.mark.usefixtures("trained", "_importable")
def test_snippets_run_as_printed(page: str, in_folder: Path) -> None:
    """The blocks of a page one after another, in one namespace; one that names its file is written there."""
    names: dict[str, Any] = {}
    for block in _snippets(page):
        if file := re.match(r"# (\w+\.py)\n", block):
            (in_folder / file[1]).write_text(block)
            importlib.invalidate_caches()
        else:
            exec(compile(block, page, "exec"), names)
    if "logits" in names:
        assert names["logits"].shape == (75, 5)
    if page == "docs/attention.md":
        assert names["slopes"](names["theta"]).shape == names["weights"].shape
    if page == "docs/networks.md":
        assert set(names["gradient"]) == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_every_page_with_snippets_is_known() -> None:
    assert {page for page in ("README.md", *PAGES) if _snippets(page)} >= {"README.md", "docs/networks.md"}


def _help(command: list[str], metaheed: Run) -> str:
    """What --help says of a command, more than it says at first included."""
    recipe = next((ROOT / "experiments" / "recipes").rglob("*.yaml"))
    words = command[:1]
    if command[0] in ("train", "search", "data", "reproduce") and not command[1].startswith("-"):
        words = command[:2]
    if words[1:] == ["custom"]:
        words += ["--learner", "maml", "--rule", "attended"]
    if "--resume" in command:
        words += ["--resume", "RUN"]
    if "--recipe" in command:
        words += ["--recipe", str(recipe)]
    shown = [metaheed(*words, option) for option in ("--help", "--help-all")]
    assert shown[0][0] == 0, command
    return "".join(out for status, out, _ in shown if status == 0) + " --resume --recipe --learner --rule --help"


@pytest.mark.parametrize("page", ["README.md", *(page for page in PAGES if _commands(_text(page)))])
def test_commands_name_what_exists(page: str, metaheed: Run) -> None:
    """Every command of a page is one, and every option that it is given is one of its own."""
    seen: dict[tuple[str, ...], str] = {}
    for command in _commands(_text(page)):
        if command == ["--version"]:
            continue
        if command[0] in ("train", "search") and not command[1].startswith("-"):
            assert command[1] in (*ALGORITHMS, "custom"), command
        key = (*command[:2], *(option for option in ("--resume", "--recipe") if option in command))
        if key not in seen:
            seen[key] = _help(command, metaheed)
        for option in [word.split("=")[0] for word in command if word.startswith("--")]:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", seen[key]), f"{option} in {shlex.join(command)}"


def test_commands_of_readme_are_found() -> None:
    assert [command[0] for command in _commands(_text("README.md"))] == [
        *("train", "evaluate", "compare", "report", "reproduce")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "until"), [("first_run", "## In Python"), ("own_pictures", "nowhere")])
def test_first_pages_can_be_followed(page: str, until: str, in_folder: Path, metaheed: Run) -> None:
    """Command by command as printed, but for fewer and smaller tasks."""
    generator = np.random.default_rng(0)
    for name in range(20):
        (in_folder / "photos" / f"flower {name}").mkdir(parents=True)
        for k in range(6):
            pixels = generator.integers(0, 256, (12, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(in_folder / "photos" / f"flower {name}" / f"{k}.png")
    short = {"--iterations": "2", "--tasks": "4", "--val-tasks": "2", "--image-size": "16"}
    commands = _commands(_text(f"docs/start/{page}.md").split(until)[0])
    assert len(commands) >= 6
    for command in commands:
        given = [short.get(before, word) for before, word in zip(["", *command], command, strict=False)]
        if command[0] == "train" and "--resume" not in command:
            given += ["--threads", "1", "--meta-batch-size", "2", "--adaptation-steps", "1"]
            given += [part for option in ("--iterations", "--val-tasks") for part in (option, short[option])]
        status, out, err = metaheed(*given)
        assert status == 0, f"{shlex.join(given)}: {out}{err}"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(notebooks.FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), "committed without outputs"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run, names = notebooks.run(path, tmp_path)
    text = notebooks.to_markdown(run)
    if path.stem == "paper_in_ten_minutes":
        assert names["difference"].half_width > 0  # type: ignore[attr-defined]
        np.testing.assert_allclose(names["weights"].sum(1), 1, atol=1e-5)  # type: ignore[attr-defined]
        assert "data:image/png;base64," in text
        assert "covers test tasks only" in text
    elif path.stem == "attention_in_your_own_loop":
        losses: Any = names["losses"]
        assert sum(losses[-5:]) < sum(losses[:5])
    else:
        assert path.stem == "add_a_rule"
        assert names["record"].weights.tolist() == [0.5, 0.0, 0.5]  # type: ignore[attr-defined]
        assert "trimmed minus uniform" in text


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(_text("mkdocs.yml"))
    return found


def _leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _leaves(part)


def test_every_page_is_in_the_navigation(settings: dict[str, Any]) -> None:
    made = [f"notebooks/{path.stem}.md" for path in notebooks.FOLDER.glob("*.ipynb")]
    pages = [leaf for leaf in _leaves(settings["nav"]) if not leaf.startswith("https://")]
    assert sorted(pages) == sorted([page.removeprefix("docs/") for page in PAGES] + made)


@pytest.mark.parametrize(
    "text",
    [
        *(pytest.param(_text(page), id=page) for page in PAGES),
        *(pytest.param(notebooks.read(path)[0].source, id=path.name) for path in notebooks.FOLDER.glob("*.ipynb")),
    ],
)
def test_pages_open_with_a_sentence_on_what_they_are_for(text: str) -> None:
    title, first = text.split("\n\n")[:2]
    assert title.startswith("# ")
    assert re.fullmatch(r"This (page|notebook) [^.!?]+(\.[a-z][^.!?]*)*\.", first), first


def test_included_code_exists() -> None:
    included = [page for page in PAGES if "{{ source" in _text(page)]
    assert len(included) >= 3
    for page in included:
        text = site_hooks.with_sources(_text(page))
        assert "{{" not in text, page
    assert "return self.steps(self._step, meta" in site_hooks.with_sources(_text("docs/method/learners.md"))


@pytest.mark.parametrize("line", ["src/metaheed/nothing.py x", "src/metaheed/types.py Nothing"])
def test_included_code_that_is_gone_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="a page includes"):
        site_hooks.with_sources(f"{{{{ source {line} }}}}")


def test_included_code_leaves_docstrings_out() -> None:
    text = site_hooks.with_sources("{{ source src/metaheed/rules/uniform.py uniform }}")
    assert text == (
        '```python title="src/metaheed/rules/uniform.py"\n'
        "def uniform() -> Rule:\n    return weighted(lambda t, info: uniform_weights(info))\n```"
    )


def test_formulas_become_mathml() -> None:
    pytest.importorskip("latex2mathml", reason="the extra docs is not installed: make docs")
    content = '<p><span class="arithmatex">\\(\\theta &lt; 1\\)</span> and <code>src/metaheed/types.py</code></p>'
    found = site_hooks.on_page_content(content, {"extra": {"repository": REPOSITORY}})
    assert "<math" in found
    assert "arithmatex" not in found
    assert f'<a href="{REPOSITORY}/blob/main/src/metaheed/types.py">' in found


@pytest.mark.parametrize(
    ("name", "text", "loads"),
    [
        ("a.html", '<script src="https://unpkg.com/x.js"></script>', True),
        ("a.html", '<link rel="stylesheet" href="//fonts.example/x.css">', True),
        ("a.html", '<link href="https://fonts.example" rel="preconnect">', True),
        ("a.html", "<img src=https://example.org/x.png>", True),
        ("a.css", "@font-face{src:url(https://fonts.example/x.woff2)}", True),
        ("a.html", '<a href="https://arxiv.org">paper</a><link rel="canonical" href="https://x/y">', False),
        ("a.html", '<script src="assets/x.js"></script><img src="data:image/png;base64,AA==">', False),
    ],
)
def test_what_a_page_loads_from_the_network_is_found(name: str, text: str, loads: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert bool(site_hooks.loaded_from_network(tmp_path)) is loads


def test_links_of_readme_work_from_the_package_page() -> None:
    readme = _text("README.md")
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", readme)
    assert all(link.startswith("https://") for link in links), "a relative link leads nowhere on the package's page"
    paths = [link.removeprefix(f"{REPOSITORY}/") for link in links if link.startswith(REPOSITORY)]
    assert len(paths) >= 12
    for path in paths:
        kind, branch, name = path.split("/", 2)
        assert branch == "main"
        assert (ROOT / name).is_dir() if kind == "tree" else (ROOT / name).is_file(), path


def test_urls_of_the_package_are_one_repository_s(settings: dict[str, Any]) -> None:
    project = tomllib.loads(_text("pyproject.toml"))["project"]
    urls = project["urls"]
    assert set(urls) == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    assert urls["Source"] == settings["extra"]["repository"] == REPOSITORY
    assert urls["Documentation"] == settings["site_url"] == SITE
    assert (ROOT / urls["Changelog"].removeprefix(f"{REPOSITORY}/blob/main/")).exists()
    assert project["version"] == package.__version__


def test_citation_parses_and_has_the_version() -> None:
    about = yaml.safe_load(_text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(about)
    assert str(about["version"]) == package.__version__
    assert about["repository-code"] == REPOSITORY
    paper = about["preferred-citation"]
    assert paper["title"] == "Task Attended Meta-Learning for Few-Shot Learning"
    assert [author["family-names"] for author in paper["authors"]] == ["Aimen", "Sidheekh", "Krishnan"]
    assert paper["doi"] == "10.48550/arXiv.2106.10642"


def _documented(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name in getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")]):
        thing = getattr(module, name)
        if not getattr(thing, "__module__", "").startswith("metaheed"):
            continue
        if inspect.isfunction(thing) or inspect.isclass(thing):
            yield f"{module.__name__}.{name}", thing
        if inspect.isclass(thing):
            for method, function in vars(thing).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{module.__name__}.{name}.{method}", function


@pytest.mark.parametrize("module", PUBLIC)
def test_docstrings_speak_of_arguments_that_exist(module: str) -> None:
    """The reference is made of them; several arguments may share a line: "ways, shots: N, K."."""
    for name, thing in _documented(importlib.import_module(module)):
        section = re.search(r"\n *Args:\n((?: +.*\n|\n)+?)(?=\n *\w+:\n|\Z)", f"{inspect.getdoc(thing) or ''}\n")
        if section is None:
            continue
        indent = re.match(r" +", section[1])
        assert indent is not None, name
        told = re.findall(rf"^{indent[0]}(\w+(?:, \w+)*):", section[1], flags=re.MULTILINE)
        assert told, name
        known = inspect.signature(thing).parameters
        for argument in ", ".join(told).split(", "):
            assert argument in known, f"{name} has no argument {argument}"
