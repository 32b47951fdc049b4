"""Recipes: files to train from, which hold a run's config and say where its values come from.

A recipe is a YAML file: a comment that says what it is and how to train it, then `provenance` and `config`. It holds
what decides the algorithm, but not the fields that belong to one machine or one run (`OF_A_RUN`). Those are options of
the command that trains it: `metaheed train --recipe FILE --seed 1 --data-root DATA`.
"""

import contextlib
import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from metaheed.config import RunConfig, default_config, from_dict, to_dict
from metaheed.errors import ConfigError, RunError, brief, shown
from metaheed.files.opening import (
    YAML_BYTES,
    cannot_write_message,
    put_in_place,
    read_bounded,
    refuse_link,
    write_synced,
)
from metaheed.files.parsing import from_yaml
from metaheed.studies.paper import ITERATIONS, Cell, all_cells

OF_A_RUN: dict[str, tuple[str, ...]] = {
    "episodes": ("data_root",),
    "learner": ("backbone_path", "init_from"),
    "rule": ("replay",),
    "training": (
        *("seed", "out", "device", "threads", "execution", "chunk_size", "capture", "block", "tf32"),
        *("checkpoint_every", "log_initial_loss", "check_gradient", "data_cache", "tensorboard"),
    ),
}
"""Group of the config -> its fields that belong to one machine or one run, and so not to a recipe."""


_SEARCHED: dict[str, type[Any]] = {
    "study": str,
    "trials": int,
    "iterations": int,
    "seed": int,
    "validation_accuracy": float,
    "version": str,
}
"""Fields that the provenance of a searched recipe must have: the study's name, its number of trials, the iterations of
a trial, the search seed, the best trial's validation accuracy in [0, 1], and the version of this program."""


@dataclass(frozen=True)
class Recipe:
    """A config without the fields that belong to one run, and where its values come from."""

    config: RunConfig
    """The fields in `OF_A_RUN` have no meaning here: they are not written, and have their defaults when read."""
    provenance: dict[str, Any]
    """`kind` is "untuned" or "searched". A searched recipe also has study, trials, iterations (of a trial), seed,
    validation_accuracy and version."""

    def __post_init__(self) -> None:
        kind = self.provenance.get("kind")
        if kind not in ("untuned", "searched"):
            raise ConfigError(f"provenance: kind is {shown(kind)}, but it must be untuned or searched")
        for name, expected in _SEARCHED.items() if kind == "searched" else ():
            value = self.provenance.get(name)
            if not isinstance(value, expected) or isinstance(value, bool):
                raise ConfigError(
                    f"provenance: {name} of a searched recipe is {shown(value)}, but it must be a {expected.__name__}"
                )
        accuracy = self.provenance.get("validation_accuracy", 0.0)
        if not isinstance(accuracy, float) or not (math.isfinite(accuracy) and 0 <= accuracy <= 1):
            raise ConfigError(
                f"provenance: validation_accuracy is {shown(accuracy)}, but it must be a number from 0 to 1"
            )

    @property
    def name(self) -> str:
        """DATA-NwayKshot-ALGORITHM: the name of its runs without the seed."""
        return self.config.run_name.removesuffix(f"-seed{self.config.training.seed}")


def write(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe, whole or not at all.

    Raises:
        RunError: the file cannot be written; no part of it is left.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        refuse_link(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(part, text(recipe, path.name).encode())
        put_in_place(part, path)
    except OSError as error:
        raise RunError(cannot_write_message(error, path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def text(recipe: Recipe, file: str) -> str:
    """The content of a recipe's file.

    Args:
        recipe: what it holds.
        file: its name, which the comment in it repeats.
    """
    values: dict[str, Any] = {"provenance": recipe.provenance, "config": recipe_settings(recipe.config)}
    return f"{_comment(recipe, file)}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"


def read(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: the file cannot be read, is no recipe, or holds a setting that is unknown, out of its bounds, or
            belongs to a run.
    """
    try:
        values = from_yaml(read_bounded(Path(path), YAML_BYTES))
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a recipe: {error}") from error
    expected = {"provenance", "config"}
    if (
        not isinstance(values, dict)
        or set(values) != expected
        or not all(isinstance(values[n], dict) for n in expected)
    ):
        found = brief(", ".join(map(str, values))) if isinstance(values, dict) else type(values).__name__
        raise ConfigError(f"{path} is not a recipe: it must hold the mappings provenance and config, and holds {found}")
    for group, names in OF_A_RUN.items():
        inside = values["config"].get(group)
        for name in names if isinstance(inside, dict) else ():
            if name in inside:
                raise ConfigError(
                    f"recipe {path} sets {name} in {group}, which belongs to a run: take it out, and set it when "
                    f"training (--{name.replace('_', '-')})"
                )
    try:
        return Recipe(from_dict(values["config"]), values["provenance"])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"recipe {path}: {error}") from error


def read_folder(folder: str | Path) -> dict[str, Recipe]:
    """Read all recipes in a folder and its subfolders: file name without .yaml -> recipe, in alphabetical order.

    Raises:
        ConfigError: there is none, two have the same name, or one cannot be read (see `read`).
    """
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).rglob("*.yaml"), key=lambda p: (p.stem, str(p))):
        if path.stem in found:
            raise ConfigError(
                f"{found[path.stem]} and {path} have the same name, and their runs would have, too: rename one"
            )
        found[path.stem] = path
    if not found:
        raise ConfigError(f"--recipes {folder} holds no recipe, which would be a file NAME.yaml")
    return {name: read(path) for name, path in found.items()}


# Recipes of the paper's cells


SHIPPED = Path(__file__).parent / "searched"
"""Folder of the searched recipes, a file for each cell; the recipes of the other cells are made of the presets."""


PAPERS_SEARCH: dict[str, tuple[str, ...]] = {
    "learner": ("fast_lr",),
    "rule": ("attention_lr", "equity_lambda"),
    "outer": ("meta_lr",),
}
"""Group of the config -> its fields that the paper searches, which are all that a cell's searched recipe may change."""


def untuned(cell: Cell) -> Recipe:
    """The recipe of a cell with the program's defaults and the paper's T, B, Q and number of iterations."""
    config = default_config(cell.algorithm, cell.data, cell.ways, cell.shots)
    training = replace(config.training, iterations=ITERATIONS)
    return Recipe(replace(config, training=training), {"kind": "untuned"})


def of_cell(cell: Cell) -> Recipe:
    """The recipe of a cell: the searched one if there is one, else the untuned one."""
    recipe = untuned(cell)
    file = SHIPPED / f"{recipe.name}.yaml"
    return read(file) if file.exists() else recipe


def adopt(found: Recipe) -> Recipe:
    """The recipe of a cell of the paper with the settings that a study found for it.

    The training loop is the cell's, whatever the study's was.

    Args:
        found: the study's recipe.

    Raises:
        ConfigError: the recipe was not searched, belongs to no cell, or differs from its cell in a field that the paper
            does not search.
    """
    if found.provenance["kind"] != "searched":
        raise ConfigError(f"the recipe of {found.name} is {found.provenance['kind']}, not searched")
    e = found.config.episodes
    cell = Cell(e.data, e.ways, e.shots, found.config.algorithm)
    if cell not in all_cells():
        raise ConfigError(f"{found.name} is no cell of the paper's experiments")
    base = untuned(cell).config
    plain = {}
    for group, names in PAPERS_SEARCH.items():
        theirs = getattr(found.config, group)
        chosen = {name: getattr(theirs, name) for name in names if hasattr(theirs, name)}
        plain[group] = replace(getattr(base, group), **chosen)
    adopted: RunConfig = replace(base, **plain)
    differs = difference(replace(without_run(found.config), training=base.training), adopted)
    if differs is not None:
        what, value, papers = differs
        raise ConfigError(f"the study of {found.name} has {what} {value!r}, but the paper's setting is {papers!r}")
    return Recipe(adopted, found.provenance)


def difference(one: RunConfig, other: RunConfig) -> tuple[str, Any, Any] | None:
    """The first field in which two configs differ, as (GROUP.FIELD, value, other value); None if they are equal."""
    flat = []
    for config in (one, other):
        groups = to_dict(config)
        flat.append({f"{g}.{n}": v for g, part in groups.items() if isinstance(part, dict) for n, v in part.items()})
    for name in {**flat[0], **flat[1]}:
        values = [side.get(name, "absent") for side in flat]
        if values[0] != values[1]:
            return name, values[0], values[1]
    return None


def without_run(config: RunConfig) -> RunConfig:
    """The config with defaults in all fields that belong to a run, so that two runs of a recipe are equal."""
    plain: dict[str, Any] = {}
    for group, names in OF_A_RUN.items():
        part = getattr(config, group)
        defaults = {f.name: f.default for f in fields(part) if f.name in names}
        plain[group] = replace(part, **defaults)
    return replace(config, **plain)


def recipe_settings(config: RunConfig) -> dict[str, Any]:
    """Group -> field -> value of a config, without the fields that belong to a run."""
    values = to_dict(config)
    for group, names in OF_A_RUN.items():
        for name in names:
            values[group].pop(name, None)
    return values


def _comment(recipe: Recipe, file: str) -> str:
    e, about = recipe.config.episodes, recipe.provenance
    origin = "untuned: the program's defaults"
    if about["kind"] == "searched":
        origin = (
            f"searched here: the best of {about['trials']} trials of {about['iterations']} iterations (study "
            f"{about['study']})"
        )
    root = "" if e.data == "glyphs" else " --data-root DATA"
    return (
        f"# {recipe.config.algorithm} on {e.data}, {e.ways}-way {e.shots}-shot; {origin}\n"
        f"# metaheed train --recipe {file}{root}\n"
    )
