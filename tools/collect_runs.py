"""Copy the evidence of runs and searches into results/STUDY: configs, logs, results; no weights, no place of the data.

python tools/collect_runs.py STUDY FOLDER...

Of a search's trials the logs of single tasks are left out.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from metaheed.running.folder import STUDY_FILE, RunFolder

OF_SEARCH = ("best.yaml", "trials.csv", "parallel_coordinate.png", "importances.png")


def keep_run(path: Path, place: Path, tasks: bool = True) -> None:
    run, kept = RunFolder(path), RunFolder(place)
    kept.path.mkdir(parents=True, exist_ok=True)
    optional = (run.result_file, run.timing_file)  # a trial is not judged; earlier versions kept no time
    for file in (run.metrics_file, *([run.tasks_file] if tasks else []), *(f for f in optional if f.exists())):
        shutil.copy(file, kept.path)
    config = run.read_config()
    kept.write_config(
        replace(
            config,
            episodes=replace(config.episodes, data_root=None),
            training=replace(config.training, out=Path("runs") / path.name),
        )
    )


def keep_search(path: Path, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name in OF_SEARCH:
        if (path / name).exists():  # importances need ten trials
            shutil.copy(path / name, place)
    settings = yaml.safe_load((path / STUDY_FILE).read_text())
    settings["config"]["episodes"]["data_root"] = None
    (place / STUDY_FILE).write_text(yaml.safe_dump(settings, sort_keys=False))
    for trial in sorted((path / "trials").iterdir()):
        keep_run(trial, place / "trials" / trial.name, tasks=False)


study = Path(__file__).parents[1] / "results" / sys.argv[1]
for folder in map(Path, sys.argv[2:]):
    (keep_search if (folder / STUDY_FILE).exists() else keep_run)(folder, study / folder.name)
    print(study / folder.name)
