"""The loss of a task: mean cross-entropy."""

from collections.abc import Callable

import torch
from torch import Tensor

from metaheed.errors import ConfigError
from metaheed.types import Params

Predict = Callable[[Params, Tensor], Tensor]
"""(φ, images) -> logits (n, N)."""


def mean_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy in nats over the images, from logits (…, n, N) and labels (…, n): (…).

    Raises:
        ConfigError: the labels are not int64 of that shape or, which is checked on a CPU only, not in [0, N).
    """
    if not isinstance(y, Tensor):
        raise ConfigError(
            f"the labels are a {type(y).__name__}, but they must be an int64 tensor: torch.as_tensor(...)"
        )
    if y.shape != logits.shape[:-1] or y.dtype != torch.int64:
        raise ConfigError(
            f"the labels are of shape {tuple(y.shape)} and type {y.dtype}, but they must be int64 "
            f"of shape {tuple(logits.shape[:-1])}: one whole number for each image"
        )
    try:
        chosen = torch.log_softmax(logits, -1).gather(-1, y.unsqueeze(-1))
    except (RuntimeError, IndexError) as error:
        if "out of bounds" not in str(error):
            raise
        hidden = torch._C._functorch.is_functorch_wrapped_tensor(y)  # by vmap
        wrong = "" if hidden else f" such as {int(y[(y < 0) | (y >= logits.shape[-1])][0])}"
        raise ConfigError(
            f"there are labels outside 0..{logits.shape[-1] - 1}{wrong}, but the network has {logits.shape[-1]} "
            "logits: number the classes of a task from 0, or build the network for more ways"
        ) from error
    return -chosen.squeeze(-1).mean(-1)


def predicted_loss(predict: Predict, at: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy in nats (0-d) at base parameters φ, and the logits (n, N) that it was computed from.

    Args:
        predict: (φ, x) -> logits.
        at: φ.
        x: images (n, C, H, W).
        y: their labels (n,).
    """
    logits = predict(at, x)
    return mean_cross_entropy(logits, y), logits
