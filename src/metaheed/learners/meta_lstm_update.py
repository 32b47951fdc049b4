"""MetaLSTM's update of all coordinates at once, by plain formulas and in closed form.

The formulas (`meta_lstm.py`, step 2) are elementwise except for two small matrix products. Autograd runs one operation
after another over all D coordinates and so waits for memory: at H = 20 it writes and reads about 300 numbers a
coordinate at every step. The closed form takes a few thousand coordinates at a time through the whole update, while the
cache holds them. For the reverse pass it keeps only the states and computes the gates again, which is no slower than
writing and reading them.

The reverse pass, from the cotangents of c_t, h_t, m_t, f̃_t, ĩ_t (a bar marks a cotangent; σ′ and tanh′ are the slopes
y(1−y) and 1−y² at the function's value y; i′, f′, n′, o′ are those of the gates):
   f̄ ← f̃̄_t + c̄_t c_{t−1} σ′(f̃_t);  ī ← ĩ̄_t − c̄_t g_t σ′(ĩ_t)
   c̄_{t−1} = c̄_t σ(f̃_t) + W_F^c f̄ + W_I^c ī;  f̃̄_{t−1} = W_F^f̃ f̄;  ĩ̄_{t−1} = W_I^ĩ ī
   h̄ ← h̄_t + W_Fʰᵀ f̄ + W_Iʰᵀ ī;  m̄ ← m̄_t + h̄ o tanh′(m_t)
   ā = (m̄ n i′, m̄ m_{t−1} f′, m̄ i n′, h̄ tanh(m_t) o′), before the gates i, f, n (the cell's), o
   m̄_{t−1} = m̄ f;  h̄_{t−1} = W_hhᵀ ā
   and for every matrix the sum over coordinates of (cotangent of its output) ⊗ (its input).

Legend: D coordinates, H hidden size, B tasks, n coordinates in a block. A coordinate is a column: (features, D).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metaheed.networks.derivatives import many_vectors
from metaheed.types import Params

_P = 10.0  # p of the preprocessing
_WEIGHTS = (
    *("lstm.weight_ih", "lstm.weight_hh", "lstm.bias_ih", "lstm.bias_hh"),
    *("forget_gate.weight", "forget_gate.bias", "input_gate.weight", "input_gate.bias"),
)
_BLOCK_BYTES = 1 << 20
"""Size of the gates (4H, n) of the n coordinates in a block: an L2 cache holds them and what is made of them."""


class State(NamedTuple):
    """The state of an adaptation between two steps; for many tasks, every field has a leading axis of tasks."""

    c: Tensor
    """(1, D) the parameters φ."""
    h: Tensor
    """(H, D) the lower LSTM's output."""
    m: Tensor
    """(H, D) its cell."""
    forget: Tensor
    """(1, D) f̃, before the sigmoid."""
    take: Tensor
    """(1, D) ĩ, before the sigmoid."""


def preprocess(x: Tensor) -> Tensor:
    """(…, 1, n) -> (…, 2, n): (log|x|/p, sign x) where |x| ≥ e⁻ᵖ, else (−1, eᵖ x), with p = 10."""
    size = x.abs()
    large = size >= math.exp(-_P)
    log = torch.where(large, size, 1.0).log() / _P
    return torch.cat([torch.where(large, log, -1.0), torch.where(large, x.sign(), math.exp(_P) * x)], -2)


def by_formula(meta: Params, loss: Tensor, g: Tensor, state: State) -> State:
    """The next state from L (1, 1) and g (1, D), by operations that all transforms of PyTorch support."""
    c, h, m, forget, take = state
    x = torch.cat([preprocess(loss).expand(*g.shape[:-2], 2, g.shape[-1]), preprocess(g)], -2)  # (4, D)
    h, m = _lstm_cell(meta, x, h, m)
    forget = meta["forget_gate.weight"] @ torch.cat([h, c, forget], -2) + meta["forget_gate.bias"].unsqueeze(-1)
    take = meta["input_gate.weight"] @ torch.cat([h, c, take], -2) + meta["input_gate.bias"].unsqueeze(-1)
    c = torch.sigmoid(forget) * c - torch.sigmoid(take) * g
    return State(c, h, m, forget, take)


def in_closed_form(meta: Params, loss: Tensor, g: Tensor, state: State) -> State:
    """`by_formula` for ordinary tensors of one type on a CPU; the two agree to rounding. L and g are constants.

    It can be differentiated any number of times: the first derivative is in closed form, the next ones are autograd's.
    """
    weights = [meta[name] for name in _WEIGHTS]
    if g.dim() == 3:
        return State(*_Update.apply(loss, g, *state, *weights))  # type: ignore[no-untyped-call]
    leaves = (leaf.unsqueeze(0) for leaf in (loss, g, *state, *weights))
    return State(*(leaf.squeeze(0) for leaf in _Update.apply(*leaves)))  # type: ignore[no-untyped-call]


def _lstm_cell(meta: Params, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    # torch.nn.LSTMCell as plain matrix products: its fused kernel has neither a vmap rule nor a second derivative.
    bias = (meta["lstm.bias_ih"] + meta["lstm.bias_hh"]).unsqueeze(-1)
    i, f, n, o = (meta["lstm.weight_ih"] @ x + meta["lstm.weight_hh"] @ h + bias).chunk(4, -2)
    m = torch.sigmoid(f) * m + torch.sigmoid(i) * torch.tanh(n)
    return torch.sigmoid(o) * torch.tanh(m), m


class _Workspace(NamedTuple):
    """Working memory for a block of n coordinates; every block of the same size uses it again."""

    gates: Tensor
    """(4H, n): the gates i, f, o, n; the three sigmoids come first, side by side."""
    tanh_m: Tensor
    """(H, n): tanh(m_t)."""
    inputs: Tensor
    """(H+3, n): h_{t−1}, prep(g_t), 1."""
    work: Tensor
    """(6H, n), for the reverse pass."""

    @classmethod
    def of_size(cls, h: Tensor, n: int, work: bool) -> "_Workspace":
        H = h.shape[-2]
        return cls(*(h.new_empty(rows, n) for rows in (4 * H, H, H + 3, 6 * H if work else 0)))

    def fill(self, cell: Tensor, h: Tensor, g_inputs: Tensor) -> None:
        """Compute the gates of a block from the weights (4H, H+3)."""
        H = len(h)
        self.inputs[:H] = h
        self.inputs[H:-1] = g_inputs
        self.inputs[-1] = 1.0
        torch.mm(cell, self.inputs, out=self.gates)
        self.gates[: 3 * H].sigmoid_()
        self.gates[3 * H :].tanh_()


def _blocks(h: Tensor, work: bool) -> Iterator[tuple[slice, _Workspace]]:
    """The blocks of coordinates, each with its working memory; only a shorter last block gets memory of its own."""
    D = h.shape[-1]
    size = max(16, _BLOCK_BYTES // (4 * h.shape[-2] * h.element_size()) // 16 * 16)
    space = _Workspace.of_size(h, min(size, D), work)
    for start in range(0, D, size):
        n = min(size, D - start)
        if n < space.gates.shape[1]:
            space = _Workspace.of_size(h, n, work)
        yield slice(start, start + n), space


class _Update(torch.autograd.Function):
    """`by_formula` for B tasks as one node of autograd's graph; L and g are constants."""

    @staticmethod
    def forward(ctx, loss, g, *leaves):  # type: ignore[no-untyped-def]
        (c, h, m, forget, take), weights = State(*leaves[:5]), leaves[5:]
        ih, hh, bias_ih, bias_hh, forget_weight, forget_bias, take_weight, take_bias = weights
        B, _, D = h.shape
        g_inputs = preprocess(g)  # (B, 2, D)
        # The loss is the same for all coordinates, so its share of the product belongs to the bias.
        bias = (ih[..., :2] @ preprocess(loss)).squeeze(-1) + bias_ih + bias_hh
        cell = _sigmoids_first(torch.cat([hh, ih[..., 2:], bias.unsqueeze(-1)], -1))  # (B, 4H, H+3)
        weight_h, weight_c, weight_fed_back = _gate_weights(forget_weight, take_weight)
        next_h, next_m, scores = torch.empty_like(h), torch.empty_like(m), h.new_empty(B, 2, D)  # f̃, ĩ
        for at, space in _blocks(h, work=False):
            i, f, o, new = space.gates.chunk(4)
            for b in range(B):
                space.fill(cell[b], h[b, :, at], g_inputs[b, :, at])
                m_now, h_now = next_m[b, :, at], next_h[b, :, at]
                torch.mul(m[b, :, at], f, out=m_now).addcmul_(i, new)
                torch.tanh(m_now, out=space.tanh_m)
                torch.mul(o, space.tanh_m, out=h_now)
                scores[b, :, at] = weight_h[b] @ h_now
        scores += weight_c * c + weight_fed_back * torch.cat([forget, take], 1)
        scores += torch.stack([forget_bias, take_bias], 1)
        next_forget, next_take = (row.clone() for row in scores.chunk(2, 1))
        next_c = torch.sigmoid(next_forget) * c - torch.sigmoid(next_take) * g
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(loss, g, *leaves, cell, g_inputs, next_m, next_forget, next_take)
        return next_c, next_h, next_m, next_forget, next_take

    @staticmethod
    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        loss, g, *leaves, cell, g_inputs, next_m, next_forget, next_take = ctx.saved_tensors
        if torch.is_grad_enabled() or many_vectors(cotangents):  # second derivatives, or many vectors at once
            with torch.enable_grad():
                return None, None, *_by_autograd(loss, g, leaves, cotangents)
        (c, h, m, forget, take), weights = State(*leaves[:5]), leaves[5:]
        _, _, _, _, forget_weight, _, take_weight, _ = weights
        B, H, _ = h.shape
        dc, dh, dm, *dscores = cotangents
        keeps, takes = torch.sigmoid(next_forget), torch.sigmoid(next_take)
        if dc is None:  # zero times an infinite c would be NaN
            slopes = h.new_zeros(B, 2, h.shape[-1])
        else:
            slopes = torch.cat([dc * c * keeps * (1 - keeps), -dc * g * takes * (1 - takes)], 1)  # f̄, ī
        for row, d in enumerate(dscores):
            if d is not None:
                slopes[:, row : row + 1] += d
        weight_h, weight_c, weight_fed_back = _gate_weights(forget_weight, take_weight)
        c_before = weight_c.mT @ slopes
        if dc is not None:
            c_before += dc * keeps
        fed_back = weight_fed_back * slopes
        h_before = torch.empty_like(h) if ctx.needs_input_grad[3] else None
        m_before = torch.empty_like(m) if ctx.needs_input_grad[4] else None
        dcell, dweight_h = (
            torch.zeros_like(cell),
            h.new_zeros(B, 2, H),
        )
        for at, space in _blocks(h, work=True):
            i, f, o, new = space.gates.chunk(4)
            da, dh_now, dm_now = space.work[: 4 * H], space.work[4 * H : 5 * H], space.work[5 * H :]
            di, df, do, dnew = da.chunk(4)
            for b in range(B):
                space.fill(cell[b], h[b, :, at], g_inputs[b, :, at])
                torch.tanh(next_m[b, :, at], out=space.tanh_m)
                slope = slopes[b, :, at]
                torch.mm(weight_h[b].T, slope, out=dh_now)
                if dh is not None:
                    dh_now += dh[b, :, at]
                torch.mul(dh_now, o, out=dm_now)
                torch.ops.aten.tanh_backward.grad_input(dm_now, space.tanh_m, grad_input=dm_now)
                if dm is not None:
                    dm_now += dm[b, :, at]
                torch.mul(dm_now, new, out=di)
                torch.mul(dm_now, m[b, :, at], out=df)
                torch.mul(dh_now, space.tanh_m, out=do)
                torch.mul(dm_now, i, out=dnew)
                torch.ops.aten.sigmoid_backward.grad_input(da[: 3 * H], space.gates[: 3 * H], grad_input=da[: 3 * H])
                torch.ops.aten.tanh_backward.grad_input(dnew, new, grad_input=dnew)
                if m_before is not None:
                    torch.mul(dm_now, f, out=m_before[b, :, at])
                if h_before is not None:
                    h_before[b, :, at] = cell[b, :, :H].T @ da
                dcell[b].addmm_(da, space.inputs.T)
                dweight_h[b].addmm_(slope, torch.mul(o, space.tanh_m, out=dh_now).T)  # slope ⊗ h_t
        dcell = _sigmoids_first(dcell)
        dbias = dcell[..., -1]
        dih = torch.cat([dbias.unsqueeze(-1) * preprocess(loss).mT, dcell[..., H:-1]], -1)
        rows = [slopes @ c.mT, (slopes * torch.cat([forget, take], 1)).sum(-1, keepdim=True)]
        dupper, dupper_bias = torch.cat([dweight_h, *rows], -1), slopes.sum(-1)
        dweights = (dih, dcell[..., :H], dbias, dbias)
        dgates = (dupper[:, :1], dupper_bias[:, :1], dupper[:, 1:], dupper_bias[:, 1:])
        return None, None, c_before, h_before, m_before, *fed_back.chunk(2, 1), *dweights, *dgates


def _by_autograd(
    loss: Tensor, g: Tensor, leaves: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The results of `_Update.backward`, in the shapes of the leaves, by operations that are differentiable again."""
    # Views: the state of a later step depends on the weights itself, and one tensor may have two names. A gradient with
    # respect to the leaves themselves would contain contributions that autograd adds afterwards.
    leaves = [leaf.view_as(leaf) for leaf in leaves]
    moving = [leaf for leaf in leaves if leaf.requires_grad]
    after = by_formula(dict(zip(_WEIGHTS, leaves[5:], strict=True)), loss, g, State(*leaves[:5]))
    given = [(y, d) for y, d in zip(after, cotangents, strict=True) if d is not None and y.requires_grad]
    if not given:
        return [torch.zeros_like(leaf) if leaf.requires_grad else None for leaf in leaves]
    values, vectors = zip(*given, strict=True)
    found = iter(torch.autograd.grad(values, moving, vectors, create_graph=True, materialize_grads=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _gate_weights(forget_weight: Tensor, take_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of both gates for h (B, 2, H), for c (B, 2, 1), and for f̃ and ĩ (B, 2, 1)."""
    both = torch.cat([forget_weight, take_weight], 1)
    return both[..., :-2], both[..., -2:-1], both[..., -1:]


def _sigmoids_first(rows: Tensor) -> Tensor:
    """Reorder rows (B, 4H, …) from torch.nn.LSTMCell's i, f, n, o to i, f, o, n; it is its own inverse."""
    i, f, third, fourth = rows.chunk(4, 1)
    return torch.cat([i, f, fourth, third], 1)
