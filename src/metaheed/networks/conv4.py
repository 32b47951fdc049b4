"""Conv4, the field's base network; and the networks that a name on the command line stands for."""

import contextlib
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from metaheed.errors import ConfigError, brief, option, shown, unknown
from metaheed.files import trust
from metaheed.networks.conversion import copied, refuse
from metaheed.networks.examination import check_logits

ImageShape = tuple[int, int, int]
"""(channels, height, width)."""


class Conv4(nn.Module):
    """Four blocks of [3×3 convolution, batch norm, halving, ReLU] and a linear head.

    Vinyals et al. 2016; Finn et al. 2017. Batch norm uses the statistics of the batch that it is given, in training and
    in test. So predictions are transductive: a query's logits depend on the other queries beside it.

    Args:
        ways: N, the outputs of the head.
        image_shape: (channels, height, width), at least 16 pixels a side.
        hidden: filters in each block (32, or 64).
        downsample: "pool" halves by 2×2 max-pooling (rounding down). "stride" halves by stride-2 convolutions (rounding
            up) and takes the mean over the last plane: Finn et al.'s form for Omniglot.

    Raises:
        ConfigError: the images are too small for four halvings, or a size is not positive.
    """

    def __init__(
        self, ways: int, image_shape: ImageShape, hidden: int = 32, downsample: Literal["pool", "stride"] = "pool"
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(ways, channels, hidden) < 1:
            raise ConfigError(f"Conv4 with {ways} ways, {channels} channels, {hidden} filters: each must be at least 1")
        if min(height, width) < 16:
            raise ConfigError(f"Conv4 halves images four times and needs 16 pixels a side, but got {height}×{width}")
        if downsample not in ("pool", "stride"):
            raise unknown("downsample", downsample, ("pool", "stride"))
        stride = 2 if downsample == "stride" else 1
        self.body = nn.Sequential()
        for index in range(4):
            block = nn.Sequential()
            block.add_module("conv", nn.Conv2d(hidden if index else channels, hidden, 3, stride=stride, padding=1))
            block.add_module("norm", nn.BatchNorm2d(hidden, track_running_stats=False))
            if downsample == "pool":
                block.add_module("pool", nn.MaxPool2d(2))
            # ReLU commutes with the pooling; after it, there is only a quarter of the values.
            block.add_module("relu", nn.ReLU())
            self.body.append(block)
        if downsample == "stride":
            self.body.append(nn.AdaptiveAvgPool2d(1))
            features = hidden
        else:
            features = hidden * (height // 16) * (width // 16)
        self.head = nn.Linear(features, ways)
        self._made_with = self._fingerprint()

    @property
    def was_given_weights(self) -> bool:
        """Whether the weights are not those of the last initialisation, for instance because weights were loaded."""
        return self._fingerprint() != self._made_with

    def _fingerprint(self) -> str:
        """A digest of all weights."""
        digest = hashlib.sha256()
        for name, p in self.named_parameters():
            digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
            if not p.is_meta:
                digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # A move to another dtype or device (`double`, `cuda`, …) does not count as new weights.
        were_given = self.was_given_weights
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not were_given:
            self._made_with = self._fingerprint()
        return self

    def redraw(self, generator: torch.Generator) -> None:
        """Draw new weights: Glorot uniform for convolutions and head, biases 0, norms the identity."""
        with torch.no_grad():
            for part in self.modules():
                if isinstance(part, nn.Conv2d | nn.Linear):
                    nn.init.xavier_uniform_(part.weight, generator=generator)
                    if part.bias is not None:
                        part.bias.zero_()
                elif isinstance(part, nn.BatchNorm2d):
                    part.weight.fill_(1.0)
                    part.bias.zero_()
        self._made_with = self._fingerprint()

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, C, H, W) to logits (n, N)."""
        logits: Tensor = self.head(self.body(x).flatten(1))
        return logits


BACKBONES: dict[str, Callable[[int, ImageShape], nn.Module]] = {
    "conv4-32": Conv4,
    "conv4-64": partial(Conv4, hidden=64),
    "conv4-64-strided": partial(Conv4, hidden=64, downsample="stride"),
}


def find_backbone(name: str, folder: Path | None = None) -> Callable[[int, ImageShape], nn.Module]:
    """The builder that a name stands for: a key of BACKBONES, or "module:Class".

    Args:
        name: as above.
        folder: is searched for the module before the rest of the import path.

    Raises:
        ConfigError: there is no such name, module or class; or a file gave the name, and the user has not allowed it
            (see `metaheed.files.trust`).
    """
    if name in BACKBONES:
        return BACKBONES[name]
    module_name, separator, attribute = name.partition(":")
    if not separator:
        raise unknown("backbone", name, [*BACKBONES, "module:Class"])
    from_file = isinstance(name, trust.NamedByFile)
    if from_file:
        trust.require(name, folder)  # before anything is imported or the import path changed
    try:
        with _looking_in(folder, from_file), trust.import_from_source() if from_file else contextlib.nullcontext():
            module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"backbone {shown(str(name))}: importing {shown(module_name)} failed with {type(error).__name__}: "
            f"{brief(str(error), 400)}. Name its folder with {option('backbone_path')}"
        ) from error
    builder = getattr(module, attribute, None)
    if not callable(builder):
        raise ConfigError(
            f"backbone {shown(str(name))}: {shown(module_name)} has no class or function {shown(attribute)}"
        )
    return builder  # type: ignore[no-any-return]  # a user's module is known at run time only


@contextlib.contextmanager
def _looking_in(folder: Path | None, from_file: bool) -> Iterator[None]:
    """Search a folder first for modules in this context.

    Afterwards the folder stays on the import path: in front in general, but at the end if a file named the network. For
    then a matplotlib.py in that folder must not be imported in place of the library.
    """
    if folder is None:
        yield
        return
    known = str(folder) in sys.path
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if known or from_file:
            with contextlib.suppress(ValueError):  # the module changed the path itself
                sys.path.remove(str(folder))
        if from_file and not known:
            sys.path.append(str(folder))


def build_backbone(name: str, ways: int, image_shape: ImageShape, seed: int, folder: Path | None = None) -> nn.Module:
    """Build the network that `find_backbone` finds; `seed` decides the random draws that building it makes.

    Raises:
        ConfigError: the builder fails, or what it returns does not map images to (n, ways) logits.
    """
    builder = find_backbone(name, folder)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = builder(ways, image_shape)
            if not isinstance(module, nn.Module):
                raise TypeError(f"it returned {type(module).__name__}, not a torch.nn.Module")
            refuse(module)
            with torch.no_grad():
                # On a copy, because a forward pass may leave something behind that hides what the network does.
                logits = copied(module).train()(torch.zeros(2 * ways, *image_shape))
        check_logits(logits, 2 * ways, ways)
    except ConfigError as error:
        raise ConfigError(f"backbone {name!r}: {error}") from error
    except Exception as error:  # as above: a user's class may raise anything
        raise ConfigError(
            f"backbone {name!r}: building it for {ways} ways and images {image_shape} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    return module
