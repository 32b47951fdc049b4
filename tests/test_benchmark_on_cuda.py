"""The benchmark for CUDA devices works where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "on_cuda.py"
    done = subprocess.run(
        [sys.executable, script, "--device", "cpu", "--quick", "--out", tmp_path / "out.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {result["part"] for result in results} == {"correctness", "capture", "speed", "memory"}
    assert all(result["passed"] for result in results if result["part"] == "correctness")
    assert all(result["records_equal"] and result["state_equal"] for result in results if result["part"] == "capture")
    assert all(result["per_second"] > 0 for result in results if result["part"] == "speed")
    assert all(result["flat"] for result in results if result["part"] == "memory")
