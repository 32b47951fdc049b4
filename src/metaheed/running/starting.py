"""Starting a run from the weights of a file or of another run (--init-from) instead of randomly drawn ones.

Only tensors are read, so no code in a stranger's file or folder can run.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from metaheed.errors import ConfigError, option
from metaheed.files.opening import read_bounded
from metaheed.learners import Learner, NetworkLearner
from metaheed.running.folder import RunFolder
from metaheed.types import Params


def read_weights(path: str | Path) -> Params:
    """The tensors of a .safetensors file, or θ of a run's best checkpoint.

    Raises:
        ConfigError: the path is neither.
        RunError: the run has no checkpoint that can be read.
    """
    path = Path(path)
    if path.is_dir():
        return RunFolder(path).read_weights("best")[0]
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise ConfigError(
            f"{option('init_from')} is {path}, which looks like a pickle, and a pickle can run code: convert it once "
            "with safetensors.torch.save_file(torch.load(PATH, weights_only=True), 'weights.safetensors')"
        )
    if not path.exists():
        raise ConfigError(
            f"{option('init_from')} is {path}, but there is no such file: name a .safetensors file or a run folder"
        )
    try:
        return dict(load_tensors(read_bounded(path)))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{option('init_from')} is {path}, but it is no safetensors file ({error})") from error


def start_from(found: Params, learner: Learner, drawn: Params, what: str, notice: Callable[[str], None]) -> Params:
    """θ with the weights found in a file.

    If they are a θ of the same learner, all of it is taken; otherwise the weights of the network. A head that the file
    lacks, or that has another number of classes there, keeps its drawn values.

    Args:
        found: parameters by name. They may be those of a larger model, in which the network's names have a prefix.
        learner: the run's learner.
        drawn: the θ that the run would start from otherwise.
        what: what the weights were read from, for messages.
        notice: called with a line that says what was taken.

    Raises:
        ConfigError: the weights do not fit this network, hold it twice, or are not finite.
    """
    if all(name in found and found[name].shape == p.shape for name, p in drawn.items()):
        taken = {name: found[name] for name in drawn}
        missing: list[str] = []
    else:
        if not isinstance(learner, NetworkLearner):
            raise ConfigError(f"{option('init_from')}: {what} does not hold this learner's parameters")
        prefix = next(iter(drawn)).startswith("initial.") * "initial."
        wanted = {name.removeprefix(prefix): p for name, p in drawn.items() if name.startswith(prefix)}
        found = _best_prefix(found, wanted, what)
        fitting = {name: found[name] for name, p in wanted.items() if name in found and found[name].shape == p.shape}
        missing = [name for name in wanted if name not in fitting]
        head = learner.backbone.names_of(learner.backbone.find_head(getattr(learner, "head", None)))
        wrong = [name for name in missing if name not in head]
        if wrong or not fitting:
            name = (wrong or missing)[0]
            there = tuple(found[name].shape) if name in found else "absent"
            raise ConfigError(
                f"{option('init_from')}: {what} does not fit the network: {name!r} is {there} there and "
                f"{tuple(wanted[name].shape)} in the network. Choose the {option('backbone')} that the weights were "
                "trained with"
            )
        taken = {f"{prefix}{name}": p for name, p in fitting.items()}
    for name, p in taken.items():
        if not p.is_floating_point():
            raise ConfigError(
                f"{option('init_from')}: {name!r} in {what} is of type {p.dtype}, but weights are floating-point"
            )
        if not bool(torch.isfinite(p).all()):
            raise ConfigError(f"{option('init_from')}: {name!r} in {what} holds values that are not finite numbers")
    left = f"; the head ({', '.join(missing)}) is drawn anew" if missing else ""
    notice(f"starting from {what}: {len(taken)} of {len(drawn)} parameters{left}")
    return {name: taken[name].to(p) if name in taken else p for name, p in drawn.items()}


def _best_prefix(found: Params, wanted: Params, what: str) -> Params:
    """The tensors below the prefix ("initial.", "module.", "encoder.", …) under which most of the wanted ones are."""
    prefixes = ["", *sorted({name[: at + 1] for name in found for at, c in enumerate(name) if c == "."})]

    def below(prefix: str) -> Params:
        return {name.removeprefix(prefix): p for name, p in found.items() if name.startswith(prefix)}

    def fitting(prefix: str) -> int:
        return sum(name in (tree := below(prefix)) and tree[name].shape == p.shape for name, p in wanted.items())

    best = max(map(fitting, prefixes))
    equal = [prefix for prefix in prefixes if fitting(prefix) == best]
    # A θ of metaheed may hold further tensors (learned rates) under prefixes with the same names: the start is meant.
    chosen = next((prefix for prefix in equal if prefix in ("", "initial.")), equal[0])
    trees = [below(prefix) for prefix in (chosen, *equal)]
    differ = [p for p, tree in zip(equal, trees[1:], strict=True) if any(not _alike(tree, trees[0], n) for n in wanted)]
    if best and chosen not in ("", "initial.") and differ:
        raise ConfigError(
            f"{option('init_from')}: {what} has the network's weights twice, under {chosen!r} and under {differ[0]!r}: "
            "save the ones that are meant to a file of their own"
        )
    return trees[0]


def _alike(one: Params, other: Params, name: str) -> bool:
    if name not in one or name not in other:
        return name not in one and name not in other
    return torch.equal(one[name], other[name])
