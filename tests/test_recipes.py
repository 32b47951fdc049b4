"""Recipe files: written, read back, trained from on the command line, and refused where they are wrong."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from metaheed.config import ALGORITHMS, default_config, preset
from metaheed.errors import ConfigError
from metaheed.running.folder import RunFolder
from metaheed.studies import recipes
from metaheed.studies.paper import Cell, all_cells
from metaheed.studies.recipes import Recipe
from tests.conftest import ROOT, Run

UNTUNED = {"kind": "untuned"}
SEARCHED = {
    "kind": "searched",
    **{"study": "small", "trials": 30, "iterations": 5000, "seed": 0, "validation_accuracy": 0.5, "version": "0.1.0"},
}
SMALL = ("--queries", 2, "--val-tasks", 4, "--iterations", 2, "--meta-batch-size", 2, "--adaptation-steps", 1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("provenance", [UNTUNED, SEARCHED], ids=["untuned", "searched"])
def test_what_is_written_is_read(algorithm: str, provenance: dict[str, object], tmp_path: Path) -> None:
    recipe = Recipe(default_config(algorithm, "cifar-fs", 5, 5), provenance)
    recipes.write(recipe, tmp_path / "new" / "r.yaml")
    assert recipes.read(tmp_path / "new" / "r.yaml") == recipe
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.yaml"]
    head = (tmp_path / "new" / "r.yaml").read_text().splitlines()[:2]
    assert algorithm in head[0]
    assert ("untuned" in head[0]) == (provenance is UNTUNED)
    assert head[1] == "# metaheed train --recipe r.yaml --data-root DATA"


def test_what_belongs_to_a_run_is_not_written(tmp_path: Path) -> None:
    plain = default_config("ta-maml")
    config = replace(
        plain,
        episodes=replace(plain.episodes, data_root=Path("somewhere")),
        training=replace(plain.training, seed=7, out=Path("run"), device="cuda:3", threads=4, iterations=123),
    )
    recipes.write(Recipe(config, UNTUNED), tmp_path / "r.yaml")
    read = recipes.read(tmp_path / "r.yaml").config
    assert read == replace(plain, training=replace(plain.training, iterations=123))
    assert recipes.without_run(config) == read
    assert not re.search(r"somewhere|cuda|\bseed", (tmp_path / "r.yaml").read_text())


def test_train_from_a_recipe(metaheed: Run, in_folder: Path) -> None:
    config = default_config("ta-maml")
    config = replace(config, outer=replace(config.outer, meta_lr=0.0123))
    recipes.write(Recipe(config, UNTUNED), in_folder / "r.yaml")
    status, out, err = metaheed("train", "--recipe", "r.yaml", *SMALL, "--seed", 3)
    assert status == 0, err
    trained = RunFolder(in_folder / "runs" / "glyphs-5way1shot-ta-maml-seed3").read_config()
    assert trained.outer.meta_lr == 0.0123, "the recipe's"
    assert trained.outer.meta_batch_size == 2, "the option's"
    assert trained.training.iterations == 2
    assert "seed3" in out
    status, out, _ = metaheed("train", "--recipe=r.yaml", "--help")
    assert status == 0
    assert "--attention-lr" in out
    assert "0.0123" in out, "the recipe's values are the defaults"
    status, _, err = metaheed("train", "maml", "--recipe", "r.yaml")
    assert status == 1
    assert "leave 'maml' out" in err
    status, _, err = metaheed("train", "--recipe", "r.yaml", "--meta-lr", -1)
    assert status == 1
    assert "--meta-lr is -1.0" in err


WRONG = {
    "is not YAML": "{",
    "must hold the mappings provenance and config, and holds list": "- 1",
    "and holds config": "config: {}",
    "kind is 'tuned'": ("provenance", "kind", "tuned"),
    "study of a searched recipe is None": ("provenance", "kind", "searched"),
    "did you mean 'fast_lr'": ("learner", "fast_rl", 0.1),
    "fast_lr is -1": ("learner", "fast_lr", -1),
    "meta_lr is 'x'": ("outer", "meta_lr", "x"),
    "sets seed in training, which belongs to a run": ("training", "seed", 3),
    "episodes is None": ("episodes", None, None),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_recipe_is_refused(message: str, metaheed: Run, in_folder: Path) -> None:
    wrong, file = WRONG[message], in_folder / "r.yaml"
    if isinstance(wrong, str):
        file.write_text(wrong)
    else:
        group, name, value = wrong
        recipes.write(Recipe(default_config("maml"), UNTUNED), file)
        values = yaml.safe_load(file.read_text())
        parent = values if group == "provenance" else values["config"]
        if name is None:
            del parent[group]
        else:
            parent[group][name] = value
        file.write_text(yaml.safe_dump(values))
    status, _, err = metaheed("train", "--recipe", "r.yaml")
    assert status == 1
    assert message in err
    assert "r.yaml" in err
    assert not (in_folder / "runs").exists()


def test_a_recipe_that_is_not_there(metaheed: Run) -> None:
    status, _, err = metaheed("train", "--recipe", "r.yaml")
    assert status == 1
    assert "r.yaml cannot be read" in err
    status, _, err = metaheed("train", "--recipe")
    assert status == 2


@pytest.mark.parametrize("accuracy", [1.5, float("nan"), "0.5", True])
def test_an_accuracy_that_is_none_is_refused(accuracy: object) -> None:
    with pytest.raises(ConfigError, match="validation_accuracy"):
        Recipe(default_config("maml"), {**SEARCHED, "validation_accuracy": accuracy})


# The paper's cells.

TOOL = ROOT / "tools" / "recipes.py"


@pytest.fixture
def tool() -> ModuleType:
    specification = importlib.util.spec_from_file_location("tools_recipes", TOOL)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_committed_recipes_are_what_the_tool_writes(tool: ModuleType) -> None:
    wanted = tool.files()
    assert {*tool.FOLDER.rglob("*.yaml")} == {*wanted}, "python tools/recipes.py"
    for path, content in wanted.items():
        assert path.read_text(encoding="utf-8") == content, f"{path}: python tools/recipes.py"


def test_every_cell_has_a_recipe_of_the_papers_setting(tool: ModuleType) -> None:
    found = {path.stem: recipes.read(path) for path in tool.FOLDER.rglob("*.yaml")}
    assert len(found) == len(all_cells())
    for cell in all_cells():
        recipe = found[f"{cell.data}-{cell.ways}way{cell.shots}shot-{cell.algorithm}"]
        config, paper = recipe.config, preset(cell.data, cell.ways, cell.shots)
        assert config.algorithm == cell.algorithm
        assert config.episodes.train_shape == config.episodes.test_shape == (cell.ways, cell.shots, paper.queries)
        assert config.outer.meta_batch_size == paper.meta_batch_size
        assert config.learner.own_settings()["adaptation_steps"] == paper.adaptation_steps
        assert config.training.iterations == 55_000
        assert recipe == recipes.of_cell(cell), "what an installed package uses"


def test_what_a_study_found_becomes_its_cells_recipe_and_stays_it(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes.recipe, "SHIPPED", tmp_path / "searched")
    cell = Cell("cifar-fs", 5, 1, "ta-maml")
    config = recipes.untuned(cell).config
    best = replace(
        config,
        learner=replace(config.learner, fast_lr=0.25),  # type: ignore[call-arg]
        rule=replace(config.rule, attention_lr=0.005),  # type: ignore[call-arg]
        outer=replace(config.outer, meta_lr=0.002),
        training=replace(config.training, iterations=5000, val_tasks=100, seed=3),
    )
    recipes.write(Recipe(best, SEARCHED), tmp_path / "best.yaml")
    tool.adopt(tmp_path / "best.yaml")
    adopted = recipes.of_cell(cell)
    assert adopted.provenance == SEARCHED
    assert adopted.config == replace(best, training=config.training), "searched values, the paper's training"
    content = tool.files()[tool.FOLDER / "cifar-fs" / "cifar-fs-5way1shot-ta-maml.yaml"]
    assert "searched here: the best of 30 trials of 5000 iterations (study small)" in content
    assert sum("kind: searched" in text for text in tool.files().values()) == 1
    assert recipes.of_cell(cell._replace(algorithm="maml")).provenance == UNTUNED


@pytest.mark.parametrize("wrong", ["untuned", "no cell", "other T", "other Q"])
def test_what_is_not_found_in_the_papers_setting_is_not_adopted(wrong: str) -> None:
    config = recipes.untuned(Cell("fc100", 10, 1, "maml")).config
    found, message = Recipe(config, SEARCHED), ""
    if wrong == "untuned":
        found, message = Recipe(config, UNTUNED), "is untuned, not searched"
    if wrong == "no cell":
        found, message = Recipe(default_config("maml"), SEARCHED), "glyphs-5way1shot-maml is no cell"
    if wrong == "other T":
        learner = replace(config.learner, adaptation_steps=3)  # type: ignore[call-arg]
        found, message = Recipe(replace(config, learner=learner), SEARCHED), "learner.adaptation_steps 3, but .* is 5"
    if wrong == "other Q":
        episodes = replace(config.episodes, queries=5)
        found, message = Recipe(replace(config, episodes=episodes), SEARCHED), "episodes.queries 5, but .* is 15"
    with pytest.raises(ConfigError, match=message):
        recipes.adopt(found)
