"""Building every CUDA kernel for three devices, without one, where anything that decides the outcome has changed.

    python -m tests.learners.kernel_builds      builds them all and writes kernel_builds.json

kernel_builds.json holds, for each device, a digest of all that decides the outcome (the kernels, what starts them, the
compiler and this file) and the outcome. A build takes half a minute, so the test takes the outcome from there while the
digest is the same, and builds where it is another.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_suffix(".json")
NETWORKS = ROOT / "src" / "metaheed" / "networks"
SOURCES = (*sorted((NETWORKS / "closed_form").glob("*.py")), NETWORKS / "conv4.py")

BUILD = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from metaheed.learners import Conv4
from metaheed.networks.closed_form import kernels
from metaheed.networks.closed_form.cpu import closed_form
from metaheed.networks.closed_form.cuda import ClosedFormCUDA

KINDS = {torch.float32: "*fp32", torch.int8: "*i8", torch.int64: "*i64"}
built = {}

class Build:
    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        def build(*args, num_warps=4, num_stages=3):
            signature, constants = {}, {}
            for parameter, value in zip(self.function.params, args, strict=True):
                name = parameter.name
                if parameter.is_constexpr:
                    signature[name], constants[name] = "constexpr", value
                elif isinstance(value, torch.Tensor):
                    signature[name] = KINDS[value.dtype]
                else:
                    signature[name] = "fp32" if isinstance(value, float) else "i32"
            key = (self.function.__name__, num_warps, num_stages, *constants.items())
            if key not in built:
                source = ASTSource(self.function, signature, constants)
                options = {"num_warps": num_warps, "num_stages": num_stages}
                made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[3]), 32), options=options)
                built[key] = made.metadata.shared
        return build

for name, value in list(vars(kernels).items()):
    if isinstance(value, triton.runtime.JITFunction) and name != "_tap":
        setattr(kernels, name, Build(value))
kernels.precision = lambda x: sys.argv[1]
net = Conv4(5, (3, 32, 32), hidden=int(sys.argv[2]))
form = closed_form(net, ClosedFormCUDA)
params = {n: torch.randn(4, *p.shape) for n, p in net.named_parameters()}
for images in map(int, sys.argv[4:]):
    x, y = torch.randn(4, images, 3, 32, 32), torch.zeros(4, images, dtype=torch.int64)
    tape = form.gradient(params, x, y, keep=True)[3]
    form.hessian_product(params, tape, params)
    form.logits(params, x)
print(len(built), max(built.values()))
"""

DEVICES: dict[str, tuple[str, int, int, tuple[int, ...], int]] = {
    "float32 on Ampere": ("tf32x3", 32, 86, (5, 75), 99),
    "TF32 on Hopper": ("tf32", 64, 90, (75,), 227),
    "float32 on Turing": ("ieee", 32, 75, (75,), 64),
}
"""Products, filters, compute capability, images a task; KiB of shared memory that a block may have there."""


def digest(device: str) -> str:
    """Of all that decides what a build gives; comments and docstrings do not."""
    said = [BUILD, metadata.version("triton"), torch.__version__, str(DEVICES[device][:4])]
    return hashlib.sha256("\0".join([*map(_code, SOURCES), *said]).encode()).hexdigest()


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [each for each in node.body if not _is_text(each)] or [ast.Pass()]
    return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def build(device: str) -> tuple[int, int]:
    """How many kernels were built for a device, and the most bytes of shared memory that one of them asks for.

    Raises:
        AssertionError: one cannot be built.
    """
    products, hidden, capability, images, _ = DEVICES[device]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", BUILD, products, str(hidden), str(capability), *map(str, images)],
            env={**environment, "PYTHONPATH": str(ROOT / "src"), "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    count, shared = map(int, done.stdout.split())
    return count, shared


def outcome(device: str) -> tuple[int, int]:
    """As `build`, from the record where that is of the same sources."""
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    found = record.get(device, {})
    if found.get("digest") == digest(device):
        return found["kernels"], found["shared_bytes"]
    return build(device)


def main() -> None:
    """Build all and write the record."""
    record = {}
    for device in DEVICES:
        kernels, shared = build(device)
        record[device] = {"digest": digest(device), "kernels": kernels, "shared_bytes": shared}
        print(f"{device}: {kernels} kernels, at most {shared} bytes of shared memory")
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
