"""Sampling: meta-batches a second, and sampling's share of a training iteration.

    python benchmarks/sampling.py [--seconds 3] [--images 600] [--shares] [--folder DIR]

84×84 RGB, 5-way 1-shot with 15 queries a class, 4 tasks a meta-batch (320 images), from random pixels of 64 classes:
from memory, from a memory-mapped file warm and cold (its pages dropped from the system's cache before every batch;
Linux), and on the GPU where there is one; beside the ways of learn2learn and torchmeta, written out here: both fetch
image after image in Python and collate. --shares instead times whole training iterations of MAML.
"""

import argparse
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from metaheed.config import MAMLConfig, TrainingConfig, default_config
from metaheed.data import Ahead, Dataset, Episodes, Split
from metaheed.learners import build_learner
from metaheed.outer import build_execution, task_gradient
from metaheed.process import keep_freed_memory

WAYS, SHOTS, QUERIES, TASKS, CLASSES = 5, 1, 15, 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3, help="to measure each way for")
    parser.add_argument("--images", type=int, default=600, help="of each of the 64 classes (600: 813 MB)")
    parser.add_argument("--shares", action="store_true", help="sampling's share of a training iteration")
    parser.add_argument("--folder", type=Path, help="where the memory-mapped file is put; none: the system's own")
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    if options.shares:
        shares()
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, rate in ways_of_sampling(Path(folder), options.images, options.seconds):
            print(f"{name:44} {rate:9.1f} meta-batches/s", flush=True)


def ways_of_sampling(folder: Path, images: int, seconds: float) -> list[tuple[str, float]]:
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
        found.append(("on the device, drawn ahead", rate(Ahead(episodes(memory, torch.device("cuda"))), seconds)))
    found.append(("learn2learn's way (image by image)", timed(learn2learn_way(memory, images), seconds)))
    found.append(("torchmeta's way (image by image)", timed(torchmeta_way(memory, images), seconds)))
    return found


def rate(episodes: Episodes | Ahead, seconds: float) -> float:
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


SETTINGS = (
    ("miniimagenet", 5, 1, (3, 84, 84), 600),
    ("miniimagenet", 10, 5, (3, 84, 84), 600),
    ("tieredimagenet", 5, 1, (3, 84, 84), 1300),
    ("cifar-fs", 5, 1, (3, 32, 32), 600),
    ("omniglot", 5, 1, (1, 28, 28), 20),
    ("omniglot", 20, 1, (1, 28, 28), 20),
    ("omniglot", 20, 5, (1, 28, 28), 20),
)


def shares() -> None:
    """One training iteration of first-order MAML (the quickest to train, so the largest share) in the paper's cells."""
    for setting in SETTINGS:
        share(*setting)


def share(name: str, ways: int, shots: int, shape: tuple[int, int, int], images: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = default_config("maml", name, ways, shots)
    queries, tasks = config.episodes.queries, config.outer.meta_batch_size
    classes = 964 if name == "omniglot" else 64
    pixels = torch.randint(0, 256, (classes * images, *shape), dtype=torch.uint8)
    split = Split("train", tuple(map(str, range(classes))), (images,) * classes, pixels)
    dataset = Dataset(name, dict.fromkeys(("train", "val", "test"), split), (0.5,) * shape[0], (0.3,) * shape[0])
    episodes = Episodes(dataset.to(device), "train", ways, shots, queries, 0)
    assert isinstance(config.learner, MAMLConfig)
    learner = build_learner(replace(config.learner, first_order=True), ways, shape, 0)
    execution = TrainingConfig(execution="vectorized" if device.type == "cuda" else "looped")
    gradients = build_execution(execution, device, learner, task_gradient)
    meta = {n: p.to(device) for n, p in learner.init(torch.Generator().manual_seed(0)).items()}
    fixed = episodes.batch(0, tasks)
    step = timed(lambda first: gradients(meta, fixed), 2.0)
    sample = timed(lambda first: episodes.batch(first, tasks), 1.0)
    ahead, waited = Ahead(episodes), []

    def iteration(first: int) -> None:
        began = time.perf_counter()
        batch = ahead.batch(first // TASKS * tasks, tasks)
        waited.append(time.perf_counter() - began)
        gradients(meta, batch)

    timed(iteration, 3.0)
    hidden = sum(waited[1:]) / len(waited[1:])
    print(
        f"{name} {ways}-way {shots}-shot, B={tasks}: iteration {1e3 / step:.1f} ms, sampling {1e3 / sample:.2f} ms "
        f"({step / sample:.1%} of it); drawn ahead {1e3 * hidden:.2f} ms ({hidden * step:.1%})",
        flush=True,
    )


if __name__ == "__main__":
    main()
