"""A run folder: what is in it, how it is written so that nothing half-written is ever taken for whole, and read back.

    config.yaml                    everything that decided the run; written first
    metrics.jsonl                  a line an iteration (loss, accuracy), and one a validation
    tasks.jsonl                    a line an iteration: attention's inputs and the weight of every task
    timing.jsonl                   a line between two checkpoints: iterations, seconds, peak memory
    checkpoints/last.safetensors   the whole state, for exact resume; previous.safetensors is the one before
    checkpoints/best.safetensors   θ at the best validation accuracy, under the backbone's own names
    start.safetensors              the weights that it started from, where those were given (--init-from)
    replayed.safetensors           the weights of another run, where the rule replays them
    classes.json                   the classes of each split, where they were split by a seed or a user's lists
    result.json                    the evaluation on test tasks of the run's own test setting (result-val.json: on
                                   validation tasks; result-on-DATA.json: on another data set;
                                   result-5way5shot15query.json: at other ways, shots or queries)
    run.lock                       held by the process that trains

Files hold iterations and never the clock, timing.jsonl excepted, so that the same run leaves the same bytes.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
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
from metaheed.errors import RunError, brief, shown
from metaheed.files import (
    JSON_BYTES,
    LINE_BYTES,
    YAML_BYTES,
    cannot_write,
    make_folder,
    open_in_place,
    open_to_read,
    put_in_place,
    read_bounded,
    refuse_link,
    refuse_special,
    try_lock,
    write_synced,
)
from metaheed.learners import Learner, NetworkLearner, build_learner
from metaheed.outer import OuterState
from metaheed.parsing import from_json, from_yaml
from metaheed.seals import FORMAT, seal_text, seal_values, unseal_text, unseal_values
from metaheed.trust import allow
from metaheed.types import Params

STUDY_FILE = "search.yaml"
"""In a folder that `metaheed search` keeps, whose run folders are trials."""
_FORMATS = (1, FORMAT)  # the first one's checksum covers tensors only, and it says nothing of the logs
_LARGEST_IMAGE = 2**24  # numbers; beyond it a checkpoint's word is not believed


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

    progress: Progress
    state: OuterState
    best: Params
    """θ at the best validation; empty before the first."""
    image_shape: tuple[int, int, int]
    pixels: Pixels | None = None
    """How images were scaled; none: written by a version that did not record it."""
    run: str = ""
    """`RunConfig.run_name` of the run that it is of; empty: written by a version that did not record it."""


class RunFolder:
    """The paths of a run and the reading and writing of its files."""

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.tasks_file = path / "tasks.jsonl"
        self.timing_file = path / "timing.jsonl"
        self.result_file = self.result("test")
        self.replayed_file = path / "replayed.safetensors"
        self.start_file = path / "start.safetensors"
        self.classes_file = path / "classes.json"
        self.lock_file = path / "run.lock"
        self.events = path / "tensorboard"
        self._last_is_damaged = False
        self._known: dict[Path, _Known] = {}
        """What this process wrote or read there, and finds again unless another program was at it."""
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

    def needs(self, path: Path) -> bool:
        """Whether a file is one that the run consists of, so that no other may take its place; results are none."""
        own = [place for place in vars(self).values() if isinstance(place, Path) and place != self.result_file]
        return (
            path.resolve() in {place.resolve() for place in own} or self.checkpoints.resolve() in path.resolve().parents
        )

    def holds_a_run(self) -> bool:
        """Whether any file of a run is here."""
        files = (self.config_file, self.metrics_file, self.checkpoints, self.result_file, self.replayed_file)
        return any(file.exists() for file in files)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, creating it; the operating system frees it when the process ends, however.

        Raises:
            RunError: another living process holds it, it cannot be written, or a link lies in it where a file of ours
                would.
        """
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_links()
            file = open_in_place(self.lock_file, "a+")
        with file:
            if not try_lock(file):
                file.seek(0)
                raise RunError(
                    f"{self.path} is being trained by another process ({brief(file.read(200)) or 'unknown'}): "
                    "wait for it, stop it, or choose another --out"
                )
            with _writing(self.path):
                file.truncate(0)
                file.write(f"process {os.getpid()}\n")
                file.flush()
            self._known = {self.lock_file: _Known(_identity(os.fstat(file.fileno())), None)}
            # The file stays when the lock goes: were it deleted, two processes could lock two files of that name.
            yield

    def _refuse_links(self) -> None:
        """Raise OSError where a link lies in the place of one of the run's files: before any work is lost."""
        for path in vars(self).values():
            if isinstance(path, Path) and path != self.path:
                refuse_link(path)

    def is_held(self) -> bool:
        """Whether a living process holds the folder at this moment.

        Raises:
            RunError: it cannot be written, so that nobody can tell.
        """
        try:
            with open_in_place(self.lock_file, "r+") as file:
                return not try_lock(file)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise RunError(cannot_write(error, self.lock_file)) from error

    def read_config(self, trust: bool = False) -> RunConfig:
        """The run's config.

        Args:
            trust: the user lets the code of its network run, if that is not one of ours.

        Raises:
            RunError: the folder holds no run, or its config.yaml is not one.
        """
        try:
            text = read_bounded(self.config_file, YAML_BYTES)
        except OSError as error:
            raise RunError(f"{self.path} is not a run folder: config.yaml cannot be read ({error.strerror})") from error
        try:
            content = unseal_text(text)
        except ValueError as error:
            raise RunError(
                f"{self.config_file}: {error}. Put it back as it was or, if the change was meant, delete its last line"
            ) from error
        try:
            config = from_dict(from_yaml(content))
        except ValueError as error:
            raise RunError(f"{self.config_file} is not a config of this program: {error}") from error
        if trust:
            allow(config.learner.backbone, config.learner.backbone_path)
        return config

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml, whole or not at all."""
        content = seal_text(yaml.safe_dump(to_dict(config), sort_keys=False).encode())
        write_whole(self.config_file, content)
        self._remember(self.config_file, content)

    def check_unaltered(self) -> None:
        """Raise RunError where another program removed or changed a file since this process, which holds the folder,
        wrote it, or began to watch it.
        """
        for path, known in self._known.items():
            try:
                if _identity(path.stat()) == known.identity:
                    continue
                if known.sha256 is None:  # only which file it is matters
                    same = _identity(path.stat())[:2] == known.identity[:2]
                else:
                    same = hashlib.sha256(read_bounded(path)).hexdigest() == known.sha256
            except OSError as error:
                raise _meddled(path, "removed" if isinstance(error, FileNotFoundError) else str(error)) from error
            if not same:
                raise _meddled(path, "changed or replaced")

    def watch_config(self) -> None:
        """From now on config.yaml is to stay as it is."""
        with _writing(self.config_file):
            self._remember(self.config_file, read_bounded(self.config_file, YAML_BYTES))

    def is_ours(self) -> bool:
        """Whether the folder here is still the one that this process holds, not one made in its place since."""
        known = self._known.get(self.lock_file)
        try:
            return known is not None and known.identity[:2] == _identity(self.lock_file.stat())[:2]
        except OSError:
            return False

    def _remember(self, path: Path, content: bytes) -> None:
        with _writing(path):
            self._known[path] = _Known(_identity(path.stat()), hashlib.sha256(content).hexdigest())

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Make this the last checkpoint and the last one the previous; write best.safetensors where it is due."""
        groups = {**checkpoint.state._asdict(), "best": checkpoint.best}
        tensors = {f"{group}.{name}": leaf for group, tree in groups.items() for name, leaf in tree.items()}
        about = {**checkpoint.progress._asdict(), "image_shape": checkpoint.image_shape, "pixels": checkpoint.pixels}
        about["run"] = checkpoint.run
        with _writing(self.path):
            make_folder(self.checkpoints, self.path)
            part = self.last.with_suffix(".part")
            content = _packed(tensors, about)
            write_synced(part, content)
            # A damaged last one, found when the run was resumed, must not replace the whole one before it.
            if self.last.exists() and not self._last_is_damaged:
                _name_also(self.last, self.previous)
            put_in_place(part, self.last)
            self._remember(self.last, content)
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
                "run": checkpoint.run,
            }
            content = _packed(checkpoint.best, about)
            write_whole(self.best, content)
            self._remember(self.best, content)

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
                reason = f"it says nothing of its {error}" if isinstance(error, KeyError) else error
                notices.append(f"checkpoint {path} is damaged ({reason}); falling back to the one before")
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
                tensors, about = _unpacked(self.best)
                _whole_number(about, "iteration")
                _image_shape(about)
                recorded_pixels(about)
                return tensors, about
            except (RunError, ValueError) as error:
                damaged = f"; {error}" if isinstance(error, RunError) else f"; {self.best}: {error}"
        checkpoint, notices = self.read_checkpoint()
        if checkpoint is None:
            reason = "; ".join(notices) + damaged or "none has been written yet: train it first"
            raise RunError(f"{self.path} has no checkpoint to read ({reason})")
        if notices:
            # The one before is of another iteration: it is gone on with in training, where that is said.
            raise RunError(
                f"{notices[0].partition('; falling')[0]}{damaged}: 'metaheed train --resume {self.path}' goes on from "
                "the one before and writes it anew"
            )
        shape = {"image_shape": list(checkpoint.image_shape), "pixels": checkpoint.pixels, "run": checkpoint.run}
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
            RunError: tasks.jsonl is missing or damaged, or not what the newest checkpoint was written after.
        """
        self.check_logs()
        try:
            rows = [line["weights"] for line in stream_lines(self.tasks_file)]
            if not rows:
                raise ValueError("it is empty")
            return torch.tensor(rows, dtype=torch.float64)
        except (RunError, ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as error:
            raise RunError(
                f"{self.tasks_file} cannot be read ({brief(str(error))}): it holds the weights to be replayed"
            ) from error

    def write_replayed(self, weights: Tensor) -> None:
        """Keep the weights that this run replays, (iterations, B)."""
        write_whole(self.replayed_file, _packed({"weights": weights}, {}))

    def read_replayed(self) -> Tensor | None:
        """What `write_replayed` kept; none: nothing.

        Raises:
            RunError: it is damaged.
        """
        if not self.replayed_file.exists():
            return None
        try:
            return _unpacked(self.replayed_file)[0]["weights"]
        except (RunError, KeyError) as error:
            raise RunError(
                f"{self.replayed_file} cannot be read ({error}): it holds the weights to be replayed. Put it back, or "
                "delete it, and they are taken from the other run again"
            ) from error

    def check_logs(self) -> None:
        """Raise RunError unless the logs begin with what the newest checkpoint was written after, where it says so.

        Of the checkpoint no tensors are read, so that a report of many runs stays quick.
        """
        for checkpoint in (self.last, self.previous):
            try:
                with open_to_read(checkpoint) as file:
                    length = int.from_bytes(file.read(8), "little")
                    about = _about_itself(file.read(min(length, JSON_BYTES)))
                logs = [
                    (log, _whole_number(about, f"{log.stem}_bytes"), about.get(f"{log.stem}_sha256"))
                    for log in (self.metrics_file, self.tasks_file)
                ]
            except (OSError, KeyError, ValueError, AttributeError, TypeError):
                continue  # as in `read_checkpoint`, where it is said
            for log, length, sha256 in logs:
                if isinstance(sha256, str) and sha256:
                    _begin(log, length, sha256)
            return

    def write_start(self, weights: Params) -> None:
        """Keep the weights that this run starts from."""
        write_whole(self.start_file, _packed(weights, {}))

    def read_start(self) -> Params | None:
        """What `write_start` kept; none: nothing.

        Raises:
            RunError: it is damaged.
        """
        return _unpacked(self.start_file)[0] if self.start_file.exists() else None

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
            write_whole(self.classes_file, (json.dumps(seal_values(now), indent=1) + "\n").encode())
        elif then != now:
            where = [{name: split for split, names in side.items() for name in names} for side in (then, now)]
            moved = next((n for n in sorted({*where[0], *where[1]}) if where[0].get(n) != where[1].get(n)), None)
            if moved is None:  # names of another Unicode form were once sorted as they came
                raise RunError(
                    f"{self.path} was begun with the same classes in another order, so that its tasks would be others "
                    "now: train anew, or go on with the version of this program that it was begun with"
                )
            raise RunError(
                f"{self.path} was begun with other classes: {shown(moved)} was in {where[0].get(moved, 'none')} and is "
                f"in {where[1].get(moved, 'none')} now. Put the folder back as it was, or train anew"
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
            classes = unseal_values(from_json(read_bounded(self.classes_file, JSON_BYTES)))
            return {split: [composed(name) for name in classes[split]] for split in ("train", "val", "test")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.classes_file} cannot be read ({brief(repr(error))}): it holds the classes that the run was "
                "begun with. Put it back or, if nothing has changed in the data set's folder, delete it"
            ) from error

    def remove_leftovers(self) -> None:
        """Delete what an interrupted write left beside its target."""
        with _writing(self.path):
            refuse_link(self.checkpoints)
            for file in (
                self.config_file,
                self.last,
                self.best,
                self.replayed_file,
                self.start_file,
                self.classes_file,
            ):
                file.with_suffix(".part").unlink(missing_ok=True)
            for part in self.path.glob("result*.part"):
                part.unlink(missing_ok=True)


class JsonLines:
    """An append-only file of one JSON object a line, cut back to a known length when a run resumes."""

    def __init__(self, path: Path, length: int, sha256: str = "") -> None:
        self._path = path
        self._digest = _begin(path, length, sha256)
        with _writing(path):
            self._file = open_in_place(path, "ab")
            self._file.truncate(length)
            self._length, self._touched = length, False
            self._identity = _identity(os.fstat(self._file.fileno()))

    def write(self, values: dict[str, Any]) -> None:
        """Append a line and hand it to the operating system."""
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        with _writing(self._path):
            number = self._file.fileno()
            self._touched |= _identity(os.fstat(number)) != self._identity
            self._file.write(line)
            self._file.flush()
            self._identity = _identity(os.fstat(number))
        self._digest.update(line)
        self._length += len(line)

    def sync(self, whole: bool = False) -> tuple[int, str]:
        """Bring everything to the disk; the file's length, and the checksum of it all.

        Args:
            whole: read it all again; else only where its time says that it was written into.

        Raises:
            RunError: another program removed, replaced or changed it.
        """
        with _writing(self._path):
            os.fsync(self._file.fileno())
            here = _identity(os.fstat(self._file.fileno()))
        try:
            there = _identity(self._path.stat())
        except OSError as error:
            raise _meddled(self._path, "removed") from error
        if there[:2] != here[:2]:
            raise _meddled(self._path, "replaced")
        if here[2] != self._length:
            raise _meddled(self._path, f"changed: it has {here[2]} bytes, where this run wrote {self._length}")
        found = self._digest.hexdigest()
        if whole or self._touched or here != self._identity:
            try:
                _begin(self._path, self._length, found)
            except RunError as error:
                raise _meddled(self._path, "changed") from error
            self._touched, self._identity = False, here
        return self._length, found

    def close(self) -> None:
        """Close the file."""
        with _writing(self._path):
            self._file.close()


def _begin(path: Path, length: int, sha256: str) -> "hashlib._Hash":
    """The running checksum of a log's first `length` bytes.

    Raises:
        RunError: it has fewer, or others than those of that checksum (none: it is not known), or cannot be read.
    """
    running, left = hashlib.sha256(), length
    if length:
        try:
            with open_to_read(path) as file:
                while left and (part := file.read(min(left, 1 << 20))):
                    running.update(part)
                    left -= len(part)
        except FileNotFoundError:
            pass  # said below
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}") from error
    remedy = "it has been altered. Put it back from a copy, or delete the run folder and train anew"
    if left:
        raise RunError(f"{path} has {length - left} bytes, but the checkpoint was written after {length}: {remedy}")
    if sha256 and running.hexdigest() != sha256:
        raise RunError(f"{path} does not begin with the {length} bytes that the checkpoint was written after: {remedy}")
    return running


def stream_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, one after another; a last line without an end is still being written, and left out.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        with open_to_read(Path(path)) as file:
            for number in itertools.count(1):
                line = file.readline(LINE_BYTES)
                if not line.endswith(b"\n"):
                    if len(line) == LINE_BYTES:
                        raise ValueError(f"line {number} has more than {LINE_BYTES:,} bytes")
                    return
                value = from_json(line)
                if not isinstance(value, dict):
                    raise ValueError(f"line {number} is no object")
                yield value
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {_said(error)}") from error


def _said(error: Exception) -> str:
    return brief(getattr(error, "strerror", None) or str(error), 300)


def load(
    run: str | Path, checkpoint: str = "best", ways: int | None = None, trust: bool = False
) -> tuple[Learner, Params]:
    """A trained run as (learner, meta), for one's own loops; needs no data.

    Args:
        run: the run folder.
        checkpoint: "best" (on validation) or "last".
        ways: N of the tasks to come, where that may be any number (ProtoNet); none: as in training.
        trust: let the code of a network run that the run folder names, is not one of ours, and was not allowed before.

    Raises:
        RunError: not a run, no such checkpoint, or one whose parameters are not those of the run's network.
        ConfigError: more ways than the learner allows; or the network's code would run and is not allowed.
    """
    if checkpoint not in ("best", "last"):
        raise RunError(f"checkpoint is {shown(checkpoint)}, but it must be 'best' or 'last'")
    folder = RunFolder(Path(run))
    learner, meta, _ = load_weights(folder, folder.read_config(trust), checkpoint, ways)
    return learner, meta


def load_weights(
    folder: RunFolder, config: RunConfig, which: str, ways: int | None = None
) -> tuple[Learner, Params, dict[str, Any]]:
    """As `load`, with what the checkpoint says of itself."""
    meta, about = folder.read_weights(which)
    check_is_of(config, about.get("run"), f"{folder.path}'s {which} checkpoint")
    channels, height, width = _image_shape(about)
    if ways is not None:
        config.check_ways(ways)
    learner = build_judged_learner(config, ways, (channels, height, width))
    check_fits(learner.init(torch.Generator().manual_seed(0)), meta, f"{folder.path}'s {which} checkpoint")
    if isinstance(learner, NetworkLearner):
        learner.hold(meta)  # lest somebody who looks inside finds a network that was never trained
    return learner, meta, about


def build_judged_learner(config: RunConfig, ways: int | None, image_shape: tuple[int, int, int]) -> Learner:
    """The learner that serves tasks of so many ways with a run's θ; with a head of fixed size, the one trained."""
    head = config.episodes.ways if ways is None or not config.learner.any_ways else ways
    return build_learner(config.learner, head, image_shape, config.training.seed)


def check_is_of(config: RunConfig, run: Any, what: str) -> None:
    """Raise RunError where a checkpoint says that it is of another run than the config's: files of two were mixed."""
    if run and run != config.run_name:
        raise RunError(
            f"{what} is of the run {shown(run)}, and its config.yaml of {shown(config.run_name)}: put back the "
            "file that belongs there"
        )


def check_fits(configured: Params, found: Params, what: str) -> None:
    """Raise RunError unless `found` has the names and shapes of `configured`."""
    expected, there = ({name: tuple(p.shape) for name, p in tree.items()} for tree in (configured, found))
    for name in sorted({**expected, **there}):
        if expected.get(name) != there.get(name):
            raise RunError(
                f"{what} is of another architecture: {shown(name)} is {there.get(name, 'absent')} there and "
                f"{expected.get(name, 'absent')} as configured. Use the checkpoint's own config.yaml"
            )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it there, so that it is whole or not there.

    Raises:
        RunError: it cannot be written; nothing is left behind.
    """
    part = _part(path)
    with _writing(path):
        refuse_link(path)
        refuse_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(part, content)
        put_in_place(part, path)


def check_writable(path: Path) -> None:
    """Raise RunError, before any work is lost, if a file cannot be written."""
    with _writing(path):
        refuse_link(path)
        refuse_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _try_to_write(path)


def is_writable(path: Path) -> bool:
    """Whether this user may write a file in that folder, which may be read-only; other hindrances are not asked for."""
    try:
        _try_to_write(path)
    except OSError as error:
        return error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM)
    return True


def _try_to_write(path: Path) -> None:
    part = _part(path)
    write_synced(part, b"")
    part.unlink()


def _part(path: Path) -> Path:
    """Where a file is written before it is put in its place; another file, whatever its own ending is."""
    return path.with_suffix(".part" if path.suffix != ".part" else ".part.part")


def _name_also(path: Path, other: Path) -> None:
    """Bring a file to a second name, keeping its first, for those who read it meanwhile."""
    part = other.with_suffix(".part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without hard links
        put_in_place(path, other)
    else:
        put_in_place(part, other)
        part.unlink(missing_ok=True)  # renaming does nothing where both names were the file's already


class _Known(NamedTuple):
    """A file as this process left or found it."""

    identity: tuple[int, int, int, int]
    sha256: str | None
    """Of its content; none: that does not matter."""


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """Which file it is (2 numbers), its length, and when it was written into last."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _meddled(path: Path, how: str) -> RunError:
    return RunError(
        f"{path} was {how} by another program while the run trained, so training ended without writing a checkpoint. "
        "Put it back and resume from the checkpoint before, or choose another --out and train anew"
    )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(cannot_write(error, path)) from error


def _packed(tensors: Params, about: dict[str, Any]) -> bytes:
    # Copies: θ and the best θ may be the same tensors, which the format refuses to write twice.
    tensors = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in tensors.items()}
    # The file sorts its tensors; their order decides the order of sums, and so bits, and must come back as it was.
    about = {"format": FORMAT, **about, "names": list(tensors)}
    about["sha256"] = _digest(tensors, about)
    # One metadata entry: the order of several in the file is random from process to process.
    return save_tensors(tensors, {"metaheed": json.dumps(about)})


def _unpacked(path: Path) -> tuple[Params, dict[str, Any]]:
    try:
        # Read at once: the library's own reader opens the file twice, and a training run may replace it in between.
        content = read_bounded(path)
        found = load_tensors(content)
        # The bytes' reader gives no metadata: the format's header is its length in 8 bytes, then JSON.
        about = _about_itself(content[8 : 8 + int.from_bytes(content[:8], "little")])
        names = about.get("names", [])
        if sorted(names) != sorted(found):
            raise ValueError("its list of tensors does not match its content")
        # Copied into memory of PyTorch's own alignment: vector kernels round differently at another one.
        tensors = {name: found[name].clone() for name in names}
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise RunError(f"{path} is not a checkpoint: {_said(error)}") from error
    version, found = about.get("format"), about.pop("sha256", None)
    if version not in _FORMATS:
        raise RunError(f"{path} has checkpoint format {shown(version)}, but this program reads {FORMAT}")
    if found != _digest(tensors, about if version == FORMAT else None):
        raise RunError(f"{path} is damaged: its checksum does not match its content")
    del about["names"]
    return tensors, about


def _about_itself(header: bytes) -> dict[str, Any]:
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


def _checkpoint(tensors: Params, about: dict[str, Any]) -> Checkpoint:
    groups: dict[str, Params] = {"meta": {}, "optimizer": {}, "rule": {}, "best": {}}
    for name, leaf in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = leaf
    fields = [field for field in Progress._fields if about["format"] == FORMAT or not field.endswith("_sha256")]
    for field in fields:
        if Progress.__annotations__[field] is int:
            _whole_number(about, field)
    progress = Progress(**{field: about[field] for field in fields})
    if not isinstance(progress.best_accuracy, float | int):
        raise ValueError("its best_accuracy is no number")
    best = groups.pop("best")
    of = str(about.get("run", ""))
    return Checkpoint(progress, OuterState(**groups), best, _image_shape(about), recorded_pixels(about), of)


def _whole_number(about: dict[str, Any], field: str) -> int:
    value = about.get(field)
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"it says {str(value)[:40]} of its {field}, which must be a whole number of at least 0")
    return value


def _image_shape(about: dict[str, Any]) -> tuple[int, int, int]:
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
