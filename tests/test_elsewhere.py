"""Runs judged on other data sets, at other ways and on frozen episodes from files, through the command line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import metaheed as package
from metaheed.data import Dataset, Episodes, load_dataset
from metaheed.data.convert import convert
from metaheed.data.frozen import freeze, write_episodes
from metaheed.data.images import make_split
from metaheed.running.checkpoint import recorded_pixels
from metaheed.running.folder import RunFolder
from tests.conftest import ROOT, Begin, Run, as_format_1, edit
from tests.data.making import pictures
from tests.documented import assert_each_has_a_case, assert_seen, rows
from tests.test_training import SMALL
from tests.warm import WarmProcess

Runs = dict[str, Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cifar_folder: Path) -> Runs:
    """Two seeds of MAML and one of ProtoNet on glyphs, MAML on CIFAR-FS; none evaluated."""
    from metaheed.cli.entry import main

    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    for name, algorithm, seed, data in (
        ("maml0", "maml", 0, "glyphs"),
        ("maml1", "maml", 1, "glyphs"),
        ("protonet0", "protonet", 0, "glyphs"),
        ("cifar0", "ta-maml", 0, "cifar-fs"),
    ):
        settings = [setting for setting in SMALL if algorithm != "protonet" or setting != "--adaptation-steps"]
        if algorithm == "protonet":
            settings.remove("2")  # the value of --adaptation-steps comes first
        where = ["--data", data, *(["--data-root", str(cifar_folder)] if data != "glyphs" else [])]
        rest = ["--test-queries", "5", "--iterations", "3", "--seed", str(seed), "--out", str(folder / name)]
        assert main(["train", algorithm, *settings, *where, *rest]) == 0
        runs[name] = folder / name
    return runs


@pytest.fixture
def runs(trained: Runs, tmp_path: Path) -> Runs:
    """Copies, so that results of one test do not reach another."""
    for name, path in trained.items():
        shutil.copytree(path, tmp_path / "copies" / name)
    return {name: tmp_path / "copies" / name for name in trained}


def test_on_another_data_set(runs: Runs, metaheed: Run, cifar_folder: Path) -> None:
    run = runs["maml0"]
    assert metaheed("evaluate", run, "--tasks", 10)[0] == 0
    before = (run / "result.json").read_bytes()
    elsewhere = ["--data", "cifar-fs", "--data-root", cifar_folder, "--tasks", 10]
    status, out, err = metaheed("evaluate", run, *elsewhere)
    assert (status, err) == (0, f"the result is in {run / 'result-on-cifar-fs.json'}\n")
    assert "maml trained on glyphs, on cifar-fs test, 5-way 1-shot: " in out
    assert "images: luminance, Lanczos from 32×32 to 28×28; scaled as glyphs was in training" in out
    assert (run / "result.json").read_bytes() == before, "the run's own result stays"
    result = json.loads((run / "result-on-cifar-fs.json").read_text())
    assert (result["data"], result["trained_on"], result["tasks"]) == ("cifar-fs", "glyphs", 10)
    assert result["conversion"] == "luminance, Lanczos from 32×32 to 28×28"
    tasks = Episodes(load_dataset("cifar-fs", cifar_folder), "test", 5, 1, 5, 0)
    assert result["episodes_sha256"] == tasks.fingerprint(10), "of the images before conversion"
    learner, meta = package.load(run)
    for index in (0, 9):
        images, _ = convert(tasks.split.images[torch.from_numpy(tasks.rows(index).flatten())], (1, 28, 28))
        x = (images.float() / 255).view(5, 6, 1, 28, 28)  # glyphs stay in [0, 1]
        adapted = learner.adapt(meta, x[:, :1].flatten(0, 1), torch.arange(5))
        right = learner.predict(adapted, x[:, 1:].flatten(0, 1)).argmax(1) == torch.arange(5).repeat_interleave(5)
        assert float(right.double().mean()) == pytest.approx(result["accuracies"][index], abs=1e-6)
    assert metaheed("evaluate", run, *elsewhere, "--split", "val")[0] == 0
    assert json.loads((run / "result-on-cifar-fs-val.json").read_text())["split"] == "val"


def test_pixels_are_scaled_as_in_training(runs: Runs, metaheed: Run, cifar_folder: Path) -> None:
    """From CIFAR-FS, whose statistics are not 0 and 1, to glyphs; without CIFAR-FS being there."""
    run, cifar = runs["cifar0"], load_dataset("cifar-fs", cifar_folder)
    for which in ("best", "last"):
        assert recorded_pixels(RunFolder(run).read_weights(which)[1]) == (cifar.mean, cifar.std)
    assert metaheed("evaluate", run, "--data", "glyphs", "--data-root", "nowhere", "--tasks", 4)[0] == 0
    result = json.loads((run / "result-on-glyphs.json").read_text())
    assert result["conversion"] == "grey repeated as RGB, Lanczos from 28×28 to 32×32"
    tasks = Episodes(load_dataset("glyphs"), "test", 5, 1, 5, 0)
    images, _ = convert(tasks.split.images[torch.from_numpy(tasks.rows(3).flatten())], (3, 32, 32))
    x = cifar.normalize(images).view(5, 6, 3, 32, 32)
    learner, meta = package.load(run)
    adapted = learner.adapt(meta, x[:, :1].flatten(0, 1), torch.arange(5))
    right = learner.predict(adapted, x[:, 1:].flatten(0, 1)).argmax(1) == torch.arange(5).repeat_interleave(5)
    assert float(right.double().mean()) == pytest.approx(result["accuracies"][3], abs=1e-6)


def test_frozen_tasks_of_a_folder(metaheed: Run, tmp_path: Path) -> None:
    """With the run's size and seed they are those that are drawn; with another seed, known classes are refused."""
    run, of_folder = tmp_path / "run", ["--data", "folder", "--data-root", pictures(tmp_path / "mine", 12, 5)]
    sizes = ["--image-size", 28, "--ways", 2, "--shots", 1]
    options = [*sizes, "--split-seed", 3, "--test-queries", 2, "--iterations", 1, "--out", run]
    assert metaheed("train", "maml", *SMALL, *of_folder, *options)[0] == 0
    assert metaheed("evaluate", run, "--tasks", 4)[0] == 0
    drawn = (run / "result.json").read_bytes()
    for seed in (3, 4):
        which = [*of_folder, *sizes, "--split-seed", seed, "--queries", 2, "--tasks", 4, "--with-images"]
        assert metaheed("data", "episodes", *which, "--out", tmp_path / f"{seed}.npz")[0] == 0
    assert metaheed("evaluate", run, "--episodes", tmp_path / "3.npz")[0] == 0
    assert (run / "result.json").read_bytes() == drawn
    status, _, err = metaheed("evaluate", run, "--episodes", tmp_path / "4.npz")
    assert status == 1
    assert "was trained on classes that are in test now" in " ".join(err.split())
    status, _, err = metaheed("data", "episodes", "--data", "glyphs", "--split-seed", 1, "--out", tmp_path / "x.npz")
    assert status == 1
    assert "glyphs has a split of its own" in err
    assert metaheed("evaluate", run, "--data", "glyphs", "--tasks", 4)[0] == 0, (
        "its folder's options are not for glyphs"
    )


def forget_pixels(run: Path) -> None:
    """Make the run's checkpoints those of a version that did not record how pixels were scaled."""
    for path in (run / "checkpoints").glob("*.safetensors"):
        as_format_1(path, lambda about: about.pop("pixels"))


def test_runs_of_an_older_version(runs: Runs, metaheed: Run, cifar_folder: Path) -> None:
    run = runs["cifar0"]
    assert metaheed("evaluate", run, "--data", "glyphs", "--tasks", 6)[0] == 0
    before = (run / "result-on-glyphs.json").read_bytes()
    forget_pixels(run)
    assert metaheed("evaluate", run, "--data", "glyphs", "--tasks", 6)[0] == 0, "from the training data, which is there"
    assert (run / "result-on-glyphs.json").read_bytes() == before
    assert metaheed("evaluate", run, "--tasks", 6)[0] == 0
    assert metaheed("train", "--resume", run, "--iterations", 4)[0] == 0
    cifar = load_dataset("cifar-fs", cifar_folder)
    assert recorded_pixels(RunFolder(run).read_weights("last")[1]) == (cifar.mean, cifar.std), "recorded from now on"


def test_compare_elsewhere(runs: Runs, metaheed: Run, cifar_folder: Path) -> None:
    for name in ("maml0", "protonet0"):
        assert metaheed("evaluate", runs[name], "--tasks", 12)[0] == 0
        elsewhere = ("--data", "cifar-fs", "--data-root", cifar_folder, "--tasks", 10)
        assert metaheed("evaluate", runs[name], *elsewhere)[0] == 0
    sides = (runs["protonet0"], "--against", runs["maml0"])
    status, out, _ = metaheed("compare", *sides, "--data", "cifar-fs", "--json")
    assert status == 0
    a, b = (json.loads((runs[n] / "result-on-cifar-fs.json").read_text()) for n in ("protonet0", "maml0"))
    assert json.loads(out)["mean"] == pytest.approx(np.mean(a["accuracies"]) - np.mean(b["accuracies"]), abs=1e-5)
    _, own, _ = metaheed("compare", *sides, "--json")
    assert metaheed("compare", *sides, "--data", "glyphs", "--json")[1] == own, "their own data set, by name"
    assert own != out


def test_protonet_at_any_number_of_ways(runs: Runs, metaheed: Run) -> None:
    run = runs["protonet0"]
    for ways in (3, 20):
        status, out, _ = metaheed("evaluate", run, "--ways", ways, "--tasks", 5, "--json")
        result = json.loads(out)
        assert (status, result["ways"]) == (0, ways)
        assert result["initial_accuracy"] == pytest.approx(1 / ways)
        assert result["initial_loss"] == pytest.approx(np.log(ways), rel=1e-5)
        tasks = Episodes(load_dataset("glyphs"), "test", ways, 1, 5, 0)
        learner, meta = package.load(run, ways=ways)
        task = tasks[4]
        z = learner.backbone.head_input(learner.initial(meta), task.support_x, learner.head)  # type: ignore[attr-defined]
        q = learner.backbone.head_input(learner.initial(meta), task.query_x, learner.head)  # type: ignore[attr-defined]
        right = torch.cdist(q, z).argmin(1) == task.query_y  # one shot: an image is its class's prototype
        assert float(right.double().mean()) == pytest.approx(result["accuracies"][4], abs=1e-6)


def test_protonet_validates_at_more_ways_than_it_trains(metaheed: Run, in_folder: Path) -> None:
    shape = ["--backbone", "conv4-32", "--ways", 3, "--queries", 2, "--test-ways", 8, "--meta-batch-size", 1]
    rest = ["--iterations", 2, "--val-tasks", 10, "--threads", 1, "--out", "run"]
    assert metaheed("train", "protonet", *shape, *rest)[0] == 0
    status, out, _ = metaheed("evaluate", "run", "--split", "val", "--tasks", 10, "--json")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    validated = {line["iteration"]: line["validation_accuracy"] for line in lines if "validation_accuracy" in line}
    result = json.loads(out)
    assert (status, result["ways"]) == (0, 8)
    assert result["accuracy"] == pytest.approx(validated[result["iteration"]], abs=1e-6)
    assert metaheed("train", "maml", *shape, "--out", "other")[0] == 1


def test_other_shots_and_queries(runs: Runs, metaheed: Run) -> None:
    status, out, _ = metaheed("evaluate", runs["maml0"], "--shots", 3, "--queries", 8, "--tasks", 4, "--json")
    assert status == 0
    assert (json.loads(out)["shots"], json.loads(out)["queries"]) == (3, 8)


@pytest.mark.parametrize("with_images", [[], ["--with-images"]])
def test_frozen_episodes_give_the_drawn_result(with_images: list[str], runs: Runs, metaheed: Run) -> None:
    run = runs["maml0"]
    assert metaheed("data", "episodes", "--queries", 5, "--tasks", 12, *with_images, "--out", "tasks.npz")[0] == 0
    assert metaheed("evaluate", run, "--tasks", 12)[0] == 0
    drawn = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    assert metaheed("evaluate", run, "--episodes", "tasks.npz")[0] == 0
    assert (run / "result.json").read_bytes() == drawn
    assert metaheed("evaluate", runs["protonet0"], "--tasks", 12)[0] == 0
    assert metaheed("compare", runs["protonet0"], "--against", run)[0] == 0


def test_frozen_episodes_of_another_data_set(runs: Runs, metaheed: Run, cifar_folder: Path) -> None:
    run, root = runs["maml0"], ("--data-root", cifar_folder)
    freezing = ("data", "episodes", "--data", "cifar-fs", *root, "--queries", 5, "--tasks", 8, "--episode-seed", 3)
    assert metaheed(*freezing, "--out", "without.npz")[0] == 0
    assert metaheed(*freezing, "--out", "with.npz", "--with-images")[0] == 0
    found = []
    for way in (
        ("--data", "cifar-fs", *root, "--tasks", 8, "--episode-seed", 3),
        ("--episodes", "without.npz", *root),
        ("--episodes", "with.npz"),  # no data set is at hand
    ):
        assert metaheed("evaluate", run, *way)[0] == 0
        found.append((run / "result-on-cifar-fs.json").read_bytes())
        (run / "result-on-cifar-fs.json").unlink()
    assert found[0] == found[1] == found[2]
    # And from the file with images in its own domain, as of a version that records no scale, with its data gone:
    assert metaheed("evaluate", runs["cifar0"], "--episodes", "with.npz")[0] == 0
    before = (runs["cifar0"] / "result.json").read_bytes()
    forget_pixels(runs["cifar0"])
    assert metaheed("evaluate", runs["cifar0"], "--episodes", "with.npz")[0] == 0
    assert (runs["cifar0"] / "result.json").read_bytes() == before


class TestExample:
    EXAMPLE = ROOT / "examples" / "frozen_episodes.py"

    def test_it_is_plain(self) -> None:
        text = self.EXAMPLE.read_text()
        assert len(text.splitlines()) < 60
        assert {*re.findall(r"^(?:import|from) (\w+)", text, flags=re.MULTILINE)} == {
            *("hashlib", "json", "sys", "collections", "pathlib", "numpy", "torch"),
        }

    def test_it_judges_the_very_tasks(self, runs: Runs, metaheed: Run, run: Callable[..., WarmProcess]) -> None:
        freezing = ("data", "episodes", "--shots", 2, "--queries", 5, "--tasks", 15, "--with-images")
        assert metaheed(*freezing, "--out", "tasks.npz")[0] == 0
        assert metaheed("evaluate", runs["maml0"], "--episodes", "tasks.npz")[0] == 0
        result = runs["maml0"] / "result-5way2shot5query.json"
        done = run("tasks.npz", result)
        assert done.returncode == 0, done.err
        accuracies = []
        episodes = Episodes(load_dataset("glyphs"), "test", 5, 2, 5, 0)
        for index in range(15):
            task = episodes[index]
            means = task.support_x.flatten(1).view(5, 2, -1).mean(1)
            right = torch.cdist(task.query_x.flatten(1), means).argmin(1) == task.query_y
            accuracies.append(float(right.double().mean()))
        lines = done.out.splitlines()
        half_width = 1.96 * np.std(accuracies, ddof=1) / 15**0.5
        assert lines[0] == f"nearest_centroid: {np.mean(accuracies):.2%} ± {half_width:.2%}"
        d = np.array(json.loads(result.read_text())["accuracies"]) - accuracies
        assert lines[1] == f"  maml minus it: {d.mean():+.2%} ± {1.96 * d.std(ddof=1) / 15**0.5:.2%}"
        assert float(lines[2].split()[1].rstrip("%")) > 40, "the linear classifier learns"
        assert metaheed("evaluate", runs["maml0"], "--tasks", 15)[0] == 0
        result = runs["maml0"] / "result.json"
        assert "judged on other tasks" in run("tasks.npz", result).err

    def test_it_checks_the_images(self, metaheed: Run, run: Callable[..., WarmProcess]) -> None:
        assert metaheed("data", "episodes", "--tasks", 5, "--out", "without.npz")[0] == 0
        assert "write the file --with-images" in run("without.npz").err
        assert metaheed("data", "episodes", "--tasks", 5, "--with-images", "--out", "tasks.npz")[0] == 0
        arrays = dict(np.load("tasks.npz"))
        arrays["images"] = arrays["images"] ^ 1
        np.savez("altered.npz", **arrays)
        assert "not the images that the tasks were made of" in run("altered.npz").err

    @pytest.fixture
    def run(self, begin: Begin) -> Callable[..., WarmProcess]:
        def run(*arguments: object) -> WarmProcess:
            process = begin(
                *arguments, program=f"import runpy\nrunpy.run_path({str(self.EXAMPLE)!r}, {{}}, '__main__')\n"
            )
            process.wait()
            return process

        return run


def frozen_file(data: str, shape: tuple[int, int, int], path: Path) -> Path:
    """Episodes of random images under any name."""
    images = [np.random.default_rng(k).integers(0, 256, (8, *shape), dtype=np.uint8) for k in range(6)]
    split = make_split("test", list("abcdef"), images)
    dataset = Dataset(data, {"test": split}, (0.0,) * shape[0], (1.0,) * shape[0])
    write_episodes(freeze(Episodes(dataset, "test", 5, 1, 5, 0), 3), path, with_images=True)
    return path


Case = Callable[[SimpleNamespace], str]


def _evaluate(name: str, *arguments: object) -> Case:
    def case(t: SimpleNamespace) -> str:
        status, out, err = t.metaheed("evaluate", t.runs[name], *arguments)
        assert (status, out) == (1, "")
        assert not list(t.runs[name].glob("result*"))
        return str(err)

    return case


def _two_channels(t: SimpleNamespace) -> str:
    return str(t.metaheed("evaluate", t.runs["maml0"], "--episodes", frozen_file("odd", (2, 28, 28), Path("f.npz")))[2])


def _own_data_of_another_size(t: SimpleNamespace) -> str:
    return str(t.metaheed("evaluate", t.runs["maml0"], "--episodes", frozen_file("glyphs", (1, 9, 9), Path("f")))[2])


def _older(t: SimpleNamespace) -> str:
    forget_pixels(t.runs["cifar0"])
    config = t.runs["cifar0"] / "config.yaml"
    edit(config, "data_root: .*", "data_root: /gone")
    return str(t.metaheed("evaluate", t.runs["cifar0"], "--data", "glyphs")[2])


def _mixed(t: SimpleNamespace) -> str:
    frozen_file("odd", (1, 28, 28), Path("f.npz"))
    for name in ("maml0", "cifar0"):
        t.metaheed("evaluate", t.runs[name], "--data", "glyphs", "--tasks", 4)
    for name in ("maml0", "cifar0"):
        assert t.metaheed("evaluate", t.runs[name], "--episodes", "f.npz")[0] == 0
    both_elsewhere = t.metaheed("compare", t.runs["cifar0"], "--against", t.runs["maml0"], "--data", "odd")[2]
    assert f"{t.runs['cifar0']} was trained on cifar-fs and {t.runs['maml0']} on glyphs" in both_elsewhere
    return str(t.metaheed("compare", t.runs["cifar0"], "--against", t.runs["maml0"], "--data", "glyphs")[2])


def _other_tasks(t: SimpleNamespace) -> str:
    frozen_file("odd", (1, 28, 28), Path("f.npz"))
    frozen_file("odd", (1, 32, 28), Path("g.npz"))
    t.metaheed("evaluate", t.runs["maml0"], "--episodes", "f.npz")
    t.metaheed("evaluate", t.runs["protonet0"], "--episodes", "g.npz")
    return str(t.metaheed("compare", t.runs["maml0"], "--against", t.runs["protonet0"], "--data", "odd")[2])


def _same_origin(t: SimpleNamespace) -> str:
    file = frozen_file("fc100", (3, 32, 32), Path("f.npz"))
    status, out, _ = t.metaheed("evaluate", t.runs["cifar0"], "--episodes", file)
    assert status == 0
    return str(out)


ELSEWHERE: dict[str, Case] = {
    "--ways is …, but …'s head has one output for each of the … training classes: …": _evaluate("maml0", "--ways", 6),
    "unknown data set …: did you mean …": _evaluate("maml0", "--data", "omniglt"),
    "… needs --data-root, …": _evaluate("maml0", "--data", "omniglot"),
    "images of … channels cannot be made into images of …: only grey and RGB (1 and 3) can": _two_channels,
    "… was trained on images …, but these are …": _own_data_of_another_size,
    "… did not record how pixels were scaled, so … is needed as well: …": _older,
    "… has no result-on-….json: run … first": lambda t: str(
        t.metaheed("compare", t.runs["maml0"], "--against", t.runs["protonet0"], "--data", "omniglot")[2]
    ),
    "… was trained on … and … on …: compare runs that were trained on the same data set": _mixed,
    "… were evaluated on different tasks: …": _other_tasks,
    "caution: … are both made of …: classes judged on may have been trained on": _same_origin,
}


def _cut_off(t: SimpleNamespace) -> str:
    file = frozen_file("odd", (1, 28, 28), Path("f.npz"))
    file.write_bytes(file.read_bytes()[:-30])
    return str(t.metaheed("evaluate", t.runs["maml0"], "--episodes", file)[2])


def _other_version(classes: int | None) -> Case:
    def case(t: SimpleNamespace) -> str:
        test = load_dataset("glyphs").split("test")
        images = [255 - a if classes is None else a for a in np.split(test.images.numpy(), test.starts[1:])]
        if classes is None:
            split = make_split("test", test.classes, images)
        else:
            repeated = [np.concatenate([a] * 2) for a in images]
            split = make_split("test", [f"{c}{k}" for c in test.classes for k in range(2)], repeated + repeated)
        dataset = Dataset("glyphs", {"test": split}, (0.0,), (1.0,))
        write_episodes(freeze(Episodes(dataset, "test", 5, 1, 5, 0), 3), Path("f.npz"), with_images=False)
        return str(t.metaheed("evaluate", t.runs["maml0"], "--episodes", "f.npz")[2])

    return case


def _no_place(t: SimpleNamespace) -> str:
    Path("taken").write_text("")
    status, out, err = t.metaheed("data", "episodes", "--tasks", 2, "--out", "taken/f.npz")
    assert (status, out) == (1, "")
    assert [str(p) for p in Path().iterdir() if p.is_file()] == ["taken"]
    return str(err)


FROZEN: dict[str, Case] = {
    "… not found: write it with 'metaheed data episodes --out …'": _evaluate("maml0", "--episodes", "no.npz"),
    "… is not a whole file of frozen episodes (…): …": _cut_off,
    "… of the … images that the tasks use are not those of …": _other_version(None),
    "the tasks use image …, but … has … images: …": _other_version(2),
    "--ways is …, but --episodes … decides it: leave it out": _evaluate("maml0", "--episodes", "f.npz", "--ways", 5),
    "cannot write …: …. Choose another --out": _no_place,
}


@pytest.mark.parametrize(
    ("row", "case"),
    [
        (row, case[row])
        for h, case in (("Evaluating elsewhere", ELSEWHERE), ("Frozen episodes", FROZEN))
        for row in rows(h)
    ],
)
def test_documented_error(row: str, case: Case, runs: Runs, metaheed: Run, in_folder: Path) -> None:
    assert_seen(row, case(SimpleNamespace(runs=runs, metaheed=metaheed)))


def test_each_error_is_documented() -> None:
    assert_each_has_a_case("Evaluating elsewhere", ELSEWHERE)
    assert_each_has_a_case("Frozen episodes", FROZEN)


@pytest.mark.parametrize(
    ("option", "value"),
    [("data", "glyphs"), ("split", "val"), ("shots", 1), ("queries", 5), ("tasks", 9), ("episode-seed", 0)],
)
def test_the_file_decides(option: str, value: object, runs: Runs, metaheed: Run) -> None:
    status, _, err = metaheed("evaluate", runs["maml0"], "--episodes", "f.npz", f"--{option}", value)
    assert status == 1
    assert f"--{option} is {value!r}, but --episodes f.npz decides it: leave it out" in err
