"""Copy the evidence of runs into results/STUDY: config, logs, results; no weights, and not where the data lay.

python tools/collect_runs.py STUDY RUN...
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from metaheed.runs import RunFolder

study = Path(__file__).parents[1] / "results" / sys.argv[1]
for path in map(Path, sys.argv[2:]):
    run, kept = RunFolder(path), RunFolder(study / path.name)
    kept.path.mkdir(parents=True, exist_ok=True)
    for file in (run.metrics_file, run.tasks_file, run.result_file, run.timing_file):
        if file != run.timing_file or file.exists():  # earlier versions kept no time
            shutil.copy(file, kept.path)
    config = run.read_config()
    kept.write_config(
        replace(
            config,
            episodes=replace(config.episodes, data_root=None),
            training=replace(config.training, out=Path("runs") / path.name),
        )
    )
    print(kept.path)
