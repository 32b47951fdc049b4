"""Flip bits of a run's files, one at a time, and ask what reads them: is each noticed, or does it change no result?

python tools/flip_bits.py [--share S] [--seed N]

A small run is trained and judged, and a small study searched, in a temporary folder. Then each bit of each of their
files, or the share S of the bits that the seed draws, is flipped, the file read as the program reads it, and the bit
flipped back:

    noticed     the reader refuses the file, or goes back to another copy with a notice
    harmless    what is read is the same
    passed      what is read is another thing, and nobody says so

The exit status is 1 if any passed.
"""

import argparse
import contextlib
import io
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the network is of the tests

from metaheed.config import EvaluationConfig, SearchConfig, default_config
from metaheed.data import Dataset, load_dataset
from metaheed.errors import MetaheedError
from metaheed.running.evaluate import evaluate_run
from metaheed.running.folder import STUDY_FILE, RunFolder
from metaheed.running.results import read_result
from metaheed.running.train import train
from metaheed.studies.search import read_search, search

Reader = Callable[[], Any]
"""Reads a file as the program does; raises MetaheedError, or returns what it found."""


class NoticedError(MetaheedError):
    """A reader that goes back to another copy has said so."""


def make_runs(folder: Path) -> tuple[Path, Path]:
    """A run with every file that a run can have, and a study."""
    config = default_config("ta-maml")
    root = Path(__file__).parents[1]
    of_learner: dict[str, Any] = {"backbone": "tests.networks:Tiny", "backbone_path": root, "adaptation_steps": 1}
    learner = replace(config.learner, **of_learner)
    training = replace(
        config.training, iterations=3, val_every=2, val_tasks=3, checkpoint_every=1, device="cpu", threads=1
    )
    config = replace(
        config,
        learner=learner,
        episodes=replace(config.episodes, ways=2, queries=1),
        outer=replace(config.outer, meta_batch_size=2),
        training=replace(training, execution="looped", out=folder / "run"),
    )
    run = train(config)
    evaluate_run(run, EvaluationConfig(tasks=5))
    kept = RunFolder(run)
    kept.write_replayed(kept.read_weights_log())
    kept.record_classes(_of_a_folder())
    study = folder / "study"
    search(replace(config, training=replace(training, iterations=1, out=study)), SearchConfig(trials=1))
    return run, study


def _of_a_folder() -> Dataset:
    glyphs = load_dataset("glyphs")
    few = {name: replace(split, classes=split.classes[:3]) for name, split in glyphs.splits.items()}
    return replace(glyphs, name="folder", splits=few)


def readers(run: Path, study: Path) -> dict[Path, Reader]:
    """What reads each file."""
    folder = RunFolder(run)

    def checkpoint() -> Any:
        found, notices = RunFolder(run).read_checkpoint()
        if notices:
            raise NoticedError(notices[0])
        return found

    def previous() -> Any:
        with _aside(folder.last):
            return checkpoint()

    def best() -> Any:
        with _aside(folder.last), _aside(folder.previous):
            return folder.read_weights("best")

    def log(file: Path) -> Reader:
        def read() -> Any:
            folder.check_logs()
            return file.read_bytes()

        return read

    dataset = _of_a_folder()
    return {
        folder.config_file: folder.read_config,
        folder.result_file: lambda: read_result(run),
        folder.last: checkpoint,
        folder.previous: previous,
        folder.best: best,
        folder.metrics_file: log(folder.metrics_file),
        folder.tasks_file: log(folder.tasks_file),
        folder.replayed_file: folder.read_replayed,
        folder.classes_file: lambda: folder.record_classes(dataset),
        study / STUDY_FILE: lambda: read_search(study),
    }


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[None]:
    """Without this file."""
    hidden = path.with_name(f"{path.name}.aside")
    path.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(path)


def flip(path: Path, read: Reader, share: float, seed: int) -> Counter[str]:
    """Flip bits of a file; how many were noticed, harmless and passed."""
    content, found = path.read_bytes(), Counter[str]()
    expected = _plain(read())
    bits = range(8 * len(content))
    drawn = bits if share >= 1 else random.Random(seed).sample(bits, max(1, int(share * len(bits))))
    for bit in drawn:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            outcome = "harmless" if _plain(read()) == expected else "passed"
        except MetaheedError:
            outcome = "noticed"
        found[outcome] += 1
    path.write_bytes(content)
    return found


def _plain(value: Any) -> Any:
    """Something that == compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, {name: _plain(getattr(value, name)) for name in [f.name for f in fields(value)]}
    if isinstance(value, dict):
        return [(name, _plain(part)) for name, part in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return repr(value)


def main() -> int:
    """Flip, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the bits of each file (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    asked = parser.parse_args()
    total = Counter[str]()
    print(f"{'file':36}{'bits':>9}{'noticed':>9}{'harmless':>10}{'passed':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.redirect_stderr(io.StringIO()):
            run, study = make_runs(Path(scratch))
        for path, read in readers(run, study).items():
            found = flip(path, read, asked.share, asked.seed)
            total += found
            _print(str(path.relative_to(scratch)), found)
    _print("in all", total)
    return 1 if total["passed"] else 0


def _print(name: str, found: Counter[str]) -> None:
    bits = sum(found.values())
    print(f"{name:36}{bits:9,}{found['noticed']:9,}{found['harmless']:10,}{found['passed']:8,}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
