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
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from metaheed.config import RunConfig, from_dict, to_dict
from metaheed.data import Dataset
from metaheed.data.reading.names import composed
from metaheed.errors import RunError, brief, option, shown
from metaheed.files.opening import (
    JSON_BYTES,
    YAML_BYTES,
    cannot_write,
    make_folder,
    open_in_place,
    open_to_read,
    put_in_place,
    read_bounded,
    refuse_link,
    try_lock,
    write_synced,
)
from metaheed.files.parsing import from_json, from_yaml
from metaheed.files.seals import seal_text, seal_values, unseal_text, unseal_values
from metaheed.files.trust import allow
from metaheed.files.writing import _writing, name_also, write_whole
from metaheed.running.checkpoint import (
    Checkpoint,
    _checkpoint,
    _image_shape,
    _packed,
    about_itself,
    recorded_pixels,
    unpacked,
    whole_number,
)
from metaheed.running.log import _begin, stream_lines
from metaheed.running.meddling import Known, identity, meddled
from metaheed.types import Params

STUDY_FILE = "search.yaml"
"""In a folder that `metaheed search` keeps, whose run folders are trials."""


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
        self._known: dict[Path, Known] = {}
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
                    f"wait for it, stop it, or choose another {option('out')}"
                )
            with _writing(self.path):
                file.truncate(0)
                file.write(f"process {os.getpid()}\n")
                file.flush()
            self._known = {self.lock_file: Known(identity(os.fstat(file.fileno())), None)}
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
                if identity(path.stat()) == known.identity:
                    continue
                if known.sha256 is None:  # only which file it is matters
                    same = identity(path.stat())[:2] == known.identity[:2]
                else:
                    same = hashlib.sha256(read_bounded(path)).hexdigest() == known.sha256
            except OSError as error:
                raise meddled(path, "removed" if isinstance(error, FileNotFoundError) else str(error)) from error
            if not same:
                raise meddled(path, "changed or replaced")

    def watch_config(self) -> None:
        """From now on config.yaml is to stay as it is."""
        with _writing(self.config_file):
            self._remember(self.config_file, read_bounded(self.config_file, YAML_BYTES))

    def is_ours(self) -> bool:
        """Whether the folder here is still the one that this process holds, not one made in its place since."""
        known = self._known.get(self.lock_file)
        try:
            return known is not None and known.identity[:2] == identity(self.lock_file.stat())[:2]
        except OSError:
            return False

    def _remember(self, path: Path, content: bytes) -> None:
        with _writing(path):
            self._known[path] = Known(identity(path.stat()), hashlib.sha256(content).hexdigest())

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
                name_also(self.last, self.previous)
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
                tensors, about = unpacked(path)
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
                tensors, about = unpacked(self.best)
                whole_number(about, "iteration")
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
                f"train on, or use {option('checkpoint', 'last')}"
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
            return unpacked(self.replayed_file)[0]["weights"]
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
                    about = about_itself(file.read(min(length, JSON_BYTES)))
                logs = [
                    (log, whole_number(about, f"{log.stem}_bytes"), about.get(f"{log.stem}_sha256"))
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
        return unpacked(self.start_file)[0] if self.start_file.exists() else None

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
