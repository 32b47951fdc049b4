"""The runs of an experiment, how far each one is in the output folder, and the command that it needs next.

OUT/NAME-seedS/       the run folder of recipe NAME
OUT/recipes/          the recipes as they were used
OUT/logs/             the output of each run's commands
OUT/locks/            a file for each run, locked by the process that works on it
OUT/toy/              the toy of Fig. 1
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from metaheed.config import FreezeConfig, ReplayedConfig, ReproduceConfig, RunConfig
from metaheed.errors import ConfigError, RunError, unknown
from metaheed.files.opening import refuse_link
from metaheed.files.trust import allow, require
from metaheed.files.writing import _writing
from metaheed.running.checkpoint import RunProgress
from metaheed.running.folder import RunFolder
from metaheed.running.results import read_result
from metaheed.studies.paper import ANALOGOUS, experiment_algorithms, experiment_cells
from metaheed.studies.recipes import Recipe, difference, of_cell, read_folder, without_run

TOY, RECIPES = "toy", "recipes"


class Slot(NamedTuple):
    """A device and a number of threads, on which one run at a time computes."""

    device: str
    """cpu or cuda:N."""
    threads: int
    """Number of CPU threads."""


class Standing(NamedTuple):
    """How far a job is."""

    iteration: int
    """Outer steps done."""
    iterations: int
    """Outer steps to be done in all."""
    trained: bool
    """Whether all of them are done, and the validation after the last."""
    judged: bool
    """Whether it has also been evaluated on as many tasks as asked for."""
    held: bool = False
    """Whether a living process trains it at this moment."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.trained and self.judged and not self.held

    def __str__(self) -> str:
        if self.done:
            return "done"
        if self.held:
            return f"being trained elsewhere, at {self.iteration:,} of {self.iterations:,}"
        if self.trained:
            return "trained, to be evaluated"
        return f"to be resumed at {self.iteration:,} of {self.iterations:,}" if self.iteration else "missing"


class Stage(NamedTuple):
    """What a job needs next."""

    what: str
    """training, evaluation, or drawing."""
    arguments: Sequence[str]
    """Arguments of metaheed's command line."""


class Job(Protocol):
    """Something that is done by a sequence of commands, each of which can be repeated."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def metrics(self) -> Path | None:
        """The log from which its progress is read; None if it has none."""

    def look(self) -> Standing:
        """How far the job is, as read from disk.

        Raises:
            RunError: its folder holds something else.
        """

    def next(self, standing: Standing, slot: Slot) -> Stage:
        """What is to be done next with that standing."""


@dataclass(frozen=True)
class RecipeRun:
    """A recipe to be trained with a seed and evaluated."""

    name: str
    """RECIPE-seedS."""
    recipe: Recipe
    file: Path
    """The file of the recipe."""
    seed: int
    folder: RunFolder
    iterations: int
    """Outer steps asked for."""
    tasks: int
    """Number of test tasks to evaluate on."""
    data_root: Path | None
    trust: bool = False
    """Whether the code of a network of the user's own, which the recipe names, may run."""

    @property
    def metrics(self) -> Path:
        """See `Job`."""
        return self.folder.metrics_file

    def look(self) -> Standing:
        """See `Job`. A run that has done more steps than asked for needs no more."""
        folder, held = self.folder, self.folder.is_held()
        if not folder.config_file.exists():
            return Standing(0, self.iterations, trained=False, judged=False, held=held)
        config = folder.read_config()
        self._check_same(config)
        checkpoint, _ = folder.read_checkpoint()
        progress = RunProgress() if checkpoint is None else checkpoint.progress
        iterations = max(self.iterations, progress.iteration)
        # The config must agree: a run that is shortened to the steps it has done is finished by resuming it.
        trained = iterations == config.training.iterations and iterations <= progress.validated
        return Standing(progress.iteration, iterations, trained, trained and self._judged(config, progress), held)

    def next(self, standing: Standing, slot: Slot) -> Stage:
        """See `Job`."""
        path, common = str(self.folder.path), ["--device", slot.device, *(["--trust"] if self.trust else [])]
        if self.data_root is not None:
            common += ["--data-root", str(self.data_root)]
        iterations = ["--iterations", str(standing.iterations)]
        if standing.trained:
            return Stage("evaluation", ["evaluate", path, "--tasks", str(self.tasks), *common])
        if self.folder.config_file.exists():
            return Stage("training", ["train", "--resume", path, *iterations, *common])
        own = ["--seed", str(self.seed), "--out", path, "--threads", str(slot.threads)]
        return Stage("training", ["train", "--recipe", str(self.file), *own, *iterations, *common])

    def _check_same(self, config: RunConfig) -> None:
        recipe = self.recipe.config
        recipe = replace(recipe, training=replace(recipe.training, iterations=config.training.iterations))
        differs = difference(without_run(config), without_run(recipe))
        if differs is None and config.training.seed != self.seed:
            differs = "training.seed", config.training.seed, self.seed
        if differs is not None:
            name, there, here = differs
            raise RunError(
                f"{self.folder.path} holds a run of other settings: {name} is {there!r} there and {here!r} here. "
                "Choose another --out, or move it away"
            )

    def _judged(self, config: RunConfig, progress: RunProgress) -> bool:
        if not self.folder.result_file.exists():
            return False
        try:
            result = read_result(self.folder.path)
        except RunError:
            return False  # the result is damaged, so the run is evaluated again
        expected = {
            **dict(zip(("ways", "shots", "queries"), config.episodes.test_shape, strict=True)),
            "split": FreezeConfig.split,
            "episode_seed": FreezeConfig.episode_seed,
            "tasks": self.tasks,
            "checkpoint": "best",
            "iteration": progress.best_iteration,  # it may have changed if the run was trained further since
        }
        return all(result.get(name) == value for name, value in expected.items())


@dataclass(frozen=True)
class ToyJob:
    """The toy of Fig. 1, which takes seconds."""

    folder: Path
    name: str = TOY
    metrics: None = None

    def look(self) -> Standing:
        """See `Job`."""
        there = all((self.folder / file).exists() for file in ("toy.json", "trajectories.png"))
        return Standing(int(there), 1, there, there)

    def next(self, standing: Standing, slot: Slot) -> Stage:
        """See `Job`."""
        return Stage("drawing", ["toy", "--out", str(self.folder)])


def make_jobs(experiment: str, config: ReproduceConfig) -> list[Job]:
    """The jobs of an experiment, seed by seed, so that the table of the first seed is complete first.

    Raises:
        ConfigError: the experiment, a word of --only or a recipe is unknown or wrong, nothing is chosen, or a recipe
            names a network whose code may not run.
        RunError: in the output folder there is a link in the place of one of the folders above.
    """
    chosen, toy = _choose(experiment, config)
    for name, recipe in chosen.items():
        network = recipe.config.learner.backbone
        if ":" in network:
            try:
                (allow if config.trust else require)(network, Path.cwd())
            except ConfigError as error:
                raise ConfigError(f"the recipe {name}: {error}") from error
    _refuse_links(config.out, [TOY, RECIPES, "logs", "locks", *(f"{n}-seed{s}" for n in chosen for s in config.seeds)])
    jobs: list[Job] = [ToyJob(config.out / TOY)] if toy else []
    for seed in config.seeds:
        for name, recipe in chosen.items():
            if isinstance(recipe.config.rule, ReplayedConfig):
                raise ConfigError(
                    f"the recipe {name} replays the weights of another run: train it with 'metaheed train --recipe'"
                )
            run = f"{name}-seed{seed}"
            iterations = config.iterations or recipe.config.training.iterations
            file, folder = config.out / RECIPES / f"{name}.yaml", RunFolder(config.out / run)
            jobs.append(
                RecipeRun(run, recipe, file, seed, folder, iterations, config.tasks, config.data_root, config.trust)
            )
    return jobs


def _refuse_links(out: Path, names: Sequence[str]) -> None:
    for name in names:
        with _writing(out):
            refuse_link(out / name)


def _choose(experiment: str, config: ReproduceConfig) -> tuple[dict[str, Recipe], bool]:
    """The recipes that are asked for, by name, and whether the toy is asked for."""
    algorithms = experiment_algorithms(experiment)
    if config.recipes is None:
        recipes = {recipe.name: recipe for recipe in map(of_cell, experiment_cells(experiment))}
    else:
        found = read_folder(config.recipes)
        recipes = {name: recipe for name, recipe in found.items() if recipe.config.algorithm in algorithms}
        if not recipes:
            raise ConfigError(
                f"no recipe in {config.recipes} is of an algorithm of {experiment}, which are {', '.join(algorithms)}"
            )
    known = {word: kind for recipe in recipes.values() for kind, word in _words(recipe).items()}
    known |= {name: "recipe" for name in recipes if name not in known}
    # The user's own files may have capitals in their names.
    words = {word if word in known else word.lower() for word in config.only}
    has_toy = experiment == "figures"
    for word in sorted(words - {TOY} if has_toy else words):
        if word not in known:
            # The names of the package's recipes are combinations of the other words and too many to list.
            listed = [w for w, kind in known.items() if kind != "recipe" or config.recipes is not None]
            raise unknown("word in --only", word, [*listed, TOY] if has_toy else listed)
    toy = has_toy and (not words or TOY in words)
    words.discard(TOY)
    if not words and toy and config.only:
        return {}, toy
    asked: dict[str, set[str]] = {}
    for word in words:
        asked.setdefault(known[word], set()).add(word)
    if config.recipes is None and not {"data set", "recipe"} & set(asked):
        recipes = {name: r for name, r in recipes.items() if r.config.episodes.data not in ANALOGOUS}
    chosen = {name: recipe for name, recipe in recipes.items() if _fits(name, recipe, asked)}
    if not chosen:
        raise ConfigError(f"--only {' '.join(config.only)}: {experiment} has no run that fits all these words")
    return chosen, toy


def _words(recipe: Recipe) -> dict[str, str]:
    e = recipe.config.episodes
    return {"data set": e.data, "setting": f"{e.ways}way{e.shots}shot", "algorithm": recipe.config.algorithm}


def _fits(name: str, recipe: Recipe, asked: Mapping[str, set[str]]) -> bool:
    own = {**_words(recipe), "recipe": name}
    return all(own[kind] in words for kind, words in asked.items())


def command(stage: Stage) -> list[str]:
    """The command line of a stage."""
    # -P: a folder named metaheed in the working directory must not be imported instead of this package.
    return [sys.executable, "-P", "-m", "metaheed", *stage.arguments]
