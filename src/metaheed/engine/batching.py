"""Which learners work on the tasks of a batch side by side, every argument with a leading axis of tasks."""

import functools

from torch import Tensor

from metaheed.learners.learner import Learner, NetworkLearner
from metaheed.types import Params


def has_closed_form(learner: Learner) -> bool:
    """Whether its own arithmetic is elementwise in the parameters, and its network known in closed form."""
    if not isinstance(learner, NetworkLearner) or not _is_elementwise(type(learner)):  # type: ignore[arg-type]
        return False
    return learner.network is not None and learner.network.closed_form_on_cpu is not None


@functools.cache
def _is_elementwise(kind: type) -> bool:
    """Whether a class of learners says so of its arithmetic, or inherits all arithmetic from one that does.

    A subclass that only adds to a learner (a constructor, a method of another name) computes as that one does. One that
    replaces a part of it may do anything, and has to say `elementwise = True` itself.
    """
    for place, ancestor in enumerate(kind.__mro__):
        if "elementwise" in vars(ancestor):
            replaced = {name for later in kind.__mro__[:place] for name in vars(later) if hasattr(ancestor, name)}
            return bool(vars(ancestor)["elementwise"]) and not {n for n in replaced if not n.startswith("__")}
    return False


def takes_batches(learner: Learner, meta: Params, x: Tensor) -> bool:
    """Whether the learner's functions also work on many tasks at once: every argument with a leading axis of tasks.

    So they do where it has a closed form, and that applies to these tensors.

    Args:
        learner: a subclass of ours that replaces a part of it counts as unknown, unless it says `elementwise = True`.
        meta: θ, without that axis.
        x: images (B, n, C, H, W).
    """
    if x.dim() != 5 or not has_closed_form(learner):
        return False
    assert isinstance(learner, NetworkLearner)
    assert learner.network is not None
    fast = learner.network.closed_form(start := learner.initial(meta), x)
    return fast is not None and fast.applies and fast.fits(start, x)
