"""A persistent process that holds one entry and steps it when told to.

It reads one JSON object a line on stdin and answers each with one on stdout; what libraries print goes to stderr.
`build` comes first; then, as often as wanted, `step`, `turn`, `gradient` (of the last step) and `memory`. `reference`
and `machine` need no `build`. An answer with "error" is a failure, which ends the process.
"""

import gc
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import limit, ours, peers, reference
from benchmarks.entry import Entry
from benchmarks.settings import Setting


class Worker:
    """The commands."""

    def __init__(self) -> None:
        self.entry: Entry | None = None
        self.steps = 0

    def build(self, entry: str, algorithm: str, setting: dict[str, Any], speed_settings: bool) -> dict[str, Any]:
        """Make the entry: "ours" or a peer, the latter with our process-wide settings or without.

        Of ours, the answer has the execution.
        """
        chosen = Setting.from_json(setting)
        made = {}
        if entry == "ours":
            made["execution"] = ours.run_config(chosen, algorithm).training.execution
            self.entry = ours.build(chosen, algorithm)
        else:
            if speed_settings:
                ours.speed_settings()
            self.entry = peers.build(entry, chosen, algorithm)
        # What imports left behind is not to be collected while a step is timed.
        gc.collect()
        gc.freeze()
        self.steps = 0
        return made

    def step(self) -> dict[str, Any]:
        """One outer iteration, timed in seconds."""
        assert self.entry is not None
        begin = time.perf_counter()
        self.entry.step(self.steps)
        seconds = time.perf_counter() - begin
        self.steps += 1
        return {"seconds": seconds}

    def turn(self, seconds: float) -> dict[str, Any]:
        """Steps back to back, one at least, until that time is over: the mean time of one, and how many they were."""
        begin, steps = time.perf_counter(), 0
        while not steps or time.perf_counter() - begin < seconds:
            self.step()
            steps += 1
        return {"seconds": (time.perf_counter() - begin) / steps, "steps": steps}

    def gradient(self, path: str) -> dict[str, Any]:
        """Write the last step's meta-gradient, and the tasks' weights under the name "weights"."""
        assert self.entry is not None
        found, weights = self.entry.gradient()
        tensors = {f"gradient.{name}": g.detach().contiguous() for name, g in found.items()}
        save_file(tensors | {"weights": weights.detach().contiguous()}, path)
        return {}

    def memory(self) -> dict[str, Any]:
        """Peak resident memory in bytes and threads, those of forked workers included; PyTorch's threads.

        The sum of each process's peak: what they share (PyTorch's own code above all) is counted in each.
        """
        statuses = [_status("self"), *map(_status, _children())]
        if "VmHWM" not in statuses[0]:
            return {"peak_bytes": _largest_resident(), "torch_threads": torch.get_num_threads(), "threads": 0}
        peak, threads = (sum(status.get(field, 0) for status in statuses) for field in ("VmHWM", "Threads"))
        return {"peak_bytes": peak * 1024, "torch_threads": torch.get_num_threads(), "threads": threads}

    def reference(self, setting: dict[str, Any], algorithm: str, path: str) -> dict[str, Any]:
        """Write the float64 per-task meta-gradients."""
        grads = reference.task_gradients(Setting.from_json(setting), algorithm)
        save_file({name: g.contiguous() for name, g in grads.items()}, path)
        return {}

    def machine(self, seconds: float) -> dict[str, Any]:
        """Measured peak and bandwidth on PyTorch's own number of threads, each for so many seconds."""
        return {"threads": torch.get_num_threads(), **limit.measure(seconds=seconds)._asdict()}


def _children() -> list[str]:
    tasks = Path("/proc/self/task")
    return (
        [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()] if tasks.exists() else []
    )


def _status(process: str) -> dict[str, int]:
    file = Path(f"/proc/{process}/status")
    if not file.exists():
        return {}
    pairs = (line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return {key: int(value.split()[0]) for key, value in pairs if value.split() and value.split()[0].isdigit()}


def _largest_resident() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if platform.system() == "Darwin" else 1024)


def _die_first() -> None:
    """Where memory runs out, the system is to end this process rather than another of the user's."""
    file = Path("/proc/self/oom_score_adj")
    if file.exists():
        file.write_text("1000")


def main() -> None:
    """Answer until stdin ends."""
    _die_first()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        name: getattr(worker, name) for name in ("build", "step", "turn", "gradient", "memory", "reference", "machine")
    }
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = commands[command.pop("do")](**command)
        except Exception as error:  # whatever a peer raises is the reason that the table gives
            print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}), file=answers, flush=True)
            raise
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
