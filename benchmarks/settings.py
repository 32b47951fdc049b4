"""What is measured: the settings, the algorithms, and who takes part in which."""

from dataclasses import asdict, dataclass
from typing import Any

FAST_LR, META_LR, HIDDEN = 0.01, 1e-3, 32
"""α of the inner steps, the rate of the outer Adam, filters of Conv4."""

AUTOGRAD = "maml-autograd"
ALGORITHMS = ("maml", AUTOGRAD, "fomaml", "metasgd", "metalstm++", "ta-maml", "ta-maml-reuse")
"""maml-autograd: our MAML with the closed form switched off, each task by autograd; ta-maml-reuse: with probe reuse."""

PEERS: dict[str, tuple[str, ...]] = {
    "learn2learn": ("maml", "fomaml"),
    "higher": ("maml",),
    "torchopt": ("maml",),
    "metalearn_vmap": ("maml", "fomaml"),
    "metalearn_sequential": ("maml", "fomaml"),
    "iteryne": ("maml", "fomaml", "metasgd"),
    "torch_func": ("maml",),
}
"""Module in benchmarks/peers -> the algorithms that it offers."""


@dataclass(frozen=True)
class Setting:
    """One meta-batch of B tasks, each of N ways, K shots and Q queries, adapted in T steps."""

    name: str
    title: str
    image_shape: tuple[int, int, int]
    """(channels, height, width), at least 16 pixels a side."""
    ways: int = 5
    shots: int = 1
    queries: int = 15
    steps: int = 5
    tasks: int = 4
    seed: int = 0
    """Of the images. With some, values lie so near a kink of the network that no float32 can tell their side."""
    algorithms: tuple[str, ...] = ("maml",)
    """What our own entries run; a peer runs those of them that it offers."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Setting":
        """The inverse of `to_json`."""
        channels, height, width = values["image_shape"]
        algorithms = tuple(values["algorithms"])
        return cls(**{**values, "image_shape": (channels, height, width), "algorithms": algorithms})


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("a", "miniImageNet 3×84×84, 5-way 1-shot, B = 4", (3, 84, 84), seed=2, algorithms=ALGORITHMS),
        Setting("b", "miniImageNet 3×84×84, 5-way 5-shot, B = 4", (3, 84, 84), shots=5, seed=3),
        Setting("c", "CIFAR-FS 3×32×32, 5-way 1-shot, B = 4", (3, 32, 32), algorithms=ALGORITHMS),
        Setting("d", "Omniglot 1×28×28, 20-way 1-shot, B = 16", (1, 28, 28), ways=20, tasks=16, seed=1),
    )
}
"""The measured ones; everywhere Q = 15, T = 5, Conv4-32."""
