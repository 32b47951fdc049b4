"""Random images in miniImageNet's published format, to time `metaheed train` where the real ones are not at hand.

    python -m benchmarks.noise DATA_ROOT
    metaheed train ta-maml --data miniimagenet --data-root DATA_ROOT --ways 5 --shots 1

Every class has a mark that its images share, so that there is something to learn; the accuracy that comes of it says
nothing.
"""

import argparse
import pickle
from pathlib import Path

import numpy as np

from metaheed.data.locate import class_list

IMAGES = 30
"""Of a class; the real set has 600."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    root: Path = parser.parse_args().root
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        classes = sorted(class_list(f"miniimagenet_{split}"))
        marks = rng.integers(0, 200, (len(classes), 1, 84, 84, 3))
        images = (marks + rng.integers(0, 56, (len(classes), IMAGES, 84, 84, 3))).astype(np.uint8)
        places = {name: list(range(k * IMAGES, (k + 1) * IMAGES)) for k, name in enumerate(classes)}
        with (root / f"mini-imagenet-cache-{split}.pkl").open("wb") as file:
            pickle.dump({"image_data": images.reshape(-1, 84, 84, 3), "class_dict": places}, file, protocol=2)


if __name__ == "__main__":
    main()
