"""What a checkpoint holds, and how it is packed into a file and checked when it is read."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from metaheed.config import RunConfig
from metaheed.errors import RunError, shown
from metaheed.files.opening import read_bounded
from metaheed.files.parsing import from_json
from metaheed.files.seals import FORMAT
from metaheed.outer import OuterState
from metaheed.running.meddling import reason
from metaheed.types import Params

_FORMATS = (1, FORMAT)  # the first one's checksum covers tensors only, and it says nothing of the logs


_LARGEST_IMAGE = 2**24  # numbers; beyond it a checkpoint's word is not believed


class RunProgress(NamedTuple):
    """Where a run stands: what a checkpoint holds beside tensors."""

    iteration: int = 0
    """Outer steps done."""
    validated: int = 0
    """The iteration of the newest validation; 0: none."""
    best_iteration: int = 0
    """The iteration of the best validation; 0: none."""
    best_accuracy: float = -1.0
    """Its mean accuracy."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this point."""
    tasks_bytes: int = 0
    """Length of tasks.jsonl at this point."""
    metrics_sha256: str = ""
    """Checksum of metrics.jsonl up to here; empty: written by a version that did not record it."""
    tasks_sha256: str = ""
    """The same of tasks.jsonl."""


class Pixels(NamedTuple):
    """How pixels are scaled, channel by channel: /255, minus mean, over std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The whole state of a run."""

    progress: RunProgress
    state: OuterState
    best: Params
    """θ at the best validation; empty before the first."""
    image_shape: tuple[int, int, int]
    pixels: Pixels | None = None
    """How images were scaled; none: written by a version that did not record it."""
    run: str = ""
    """`RunConfig.run_name` of the run that it is of; empty: written by a version that did not record it."""


def check_same_run(config: RunConfig, run: Any, what: str) -> None:
    """Raise RunError where a checkpoint says that it is of another run than the config's: files of two were mixed."""
    if run and run != config.run_name:
        raise RunError(
            f"{what} is of the run {shown(run)}, and its config.yaml of {shown(config.run_name)}: put back the "
            "file that belongs there"
        )


def check_same_shapes(configured: Params, found: Params, what: str) -> None:
    """Raise RunError unless `found` has the names and shapes of `configured`."""
    expected, there = ({name: tuple(p.shape) for name, p in tree.items()} for tree in (configured, found))
    for name in sorted({**expected, **there}):
        if expected.get(name) != there.get(name):
            raise RunError(
                f"{what} is of another architecture: {shown(name)} is {there.get(name, 'absent')} there and "
                f"{expected.get(name, 'absent')} as configured. Use the checkpoint's own config.yaml"
            )


def pack_tensors(tensors: Params, about: dict[str, Any]) -> bytes:
    # Copies: θ and the best θ may be the same tensors, which the format refuses to write twice.
    tensors = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in tensors.items()}
    # The file sorts its tensors; their order decides the order of sums, and so bits, and must come back as it was.
    about = {"format": FORMAT, **about, "names": list(tensors)}
    about["sha256"] = _digest(tensors, about)
    # One metadata entry: the order of several in the file is random from process to process.
    return save_tensors(tensors, {"metaheed": json.dumps(about)})


def read_tensors(path: Path) -> tuple[Params, dict[str, Any]]:
    """The tensors in a file and what it says of itself; RunError where it is damaged."""
    try:
        # Read at once: the library's own reader opens the file twice, and a training run may replace it in between.
        content = read_bounded(path)
        found = load_tensors(content)
        # The bytes' reader gives no metadata: the format's header is its length in 8 bytes, then JSON.
        about = parse_metadata(content[8 : 8 + int.from_bytes(content[:8], "little")])
        names = about.get("names", [])
        if sorted(names) != sorted(found):
            raise ValueError("its list of tensors does not match its content")
        # Copied into memory of PyTorch's own alignment: vector kernels round differently at another one.
        tensors = {name: found[name].clone() for name in names}
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise RunError(f"{path} is not a checkpoint: {reason(error)}") from error
    version, found = about.get("format"), about.pop("sha256", None)
    if version not in _FORMATS:
        raise RunError(f"{path} has checkpoint format {shown(version)}, but this program reads {FORMAT}")
    if found != _digest(tensors, about if version == FORMAT else None):
        raise RunError(f"{path} is damaged: its checksum does not match its content")
    del about["names"]
    return tensors, about


def parse_metadata(header: bytes) -> dict[str, Any]:
    """What a checkpoint says of itself, from the header of its format.

    Raises:
        KeyError, ValueError, AttributeError, TypeError: it is none.
    """
    about = from_json(from_json(header).get("__metadata__", {})["metaheed"])
    if not isinstance(about, dict):
        raise ValueError("it says nothing of itself")
    return about


def _digest(tensors: Params, about: dict[str, Any] | None) -> str:
    digest = hashlib.sha256()
    if about is not None:
        digest.update(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        leaf = tensors[name]
        digest.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(leaf.reshape(-1).view(torch.uint8).numpy().tobytes() if leaf.numel() else b"")
    return digest.hexdigest()


def build_checkpoint(tensors: Params, about: dict[str, Any]) -> Checkpoint:
    groups: dict[str, Params] = {"meta": {}, "optimizer": {}, "rule": {}, "best": {}}
    for name, leaf in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = leaf
    fields = [field for field in RunProgress._fields if about["format"] == FORMAT or not field.endswith("_sha256")]
    for field in fields:
        if RunProgress.__annotations__[field] is int:
            whole_number(about, field)
    progress = RunProgress(**{field: about[field] for field in fields})
    if not isinstance(progress.best_accuracy, float | int):
        raise ValueError("its best_accuracy is no number")
    best = groups.pop("best")
    of = str(about.get("run", ""))
    return Checkpoint(progress, OuterState(**groups), best, recorded_image_shape(about), recorded_pixels(about), of)


def whole_number(about: dict[str, Any], field: str) -> int:
    """A field that must be a whole number of at least 0; ValueError where it is not."""
    value = about.get(field)
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"it says {str(value)[:40]} of its {field}, which must be a whole number of at least 0")
    return value


def recorded_image_shape(about: dict[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) of the images trained on, from what a checkpoint says of itself.

    Raises:
        ValueError: it says nothing of them, or what cannot be.
    """
    shape = about.get("image_shape")
    if (
        not isinstance(shape, list | tuple)
        or len(shape) != 3
        or not all(isinstance(n, int) and n > 0 for n in shape)
        or math.prod(shape) > _LARGEST_IMAGE
    ):
        raise ValueError(f"its image_shape is {str(shape)[:40]}, which must be channels, height and width of an image")
    channels, height, width = shape
    return channels, height, width


def recorded_pixels(about: dict[str, Any]) -> Pixels | None:
    """How images were scaled, from what a checkpoint says of itself; none: it does not.

    Raises:
        ValueError: it says what cannot be.
    """
    found = about.get("pixels")
    if found is None:
        return None
    try:
        mean, std = (tuple(map(float, part)) for part in found)
    except TypeError:
        mean, std = (), ()
    if not mean or len(mean) != len(std) or not all(math.isfinite(v) for v in (*mean, *std)) or min(std) <= 0:
        raise ValueError(f"its pixels are {str(found)[:40]}, which must be a mean and a deviation for each channel")
    return Pixels(mean, std)
