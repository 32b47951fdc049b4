"""Rules about the code itself: imports point one way, defaults have one home, the README's paths exist."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from metaheed import config
from metaheed.learners.build import _CLASSES as LEARNER_CLASSES
from metaheed.outer import TaskAttention, attended
from tests.conftest import ROOT

SOURCE = ROOT / "src" / "metaheed"
LAYERS = (
    ("types", "errors", "headless"),
    ("trees",),
    ("files",),
    ("config",),
    ("data", "networks"),
    ("learners", "rules"),
    ("engine",),
    ("outer",),
    ("running",),
    ("studies",),
    ("cli",),
)
"""Folders and files of the package; each imports only from those in rows above its own."""
LINES = 450
"""Of a file, at most; the CUDA kernels are one program and stay together."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def _part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    part = _part(path)
    if part in ("__init__", "__main__"):
        return
    for module in _imports(path):
        if module.startswith("metaheed."):
            other = module.split(".")[1]
            assert other == part or LEVEL[other] < LEVEL[part], f"{path} imports {module}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_are_short(path: Path) -> None:
    assert path.name == "kernels.py" or len(path.read_text().splitlines()) <= LINES


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("__init__.py")), ids=lambda p: str(p.parent.relative_to(SOURCE)))
def test_packages_only_name_what_is_public(path: Path) -> None:
    if path.parent == SOURCE:
        return
    for node in ast.parse(path.read_text()).body:
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        doc = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert named or doc or isinstance(node, ast.ImportFrom), ast.unparse(node)


def test_every_module_has_a_layer() -> None:
    parts = {_part(path) for path in SOURCE.rglob("*.py")} - {"__init__", "__main__"}
    assert parts == set(LEVEL)


def test_attention_needs_torch_and_types_only() -> None:
    imported = _imports(SOURCE / "rules" / "attention.py")
    assert {name.split(".")[0] for name in imported} <= {"torch", "collections", "metaheed"}
    assert {name for name in imported if name.startswith("metaheed")} == {"metaheed.types"}


def test_config_and_the_command_line_do_not_need_torch() -> None:
    paths = [*(SOURCE / "config").glob("*.py"), *(SOURCE / "cli").glob("*.py"), SOURCE / "errors.py"]
    for path in [*paths, SOURCE / "__init__.py"]:
        top_level = ast.parse(path.read_text()).body
        modules = [n.module or "" for n in top_level if isinstance(n, ast.ImportFrom)]
        modules += [alias.name for n in top_level if isinstance(n, ast.Import) for alias in n.names]
        assert not any(m.split(".")[0] in ("torch", "numpy") for m in modules), path


def test_constructors_read_their_defaults_from_config() -> None:
    for kind, function in LEARNER_CLASSES.items():
        fields = {f.name: f.default for f in dataclasses.fields(kind)}
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                assert parameter.default == fields[name]
        assert [*inspect.signature(function).parameters][1:] == [*kind().own_settings()]
    defaults = config.AttendedConfig()
    # TaskAttention stands alone, so its signature repeats two defaults: they must agree.
    signature = inspect.signature(TaskAttention).parameters
    assert signature["architecture"].default == defaults.attention_architecture
    assert signature["standardize"].default == defaults.attention_standardize
    assert signature["omit"].default == defaults.attention_omit
    rule = inspect.signature(attended).parameters
    assert rule["jacobian"].default == defaults.attention_jacobian
    assert rule["reuse_probe"].default == defaults.attention_reuse_probe
    assert rule["release_leak"].default == defaults.faithful_to_release
    assert set(LEARNER_CLASSES) == set(config.LEARNERS.values())


def test_every_config_field_is_explained() -> None:
    for node in [node for path in (SOURCE / "config").glob("*.py") for node in ast.parse(path.read_text()).body]:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                    assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(field.target)}"


def test_every_config_field_is_used() -> None:
    """No option is parsed and ignored: each field's name is read somewhere outside the config."""
    text = "\n".join(p.read_text() for p in SOURCE.rglob("*.py") if _part(p) != "config")
    own = "\n".join(p.read_text() for p in (SOURCE / "config").glob("*.py"))
    text += "\n".join(re.findall(r"self\.\w+", own))
    for kind in vars(config).values():
        if inspect.isclass(kind) and dataclasses.is_dataclass(kind):
            for field in dataclasses.fields(kind):
                assert re.search(rf"\.{field.name}\b", text), f"{kind.__name__}.{field.name}"


def test_readme_paths_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Dive into the code")[1].split("\n## ")[0]
    paths = re.findall(r"`((?:src|tests|docs|examples|tools|benchmarks|experiments|results)/[\w./-]+)`", section)
    assert len(paths) >= 8
    for path in paths:
        assert (ROOT / path).exists(), path


FOLDERS = ("running", "studies")
"""What reads and writes folders that a stranger may have filled."""
OPENING = {"open", "write_text", "write_bytes", "touch", "read_text", "read_bytes", "savefig", "safe_load"}


def test_files_of_such_folders_are_opened_in_one_place() -> None:
    """By `files.opening`, which follows no link where it writes and waits for no pipe; parsed by `files.parsing`."""
    allowed = {
        ("page.py", "read_text"),  # the package's own template
        ("figures.py", "savefig"),  # into memory
        ("process.py", "read_text"),  # what the system says of its memory
    }
    for path in SOURCE.rglob("*.py"):
        if _part(path) not in FOLDERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
            assert name not in OPENING or (path.name, name) in allowed, f"{path}:{getattr(node, 'lineno', 0)} {name}"


def test_what_a_file_says_becomes_a_config_with_its_mark_in_one_place() -> None:
    """No other module builds a learner's config from values, so that none forgets that a file named its network."""
    for path in SOURCE.rglob("*.py"):
        if _part(path) != "config":
            assert "LEARNERS[" not in path.read_text().replace("LEARNERS[config.learner.name]()", ""), path


def test_no_data_is_committed() -> None:
    largest = max((p.stat().st_size, str(p)) for p in SOURCE.rglob("*") if p.is_file() and "__pycache__" not in str(p))
    assert largest[0] < 100_000, largest
