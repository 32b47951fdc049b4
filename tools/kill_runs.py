"""Kill small runs at random moments and resume them: do they end with the files of a run that was left alone?

python tools/kill_runs.py [--times N] [--seed N]

Each is killed by SIGKILL a random time after it began, resumed (and, half of them, killed and resumed once more), and
its logs, checkpoints and config compared byte by byte. The exit status is 1 if any differs. Not for Windows.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALGORITHMS = ("maml", "ta-maml")
SETTING = (
    *("--backbone", "tests.networks:Tiny", "--ways", "2", "--queries", "1", "--adaptation-steps", "1"),
    *("--meta-batch-size", "2", "--iterations", "90", "--val-every", "20", "--val-tasks", "4"),
    *("--checkpoint-every", "7", "--threads", "1", "--execution", "looped", "--device", "cpu"),
)
COMPARED = ("metrics.jsonl", "tasks.jsonl", "checkpoints/last.safetensors", "checkpoints/best.safetensors")
ROOT = Path(__file__).parents[1]


def begin(arguments: list[str]) -> "subprocess.Popen[bytes]":
    """`metaheed train` with these arguments."""
    command = [sys.executable, "-m", "metaheed", "train", *arguments]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def whole(algorithm: str, run: Path) -> float:
    """Train a run without interruption; the seconds it took."""
    began = time.monotonic()
    done = begin([algorithm, *SETTING, "--out", str(run)])
    _, said = done.communicate()
    if done.returncode:
        raise SystemExit(f"the uninterrupted run failed: {said.decode(errors='replace')}")
    return time.monotonic() - began


def content(run: Path) -> dict[str, bytes]:
    """What is compared; of config.yaml all but the place of the run and its checksum."""
    files = {name: (run / name).read_bytes() for name in COMPARED}
    config = (run / "config.yaml").read_text()
    files["config.yaml"] = re.sub(r"(?m)^( *out:|# sha256:).*\n", "", config).encode()
    return files


def killed(algorithm: str, run: Path, draw: random.Random, longest: float) -> int:
    """Begin a run, kill it once or twice, and let it end; how often it was killed in time."""
    kills, arguments = 0, [algorithm, *SETTING, "--out", str(run)]
    for _ in range(draw.choice((1, 2))):
        process = begin(arguments)
        time.sleep(draw.uniform(0, longest))
        process.kill()
        process.communicate()
        kills += process.returncode < 0
        if (run / "config.yaml").exists():  # else it had not begun
            arguments = ["--resume", str(run)]
    done = begin(arguments)
    _, said = done.communicate()
    if done.returncode:
        print(said.decode(errors="replace"), file=sys.stderr)
    return kills


def main() -> int:
    """Kill, resume and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="runs")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    asked = parser.parse_args()
    draw, same, kills = random.Random(asked.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        expected, longest = {}, 0.0
        for algorithm in ALGORITHMS:
            run = Path(scratch) / algorithm
            longest = max(longest, whole(algorithm, run))
            expected[algorithm] = content(run)
        for number in range(asked.times):
            algorithm = ALGORITHMS[number % len(ALGORITHMS)]
            run = Path(scratch) / f"{algorithm}-{number}"
            kills += killed(algorithm, run, draw, longest)
            try:
                found = content(run)
            except OSError as error:
                print(f"{run.name}: {error}")
                continue
            different = [name for name, part in found.items() if part != expected[algorithm][name]]
            same += not different
            if different:
                print(f"{run.name}: {', '.join(different)} differ")
    print(f"{same} of {asked.times} runs, killed {kills} times, ended with the same bytes")
    return 0 if same == asked.times else 1


if __name__ == "__main__":
    sys.exit(main())
