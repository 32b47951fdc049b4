"""A network that a file names, and not the user, is not imported without his word: marker files say what ran."""

import json
import os
import pickle
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import metaheed as package
from metaheed.config import EvaluationConfig, from_dict, to_dict
from metaheed.errors import ConfigError, MetaheedError
from metaheed.files import trust
from metaheed.files.seals import seal_text, unseal_text
from metaheed.learners import find_backbone
from metaheed.running.evaluate import evaluate_run
from metaheed.running.folder import RunFolder
from metaheed.running.train import resume, train
from metaheed.studies import recipes
from tests.conftest import Run
from tests.test_training import SMALL

MODULE = "payload_of_a_stranger"
PAYLOAD = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from tests.networks import Tiny as Net
"""
OPTIONS = [*SMALL[2:], "--iterations", "4", "--backbone", f"{MODULE}:Net"]


class Stranger:
    """A folder with a module, a run, a study and a recipe that name it; and who looks at it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.study = folder, folder / "run", folder / "study"
        self.recipe = folder / "recipe.yaml"
        self.module = folder / f"{MODULE}.py"

    def somebody_else(self, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on another user looks at it, in a new process as far as trust goes."""
        monkeypatch.setenv("METAHEED_STATE", str(state))
        trust._allowed.clear()
        self.forget()

    def forget(self) -> None:
        """Nothing of it is imported, and nothing has run."""
        for name in [name for name in sys.modules if name.split(".")[0] == MODULE]:
            del sys.modules[name]
        sys.path[:] = [path for path in sys.path if path != str(self.folder)]
        (self.folder / "ran").unlink(missing_ok=True)

    def has_run(self) -> bool:
        return (self.folder / "ran").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a stranger made on his machine."""
    from metaheed.cli.entry import main

    folder = tmp_path_factory.mktemp("theirs")
    theirs = Stranger(folder)
    theirs.module.write_text(PAYLOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAHEED_STATE", str(tmp_path_factory.mktemp("state of the stranger")))
        patch.setenv("METAHEED_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        path = ["--backbone-path", str(folder)]
        assert main(["train", "maml", *OPTIONS, *path, "--out", str(theirs.run)]) == 0
        searched = ["--trials", "2", "--out", str(theirs.study), "--test-queries", "3"]
        assert main(["search", "maml", *OPTIONS, *path, *searched]) == 0
        shutil.copy(theirs.study / "best.yaml", theirs.recipe)
    theirs.forget()
    trust._allowed.clear()
    return folder


@pytest.fixture
def stranger(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stranger]:
    """The same folder, copied to this user, who has allowed nothing."""
    folder = tmp_path / "theirs"
    shutil.copytree(made, folder)
    theirs = Stranger(folder)
    for file in (*folder.rglob("config.yaml"), theirs.study / "search.yaml"):
        moved = unseal_text(file.read_bytes()).replace(str(made).encode(), str(folder).encode())
        file.write_bytes(seal_text(moved))
    theirs.somebody_else(tmp_path / "state", monkeypatch)
    monkeypatch.chdir(folder)  # where a recipe's module is looked for
    yield theirs
    theirs.forget()
    trust._allowed.clear()


COMMANDS: dict[str, list[str]] = {
    "evaluate": ["evaluate", "run", "--tasks", "4"],
    "train --resume": ["train", "--resume", "run", "--iterations", "5"],
    "train --recipe": ["train", "--recipe", "recipe.yaml", "--out", "new", "--iterations", "2", *SMALL[8:]],
    "search --resume": ["search", "--resume", "study", "--trials", "3"],
}
NEVER: dict[str, list[str]] = {
    "report": ["report", ".", "--out", "page"],
    "compare": ["compare", "run", "--against", "run"],
    "reproduce": ["reproduce", "table2", "--recipes", "folder", "--dry-run"],
}


def _run(metaheed: Run, stranger: Stranger, arguments: list[str]) -> tuple[int, str, str]:
    os.chdir(stranger.folder)  # the fixture of the command line has its own
    return metaheed(*arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_strangers_network_runs_with_trust_only(name: str, stranger: Stranger, metaheed: Run) -> None:
    arguments = COMMANDS[name]
    status, out, err = _run(metaheed, stranger, arguments)
    assert (status, out, stranger.has_run()) == (1, "", False), err
    assert str(stranger.folder) not in sys.path
    assert all(word in err for word in (f"{MODULE}:Net", str(stranger.module), "--trust")), "module, file and remedy"
    assert err.count("\n") == 1
    status, _, err = _run(metaheed, stranger, [*arguments, "--trust"])
    assert (status, stranger.has_run()) == (0, True), err
    # It was recorded, outside the folder: the same user need not say so again.
    stranger.forget()
    trust._allowed.clear()
    again = [a if a not in ("new", "5", "3") else {"new": "other", "5": "6", "3": "4"}[a] for a in arguments]
    status, _, err = _run(metaheed, stranger, again)
    assert (status, stranger.has_run()) == (0, True), err
    # Until the module changes.
    stranger.forget()
    trust._allowed.clear()
    stranger.module.write_text(PAYLOAD + "# another\n")
    status, _, err = _run(metaheed, stranger, again)
    assert (status, stranger.has_run()) == (1, False)
    assert "has changed since" in err


@pytest.mark.parametrize("name", NEVER)
def test_what_reads_runs_imports_no_network(name: str, stranger: Stranger, metaheed: Run) -> None:
    (stranger.folder / "folder").mkdir()
    shutil.copy(stranger.recipe, stranger.folder / "folder" / "r.yaml")
    status, _, err = _run(metaheed, stranger, NEVER[name])
    assert (name == "reproduce") <= (status == 1 and "the recipe r: the network" in err and "--trust" in err), err
    assert not stranger.has_run()


def test_python_calls_ask_too(stranger: Stranger) -> None:
    recipe = recipes.read(stranger.recipe).config
    new = replace(recipe, training=replace(RunFolder(stranger.run).read_config().training, out=Path("new")))
    calls: list[Callable[[bool], object]] = [
        lambda trusted: package.load(stranger.run, trust=trusted),
        lambda trusted: evaluate_run(stranger.run, EvaluationConfig(tasks=4), trust=trusted),
        lambda trusted: resume(stranger.run, 5, trust=trusted),
        lambda trusted: train(new, trust=trusted),
    ]
    for call in calls:
        stranger.forget()
        trust._allowed.clear()
        shutil.rmtree(os.environ["METAHEED_STATE"], ignore_errors=True)
        with pytest.raises(MetaheedError, match="trust=True"):
            call(False)
        assert not stranger.has_run()
        call(True)
        assert stranger.has_run()


def test_what_the_user_names_himself_needs_no_word(
    stranger: Stranger, metaheed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line it is his word, with a recipe as well; and what he trained he can use from then on."""
    arguments = [*COMMANDS["train --recipe"], "--backbone", f"{MODULE}:Net"]
    status, _, err = _run(metaheed, stranger, arguments)
    assert (status, stranger.has_run()) == (0, True), err
    stranger.forget()
    trust._allowed.clear()
    assert _run(metaheed, stranger, ["evaluate", "new", "--tasks", "4"])[0] == 0
    assert stranger.has_run()


def test_nothing_in_the_folder_can_claim_it(stranger: Stranger, metaheed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a state folder within it, not a setting in the config, not the record of another module."""
    (stranger.run / "metaheed" / "trusted").mkdir(parents=True)
    values = yaml.safe_load((stranger.run / "config.yaml").read_text())
    code = trust.find_code(MODULE, stranger.folder)
    record = trust._record_file(stranger.module)
    assert record is not None
    (stranger.run / "metaheed" / "trusted" / record.name).write_text(
        json.dumps({"file": str(code.file), "sha256": code.sha256})
    )
    assert _run(metaheed, stranger, ["evaluate", "run"])[0] == 1
    for group in ("learner", "training"):
        (stranger.run / "config.yaml").write_text(yaml.safe_dump({**values, group: {**values[group], "trust": True}}))
        assert "unknown field" in _run(metaheed, stranger, ["evaluate", "run"])[2]
    assert not stranger.has_run()


@pytest.mark.parametrize(
    "name", ["os:system", "subprocess:Popen", "builtins:exec", "../x:Net", "/etc/x:Net", ".:x", "a..b:c"]
)
def test_other_names_that_a_file_may_have(name: str, stranger: Stranger, metaheed: Run) -> None:
    """Modules of Python's own, which have no file to look at or are imported already, and names that are paths."""
    (stranger.folder.parent / "x.py").write_text("from pathlib import Path\nPath('ran').touch()")
    values = yaml.safe_load((stranger.run / "config.yaml").read_text())
    values["learner"]["backbone"] = name
    (stranger.run / "config.yaml").write_text(yaml.safe_dump(values))
    status, _, err = _run(metaheed, stranger, ["evaluate", "run", "--tasks", "4"])
    assert (status, "--trust" in err, stranger.has_run()) == (1, True, False)


def test_packages_are_found_without_running_them(stranger: Stranger) -> None:
    inner = stranger.folder / MODULE / "inner"
    inner.mkdir(parents=True)
    stranger.module.unlink()
    for file in (inner.parent / "__init__.py", inner / "__init__.py", inner / "net.py"):
        file.write_text("from pathlib import Path\nPath('ran').touch()\n")
    code = trust.find_code(f"{MODULE}.inner.net", stranger.folder)
    assert code.file == inner / "net.py"
    with pytest.raises(ConfigError, match=r"net\.py"):
        find_backbone(trust.NamedByFile(f"{MODULE}.inner.net:Net"), stranger.folder)
    assert not (stranger.folder / "ran").exists()
    assert str(stranger.folder) not in sys.path
    (inner.parent / "__init__.py").write_text("# another")
    assert trust.find_code(f"{MODULE}.inner.net", stranger.folder) != code, "its packages are run, too"


def test_what_a_module_imports_beside_it_counts(stranger: Stranger) -> None:
    folder = stranger.folder
    (folder / "helper_a.py").write_text("import helper_b")
    (folder / "helper_b.py").write_text("")
    stranger.module.write_text("def f():\n    from helper_a import x\nimport json, torch")
    before = trust.find_code(MODULE, folder)
    (folder / "unrelated.py").write_text("")
    assert trust.find_code(MODULE, folder) == before
    (folder / "helper_b.py").write_text("changed = 1")
    after = trust.find_code(MODULE, folder)
    assert after != before
    (folder / "json.py").write_text("which would be imported instead of Python's")
    assert trust.find_code(MODULE, folder) != after


def test_modules_that_take_the_place_of_others(stranger: Stranger) -> None:
    """A file yaml.py beside the network: it is part of what is allowed, and is not what others then import."""
    name, folder = trust.NamedByFile(f"{MODULE}:Net"), stranger.folder
    trust.allow(name, folder)
    before = trust.find_code(MODULE, folder)
    (folder / "of_nobody_else.py").write_text("")
    assert trust.find_code(MODULE, folder) == before
    for other in ("cgitb.py", "yaml.py"):  # of Python's own, and of a library's
        (folder / other).write_text("from pathlib import Path\nPath('ran').touch()")
        with pytest.raises(ConfigError, match="has changed since"):
            find_backbone(name, folder)
        trust.allow(name, folder)
    find_backbone(name, folder)
    assert sys.path[-1] == str(folder), "last of all, so that it is not found before a library"
    assert sys.path.count(str(folder)) == 1


@pytest.mark.parametrize("name", [f"{MODULE}.below:Net", f"{MODULE}.below.more:Net"])
def test_what_runs_before_an_import_fails_is_named(name: str, stranger: Stranger) -> None:
    """To import a.b is to run a first, also where there is no b."""
    with pytest.raises(ConfigError, match=re.escape(str(stranger.module))):
        find_backbone(trust.NamedByFile(name), stranger.folder)
    assert not stranger.has_run()


@pytest.mark.parametrize("name", [f"{'x' * 10**5}:y", f"x:{'y' * 10**5}"])
def test_long_names_are_cut(name: str, stranger: Stranger) -> None:
    for named in (name, trust.NamedByFile(name)):
        with pytest.raises(ConfigError) as error:
            find_backbone(named, stranger.folder)
        assert len(str(error.value)) < 900


def test_compiled_code_beside_the_source_does_not_run(stranger: Stranger, metaheed: Run) -> None:
    """It would be taken for the source's where its date and length fit, and says something else."""
    import importlib.util
    import py_compile

    harmless = PAYLOAD.replace('"ran"', '"fun"')
    status = stranger.module.stat()
    cached = Path(importlib.util.cache_from_source(str(stranger.module)))
    py_compile.compile(str(stranger.module), str(cached), doraise=True)
    stranger.module.write_text(harmless)
    os.utime(stranger.module, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert _run(metaheed, stranger, ["evaluate", "run", "--tasks", "4", "--trust"])[0] == 0
    assert (stranger.folder / "fun").exists()
    assert not stranger.has_run()


def test_the_record_is_private_and_may_be_impossible(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{MODULE}:Net"
    trust.allow(name, stranger.folder)
    (record,) = (tmp_path / "state" / "trusted").iterdir()
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    assert stat.S_IMODE(record.parent.stat().st_mode) == 0o700
    assert capsys.readouterr() == ("", "")
    for damage in ("", "[]", "[" * 10_000, '{"file": 1}', json.dumps({"file": str(stranger.module), "sha256": 1})):
        record.write_text(damage)
        trust._allowed.clear()
        with pytest.raises(ConfigError):
            trust.require(name, stranger.folder)
    (tmp_path / "file").touch()
    monkeypatch.setenv("METAHEED_STATE", str(tmp_path / "file" / "below"))
    trust.allow(name, stranger.folder)
    assert "could not be saved" in capsys.readouterr().err
    trust.require(name, stranger.folder)  # in this process it holds


def test_the_mark_survives_what_is_done_to_configs(stranger: Stranger) -> None:
    config = RunFolder(stranger.run).read_config()
    assert isinstance(config.learner.backbone, trust.NamedByFile)
    assert config.learner.backbone == f"{MODULE}:Net"
    for other in (
        replace(config, learner=replace(config.learner, backbone_path=None)),
        pickle.loads(pickle.dumps(config)),
        deepcopy(config),
        from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))),
        recipes.read(stranger.recipe).config,
    ):
        assert isinstance(other.learner.backbone, trust.NamedByFile)
        with pytest.raises(ConfigError, match="trust"):
            find_backbone(other.learner.backbone, stranger.folder)
