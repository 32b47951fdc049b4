"""A run folder: what is in it, how it is written so that nothing half-written is ever taken for whole, and read back.

    config.yaml                    everything that decided the run; written first
    metrics.jsonl                  a line an iteration (loss, accuracy), and one a validation
    tasks.jsonl                    a line an iteration: attention's inputs and the weight of every task
    timing.jsonl                   a line between two checkpoints: iterations, seconds, peak memory
    checkpoints/last.safetensors   the whole state, for exact resume; previous.safetensors is the one before
    checkpoints/best.safetensors   θ at the best validation accuracy, under the backbone's own names
    replayed.safetensors           the weights of another run, where the rule replays them
    classes.json                   the classes of each split, where they were split by a seed or a user's lists
    result.json                    the evaluation on test tasks of the run's own test setting (result-val.json: on
                                   validation tasks; result-on-DATA.json: on another data set;
                                   result-5way5shot15query.json: at other ways, shots or queries)
    run.lock                       held by the process that trains

Files hold iterations and never the clock, timing.jsonl excepted, so that the same run leaves the same bytes.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from metaheed.config import RunConfig, from_dict, to_dict
from metaheed.data import Dataset
from metaheed.data.names import composed
from metaheed.errors import RunError
from metaheed.files import try_lock, write_synced
from metaheed.learners import Learner, build_learner
from metaheed.outer import OuterState
from metaheed.types import Params

STUDY_FILE = "search.yaml"
"""In a folder that `metaheed search` keeps, whose run folders are trials."""
_FORMAT = 1


class Progress(NamedTuple):
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


class Pixels(NamedTuple):
    """How pixels are scaled, channel by channel: /255, minus mean, over std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The whole state of a run."""

    progress: Progress
    state: OuterState
    best: Params
    """θ at the best validation; empty before the first."""
    image_shape: tuple[int, int, int]
    pixels: Pixels | None = None
    """How images were scaled; none: written by a version that did not record it."""


class RunFolder:
    """The paths of a run and the reading and writing of its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.tasks_file = path / "tasks.jsonl"
        self.timing_file = path / "timing.jsonl"
        self.result_file = self.result("test")
        self.replayed_file = path / "replayed.safetensors"
        self.classes_file = path / "classes.json"
        self.lock_file = path / "run.lock"
        self._last_is_damaged = False
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.safetensors"
        self.previous = self.checkpoints / "previous.safetensors"
        self.best = self.checkpoints / "best.safetensors"

    def result(self, split: str, data: str | None = None, shape: tuple[int, int, int] | None = None) -> Path:
        """The file of the evaluation on the tasks of a split; of another data set, and at (ways, shots, queries) other
        than the run's own, where these are named.
        """
        on = "" if data is None else "-on-" + re.sub(r"[^\w.-]+", "_", data)
        at = "" if shape is None else "-{}way{}shot{}query".format(*shape)
        return self.path / f"result{on}{at}{'' if split == 'test' else f'-{split}'}.json"

    def holds_a_run(self) -> bool:
        """Whether any file of a run is here."""
        files = (self.config_file, self.metrics_file, self.checkpoints, self.result_file, self.replayed_file)
        return any(file.exists() for file in files)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, creating it; the operating system frees it when the process ends, however.

        Raises:
            RunError: another living process holds it, or it cannot be written.
        """
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.lock_file.open("a+")
        with file:
            if not try_lock(file):
                file.seek(0)
                raise RunError(
                    f"{self.path} is being trained by another process ({file.read().strip() or 'unknown'}): "
                    "wait for it, stop it, or choose another --out"
                )
            with _writing(self.path):
                file.truncate(0)
                file.write(f"process {os.getpid()}\n")
                file.flush()
            # The file stays when the lock goes: were it deleted, two processes could lock two files of that name.
            yield

    def is_held(self) -> bool:
        """Whether a living process holds the folder at this moment.

        Raises:
            RunError: it cannot be written, so that nobody can tell.
        """
        try:
            with self.lock_file.open("r+") as file:
                return not try_lock(file)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise RunError(
                f"cannot write {self.lock_file}: {error.strerror}. Grant permission there, or choose another folder"
            ) from error

    def read_config(self) -> RunConfig:
        """The run's config.

        Raises:
            RunError: the folder holds no run, or its config.yaml is not one.
        """
        try:
            text = self.config_file.read_bytes()
        except OSError as error:
            raise RunError(f"{self.path} is not a run folder: config.yaml cannot be read ({error.strerror})") from error
        try:
            return from_dict(yaml.safe_load(text))
        except (yaml.YAMLError, ValueError) as error:
            raise RunError(f"{self.config_file} is not a config of this program: {error}") from error

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml, whole or not at all."""
        write_whole(self.config_file, yaml.safe_dump(to_dict(config), sort_keys=False).encode())

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Make this the last checkpoint and the last one the previous; write best.safetensors where it is due."""
        groups = {**checkpoint.state._asdict(), "best": checkpoint.best}
        tensors = {f"{group}.{name}": leaf for group, tree in groups.items() for name, leaf in tree.items()}
        about = {**checkpoint.progress._asdict(), "image_shape": checkpoint.image_shape, "pixels": checkpoint.pixels}
        with _writing(self.path):
            self.checkpoints.mkdir(exist_ok=True)
            part = self.last.with_suffix(".part")
            write_synced(part, _packed(tensors, about))
            # A damaged last one, found when the run was resumed, must not replace the whole one before it.
            if self.last.exists() and not self._last_is_damaged:
                _name_also(self.last, self.previous)
            part.replace(self.last)
            self._last_is_damaged = False
        self.write_best(checkpoint)

    def write_best(self, checkpoint: Checkpoint) -> None:
        """Bring best.safetensors to what the checkpoint says."""
        if checkpoint.best:
            about = {
                "iteration": checkpoint.progress.best_iteration,
                "validation_accuracy": checkpoint.progress.best_accuracy,
                "image_shape": checkpoint.image_shape,
                "pixels": checkpoint.pixels,
            }
            write_whole(self.best, _packed(checkpoint.best, about))

    def read_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and a notice for each damaged one passed over. None: there is no whole one."""
        notices: list[str] = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                tensors, about = _unpacked(path)
                return _checkpoint(tensors, about), notices
            except (RunError, KeyError, TypeError, ValueError) as error:
                notices.append(f"checkpoint {path} is damaged ({error}); falling back to the one before")
                self._last_is_damaged |= path == self.last
        return None, notices

    def read_weights(self, which: str) -> tuple[Params, dict[str, Any]]:
        """θ at the "best" or "last" checkpoint, with iteration, image_shape and pixels.

        Raises:
            RunError: there is none yet, or none that is whole.
        """
        damaged = ""
        if which == "best" and self.best.exists():
            try:
                return _unpacked(self.best)
            except RunError as error:
                damaged = f"; {error}"
        checkpoint, notices = self.read_checkpoint()
        if checkpoint is None:
            reason = "; ".join(notices) + damaged or "none has been written yet: train it first"
            raise RunError(f"{self.path} has no checkpoint to read ({reason})")
        shape = {"image_shape": list(checkpoint.image_shape), "pixels": checkpoint.pixels}
        if which == "last":
            return checkpoint.state.meta, {"iteration": checkpoint.progress.iteration, **shape}
        if not checkpoint.best:
            raise RunError(
                f"{self.path} has not been validated yet, so it has no best checkpoint: "
                "train on, or use --checkpoint last"
            )
        return checkpoint.best, {"iteration": checkpoint.progress.best_iteration, **shape}

    def read_weights_log(self) -> Tensor:
        """The weights that every iteration gave its tasks, (iterations, B) float64.

        Raises:
            RunError: tasks.jsonl is missing or damaged.
        """
        try:
            lines = self.tasks_file.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line)["weights"] for line in lines]
            if not rows:
                raise ValueError("it is empty")
            return torch.tensor(rows, dtype=torch.float64)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.tasks_file} cannot be read ({error}): it holds the weights to be replayed"
            ) from error

    def write_replayed(self, weights: Tensor) -> None:
        """Keep the weights that this run replays, (iterations, B)."""
        write_whole(self.replayed_file, _packed({"weights": weights}, {}))

    def read_replayed(self) -> Tensor | None:
        """What `write_replayed` kept; none: nothing, or nothing whole."""
        try:
            return _unpacked(self.replayed_file)[0]["weights"]
        except RunError:
            return None

    def record_classes(self, dataset: Dataset) -> None:
        """Keep which classes of a folder of one's own are trained on and which not.

        Raises:
            RunError: the run was begun with others, or they cannot be written.
        """
        if dataset.name != "folder":
            return
        now = {name: [*map(composed, split.classes)] for name, split in dataset.splits.items()}
        then = self._read_classes()
        if then is None:
            write_whole(self.classes_file, (json.dumps(now, indent=1) + "\n").encode())
        elif then != now:
            where = [{name: split for split, names in side.items() for name in names} for side in (then, now)]
            moved = next((n for n in sorted({*where[0], *where[1]}) if where[0].get(n) != where[1].get(n)), None)
            if moved is None:  # names of another Unicode form were once sorted as they came
                raise RunError(
                    f"{self.path} was begun with the same classes in another order, so that its tasks would be others "
                    "now: train anew, or go on with the version of this program that it was begun with"
                )
            raise RunError(
                f"{self.path} was begun with other classes: {moved!r} was in {where[0].get(moved, 'none')} and is in "
                f"{where[1].get(moved, 'none')} now. Put the folder back as it was, or train anew"
            )

    def check_classes(self, dataset: Dataset, split: str) -> None:
        """Raise RunError if classes that the run was trained on are in a split that it is to be judged on."""
        then = self._read_classes() if dataset.name == "folder" else None
        now = map(composed, dataset.splits[split].classes)
        known = sorted({*then["train"]} & {*now}) if then is not None else []
        if known:
            raise RunError(
                f"{self.path} was trained on classes that are in {split} now: {', '.join(known)}. Put the folder back "
                "as it was; lists written by 'metaheed data split' keep a split when classes are added"
            )

    def _read_classes(self) -> dict[str, list[str]] | None:
        try:
            classes = json.loads(self.classes_file.read_text(encoding="utf-8"))
            return {split: [composed(name) for name in classes[split]] for split in ("train", "val", "test")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.classes_file} cannot be read: {error!r}") from error

    def remove_leftovers(self) -> None:
        """Delete what an interrupted write left beside its target."""
        for file in (self.config_file, self.last, self.best, self.replayed_file, self.classes_file):
            file.with_suffix(".part").unlink(missing_ok=True)
        for part in self.path.glob("result*.part"):
            part.unlink(missing_ok=True)


class JsonLines:
    """An append-only file of one JSON object a line, cut back to a known length when a run resumes."""

    def __init__(self, path: Path, length: int) -> None:
        self._path = path
        with _writing(path):
            present = path.stat().st_size if path.exists() else 0
            if present < length:
                raise RunError(
                    f"{path} has {present} bytes, but the checkpoint was written after {length}: it has been altered. "
                    "Delete the run folder and train anew"
                )
            self._file = path.open("ab")
            self._file.truncate(length)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line and hand it to the operating system."""
        with _writing(self._path):
            self._file.write(json.dumps(values, allow_nan=False).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Bring everything to the disk; the file's length."""
        with _writing(self._path):
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        with _writing(self._path):
            self._file.close()


def stream_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, one after another; a last line without an end is still being written, and left out.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError(f"line {number} is no object")
                yield value
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def load(run: str | Path, checkpoint: str = "best", ways: int | None = None) -> tuple[Learner, Params]:
    """A trained run as (learner, meta), for one's own loops; needs no data.

    Args:
        run: the run folder.
        checkpoint: "best" (on validation) or "last".
        ways: N of the tasks to come, where that may be any number (ProtoNet); none: as in training.

    Raises:
        RunError: not a run, no such checkpoint, or one whose parameters are not those of the run's network.
        ConfigError: more ways than the learner allows.
    """
    if checkpoint not in ("best", "last"):
        raise RunError(f"checkpoint is {checkpoint!r}, but it must be 'best' or 'last'")
    folder = RunFolder(Path(run))
    learner, meta, _ = load_weights(folder, folder.read_config(), checkpoint, ways)
    return learner, meta


def load_weights(
    folder: RunFolder, config: RunConfig, which: str, ways: int | None = None
) -> tuple[Learner, Params, dict[str, Any]]:
    """As `load`, with what the checkpoint says of itself."""
    meta, about = folder.read_weights(which)
    channels, height, width = about["image_shape"]
    if ways is not None:
        config.check_ways(ways)
    learner = build_judged_learner(config, ways, (channels, height, width))
    check_fits(learner.init(torch.Generator().manual_seed(0)), meta, f"{folder.path}'s {which} checkpoint")
    return learner, meta, about


def build_judged_learner(config: RunConfig, ways: int | None, image_shape: tuple[int, int, int]) -> Learner:
    """The learner that serves tasks of so many ways with a run's θ; with a head of fixed size, the one trained."""
    head = config.episodes.ways if ways is None or not config.learner.any_ways else ways
    return build_learner(config.learner, head, image_shape, config.training.seed)


def check_fits(configured: Params, found: Params, what: str) -> None:
    """Raise RunError unless `found` has the names and shapes of `configured`."""
    expected, there = ({name: tuple(p.shape) for name, p in tree.items()} for tree in (configured, found))
    for name in sorted({**expected, **there}):
        if expected.get(name) != there.get(name):
            raise RunError(
                f"{what} is of another architecture: {name!r} is {there.get(name, 'absent')} there and "
                f"{expected.get(name, 'absent')} as configured. Use the checkpoint's own config.yaml"
            )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it there, so that it is whole or not there.

    Raises:
        RunError: it cannot be written; nothing is left behind.
    """
    part = path.with_suffix(".part")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(part, content)
        part.replace(path)


def check_writable(path: Path) -> None:
    """Raise RunError, before any work is lost, if a file cannot be written."""
    part = path.with_suffix(".part")
    with _writing(path):
        part.touch()
        part.unlink()


def _name_also(path: Path, other: Path) -> None:
    """Bring a file to a second name, keeping its first, for those who read it meanwhile."""
    part = other.with_suffix(".part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without hard links
        path.replace(other)
    else:
        part.replace(other)
        part.unlink(missing_ok=True)  # renaming does nothing where both names were the file's already


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or path}: {error.strerror or error}. "
            "Make room or grant permission there, or choose another folder"
        ) from error


def _packed(tensors: Params, about: dict[str, Any]) -> bytes:
    # Copies: θ and the best θ may be the same tensors, which the format refuses to write twice.
    tensors = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in tensors.items()}
    # The file sorts its tensors; their order decides the order of sums, and so bits, and must come back as it was.
    about = {"format": _FORMAT, **about, "names": list(tensors), "sha256": _digest(tensors)}
    # One metadata entry: the order of several in the file is random from process to process.
    return save_tensors(tensors, {"metaheed": json.dumps(about)})


def _unpacked(path: Path) -> tuple[Params, dict[str, Any]]:
    try:
        # Read at once: the library's own reader opens the file twice, and a training run may replace it in between.
        content = path.read_bytes()
        found = load_tensors(content)
        # The bytes' reader gives no metadata: the format's header is its length in 8 bytes, then JSON.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header.get("__metadata__", {})["metaheed"])
        names = about.get("names", [])
        if sorted(names) != sorted(found):
            raise ValueError("its list of tensors does not match its content")
        # Copied into memory of PyTorch's own alignment: vector kernels round differently at another one.
        tensors = {name: found[name].clone() for name in names}
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise RunError(f"{path} is not a checkpoint: {error}") from error
    if about.get("format") != _FORMAT:
        raise RunError(f"{path} has checkpoint format {about.get('format')!r}, but this program reads {_FORMAT}")
    if about.pop("sha256", None) != _digest(tensors):
        raise RunError(f"{path} is damaged: its checksum does not match its content")
    del about["names"]
    return tensors, about


def _digest(tensors: Params) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        leaf = tensors[name]
        digest.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(leaf.reshape(-1).view(torch.uint8).numpy().tobytes() if leaf.numel() else b"")
    return digest.hexdigest()


def _checkpoint(tensors: Params, about: dict[str, Any]) -> Checkpoint:
    groups: dict[str, Params] = {"meta": {}, "optimizer": {}, "rule": {}, "best": {}}
    for name, leaf in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = leaf
    channels, height, width = about["image_shape"]
    progress = Progress(**{field: about[field] for field in Progress._fields})
    best = groups.pop("best")
    return Checkpoint(progress, OuterState(**groups), best, (channels, height, width), recorded_pixels(about))


def recorded_pixels(about: dict[str, Any]) -> Pixels | None:
    """How images were scaled, from what a checkpoint says of itself; none: it does not."""
    if about.get("pixels") is None:
        return None
    mean, std = about["pixels"]
    return Pixels(tuple(mean), tuple(std))
