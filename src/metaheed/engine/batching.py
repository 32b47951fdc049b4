"""Which learners can adapt many tasks side by side, where every argument has a leading axis of tasks."""

import functools

from torch import Tensor

from metaheed.learners.learner import Learner, NetworkLearner
from metaheed.types import Params


def has_closed_form(learner: Learner) -> bool:
    """Whether the learner's own arithmetic is elementwise in the parameters, and its network has a closed form."""
    if not isinstance(learner, NetworkLearner) or not _is_elementwise(type(learner)):  # type: ignore[arg-type]
        return False
    return learner.network is not None and learner.network.closed_form_on_cpu is not None


@functools.cache
def _is_elementwise(kind: type) -> bool:
    """Whether a class of learners declares `elementwise = True`, or inherits all its arithmetic from one that does.

    A subclass that only adds to a learner (a constructor, new methods) computes the same as the learner. A subclass
    that replaces one of the learner's methods may compute anything, and has to declare `elementwise = True` itself.
    """
    for place, ancestor in enumerate(kind.__mro__):
        if "elementwise" in vars(ancestor):
            replaced = {name for later in kind.__mro__[:place] for name in vars(later) if hasattr(ancestor, name)}
            return bool(vars(ancestor)["elementwise"]) and not {n for n in replaced if not n.startswith("__")}
    return False


def takes_batches(learner: Learner, meta: Params, x: Tensor) -> bool:
    """Whether the learner's functions also take many tasks at once, every argument with a leading axis of tasks.

    This is so if the learner has a closed form that applies to these tensors.

    Args:
        learner: any learner. A subclass of ours that replaces a method must declare `elementwise = True`.
        meta: θ, without the axis of tasks.
        x: images (B, n, C, H, W).
    """
    if x.dim() != 5 or not has_closed_form(learner):
        return False
    assert isinstance(learner, NetworkLearner)
    assert learner.network is not None
    fast = learner.network.closed_form(start := learner.initial(meta), x)
    return fast is not None and fast.applies and fast.fits(start, x)
