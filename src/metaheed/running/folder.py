"""A run folder: what is in it, how its files are read, and how they are written so that each is whole or absent.

    config.yaml                    everything that decides the run; written first
    metrics.jsonl                  a line for each iteration (loss, accuracy) and for each validation
    tasks.jsonl                    a line for each iteration: attention's inputs and the weight of every task
    timing.jsonl                   a line for each checkpoint: iterations since the last, seconds, peak memory
    checkpoints/last.safetensors   the whole state, for an exact resume; previous.safetensors is the one before
    checkpoints/best.safetensors   θ at the best validation accuracy, under the backbone's own names
    start.safetensors              the weights that the run started from, if they were given (--init-from)
    replayed.safetensors           the task weights of another run, if the rule replays them
    classes.json                   the classes of each split, for a folder of the user's own
    result.json                    the evaluation on test tasks of the run's own setting (result-val.json: on
                                   validation tasks; result-on-DATA.json: on another data set;
                                   result-5way5shot15query.json: with other ways, shots or queries)
    run.lock                       locked by the process that trains

No file but timing.jsonl holds times, so that the same run leaves the same bytes.
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
    cannot_write_message,
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
from metaheed.files.writing import _writing, add_name, write_whole
from metaheed.running.checkpoint import (
    Checkpoint,
    build_checkpoint,
    pack_tensors,
    parse_metadata,
    read_tensors,
    recorded_image_shape,
    recorded_pixels,
    whole_number,
)
from metaheed.running.log import hash_beginning, stream_lines
from metaheed.running.meddling import KnownFile, identity, meddling_error
from metaheed.types import Params

STUDY_FILE = "search.yaml"
"""Name of the file by which a study folder of `metaheed search` is known."""


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
        self._known: dict[Path, KnownFile] = {}
        """Files as this process last wrote or read them, to detect that another program changed them."""
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.safetensors"
        self.previous = self.checkpoints / "previous.safetensors"
        self.best = self.checkpoints / "best.safetensors"

    def result(self, split: str, data: str | None = None, shape: tuple[int, int, int] | None = None) -> Path:
        """The result file of the evaluation on the tasks of a split.

        Args:
            split: "test" or another split.
            data: the data set, if it is not the run's own.
            shape: (ways, shots, queries), if they are not the run's own.
        """
        on = "" if data is None else "-on-" + re.sub(r"[^\w.-]+", "_", data)
        at = "" if shape is None else "-{}way{}shot{}query".format(*shape)
        return self.path / f"result{on}{at}{'' if split == 'test' else f'-{split}'}.json"

    def needs(self, path: Path) -> bool:
        """Whether a path is one of the files that the run consists of; results are not among them."""
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
        """Lock the folder for this process, creating it if need be. The system frees the lock when the process ends.

        Raises:
            RunError: another living process holds the lock, the folder cannot be written, or a link is in the place of
                one of the run's files.
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
            self._known = {self.lock_file: KnownFile(identity(os.fstat(file.fileno())), None)}
            # The file stays: if it were deleted here, two processes could lock two files of the same name.
            yield

    def _refuse_links(self) -> None:
        """Raise OSError if a link is in the place of one of the run's files, before any work is lost."""
        for path in vars(self).values():
            if isinstance(path, Path) and path != self.path:
                refuse_link(path)

    def is_held(self) -> bool:
        """Whether a living process holds the lock of the folder.

        Raises:
            RunError: the lock file cannot be opened, so it cannot be known.
        """
        try:
            with open_in_place(self.lock_file, "r+") as file:
                return not try_lock(file)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise RunError(cannot_write_message(error, self.lock_file)) from error

    def read_config(self, trust: bool = False) -> RunConfig:
        """The run's config.

        Args:
            trust: allow the code of the run's network, if it is not metaheed's.

        Raises:
            RunError: the folder holds no run, or its config.yaml is damaged or no config.
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
        """Raise RunError if another program removed or changed a file since this process wrote it or began to watch it.

        Only the process that holds the folder's lock may call this.
        """
        for path, known in self._known.items():
            try:
                if identity(path.stat()) == known.identity:
                    continue
                if known.sha256 is None:  # only the identity of the file matters
                    same = identity(path.stat())[:2] == known.identity[:2]
                else:
                    same = hashlib.sha256(read_bounded(path)).hexdigest() == known.sha256
            except OSError as error:
                raise meddling_error(path, "removed" if isinstance(error, FileNotFoundError) else str(error)) from error
            if not same:
                raise meddling_error(path, "changed or replaced")

    def watch_config(self) -> None:
        """Let `check_unaltered` refuse changes of config.yaml from now on."""
        with _writing(self.config_file):
            self._remember(self.config_file, read_bounded(self.config_file, YAML_BYTES))

    def is_ours(self) -> bool:
        """Whether the folder is still the one that this process locked, and not another in its place."""
        known = self._known.get(self.lock_file)
        try:
            return known is not None and known.identity[:2] == identity(self.lock_file.stat())[:2]
        except OSError:
            return False

    def _remember(self, path: Path, content: bytes) -> None:
        with _writing(path):
            self._known[path] = KnownFile(identity(path.stat()), hashlib.sha256(content).hexdigest())

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write the last checkpoint and best.safetensors; what was the last becomes previous.safetensors."""
        groups = {**checkpoint.state._asdict(), "best": checkpoint.best}
        tensors = {f"{group}.{name}": leaf for group, tree in groups.items() for name, leaf in tree.items()}
        about = {**checkpoint.progress._asdict(), "image_shape": checkpoint.image_shape, "pixels": checkpoint.pixels}
        about["run"] = checkpoint.run
        with _writing(self.path):
            make_folder(self.checkpoints, self.path)
            part = self.last.with_suffix(".part")
            content = pack_tensors(tensors, about)
            write_synced(part, content)
            # If the last one was found damaged on resuming, it must not replace the whole one before it.
            if self.last.exists() and not self._last_is_damaged:
                add_name(self.last, self.previous)
            put_in_place(part, self.last)
            self._remember(self.last, content)
            self._last_is_damaged = False
        self.write_best(checkpoint)

    def write_best(self, checkpoint: Checkpoint) -> None:
        """Write best.safetensors from a checkpoint, if it has been validated."""
        if checkpoint.best:
            about = {
                "iteration": checkpoint.progress.best_iteration,
                "validation_accuracy": checkpoint.progress.best_accuracy,
                "image_shape": checkpoint.image_shape,
                "pixels": checkpoint.pixels,
                "run": checkpoint.run,
            }
            content = pack_tensors(checkpoint.best, about)
            write_whole(self.best, content)
            self._remember(self.best, content)

    def read_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, or None if there is none, and a notice for each damaged one passed over."""
        notices: list[str] = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                tensors, about = read_tensors(path)
                return build_checkpoint(tensors, about), notices
            except (RunError, KeyError, TypeError, ValueError) as error:
                reason = f"it lacks {error}" if isinstance(error, KeyError) else error
                notices.append(f"checkpoint {path} is damaged ({reason}); falling back to the one before")
                self._last_is_damaged |= path == self.last
        return None, notices

    def read_weights(self, which: str) -> tuple[Params, dict[str, Any]]:
        """θ at the "best" or "last" checkpoint, with iteration, image_shape and pixels.

        Raises:
            RunError: no such checkpoint has been written, or it is damaged.
        """
        damaged = ""
        if which == "best" and self.best.exists():
            try:
                tensors, about = read_tensors(self.best)
                whole_number(about, "iteration")
                recorded_image_shape(about)
                recorded_pixels(about)
                return tensors, about
            except (RunError, ValueError) as error:
                damaged = f"; {error}" if isinstance(error, RunError) else f"; {self.best}: {error}"
        checkpoint, notices = self.read_checkpoint()
        if checkpoint is None:
            reason = "; ".join(notices) + damaged or "none has been written yet: train it first"
            raise RunError(f"{self.path} has no checkpoint to read ({reason})")
        if notices:
            # The previous checkpoint is of another iteration. Training falls back to it and says so; reading does not.
            raise RunError(
                f"{notices[0].partition('; falling')[0]}{damaged}: 'metaheed train --resume {self.path}' continues "
                "from the one before and rewrites it"
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
        """The logged task weights of every iteration, (iterations, B) float64.

        Raises:
            RunError: tasks.jsonl is missing or damaged, or does not begin with what the newest checkpoint records.
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
        """Keep the task weights that this run replays, (iterations, B)."""
        write_whole(self.replayed_file, pack_tensors({"weights": weights}, {}))

    def read_replayed(self) -> Tensor | None:
        """The task weights that `write_replayed` kept, (iterations, B); None if there are none.

        Raises:
            RunError: the file is damaged.
        """
        if not self.replayed_file.exists():
            return None
        try:
            return read_tensors(self.replayed_file)[0]["weights"]
        except (RunError, KeyError) as error:
            raise RunError(
                f"{self.replayed_file} cannot be read ({error}): it holds the weights to be replayed. Put it back, or "
                "delete it, and they are taken from the other run again"
            ) from error

    def check_logs(self) -> None:
        """Raise RunError unless the logs begin with the bytes whose checksums the newest checkpoint records.

        The checkpoint's tensors are not read, so that a report on many runs stays quick.
        """
        for checkpoint in (self.last, self.previous):
            try:
                with open_to_read(checkpoint) as file:
                    length = int.from_bytes(file.read(8), "little")
                    about = parse_metadata(file.read(min(length, JSON_BYTES)))
                logs = [
                    (log, whole_number(about, f"{log.stem}_bytes"), about.get(f"{log.stem}_sha256"))
                    for log in (self.metrics_file, self.tasks_file)
                ]
            except (OSError, KeyError, ValueError, AttributeError, TypeError):
                continue  # a damaged checkpoint, which `read_checkpoint` reports
            for log, length, sha256 in logs:
                if isinstance(sha256, str) and sha256:
                    hash_beginning(log, length, sha256)
            return

    def write_start(self, weights: Params) -> None:
        """Keep the weights that this run starts from."""
        write_whole(self.start_file, pack_tensors(weights, {}))

    def read_start(self) -> Params | None:
        """The weights that `write_start` kept; None if there are none.

        Raises:
            RunError: the file is damaged.
        """
        return read_tensors(self.start_file)[0] if self.start_file.exists() else None

    def record_classes(self, dataset: Dataset) -> None:
        """Record the classes of each split of a folder of the user's own, or check them against those recorded.

        Raises:
            RunError: the run was begun with other classes, or they cannot be written.
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
            if moved is None:  # an old version sorted names before it brought them to one Unicode form
                raise RunError(
                    f"{self.path} was begun with the same classes in another order, so that its tasks would be others "
                    "now: train a new run, or continue with the version of this program that the run was begun with"
                )
            raise RunError(
                f"{self.path} was begun with other classes: {shown(moved)} was in {where[0].get(moved, 'none')} and is "
                f"in {where[1].get(moved, 'none')} now. Put the folder back as it was, or train anew"
            )

    def check_classes(self, dataset: Dataset, split: str) -> None:
        """Raise RunError if a split to be evaluated on has classes that the run was trained on."""
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
        """Delete the .part files that interrupted writes left."""
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
