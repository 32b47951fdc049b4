"""`make bench`: the time of an outer iteration, side by side with the peers and with the machine's limit.

For each setting, twice (peers with their own settings, then with our process-wide ones): start one process an entry,
check every meta-gradient against the reference, warm up, and let them step in turn, one at a time, round after round.
A turn is as many steps as make a second. What other work does to the machine it does to all alike; ratios are taken
within a round.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks import limit, table
from benchmarks.processes import ROOT, Process, WorkerError
from benchmarks.reference import LARGEST, base_algorithm, difference
from benchmarks.settings import PEERS, SETTINGS, Setting
from metaheed.files.writing import write_whole
from metaheed.types import Params

WARM_UP = 2
"""Steps before the first that counts; the first of them is the one whose meta-gradient is checked."""
TURN = 1.0
"""Seconds of steps in a turn, one step at least: a training steps back to back, and a step just after another entry's
turn finds nothing of its own in the processor's caches."""
MACHINE = 1.0
"""Seconds of repetitions for each of the two things that are measured of the machine."""
PAUSE = 0.05
"""Seconds between two entries' turns: threads that finish wait actively for a moment before they sleep."""
DISTRIBUTIONS = {
    "learn2learn": "learn2learn",
    "higher": "higher",
    "torchopt": "torchopt",
    "metalearn_vmap": "parallel-metalearn",
    "metalearn_sequential": "parallel-metalearn",
    "iteryne": "iteryne",
    "torch_func": "torch",
    "ours": "metaheed",
}
"""Entry -> the distribution whose version it has."""


@dataclass(frozen=True)
class Key:
    """Which entry."""

    entry: str
    """ "ours" or a key of PEERS."""
    algorithm: str
    speed_settings: bool
    """Whether the process-wide settings of our command line are made in its process."""


@dataclass
class Row:
    """What was measured of one entry in one setting."""

    setting: str
    entry: str
    algorithm: str
    speed_settings: bool
    version: str = ""
    status: str = "measured"
    """measured, missing, wrong or failed."""
    reason: str = ""
    """Why it is not measured."""
    difference: float | None = None
    """Of its meta-gradient to the reference, relative."""
    seconds: list[float] = field(default_factory=list)
    """A step's, of every round: the mean of its turn."""
    baseline: str = ""
    """The entry that `ratios` are to."""
    ratios: list[float] = field(default_factory=list)
    """Its time over the baseline's, round by round."""
    peak_bytes: int | None = None
    torch_threads: int | None = None
    threads: int | None = None
    """Of its process: PyTorch's for operators, ours for tasks, and idle ones."""
    limit_seconds: float | None = None
    share_of_limit: float | None = None
    """limit_seconds over the median of seconds."""


def keys(setting: Setting, entries: Sequence[str], speed_settings: bool) -> list[Key]:
    """Who takes part: ours first; with `speed_settings` the peers again, and of ours MAML alone, as the baseline."""
    algorithms = [a for a in setting.algorithms if a == "maml" or not speed_settings]
    found = [Key("ours", algorithm, True) for algorithm in algorithms if "ours" in entries]
    return found + [
        Key(peer, algorithm, speed_settings)
        for algorithm in algorithms
        for peer, offered in PEERS.items()
        if peer in entries and algorithm in offered
    ]


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Paired: round by round."""
    return [mine / theirs for mine, theirs in zip(seconds, baseline, strict=True)]


class References:
    """Reference meta-gradients, each computed once, in a process that ends after it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[Setting, str], Params] = {}

    def __call__(self, setting: Setting, algorithm: str) -> Params:
        """Per-task, float64, leaves (B, ...)."""
        key = (setting, base_algorithm(algorithm))
        if key not in self._known:
            path = self._folder / "reference.safetensors"
            with Process() as process:
                process.ask("reference", setting=setting.to_json(), algorithm=algorithm, path=str(path))
            self._known[key] = load_file(path)
        return self._known[key]


def measure(setting: Setting, chosen: Sequence[Key], rounds: int, references: References) -> list[Row]:
    """One setting, the chosen entries in turn."""
    rows = [Row(setting.name, k.entry, k.algorithm, k.speed_settings, _version(k.entry)) for k in chosen]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        running: list[tuple[Row, Process]] = []
        for row in rows:
            expected = references(setting, row.algorithm)
            process = stack.enter_context(Process())
            if _ready(row, process, setting, expected, Path(folder)):
                running.append((row, process))
            else:
                process.close()
            _say(f"  {_label(row)}: {_verdict(row)}")
        order = random.Random(0)
        for _ in range(rounds):
            for row, process in order.sample(running, len(running)):
                time.sleep(PAUSE)
                try:
                    row.seconds.append(process.ask("turn", seconds=TURN)["seconds"])
                except WorkerError as error:
                    _fail(row, "failed", str(error))
            running = [pair for pair in running if pair[0].status == "measured"]
        for row, process in running:
            answer = process.ask("memory")
            row.peak_bytes, row.torch_threads = answer["peak_bytes"], answer["torch_threads"]
            row.threads = answer["threads"]
    _compare(rows)
    return rows


def _ready(row: Row, process: Process, setting: Setting, expected: Params, folder: Path) -> bool:
    """Build, check, warm up; what goes wrong is noted in the row."""
    path = folder / "gradient.safetensors"
    try:
        process.ask(
            "build",
            entry=row.entry,
            algorithm=row.algorithm,
            setting=setting.to_json(),
            speed_settings=row.speed_settings,
        )
        process.ask("step")
        process.ask("gradient", path=str(path))
        tensors = load_file(path)
        weights = tensors.pop("weights")
        found = {name.removeprefix("gradient."): g for name, g in tensors.items()}
        row.difference = difference(found, weights, expected)
        if row.difference > LARGEST:
            _fail(row, "wrong", f"its meta-gradient is {row.difference:.1e} off")
            return False
        for _ in range(WARM_UP - 1):
            process.ask("step")
    except WorkerError as error:
        absent = "ModuleNotFoundError" in str(error) or "ImportError" in str(error)
        _fail(row, "missing" if absent else "failed", str(error))
        return False
    return True


def _fail(row: Row, status: str, reason: str) -> None:
    row.status, row.reason, row.seconds = status, reason, []


def _compare(rows: Sequence[Row]) -> None:
    """Peers against our entry of the same algorithm; ours against our MAML."""
    ours = {row.algorithm: row for row in rows if row.entry == "ours" and row.status == "measured"}
    for row in rows:
        baseline = ours.get("maml" if row.entry == "ours" else row.algorithm)
        if row.status == "measured" and baseline is not None:
            row.baseline = f"ours {baseline.algorithm}"
            row.ratios = ratios(row.seconds, baseline.seconds)


def add_limits(rows: Sequence[Row], settings: Sequence[Setting], machine: limit.Machine) -> None:
    """What share of the machine's limit each row reaches."""
    by_name = {setting.name: setting for setting in settings}
    for row in rows:
        row.limit_seconds = limit.step_work(by_name[row.setting], row.algorithm).seconds(machine)
        if row.seconds:
            row.share_of_limit = row.limit_seconds / statistics.median(row.seconds)


def measured_machine(before: dict[str, float]) -> dict[str, float]:
    """What the machine reaches: the best so far, for something else may have been at work at any one time."""
    with Process() as process:
        return {
            name: max(value, before.get(name, 0.0)) for name, value in process.ask("machine", seconds=MACHINE).items()
        }


def run(settings: Sequence[Setting], entries: Sequence[str], rounds: int, out: Path) -> dict[str, Any]:
    """Measure, print and write speed.json, speed.md and speed.png into `out`; returns what speed.json holds."""
    begin = time.time()
    machine = measured_machine({})
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        references = References(Path(folder))
        for setting in settings:
            machine = measured_machine(machine)
            for speed_settings in (False, True):
                chosen = keys(setting, entries, speed_settings)
                if speed_settings and all(key.entry == "ours" for key in chosen):
                    continue
                _say(
                    f"({setting.name}) {setting.title}; peers with {'our' if speed_settings else 'their own'} settings"
                )
                rows += measure(setting, chosen, rounds, references)
    add_limits(rows, settings, limit.Machine(machine["flops"], machine["bandwidth"]))
    result = {
        **conditions(),
        "seconds_in_all": round(time.time() - begin),
        "rounds": rounds,
        "warm_up": WARM_UP,
        "turn_seconds": TURN,
        "machine": machine,
        "settings": [setting.to_json() for setting in settings],
        "rows": [asdict(row) for row in rows],
    }
    write_whole(out / "speed.json", (json.dumps(result, indent=1) + "\n").encode())
    text = table.markdown(result)
    write_whole(out / "speed.md", text.encode())
    table.figure(result, out / "speed.png")
    print(text)
    return result


def conditions() -> dict[str, Any]:
    """What a reader must know to judge the numbers: commit, versions, processor."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _git("rev-parse", "HEAD") + ("" if not status else " with changes"),
        "python": platform.python_version(),
        "versions": {name: _version(entry) for entry, name in DISTRIBUTIONS.items()},
        "processor": _processor(),
        "system": platform.platform(),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def _version(entry: str) -> str:
    try:
        return metadata.version(DISTRIBUTIONS[entry])
    except metadata.PackageNotFoundError:
        return ""


def _label(row: Row) -> str:
    return f"{row.entry} {row.algorithm}"


def _verdict(row: Row) -> str:
    return f"meta-gradient {row.difference:.1e} off" if row.status == "measured" else f"{row.status}: {row.reason}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    everyone = ["ours", *PEERS]
    parser = argparse.ArgumentParser(prog="make bench", description="Speed beside the peers and the machine's limit.")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], help="which settings")
    parser.add_argument("--entries", nargs="+", choices=everyone, default=everyone, help="whom to measure")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each entry")
    parser.add_argument("--quick", action="store_true", help="setting c and two rounds: does it work?")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "bench", help="folder of the results (the evidence: results/speed)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error(f"--rounds is {chosen.rounds}, but it must be at least 1")
    names, rounds = (["c"], 2) if chosen.quick else (chosen.settings, chosen.rounds)
    run([SETTINGS[name] for name in names], chosen.entries, rounds, chosen.out)


if __name__ == "__main__":
    main()
