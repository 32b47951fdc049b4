"""The attention module (Aimen, Sidheekh, Krishnan: Task Attended Meta-Learning for Few-Shot Learning, section 4).

A small network with parameters δ sees four numbers of each task of a meta-batch and returns the tasks' weights. How δ
is learned is in attended.py.

The module fits into any training loop, by weights for stacked losses or by `weighted_sum` over per-task gradients (see
docs/attention.md): it needs only torch, and the types of metaheed/types.py.

Legend: B tasks; per-task gradients have a leading B in every leaf.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from metaheed.types import Params, TaskInfo

FEATURES = ("grad_norm", "query_loss", "query_accuracy", "loss_ratio")
"""The inputs of attention in order: ‖∇_φ L*(φᵀ)‖, L*ᵀ, A*ᵀ, L*ᵀ/L*⁰."""


def attention_features(info: TaskInfo) -> Tensor:
    """The inputs (B, 4) in the order of FEATURES, detached.

    If an initial loss is zero, the smallest positive normal number takes its place, so that the ratio is defined. The
    ratio is limited to 1/ε of the dtype.
    """
    limits = torch.finfo(info.query_loss.dtype)
    ratio = (info.query_loss / info.initial_loss.clamp(min=limits.tiny)).clamp(max=1 / limits.eps)
    return torch.stack([info.grad_norm, info.query_loss, info.query_accuracy, ratio], dim=-1).detach()


class TaskAttention(nn.Module):
    """Weights of the tasks of a meta-batch: (B,), positive, sum 1.

    "paper": a 1×1 convolution from 4 channels to 1 over the tasks, without activation; then fully connected layers
    B→32→32→B with ReLU between them; softmax. It is tied to the number of tasks and to their order. The paper's "2
    fully connected layers with 32 neurons" can mean one or two hidden layers; here there are two.

    "equivariant" (ours): one network 12→32→32→1, shared by all tasks, scores each from its own inputs and their mean
    and maximum over the batch; softmax. It takes any number of tasks, and permuted tasks get permuted weights.

    Args:
        tasks: B. "paper" needs it; "equivariant" takes any number of tasks if it is None. If given, every call is
            checked against it.
        architecture: "paper" or "equivariant".
        standardize: subtract each input's mean over the batch and divide by its standard deviation (the result is 0
            where all tasks are alike). The raw inputs differ in scale by orders of magnitude.
        hidden: neurons in a hidden layer.
        generator: draws the initial δ; PyTorch's global generator if None.
        omit: the input of FEATURES to leave out (a control); all four are used if None.

    Raises:
        ValueError: the architecture or the input is unknown, "paper" has no number of tasks, or a size is below 1.
    """

    def __init__(
        self,
        tasks: int | None = None,
        architecture: str = "paper",
        standardize: bool = False,
        hidden: int = 32,
        generator: torch.Generator | None = None,
        omit: str | None = None,
    ) -> None:
        super().__init__()
        if omit is not None and omit not in FEATURES:
            raise ValueError(f"omit is {omit!r}, but attention's inputs are {', '.join(FEATURES)}")
        if architecture not in ("paper", "equivariant"):
            raise ValueError(f"architecture is {architecture!r}, but it must be 'paper' or 'equivariant'")
        if architecture == "paper" and tasks is None:
            raise ValueError("the paper's architecture is tied to the number of tasks: give tasks=B")
        if min(hidden, 1 if tasks is None else tasks) < 1:
            raise ValueError(f"tasks={tasks} and hidden={hidden} must be at least 1")
        self.tasks = tasks
        self.architecture = architecture
        self.standardize = standardize
        self.inputs = [k for k, name in enumerate(FEATURES) if name != omit]
        if architecture == "paper":
            assert tasks is not None
            self.mix: nn.Module = nn.Conv1d(len(self.inputs), 1, 1)
            inputs, outputs = tasks, tasks
        else:
            self.mix = nn.Identity()
            inputs, outputs = 3 * len(self.inputs), 1
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )
        if generator is not None:
            self._redraw(generator)

    def _redraw(self, generator: torch.Generator) -> None:
        # As PyTorch initialises these layers: weights and biases from U(−1/√inputs, 1/√inputs).
        with torch.no_grad():
            for part in self.modules():
                if isinstance(part, nn.Linear | nn.Conv1d):
                    bound = part.weight[0].numel() ** -0.5
                    part.weight.uniform_(-bound, bound, generator=generator)
                    assert part.bias is not None
                    part.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, info: TaskInfo, check: bool = True) -> Tensor:
        """Weights (B,) in the dtype of `info`; differentiable with respect to δ only.

        Args:
            info: tensors (B,). A field that only an omitted input needs may be anything, also NaN or None.
            check: check that every input is finite, because a single one that is not would make all weights NaN, and θ
                with them. On a GPU the host has to wait for this check.

        Raises:
            ValueError: the fields are not floating-point tensors (B,), or B is not the number of tasks that the module
                was built for; an input of a task is not finite; or `check` is set inside torch.func.vmap, where values
                cannot be read.
        """
        info = self._checked(info)
        tasks = info.query_loss.shape[0]
        if self.tasks is not None and tasks != self.tasks:
            raise ValueError(f"built for {self.tasks} tasks but given {tasks}: rebuild it, or use 'equivariant'")
        if check:
            self._check_finite(info)
        dtype = next(self.parameters()).dtype
        x = attention_features(info).to(dtype)
        if len(self.inputs) < len(FEATURES):
            x = torch.stack([x[:, k] for k in self.inputs], dim=1)
        if self.standardize:
            centred = x - x.mean(0)
            spread = centred.square().mean(0).sqrt()
            # Equal values differ by rounding errors only, which must not be scaled up to ±1.
            differ = spread > 16 * torch.finfo(dtype).eps * x.abs().amax(0)
            x = torch.where(differ, centred / torch.where(differ, spread, 1.0), 0.0)
        if self.architecture == "paper":
            scores = self.layers(self.mix(x.T.unsqueeze(0)).flatten())
        else:
            pooled = torch.cat([x.mean(0), x.amax(0)]).expand(tasks, -1)
            scores = self.layers(torch.cat([x, pooled], dim=1)).squeeze(1)
        return torch.softmax(scores, 0).to(info.query_loss.dtype)

    def _needed(self) -> list[str]:
        inputs = [FEATURES[k] for k in self.inputs]
        made_of = {"loss_ratio": ("query_loss", "initial_loss")}
        return sorted({field for name in inputs for field in made_of.get(name, (name,))})

    def _checked(self, info: TaskInfo) -> TaskInfo:
        loss = info.query_loss  # it gives the weights their dtype, even where it is not an input
        if not isinstance(loss, Tensor) or loss.dim() != 1 or not len(loss) or not loss.is_floating_point():
            found = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"info.query_loss is {found}, but it must be a floating-point tensor of shape (B,), B ≥ 1")
        needed = self._needed()
        for name in needed:
            value = getattr(info, name)
            if not isinstance(value, Tensor) or value.shape != loss.shape:
                found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(f"info.{name} is {found}, but it must be a tensor of shape (B,), here {len(loss)}")
        absent = {name: torch.ones_like(loss) for name in TaskInfo._fields if name not in (*needed, "query_loss")}
        return info._replace(**absent)

    def _check_finite(self, info: TaskInfo) -> None:
        needed = self._needed()
        values = torch.stack([getattr(info, field).detach() for field in needed])
        if torch._C._functorch.is_batchedtensor(values):
            raise ValueError("inside torch.func.vmap no value can be read: call with check=False there")
        wrong = (~torch.isfinite(values)).nonzero().tolist()
        if not wrong:
            return
        field, task = needed[wrong[0][0]], wrong[0][1]
        advice = "leave the task out of the batch, or stop training that diverges"
        if field == "query_accuracy":
            advice = "where there is no accuracy (regression, say), build TaskAttention(..., omit='query_accuracy')"
        elif field == "initial_loss":
            advice = "compute the loss before adaptation, or build TaskAttention(..., omit='loss_ratio')"
        raise ValueError(
            f"the {field} of task {task + 1} of {values.shape[1]} is {float(values[wrong[0][0], task])}, which would "
            f"make the weights of all tasks NaN: {advice}"
        )


def stack_gradients(task_grads: Sequence[Mapping[str, Tensor | None] | Sequence[Tensor | None]]) -> Params:
    """Gradients of B tasks that a loop has gathered one by one -> one tree of leaves (B, ...), detached.

    Args:
        task_grads: the gradient of each task, either by name or as `torch.autograd.grad` returns it: a sequence in the
            order of the parameters, whose leaves are then named "0", "1", …. None stands for a parameter that the task
            does not use, and counts as zero.

    Raises:
        ValueError: there are no tasks, the tasks have different parameters, or no task uses a parameter.
    """
    named = [dict(g) if isinstance(g, Mapping) else {str(k): leaf for k, leaf in enumerate(g)} for g in task_grads]
    if not named or any(g.keys() != named[0].keys() for g in named):
        raise ValueError("give the gradients of at least one task, with the same parameters for every task")
    stacked = {}
    for name in named[0]:
        like = next((g[name] for g in named if g[name] is not None), None)
        if like is None:
            raise ValueError(f"no task has a gradient of parameter {name!r}: leave the parameter out")
        leaves = [torch.zeros_like(like) if leaf is None else leaf for leaf in (g[name] for g in named)]
        stacked[name] = torch.stack(leaves).detach()
    return stacked


def weighted_sum(weights: Tensor, task_grads: Params) -> Params:
    """Σ_i w_i g_i: weights (B,), leaves (B, ...) -> leaves (...), in the leaves' dtype."""
    return {name: torch.tensordot(weights.to(g.dtype), g, dims=1) for name, g in task_grads.items()}


def weight_gradient(task_grads: Params, probe_gradient: Params, pull: Callable[[Params], Params]) -> Tensor:
    """∂L/∂w_i = ⟨g_i, Jᵀ G⟩ for every task, (B,): how the probe loss L changes with the tasks' weights.

    θ' depends on w only through Σ w_i g_i, so no third-order graph is needed (paper, eq. 3).

    Args:
        task_grads: g_i, leaves (B, ...).
        probe_gradient: G = ∇_{θ'} L, leaves (...).
        pull: G -> Jᵀ G, the vector-Jacobian product of the outer step with respect to its gradient.
    """
    pulled = pull(probe_gradient)
    products = [g.reshape(len(g), -1) @ pulled[name].flatten() for name, g in task_grads.items()]
    return torch.stack(products).sum(0)
