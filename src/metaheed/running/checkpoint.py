"""What a checkpoint holds, how it is packed into a .safetensors file, and how it is checked when it is read."""

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

_FORMATS = (1, FORMAT)  # in format 1 the checksum covers only the tensors, and the logs have none


_LARGEST_IMAGE = 2**24  # numbers; a checkpoint that claims larger images is refused


class RunProgress(NamedTuple):
    """How far a run has come: what a checkpoint holds beside its tensors."""

    iteration: int = 0
    """Number of outer steps done."""
    validated: int = 0
    """Iteration of the newest validation; 0 before the first."""
    best_iteration: int = 0
    """Iteration of the best validation; 0 before the first."""
    best_accuracy: float = -1.0
    """Mean accuracy of the best validation; -1 before the first."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl when the checkpoint was written."""
    tasks_bytes: int = 0
    """Length of tasks.jsonl when the checkpoint was written."""
    metrics_sha256: str = ""
    """Checksum of those bytes of metrics.jsonl; empty if an old version, which had none, wrote the checkpoint."""
    tasks_sha256: str = ""
    """Checksum of those bytes of tasks.jsonl; empty as above."""


class Pixels(NamedTuple):
    """How pixels are standardised, channel by channel: (value / 255 - mean) / std."""

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
    """How images were standardised; None if an old version, which did not record it, wrote the checkpoint."""
    run: str = ""
    """`RunConfig.run_name` of the run; empty if an old version, which did not record it, wrote the checkpoint."""


def check_same_run(config: RunConfig, run: Any, what: str) -> None:
    """Raise RunError if a checkpoint belongs to another run than the config, that is, if files of two runs were mixed.

    Args:
        config: the config in the run folder.
        run: the run's name that the checkpoint records; nothing is checked if it is empty.
        what: what the checkpoint is called in the message.
    """
    if run and run != config.run_name:
        raise RunError(
            f"{what} belongs to the run {shown(run)}, but its config.yaml to {shown(config.run_name)}: put back the "
            "file that belongs there"
        )


def check_same_shapes(configured: Params, found: Params, what: str) -> None:
    """Raise RunError unless `found` has the names and shapes of `configured`."""
    expected, there = ({name: tuple(p.shape) for name, p in tree.items()} for tree in (configured, found))
    for name in sorted({**expected, **there}):
        if expected.get(name) != there.get(name):
            raise RunError(
                f"{what} has another architecture: {shown(name)} is {there.get(name, 'absent')} there and "
                f"{expected.get(name, 'absent')} as configured. Use the checkpoint's own config.yaml"
            )


def pack_tensors(tensors: Params, about: dict[str, Any]) -> bytes:
    """The content of a .safetensors file that holds the tensors and, as metadata, what is said about them."""
    # Copied because θ and the best θ may be the same tensors, which the format refuses to write twice.
    tensors = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in tensors.items()}
    # The format sorts tensors by name. Their order decides the order of sums, and so the last bits of a result. It is
    # recorded here and restored by `read_tensors`.
    about = {"format": FORMAT, **about, "names": list(tensors)}
    about["sha256"] = _digest(tensors, about)
    # One metadata entry, because the order in which the library writes several differs from process to process.
    return save_tensors(tensors, {"metaheed": json.dumps(about)})


def read_tensors(path: Path) -> tuple[Params, dict[str, Any]]:
    """The tensors of a file written from `pack_tensors`, and its metadata.

    Raises:
        RunError: the file cannot be read, is no checkpoint, or is damaged.
    """
    try:
        # Read at once, because the library's own reader opens the file twice, and training may replace it in between.
        content = read_bounded(path)
        found = load_tensors(content)
        # The library's reader of bytes gives no metadata. The header begins with its length in 8 bytes; JSON follows.
        about = parse_metadata(content[8 : 8 + int.from_bytes(content[:8], "little")])
        names = about.get("names", [])
        if sorted(names) != sorted(found):
            raise ValueError("its list of tensors does not match its content")
        # Copied into memory that PyTorch aligned, because vector kernels round differently at another alignment.
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
    """The metadata of a checkpoint, from the JSON header of its file.

    Raises:
        KeyError, ValueError, AttributeError, TypeError: the header is not that of a checkpoint.
    """
    about = from_json(from_json(header).get("__metadata__", {})["metaheed"])
    if not isinstance(about, dict):
        raise ValueError("it has no metadata")
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
    """The checkpoint that a file's tensors and metadata stand for.

    Raises:
        KeyError, ValueError: a field or a group of tensors is missing, unknown, or out of its bounds.
    """
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
        raise ValueError("its best_accuracy is not a number")
    best = groups.pop("best")
    of = str(about.get("run", ""))
    return Checkpoint(progress, OuterState(**groups), best, recorded_image_shape(about), recorded_pixels(about), of)


def whole_number(about: dict[str, Any], field: str) -> int:
    """A field of the metadata that must be a whole number of at least 0; ValueError if it is not."""
    value = about.get(field)
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"its {field} is {str(value)[:40]}, which must be a whole number of at least 0")
    return value


def recorded_image_shape(about: dict[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) of the images trained on, from a checkpoint's metadata.

    Raises:
        ValueError: the metadata lacks the shape, or it is not one of an image.
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
    """How images were standardised, from a checkpoint's metadata; None if it is not recorded.

    Raises:
        ValueError: what is recorded is not a mean and a deviation for each channel.
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
