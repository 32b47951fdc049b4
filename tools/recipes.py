"""Write experiments/recipes/: a recipe for each cell of the paper's tables and figures, and the same on other data.

    python tools/recipes.py
    python tools/recipes.py --searched STUDY/best.yaml ...

A cell whose values were searched keeps them: they lie in src/metaheed/studies/recipes/searched/, where --searched puts
what a study found. Every other one is made of the presets of metaheed.config, and marked untuned.
"""

import argparse
from pathlib import Path

from metaheed.errors import ConfigError
from metaheed.studies import recipes
from metaheed.studies.paper import all_cells

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "recipes"


def files() -> dict[Path, str]:
    """What each file of the folder is to hold."""
    found = {}
    for cell in all_cells():
        recipe = recipes.of_cell(cell)
        path = FOLDER / cell.data / f"{recipe.name}.yaml"
        found[path] = recipes.text(recipe, str(path.relative_to(ROOT)))
    return found


def adopt(study: Path) -> Path:
    """Make what a study found its cell's recipe; the file."""
    recipe = recipes.adopt(recipes.read(study))
    path = recipes.recipe.SHIPPED / f"{recipe.name}.yaml"
    before = recipes.read(path).provenance["study"] if path.exists() else "untuned"
    recipes.write(recipe, path)
    print(f"{recipe.name}: {before} -> study {recipe.provenance['study']}")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searched", type=Path, nargs="+", default=[], help="best.yaml of studies")
    try:
        for study in parser.parse_args().searched:
            adopt(study)
    except ConfigError as error:
        parser.error(str(error))
    wanted = files()
    for path in FOLDER.rglob("*.yaml"):
        if path not in wanted:
            path.unlink()
    for path, content in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    print(f"{len(wanted)} recipes in {FOLDER}")
