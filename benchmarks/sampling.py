"""Sampling: meta-batches a second, and its share of a training iteration.

    python -m benchmarks.sampling [--ways] [--shares] [--settings a b c d e] [--rounds 3] [--out runs/bench]

--ways: 84×84 RGB, 5-way 1-shot with 15 queries a class, 4 tasks a meta-batch (320 images), from random pixels of 64
classes: from memory, from a memory-mapped file warm and cold (its pages dropped from the system's cache before every
batch; Linux), and on the GPU where there is one; beside the ways of learn2learn and torchmeta, written out here: both
fetch image after image in Python and collate.

--shares: `metaheed train` itself, on the CPU, from a store of random pixels of the real size, in the settings of `make
bench` and (e), Omniglot 20-way 5-shot; MAML, FOMAML and, quickest of all, ProtoNet. It tells how long an iteration
takes, how long of it is waiting for the batch (drawn while the one before is trained on), and how long drawing takes by
itself.

Medians of rounds; without --ways or --shares both. Written to sampling.json (ways.json, shares.json), with the load of
the machine.
"""

import argparse
import itertools
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from benchmarks.processes import ROOT
from benchmarks.settings import SETTINGS, Setting
from benchmarks.speed import conditions
from metaheed.config import MAMLConfig, RunConfig, default_config
from metaheed.data import SPLITS, Dataset, Episodes, Prefetcher, Split, load_dataset
from metaheed.data.preparing import prepare
from metaheed.data.sources import Quiet, Source, SourceSplit, array_stream
from metaheed.files.writing import write_whole
from metaheed.running.folder import RunFolder
from metaheed.running.process import cpu_threads, keep_freed_memory, make_deterministic
from metaheed.running.reporter import Reporter
from metaheed.running.train import train
from metaheed.types import Episode

WAYS, SHOTS, QUERIES, TASKS, CLASSES = 5, 1, 15, 4, 64
ALGORITHMS = ("maml", "fomaml", "protonet")
SHARED = {**SETTINGS, "e": replace(SETTINGS["d"], name="e", title="Omniglot 1×28×28, 20-way 5-shot, B = 16", shots=5)}
"""Where shares are measured."""
COUNTS = {"miniimagenet": (64, 600), "cifar-fs": (64, 600), "omniglot": (3920, 20)}
"""Training classes, and images of each."""
WARM_UP = 2  # iterations


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", action="store_true", help="meta-batches a second, beside other libraries' ways")
    parser.add_argument("--shares", action="store_true", help="share of a training iteration")
    parser.add_argument("--settings", nargs="+", choices=SHARED, default=[*SHARED], help="where shares are measured")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are taken")
    parser.add_argument("--iterations", type=int, default=12, help="timed in each round of --shares")
    parser.add_argument("--seconds", type=float, default=3, help="to measure each way for, in each round")
    parser.add_argument("--images", type=int, default=600, help="of each of 64 classes of --ways (600: 813 MB)")
    parser.add_argument("--folder", type=Path, help="where files are put meanwhile; none: the system's own")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "bench",
        help="folder of the result (the evidence: results/sampling)",
    )
    chosen = parser.parse_args(arguments)
    if min(chosen.rounds, chosen.iterations) < 1:
        parser.error(f"--rounds is {chosen.rounds} and --iterations {chosen.iterations}, but both must be at least 1")
    both = chosen.ways == chosen.shares
    file = "sampling" if both else "ways" if chosen.ways else "shares"
    keep_freed_memory()  # as the command line does
    make_deterministic()
    result: dict[str, Any] = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.sampling", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        **conditions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg(),
    }

    def save() -> None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        write_whole(chosen.out / f"{file}.json", (json.dumps(result, indent=1) + "\n").encode())

    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        if both or chosen.ways:
            rounds = [ways_of_sampling(Path(folder), chosen.images, chosen.seconds) for _ in range(chosen.rounds)]
            result["meta_batches_per_second"] = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            result["meta_batches_per_second_rounds"] = rounds
            for name, rate in result["meta_batches_per_second"].items():
                print(f"{name:44} {rate:9.1f} meta-batches/s", flush=True)
            save()
        if both or chosen.shares:
            measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
            for number in range(chosen.rounds):  # a round of all, then the next: it may be stopped after any
                for name, algorithm in itertools.product(chosen.settings, ALGORITHMS):
                    one = _round(SHARED[name], algorithm, Path(folder), chosen.iterations, number)
                    measured.setdefault((name, algorithm), []).append(one)
                    result["shares"] = [row(SHARED[s], a, of_all) for (s, a), of_all in measured.items()]
                    print(describe(row(SHARED[name], algorithm, [one])), flush=True)
                    save()


def ways_of_sampling(folder: Path, images: int, seconds: float) -> dict[str, float]:
    """Meta-batches a second of each way."""
    path = folder / "images.npy"
    generator = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, "w+", np.uint8, (CLASSES * images, 3, 84, 84))
    for k in range(CLASSES):
        file[k * images : (k + 1) * images] = generator.integers(0, 256, (images, 3, 84, 84), np.uint8)
    file.flush()
    del file
    memory = torch.from_numpy(np.load(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a read-only map must not be written
        mapped = torch.from_numpy(np.load(path, mmap_mode="r"))

    def episodes(pixels: torch.Tensor, device: torch.device | None = None) -> Episodes:
        classes = tuple(f"class {k}" for k in range(CLASSES))
        splits = dict.fromkeys(("train", "val", "test"), Split("train", classes, (images,) * CLASSES, pixels))
        dataset = Dataset("random", splits, (0.5,) * 3, (0.3,) * 3)
        return Episodes(dataset if device is None else dataset.to(device), "train", WAYS, SHOTS, QUERIES, 0)

    def drop() -> None:
        with path.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    found = [("memory", rate(episodes(memory), seconds)), ("memory map, warm", rate(episodes(mapped), seconds))]
    if hasattr(os, "posix_fadvise"):
        # Mapped anew for each batch, for pages in use are not dropped; mapping is quick.
        def cold(first: int) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                episodes(torch.from_numpy(np.load(path, mmap_mode="r"))).batch(first, TASKS)

        del mapped
        found.append(("memory map, cold", timed(cold, seconds, before=drop)))
    if torch.cuda.is_available():
        found.append(("on the device", rate(episodes(memory, torch.device("cuda")), seconds)))
        found.append(("on the device, drawn ahead", rate(Prefetcher(episodes(memory, torch.device("cuda"))), seconds)))
    found.append(("learn2learn's way (image by image)", timed(learn2learn_way(memory, images), seconds)))
    found.append(("torchmeta's way (image by image)", timed(torchmeta_way(memory, images), seconds)))
    return dict(found)


def rate(episodes: Episodes | Prefetcher, seconds: float) -> float:
    return timed(lambda first: episodes.batch(first, TASKS), seconds)


def timed(batch: Callable[[int], object], seconds: float, before: Callable[[], None] | None = None) -> float:
    """Batches a second of what is timed; what is done before each batch is not."""
    batch(0)
    spent, count = 0.0, 0
    while spent < seconds:
        if before is not None:
            before()
        began = time.perf_counter()
        count += 1
        batch(count * TASKS)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent += time.perf_counter() - began
    return count / spent


def learn2learn_way(pixels: torch.Tensor, images: int) -> Callable[[int], object]:
    """TaskDataset with NWays, KShots, LoadData, RemapLabels: a list of indices, each loaded, then collated.

    Its MiniImagenet holds the whole set as float32 (3.3 GB for 64 classes); here each image is made float32 as it is
    loaded, so that memory is not what is compared.
    """

    def load(index: int) -> tuple[torch.Tensor, int]:
        return pixels[index].float(), index // images

    def batch(first: int) -> object:
        tasks = []
        for _ in range(TASKS):
            chosen = random.sample(range(CLASSES), WAYS)
            indices = [c * images + i for c in chosen for i in random.sample(range(images), SHOTS + QUERIES)]
            data, labels = default_collate([load(index) for index in indices])
            labels = torch.tensor([chosen.index(int(label)) for label in labels])
            support = torch.zeros(len(indices), dtype=torch.bool)
            support[[k * (SHOTS + QUERIES) + s for k in range(WAYS) for s in range(SHOTS)]] = True
            tasks.append((data[support], labels[support], data[~support], labels[~support]))
        return tasks

    return batch


def torchmeta_way(pixels: torch.Tensor, images: int) -> Callable[[int], object]:
    """CombinationMetaDataset, ClassSplitter and BatchMetaDataLoader: each image through Pillow and a transform, each
    task collated, then the tasks.
    """
    pictures = pixels.permute(0, 2, 3, 1).numpy()

    def load(index: int, label: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(np.ascontiguousarray(pictures[index]))
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div(255), label

    def batch(first: int) -> object:
        tasks = []
        for _ in range(TASKS):
            train, test = [], []
            for label, c in enumerate(random.sample(range(CLASSES), WAYS)):
                order = torch.randperm(images)[: SHOTS + QUERIES].tolist()
                samples = [load(c * images + i, label) for i in order]
                train += samples[:SHOTS]
                test += samples[SHOTS:]
            tasks.append({"train": default_collate(train), "test": default_collate(test)})
        return default_collate(tasks)

    return batch


def row(setting: Setting, algorithm: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What an iteration takes, waits, and what drawing takes by itself: medians of rounds."""
    return {
        "setting": setting.name,
        "title": setting.title,
        "algorithm": algorithm,
        **{f"{key}_seconds": statistics.median(r[key] for r in rounds) for key in ("iteration", "waited", "alone")},
        "waited_share": statistics.median(r["waited"] / r["iteration"] for r in rounds),
        "alone_share": statistics.median(r["alone"] / r["iteration"] for r in rounds),
        "execution": rounds[0]["execution"],
        "rounds": list(rounds),
    }


def describe(row: dict[str, Any]) -> str:
    """A row in words."""
    return (
        f"({row['setting']}) {row['title']}, {row['algorithm']}: iteration {1e3 * row['iteration_seconds']:.1f} ms, "
        f"of which it waits {1e3 * row['waited_seconds']:.2f} ms for its batch ({row['waited_share']:.1%}); drawing by "
        f"itself {1e3 * row['alone_seconds']:.2f} ms ({row['alone_share']:.1%})"
    )


def store(name: str, shape: tuple[int, int, int], folder: Path) -> None:
    """A store of random pixels, of as many classes and images as the data set's; one that is there is kept."""
    if (folder / f"{name}.metaheed").exists():
        return
    classes, images = COUNTS[name]

    def chunks(split: str, count: int, start: int) -> Iterator[np.ndarray]:
        generator = np.random.default_rng(SPLITS.index(split))
        for first in range(start, count, 600):
            yield generator.integers(0, 256, (min(600, count - first), *shape), np.uint8)

    splits = {}
    for split in SPLITS:
        n = classes if split == "train" else 20
        counts, total = (images,) * n, n * images
        stream = array_stream(np.arange(total), partial(chunks, split, total))
        splits[split] = SourceSplit(tuple(f"{split} {k}" for k in range(n)), counts, shape, total, stream)
    prepare(Source(name, "random pixels", splits, "random"), folder, Quiet())


def config(setting: Setting, algorithm: str, name: str, root: Path, iterations: int, out: Path) -> RunConfig:
    """Of a training run in that setting, with everything else as the command line has it."""
    made = default_config({"fomaml": "maml"}.get(algorithm, algorithm), name, setting.ways, setting.shots)
    learner = made.learner
    if isinstance(learner, MAMLConfig):
        learner = replace(learner, adaptation_steps=setting.steps, first_order=algorithm == "fomaml")
    total = WARM_UP + iterations
    return replace(
        made,
        episodes=replace(made.episodes, queries=setting.queries, test_queries=1, data_root=root),
        learner=learner,
        outer=replace(made.outer, meta_batch_size=setting.tasks),
        training=replace(
            made.training, device="cpu", iterations=total, val_every=total, checkpoint_every=total, val_tasks=2, out=out
        ),
    )


class _Clock(Reporter):
    """When each iteration was done."""

    def __init__(self) -> None:
        self.done: list[float] = []

    def step(self, iteration: int, loss: float, accuracy: float) -> None:
        self.done.append(time.perf_counter())


def _round(setting: Setting, algorithm: str, folder: Path, iterations: int, number: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    name = {(3, 84, 84): "miniimagenet", (3, 32, 32): "cifar-fs"}.get(setting.image_shape, "omniglot")
    store(name, setting.image_shape, folder)
    out = folder / f"{setting.name}-{algorithm}-{number}"
    chosen = config(setting, algorithm, name, folder, iterations, out)
    waited: list[float] = []

    class Timed(Prefetcher):
        def batch(self, first: int, count: int) -> Episode:
            began = time.perf_counter()
            drawn = super().batch(first, count)
            waited.append(time.perf_counter() - began)
            return drawn

    clock = _Clock()
    with mock.patch("metaheed.engine.steps.Prefetcher", Timed):
        path = train(chosen, clock)
    trained = RunFolder(path).read_config()
    dataset = load_dataset(chosen.episodes.data, chosen.episodes.data_root)
    episodes = Episodes(dataset, "train", *chosen.episodes.train_shape, chosen.training.seed, stream="training")
    tasks, alone = chosen.outer.meta_batch_size, []
    with cpu_threads(trained.training):
        for t in range(WARM_UP, chosen.training.iterations):
            began = time.perf_counter()
            episodes.batch(t * tasks, tasks)
            alone.append(time.perf_counter() - began)
    return {
        "iteration": statistics.median(np.diff(clock.done)[WARM_UP - 1 :].tolist()),
        "waited": statistics.median(waited[WARM_UP:]),
        "alone": statistics.median(alone),
        "execution": trained.training.execution,
        "load": load,
    }


if __name__ == "__main__":
    main()
