"""Baselines in plain torch on frozen episodes: the very tasks that metaheed judges its runs on, read by numpy alone.

metaheed data episodes --data glyphs --with-images --out episodes.npz
python examples/frozen_episodes.py episodes.npz [RUN/result.json]
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def tasks(file: dict[str, np.ndarray], about: dict) -> Iterator[tuple[Tensor, ...]]:
    """Support images (N·K, pixels) and labels, query images (N·Q, pixels) and labels of each task."""
    assert "images" in file, "write the file --with-images"
    for image, expected in zip(file["images"], file["image_sha256"], strict=True):
        assert hashlib.sha256(image.tobytes()).hexdigest() == expected, "not the images that the tasks were made of"
    mean, std = (torch.tensor(about[name]).view(-1, 1, 1) for name in ("mean", "std"))
    x = ((torch.from_numpy(file["images"]) / 255 - mean) / std).flatten(1)
    N, K, Q = (about[name] for name in ("ways", "shots", "queries"))
    support_y, query_y = (torch.arange(N).repeat_interleave(each) for each in (K, Q))  # a task's row is the label
    for chosen in torch.from_numpy(file["tasks"]).long():  # (N, K+Q) image numbers
        yield x[chosen[:, :K].flatten()], support_y, x[chosen[:, K:].flatten()], query_y


def nearest_centroid(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
    """The class whose mean support image is nearest."""
    return torch.cdist(query_x, torch.stack([support_x[support_y == k].mean(0) for k in support_y.unique()])).argmin(1)


def linear_classifier(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
    """Softmax regression on the pixels, fitted to the support set by gradient descent."""
    model = nn.Linear(support_x.shape[1], int(support_y.max()) + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(model(support_x), support_y).backward()
        optimizer.step()
    return model(query_x).argmax(1)


if __name__ == "__main__":
    torch.manual_seed(0)
    file = dict(np.load(sys.argv[1]))  # unpickles nothing
    about = json.loads(str(file["about"]))
    judged = json.loads(Path(sys.argv[2]).read_text()) if len(sys.argv) > 2 else None
    assert judged is None or judged["episodes_sha256"] == about["episodes_sha256"], "judged on other tasks"
    for method in (nearest_centroid, linear_classifier):
        right = [(method(sx, sy, qx) == qy).double().mean().item() for sx, sy, qx, qy in tasks(file, about)]
        print(f"{method.__name__}: {np.mean(right):.2%} ± {1.96 * np.std(right, ddof=1) / len(right) ** 0.5:.2%}")
        if judged is not None:
            d = np.array(judged["accuracies"]) - right
            print(f"  {judged['algorithm']} minus it: {d.mean():+.2%} ± {1.96 * d.std(ddof=1) / len(d) ** 0.5:.2%}")
