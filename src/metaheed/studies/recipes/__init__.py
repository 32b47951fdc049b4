"""Recipes: files to train from, which hold a run's config."""

from metaheed.studies.recipes.recipe import (
    OF_A_RUN,
    PAPERS_SEARCH,
    Recipe,
    adopt,
    difference,
    of_cell,
    read,
    read_folder,
    recipe_settings,
    text,
    untuned,
    without_run,
    write,
)

__all__ = [
    "OF_A_RUN",
    "PAPERS_SEARCH",
    "Recipe",
    "adopt",
    "difference",
    "of_cell",
    "read",
    "read_folder",
    "recipe_settings",
    "text",
    "untuned",
    "without_run",
    "write",
]
