"""Links in a folder that a stranger gave are not written through, and a file that is bad in any way stops no report."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from metaheed.errors import ConfigError, RunError, brief, shown
from metaheed.files.opening import YAML_BYTES, open_in_place, read_bounded
from metaheed.files.parsing import from_json, from_yaml
from metaheed.running.compare import compare
from metaheed.running.folder import RunFolder
from metaheed.running.load import load
from metaheed.running.log import stream_lines
from metaheed.running.results import read_result
from metaheed.studies.report.figures import read_toy
from metaheed.studies.report.measures import attention_log
from metaheed.studies.report.reading import find
from tests.conftest import Run
from tests.report.making import TASKS, make_run
from tests.test_training import SMALL

posix = pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is half done, judged; and a study."""
    from metaheed.cli.entry import main

    folder = tmp_path_factory.mktemp("theirs")
    small = [*SMALL[2:], "--backbone", "tests.networks:Tiny", "--test-queries", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAHEED_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert main(["train", "maml", *small, "--iterations", "4", "--out", str(folder / "run")]) == 0
        assert main(["evaluate", str(folder / "run"), "--tasks", "4"]) == 0
        searched = ["--trials", "2", "--iterations", "2", "--out", str(folder / "study")]
        assert main(["search", "maml", *small, *searched]) == 0
    return folder


@pytest.fixture
def copy(theirs: Path, tmp_path: Path) -> Path:
    shutil.copytree(theirs, tmp_path / "copy")
    return tmp_path / "copy"


RESUME = ("train", "--resume", "run", "--iterations", "6")
EVALUATE = ("evaluate", "run", "--tasks", "5")
SEARCH = ("search", "--resume", "study", "--trials", "3")
FILES = {
    **dict.fromkeys(("config.yaml", "run.lock", "metrics.jsonl", "tasks.jsonl", "timing.jsonl"), RESUME),
    **dict.fromkeys((f"checkpoints/{name}.safetensors" for name in ("last", "previous", "best")), RESUME),
    "result.json": EVALUATE,
}
PARTS = {
    "config.part": RESUME,
    "checkpoints/last.part": RESUME,
    "checkpoints/best.part": RESUME,
    "result.part": EVALUATE,
}
STUDY = ("search.yaml", "search.lock", "study.db", "study.db.lock", "study.db-journal", "study.db-wal", "trials.csv")


def _linked(file: Path, victim: Path, hard: bool = False) -> bytes:
    """Put a link in the place of a file; what the link leads to."""
    if file.exists():
        shutil.copy(file, victim)
    else:
        victim.write_bytes(b"mine")
    file.unlink(missing_ok=True)
    if hard:
        os.link(victim, file)
    else:
        file.symlink_to(victim)
    return victim.read_bytes()


def _refused_at_a_link(
    copy: Path, file: str, command: Sequence[str], metaheed: Run, hard: bool = False
) -> tuple[str, Path]:
    """That a command fails where a link lies in a file's place, and leaves alone what it leads to; what it says, and
    where the link leads."""
    victim = copy / "victim"
    before = _linked(copy / file, victim, hard)
    os.chdir(copy)
    status, _, err = metaheed(*command)
    assert (status, victim.read_bytes()) == (1, before), err
    return err, victim


@posix
@pytest.mark.parametrize("file", FILES)
def test_files_of_a_run_are_not_written_through_links(file: str, copy: Path, metaheed: Run) -> None:
    err, victim = _refused_at_a_link(copy, f"run/{file}", FILES[file], metaheed)
    assert f"{file} " in err.replace(":", " ")
    assert f"is a link to {victim}" in err
    assert err.count("\n") == 1


@posix
@pytest.mark.parametrize("file", PARTS)
def test_what_is_half_written_is_not_written_through_links(file: str, copy: Path, metaheed: Run) -> None:
    """The link is removed, as what an interrupted write left would be, and what it leads to stays."""
    for hard in (False, True):
        victim = copy / f"victim {hard}"
        before = _linked(copy / "run" / file, victim, hard)
        os.chdir(copy)
        assert metaheed(*PARTS[file])[0] == 0
        assert victim.read_bytes() == before
        assert not (copy / "run" / file).exists()


@posix
@pytest.mark.parametrize("file", ["run.lock", "metrics.jsonl", "tasks.jsonl", "timing.jsonl"])
def test_files_that_are_written_on_have_no_second_name(file: str, copy: Path, metaheed: Run) -> None:
    err, _ = _refused_at_a_link(copy, f"run/{file}", RESUME, metaheed, hard=True)
    assert "hard link" in err


@posix
def test_folders_that_are_links_are_not_written_into(copy: Path, metaheed: Run) -> None:
    os.chdir(copy)
    elsewhere = copy / "elsewhere"
    (copy / "run" / "checkpoints").rename(elsewhere)
    (elsewhere / "last.part").write_text("mine")
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    (copy / "run" / "checkpoints").symlink_to(elsewhere)
    status, _, err = metaheed(*RESUME)
    assert (status, f"checkpoints: it is a link to {elsewhere}" in err) == (1, True), err
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before


@posix
def test_a_run_that_the_user_reaches_through_a_link_is_his(copy: Path, metaheed: Run) -> None:
    os.chdir(copy)
    Path("link").symlink_to(copy / "run")
    assert metaheed("train", "--resume", "link", "--iterations", "6")[0] == 0
    assert metaheed("evaluate", "link", "--tasks", "4")[0] == 0


@posix
def test_a_new_run_is_not_written_through_links_that_wait_for_it(copy: Path, metaheed: Run) -> None:
    os.chdir(copy)
    for name in ("metrics.jsonl", "run.lock", "tensorboard", "checkpoints"):
        Path("new").mkdir()
        Path("new", name).symlink_to(copy / "made")
        status, _, err = metaheed("train", "maml", *SMALL, "--iterations", "1", "--out", "new")
        assert (status, f"{name}: it is a link" in err, Path("made").exists()) == (1, True, False), err
        shutil.rmtree("new")


@posix
@pytest.mark.parametrize("file", STUDY)
def test_files_of_a_study_are_not_written_through_links(file: str, copy: Path, metaheed: Run) -> None:
    err, victim = _refused_at_a_link(copy, f"study/{file}", SEARCH, metaheed)
    assert f"is a link to {victim}" in err


@posix
def test_folders_of_a_study_that_are_links(copy: Path, metaheed: Run) -> None:
    """A search drops the checkpoints of trials that are not the best: not those of a folder elsewhere."""
    os.chdir(copy)
    for name in ("workers", "trials", "trials/000", "trials/001"):
        shutil.rmtree("s", ignore_errors=True)
        shutil.copytree("study", "s")
        shutil.rmtree(f"s/{name}")
        Path("s", name).symlink_to(copy / "run")
        status, _, err = metaheed("search", "--resume", "s", "--trials", "3")
        assert (status, f"{name}: it is a link to" in err) == (1, True), err
        assert len([*Path("run", "checkpoints").iterdir()]) == 3


@posix
def test_other_commands_and_links(copy: Path, metaheed: Run) -> None:
    os.chdir(copy)
    Path("out").mkdir()
    for name in ("toy", "logs", "locks", "recipes"):
        Path("out", name).symlink_to(copy / "elsewhere")
        status, _, err = metaheed("reproduce", "figures", "--only", "toy", "--out", "out", "--dry-run")
        assert (status, f"{name}: it is a link" in err) == (1, True), err
        Path("out", name).unlink()
    Path("out", "maml").symlink_to(copy / "run")
    status, _, err = metaheed("demo", "--out", "out", "--iterations", "1")
    assert (status, "maml: it is a link" in err) == (1, True), err
    Path("out", "toy.json").symlink_to(copy / "made")
    status, _, err = metaheed("toy", "--out", "out", "--iterations", "2")
    assert (status, "toy.json: it is a link" in err, Path("made").exists()) == (1, True, False), err


def test_a_database_that_only_the_folder_names_is_not_opened(copy: Path, metaheed: Run) -> None:
    os.chdir(copy)
    file = copy / "study" / "search.yaml"
    values = yaml.safe_load(file.read_text())
    inside, outside = copy / "study" / "study.db", copy / "other.db"
    for url in (
        f"sqlite:///{outside}",
        "sqlite:///other.db",
        f"sqlite:///file:{inside}?uri=true",
        "postgresql://me:secret@127.0.0.1:1/db",
        "payload://host/db",
        "sqlite+payload:///study/study.db",
    ):
        values["search"]["storage"] = url
        file.write_text(yaml.safe_dump(values))
        status, _, err = metaheed("search", "--resume", "study", "--trials", "3")
        assert (status, "--storage URL" in err, outside.exists()) == (1, True, False), (url, err)
        assert "secret" not in err
    values["search"]["storage"] = f"sqlite:///{inside}"
    file.write_text(yaml.safe_dump(values))
    assert metaheed("search", "--resume", "study", "--trials", "2")[0] == 0


# Files that are bad in any way.

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[1, 2]",
    "a word": b'"config"',
    "a large number": b"1" + b"0" * 400,
    "a number without end": b"1" + b"0" * 9000,
    "mapping of lists": b'{"episodes": [], "learner": [1], "rule": [], "optima": 1, "accuracies": {}}',
    "nested lists": b"[" * 100_000 + b"]" * 100_000,
    "nested mappings": b'{"a":' * 100_000,
    "an alias bomb": BOMB.encode(),
    "a cycle": b"a: &a [*a]",
    "not UTF-8": b"\xff\xfe\x00\x80",
    "zeros": bytes(5000),
    "NaN": b'{"accuracy": NaN, "iteration": NaN, "weights": [NaN]}\n',
    "1e400": b'{"accuracy": 1e400, "iteration": 1e400}\n',
    "odd tags": b'a: !!int ""\nb: !!bool x\nc: !!python/object/apply:os.system [touch ran]\n',
    "an empty int": b'!!int ""',
    "a bool that is none": b"!!bool x",
    "a date that is none": b"!!timestamp x",
    "a hexadecimal number": b"0x" + b"f" * 20_000,
    "too large": b"# " + b"x" * (YAML_BYTES + 1),
}


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # its whole path may be too long for a socket's
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**8)  # 100 MB of zeros, in no space


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a pipe": _fifo,
    "a socket": _socket,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "100 MB": _huge,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
}
READ = ("config.yaml", "metrics.jsonl", "result.json", "tasks.jsonl", "timing.jsonl", "toy.json", "search.yaml")
BAD = [*CONTENTS, *(SPECIAL if os.name != "nt" else [])]


def _spoil(file: Path, how: str) -> None:
    file.unlink(missing_ok=True)
    if how in CONTENTS:
        file.write_bytes(CONTENTS[how] + b"\n")  # a log's last line counts only with its end
    else:
        SPECIAL[how](file)


def _spoilt_run(folder: Path, name: str, how: str) -> Path:
    timing = [{"iterations": 4, "seconds": 1.0, "device": "cpu"}]
    run = make_run(folder, "ta-maml", timing=timing, accuracies=TASKS)
    _spoil(run / name, how)
    return run


@pytest.mark.parametrize("how", BAD)
def test_one_bad_run_stops_neither_report_nor_comparison(how: str, metaheed: Run, in_folder: Path) -> None:
    """Each file of a run is spoilt in turn: the run is listed as unreadable, or what is left of it is used."""
    good = make_run(in_folder / "runs" / "good", accuracies=TASKS)
    spoilt = {name: _spoilt_run(in_folder / "runs" / f"spoilt {name}", name, how) for name in READ}
    found = find([in_folder / "runs"])
    assert good in {run.path for run in found.runs}
    listed = {Path(name) for name, _ in found.unreadable}
    nothing = how in ("a link to nothing", "a link to itself")  # as if there were no such file
    assert spoilt["config.yaml"] in listed
    assert spoilt["metrics.jsonl"] in listed
    problems = {run.path: run.problem for run in found.runs}
    assert spoilt["result.json"] in listed or (nothing and problems[spoilt["result.json"]])
    assert all(len(reason) < 700 and reason.isprintable() for _, reason in found.unreadable)
    for file, read in (("tasks.jsonl", attention_log), ("toy.json", read_toy)):
        with pytest.raises(RunError) as raised:
            read(spoilt[file] / file)
        assert len(str(raised.value)) < 700
    status, out, err = metaheed("compare", good, "--against", spoilt["result.json"])
    assert (status, out, err.count("\n"), len(err) < 900) == (1, "", 1, True), err
    assert not Path("ran").exists()


def test_a_report_on_them_all(metaheed: Run, in_folder: Path) -> None:
    make_run(in_folder / "runs" / "good", accuracies=TASKS)
    spoilt = [(name, how) for how in BAD for name in ("config.yaml", "result.json", "tasks.jsonl")]
    for index, (name, how) in enumerate(spoilt):
        _spoilt_run(in_folder / "runs" / f"{index:03d}", name, how)
    status, _, err = metaheed("report", "runs", "--out", "page")
    assert status == 0, err
    page = Path("page/report.md").read_text()
    for index, (name, how) in enumerate(spoilt):
        if name != "tasks.jsonl" and how not in ("a link to nothing", "a link to itself"):
            assert f"runs/{index:03d} " in page, (name, how)
    assert max(map(len, page.splitlines())) < 20_000
    assert not Path("ran").exists()


@pytest.mark.parametrize("how", BAD)
def test_bad_recipes_and_studies_are_one_line(how: str, metaheed: Run, in_folder: Path) -> None:
    Path("study").mkdir()
    for file, arguments in (
        (Path("r.yaml"), ["train", "--recipe", "r.yaml"]),
        (Path("study/search.yaml"), ["search", "--resume", "study"]),
    ):
        _spoil(file, how)
        status, out, err = metaheed(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1), err
        assert len(err) < 900
    assert not Path("ran").exists()


FIELDS = ("learner.fast_lr", "learner.backbone", "outer.meta_lr", "episodes.data", "training.iterations", "rule.name")
VALUES = {
    "large": 10**400,
    "long": "x" * 50_000,
    "list": [[1] * 5000] * 1,
    "mapping": {str(n): n for n in range(5000)},
    "date": yaml.safe_load("2001-01-01"),
    "inf": float("inf"),
    "nan": float("nan"),
    "none": None,
}


@pytest.mark.parametrize("value", VALUES)
def test_values_of_a_config_are_never_printed_at_length(value: str, metaheed: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    plain = yaml.safe_load((run / "config.yaml").read_text())
    for name in FIELDS:
        group, _, field = name.partition(".")
        (run / "config.yaml").write_text(yaml.safe_dump({**plain, group: {**plain[group], field: VALUES[value]}}))
        status, _, err = metaheed("evaluate", run)
        assert status == 1
        assert len(err) < 700, name
        assert err.count("\n") == 1


WRONG: dict[str, dict[str, object]] = {
    "200%": {"accuracies": [2.0, 2.0, 2.0, 2.0], "accuracy": 2.0},
    "below 0": {"accuracies": [-0.2, 0.4, 0.6, 0.8], "accuracy": 0.4},
    "NaN": {"accuracies": [float("nan"), 0.4, 0.6, 0.8], "accuracy": float("nan")},
    "one task": {"accuracies": [0.5], "tasks": 1},
    "one task for four": {"accuracies": [0.5]},
    "lists of lists": {"accuracies": [[0.5]] * 4},
    "words": {"accuracies": ["0.5"] * 4},
    "truth": {"accuracies": [True, False, True, False]},
    "large": {"accuracies": [10**400] * 4},
    "another mean": {"accuracy": 0.6},
    "a wide interval": {"half_width_95": 1e300},
    "no seed": {"seed": True},
    "a large seed": {"seed": 10**30},
    "no interval": {"half_width_95": None},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_compare_checks_what_report_checks(wrong: str, metaheed: Run, in_folder: Path) -> None:
    good, bad = make_run(in_folder / "r" / "good"), make_run(in_folder / "r" / "bad", "ta-maml", result=WRONG[wrong])
    with pytest.raises(RunError, match=r"result\.json"):
        read_result(bad)
    for sides in ((good, bad), (bad, good)):
        status, out, err = metaheed("compare", sides[0], "--against", sides[1])
        assert (status, out, err.count("\n"), len(err) < 700) == (1, "", 1, True), err
    assert metaheed("report", "r", "--out", "page")[0] == 0
    assert "bad/result.json cannot be read" in Path("page/report.md").read_text().replace("\\", "")


def test_unequal_numbers_of_tasks_are_not_compared(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one")
    other = make_run(tmp_path / "other", "ta-maml", accuracies=[0.2, 0.8])
    with pytest.raises(RunError, match="different numbers of tasks"):
        compare([one], [other])


def test_values_are_shown_on_a_line() -> None:
    for value in (10**5000, -(10**5000), "x" * 10**6, ["x" * 10**6] * 10**5, {1: {2: {3: {4: {5: 6}}}}}, b"\0" * 10**6):
        assert len(shown(value)) <= 120
        assert "\n" not in shown(value)
    assert [shown(v) for v in (1, 0.5, None, "a", True, [1, "b"])] == ["1", "0.5", "None", "'a'", "True", "[1, 'b']"]
    assert brief("a\n  b " + "c" * 500, 10) == "a b ccccc…"
    itself: list[object] = []
    itself.append(itself)
    assert len(shown(itself)) <= 120


def test_plain_values_are_read_as_ever() -> None:
    values = {"a": [1, 2.5, None, True, "ä"], "b": {"c": []}}
    assert from_yaml(yaml.safe_dump(values, allow_unicode=True).encode()) == values
    assert from_json(json.dumps(values)) == values
    with pytest.raises(ValueError, match="anchors and aliases"):
        from_yaml(b"a: &x 1\nb: *x")


def test_reading_and_writing_in_place(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"12345")
    assert read_bounded(file, 5) == read_bounded(file) == b"12345"
    with pytest.raises(OSError, match="5 bytes, but such a file may have 4 at most"):
        read_bounded(file, 4)
    with open_in_place(file, "ab") as opened:
        opened.write(b"6")
    assert file.read_bytes() == b"123456"
    with pytest.raises(RunError, match="cannot be read"):
        next(stream_lines(tmp_path))


def test_a_checkpoint_in_no_file(copy: Path) -> None:
    for how in ("a folder", *(("a pipe", "a device") if os.name != "nt" else ())):
        for name in ("last", "previous", "best"):
            path = RunFolder(copy / "run").checkpoints / f"{name}.safetensors"
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            SPECIAL[how](path)
        with pytest.raises((RunError, ConfigError), match="is not a checkpoint"):
            load(copy / "run")


@posix
def test_settings_of_matplotlib_in_the_folder(tmp_path: Path) -> None:
    """They can ask for LaTeX; and where they are a pipe, matplotlib would wait for its writer."""
    code = (
        "from metaheed.headless import matplotlib, own_settings\n"
        "said = lambda: (matplotlib.rcParams['text.usetex'], matplotlib.rcParams['font.size'])\n"
        "print(*said())\nwith own_settings({'font.size': 9}): print(*said())\nprint(*said())"
    )

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
        )
        return done.stdout + done.stderr

    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    assert run() == "True 30.0\nFalse 9.0\nTrue 30.0\n"
    (tmp_path / "matplotlibrc").unlink()
    os.mkfifo(tmp_path / "matplotlibrc")
    assert "matplotlibrc is a pipe or a device" in run()


@pytest.mark.skipif(os.name == "nt", reason="there is no such limit")
def test_an_alias_bomb_takes_no_memory(tmp_path: Path) -> None:
    """In a process that may have 3 GB: written out the list would have billions of words."""
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(BOMB + "algorithm: *n\n")
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30)); " + (
        "from metaheed.running.folder import RunFolder; from pathlib import Path; "
        "RunFolder(Path(sys.argv[1])).read_config()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False)
    assert "anchors and aliases are not read" in done.stderr.splitlines()[-1]
