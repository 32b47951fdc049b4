"""Checks the meta-gradient of a user's network, and finds advice for a network that cannot be differentiated.

The meta-gradient consists of second derivatives, which some operations get wrong or do not have. So before a run trains
on a network that is not ours, `check_gradient` compares a directional derivative of the meta-gradient of one small task
with finite differences in float64:

    ⟨g, d⟩ = (L(θ + h d) − L(θ − h d)) / 2h

where L(θ) is the query loss after adaptation from θ and d a random direction. It costs a few passes over eight images.
"""

import copy
import math
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaheed.engine.estimate import evaluate_adapted, evaluate_initial, initial_gradient, task_gradient
from metaheed.engine.executions.basic import Execution, map_looped
from metaheed.errors import ConfigError, MetaheedError, option
from metaheed.learners.learner import Learner, NetworkLearner
from metaheed.types import Episode, Params

_IMAGES = 4  # in the support set, and in the query set
_STEPS = 2  # the most adaptation steps
_TOLERANCE = 1e-4  # relative
# h, relative to the size of the parameters, the best one first. The loss after adaptation jumps at the kinks of the
# ReLUs, and in a network of a million ReLUs only the smallest distances contain no kink.
_DISTANCES = (1e-5, 1e-6, 1e-7, 1e-8, 1e-4, 1e-3)

Executed = Callable[[Learner, Callable[[Learner, Params, Episode], Any]], Execution[Any]]
"""(learner, function of one task) -> the same function over a batch."""


def _looped(learner: Learner, function: Callable[[Learner, Params, Episode], Any]) -> Execution[Any]:
    return map_looped(partial(function, learner))


def check_gradient(learner: Learner, meta: Params, episode: Episode, executed: Executed = _looped) -> str | None:
    """Compare a task's meta-gradient with finite differences in float64.

    If the learner drops second derivatives, its meta-gradient has nothing to be compared with. Then the gradient of the
    loss before adaptation is checked instead.

    Args:
        learner: a learner on any network.
        meta: θ.
        episode: a task, of which a few images are used.
        executed: the execution that computes the gradients and is checked with them; one task after another by default.

    Returns:
        None if the gradient is right; otherwise the reason why nothing can be said.

    Raises:
        ConfigError: the gradient is wrong, or the network gives the same task different losses from call to call.
    """
    learner, meta = _small(learner), {name: p.detach().double() for name, p in meta.items()}
    batch = Episode(*(part.unsqueeze(0) for part in _few(episode)))
    exact = not isinstance(learner, NetworkLearner) or learner.has_exact_gradient
    gradient, outcome = (task_gradient, evaluate_adapted) if exact else (initial_gradient, evaluate_initial)
    judged = executed(learner, outcome)

    def loss(at: Params) -> float:
        return float(judged(at, batch)[0])

    try:
        before = loss(meta)
        slope = {name: g[0] for name, g in executed(learner, gradient)(meta, batch)[0].items()}
    except MetaheedError:
        raise
    except Exception as error:  # the run's own dtype was tried before; only this check needs float64
        return f"the network does not compute in float64 ({_first_line(error)}), so its derivatives were not checked"
    direction = _direction(meta)
    verdict = _compare(loss, meta, slope, direction)
    after = loss(meta)
    if abs(after - before) > 1e-9 * abs(before):
        raise ConfigError(
            f"the network gave the same task the losses {before!r} and {after!r}: adaptation must be the same "
            "function every time, so remove from the network what is random or changes with each call"
        )
    if verdict is None:
        return None
    claimed, found = verdict
    coarse = _rounded_to(learner, meta, batch)
    if coarse is not None:
        return f"the network computes in {coarse} even if it is given float64, so its derivatives were not checked"
    if not math.isfinite(found):
        return "finite differences of the network's loss do not converge, so its derivatives were not checked"
    alone = ({name: d if name == own else torch.zeros_like(d) for name, d in direction.items()} for own in direction)
    wrong = [name for name, d in zip(direction, alone, strict=True) if _compare(loss, meta, slope, d) is not None]
    raise ConfigError(
        f"the {'meta-gradient' if exact else 'gradient'} of the network is wrong: along a random direction it is "
        f"{claimed:.6g}, but finite differences give {found:.6g}. It is off for {_listed(wrong or list(direction))}: "
        f"{_cause(learner, meta, batch, exact, slope)}. If that is meant (a straight-through estimator, a part that is "
        f"detached on purpose), skip this check with {option('check_gradient', False)}"
    )


def _cause(learner: Learner, meta: Params, batch: Episode, exact: bool, slope: Params) -> str:
    """Where the gradient goes wrong, and what to do about it."""
    if not any(bool(g.any()) for g in slope.values()):
        return "it is zero everywhere, so take torch.no_grad() or detach() out of the network's forward"
    if exact:
        slope = {name: g[0] for name, g in _looped(learner, initial_gradient)(meta, batch)[0].items()}
        judged = _looped(learner, evaluate_initial)
        if _compare(lambda at: float(judged(at, batch)[0]), meta, slope, _direction(meta)) is None:
            return (
                "the first derivative is right, so the second derivative of an operation that they go through is "
                f"wrong: train with {option('first_order', True)}, or write that operation in plain tensor operations"
            )
    return (
        "the derivative of an operation that they go through is wrong: write that operation in plain tensor operations"
    )


def _compare(
    loss: Callable[[Params], float], meta: Params, slope: Params, direction: Params
) -> tuple[float, float] | None:
    """None if gradient and finite differences agree; otherwise what the gradient claims and what finite differences
    give.

    The latter is NaN if the finite differences do not converge.
    """
    products = torch.stack([(slope[name] * d).sum() for name, d in direction.items()])
    spread = torch.stack([(slope[name] * d).square().sum() for name, d in direction.items()]).sum().sqrt()
    claimed = float(products.sum())
    if not math.isfinite(claimed):
        return None  # training reports a gradient that is not finite, with its task
    found: list[float] = []
    for h in _DISTANCES:
        ahead, behind = (
            loss({name: p + side * h * direction[name] for name, p in meta.items()}) for side in (1.0, -1.0)
        )
        difference = (ahead - behind) / (2 * h)
        scale = max(abs(difference), abs(claimed), 0.01 * float(spread), 1e-7)
        if abs(difference - claimed) <= _TOLERANCE * scale or not math.isfinite(difference):
            return None
        # Not relative to the claim: compared with a gradient that explodes, all differences would look alike.
        own_scale = max(abs(difference), 0.01 * min(float(spread), 1.0), 1e-7)
        settled = any(abs(other - difference) <= 0.1 * _TOLERANCE * own_scale for other in found)
        rounding = torch.finfo(torch.float64).eps * max(abs(ahead), 1.0) / h
        if settled and abs(difference - claimed) > 100 * rounding:
            return claimed, difference
        found.append(difference)
    return claimed, math.nan


def _small(learner: Learner) -> Learner:
    """The same learner with few adaptation steps."""
    small = copy.copy(learner)
    if isinstance(small, NetworkLearner):
        small.adaptation_steps = min(small.adaptation_steps, _STEPS)
    return small


class _Roundings(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class has no annotations
    """Notes the floating-point types of results that operations compute from float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args):
            made = result if isinstance(result, tuple | list) else [result]
            self.found |= {one.dtype for one in made if isinstance(one, Tensor) and one.dtype.is_floating_point}
        return result


def _rounded_to(learner: Learner, meta: Params, batch: Episode) -> str | None:
    """The coarsest type that the forward pass rounds float64 to; None if it does not round."""
    with torch.no_grad(), _Roundings() as roundings:
        learner.predict(learner.initial(meta), batch.support_x[0])
    coarser = [dtype for dtype in roundings.found if dtype != torch.float64]
    return str(max(coarser, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.") if coarser else None


def _few(episode: Episode) -> Episode:
    """A task of a few of the images, from as many classes as possible; its queries are of its support classes."""

    def chosen(which: Tensor) -> Tensor:
        return which[torch.linspace(0, len(which) - 1, min(len(which), _IMAGES)).round().long().to(which.device)]

    support = chosen(torch.arange(len(episode.support_y), device=episode.support_y.device))
    known = torch.isin(episode.query_y, episode.support_y[support]).nonzero().flatten()
    query = chosen(known if len(known) else torch.arange(len(episode.query_y), device=episode.query_y.device))
    return Episode(
        episode.support_x[support], episode.support_y[support], episode.query_x[query], episode.query_y[query]
    )


def _direction(meta: Params) -> Params:
    """A random direction; its part for a parameter is as large as the parameter."""
    generator = torch.Generator().manual_seed(0)

    def drawn(p: Tensor) -> Tensor:
        size = float(p.square().mean().sqrt()) or 0.1
        return size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)

    return {name: drawn(p) for name, p in meta.items()}


def _listed(names: list[str]) -> str:
    """The names, at most five of them."""
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _with_backward_hooks(learner: Learner) -> list[str]:
    """The names of the network's modules that have backward hooks."""
    if not isinstance(learner, NetworkLearner):
        return []
    modules = learner.backbone.module.named_modules()
    return [name or "whole" for name, part in modules if part._backward_hooks or part._backward_pre_hooks]


def _went_through(error: BaseException, file: str) -> bool:
    """Whether the error came through a file of this name."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == file for frame in frames)


def explain_failure(
    error: Exception, learner: Learner, meta: Params, batch: Episode, executed: Executed, execution: str, judging: bool
) -> ConfigError:
    """The error for a network that failed under an execution, with advice. Settings are tried before they are
    recommended.

    Args:
        error: what was raised.
        learner, meta, batch: the run's learner, θ, and a batch of one task.
        executed: the execution that failed.
        execution: its name.
        judging: True if tasks were evaluated, False if their gradients were computed.
    """
    function = evaluate_adapted if judging else task_gradient

    def works(executed: Executed, learner: Learner) -> bool:
        try:
            executed(learner, function)(meta, batch)
        except Exception:  # any failure means that it does not work
            return False
        return True

    def settings() -> Iterator[tuple[str, Executed, Learner]]:
        if execution != "looped":
            yield option("execution", "looped"), _looped, learner
        if not judging and getattr(learner, "first_order", True) is False:
            first_order = copy.copy(learner)
            first_order.first_order = True  # type: ignore[attr-defined]  # checked by getattr above
            yield option("first_order", True), executed, first_order
            if execution != "looped":
                yield f"{option('execution', 'looped')} {option('first_order', True)}", _looped, first_order

    helping = next((setting for setting, how, who in settings() if works(how, who)), None)
    advice = [f"it works with {helping}"] if helping else []
    said = str(error)
    hooked = _with_backward_hooks(learner)
    if hooked and "setup_context" in said:
        advice.append(f"remove the backward hooks of its {_listed(hooked)}, which torch.func cannot differentiate")
    elif "scaled_dot_product" in said:
        advice.append(
            "attention has second derivatives with torch.nn.attention.sdpa_kernel(SDPBackend.MATH) in its forward"
        )
    elif "checkpoint" in said or "saved tensor" in said or _went_through(error, "checkpoint.py"):
        advice.append(
            f"remove torch.utils.checkpoint from it, and save memory with {option('recompute', True)} instead"
        )
    elif "setup_context" in said:
        advice.append("give its autograd.Function a setup_context method, as PyTorch's torch.func asks for")
    elif "doesn't have storage" in said or "numpy()" in said:
        advice.append("compute with tensors in its forward, not with NumPy")
    elif "inference" in said.lower():
        advice.append("take torch.inference_mode() out of its forward")
    elif "inplace" in said or "in-place" in said:
        advice.append("make its forward write into no tensor in place")
    elif "derivative for" in said or "double backwards" in said or "once_differentiable" in said:
        advice.append("write the operation in plain tensor operations, which have second derivatives")
    if not advice:
        advice.append("this is an error of the network's own forward, and no setting avoids it")
    doing = "judged" if judging else "meta-learned"
    return ConfigError(
        f"the network cannot be {doing} under the execution {execution} "
        f"({type(error).__name__}: {_first_line(error)}). What helps: {'; '.join(advice)}"
    )
