"""An independent reference: plain float64 autograd through the whole adaptation, sharing no code with the package."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metaheed.types import Episode, Params


def maml_query_loss(
    network: nn.Module, meta: Params, episode: Episode, steps: int, rate: float, first_order: bool = False
) -> tuple[Tensor, Params]:
    """The query loss after `steps` gradient steps, and the adapted parameters, with the graph to `meta`."""
    phi = dict(meta)
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(network, phi, (episode.support_x,)), episode.support_y)
        grads = torch.autograd.grad(loss, list(phi.values()), create_graph=not first_order, allow_unused=True)
        phi = {n: p if g is None else p - rate * g for (n, p), g in zip(phi.items(), grads, strict=True)}
    return F.cross_entropy(functional_call(network, phi, (episode.query_x,)), episode.query_y), phi


def part_query_loss(
    network: nn.Module, meta: Params, episode: Episode, steps: int, rate: float, moving: list[str]
) -> tuple[Tensor, Params]:
    """As `maml_query_loss`, only the parameters named moving."""
    phi = dict(meta)
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(network, phi, (episode.support_x,)), episode.support_y)
        grads = torch.autograd.grad(loss, [phi[n] for n in moving], create_graph=True)
        phi |= {n: phi[n] - rate * g for n, g in zip(moving, grads, strict=True)}
    # Copies, so that the gradient at φ is that of φ alone and not also of θ where a part did not move.
    phi = {n: p + 0 for n, p in phi.items()}
    return F.cross_entropy(functional_call(network, phi, (episode.query_x,)), episode.query_y), phi


def meta_sgd_query_loss(network: nn.Module, meta: Params, episode: Episode, steps: int) -> tuple[Tensor, Params]:
    names = [n.removeprefix("initial.") for n in meta if n.startswith("initial.")]
    phi = {n: meta[f"initial.{n}"] for n in names}
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(network, phi, (episode.support_x,)), episode.support_y)
        grads = torch.autograd.grad(loss, [phi[n] for n in names], create_graph=True)
        phi = {n: phi[n] - meta[f"fast_lr.{n}"] * g for n, g in zip(names, grads, strict=True)}
    return F.cross_entropy(functional_call(network, phi, (episode.query_x,)), episode.query_y), phi


def meta_lstm_query_loss(network: nn.Module, meta: Params, episode: Episode, steps: int) -> tuple[Tensor, Params]:
    """Ravi & Larochelle's learner, coordinate by coordinate in name order, the LSTM being PyTorch's own cell."""
    names = [n.removeprefix("initial.") for n in meta if n.startswith("initial.")]
    phi = {n: meta[f"initial.{n}"] for n in names}
    hidden = meta["lstm.weight_hh"].shape[1]
    cell = [meta[f"lstm.{n}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    state = {n: [p.new_zeros(p.numel(), w) for w in (hidden, hidden, 1, 1)] for n, p in phi.items()}
    for _ in range(steps):
        at = {n: p.detach().clone().requires_grad_() for n, p in phi.items()}
        loss = F.cross_entropy(functional_call(network, at, (episode.support_x,)), episode.support_y)
        grads = torch.autograd.grad(loss, list(at.values()))
        for n, g in zip(names, grads, strict=True):
            h, m, f, i = state[n]
            c, column = phi[n].reshape(-1, 1), g.reshape(-1, 1)
            x = torch.cat([_prepared(loss.detach().expand(len(c))), _prepared(g.flatten())], 1)
            h, m = torch.lstm_cell(x, (h, m), *cell)
            f = torch.cat([h, c, f], 1) @ meta["forget_gate.weight"].T + meta["forget_gate.bias"]
            i = torch.cat([h, c, i], 1) @ meta["input_gate.weight"].T + meta["input_gate.bias"]
            phi[n] = (f.sigmoid() * c - i.sigmoid() * column).reshape(phi[n].shape)
            state[n] = [h, m, f, i]
    return F.cross_entropy(functional_call(network, phi, (episode.query_x,)), episode.query_y), phi


def reptile_query_loss(
    network: nn.Module, meta: Params, episode: Episode, steps: int, rate: float
) -> tuple[Tensor, Params]:
    """The query loss after `steps` steps on the support set, and the adapted parameters.

    Reptile's meta-gradient is the sum of the gradients of these steps and of as many on the query set after them. It is
    made the loss's gradient by a term that is zero.
    """
    phi = {n: p.detach() for n, p in meta.items()}
    total = {n: torch.zeros_like(p) for n, p in phi.items()}
    judged = phi
    for step in range(2 * steps):
        judged = phi if step == steps else judged
        x, y = (episode.support_x, episode.support_y) if step < steps else (episode.query_x, episode.query_y)
        at = with_grad(phi)
        slope = gradient(F.cross_entropy(functional_call(network, at, (x,)), y), at)
        total = {n: total[n] + g for n, g in slope.items()}
        phi = {n: p - rate * slope[n] for n, p in phi.items()}
    judged = with_grad(judged)
    loss = F.cross_entropy(functional_call(network, judged, (episode.query_x,)), episode.query_y)
    return loss + sum(((p - p.detach()) * total[n].detach()).sum() for n, p in meta.items()), judged


def _prepared(values: Tensor) -> Tensor:
    rows = []
    for v in values.tolist():
        large = abs(v) >= math.exp(-10)
        rows.append([math.log(abs(v)) / 10, math.copysign(1.0, v)] if large else [-1.0, math.exp(10) * v])
    return torch.tensor(rows, dtype=values.dtype)


def protonet_query_loss(network: nn.Module, meta: Params, episode: Episode, head: str) -> tuple[Tensor, Params]:
    """Softmax over negative squared distances; φ's head is what makes a linear layer of them."""

    def embed(x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = network.get_submodule(head).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        functional_call(network, meta, (x,))
        hook.remove()
        return seen[0]

    z, y = embed(episode.support_x), episode.support_y
    c = torch.stack([z[y == k].mean(0) for k in range(int(y.max()) + 1)])
    phi = {n: p + 0 for n, p in meta.items()} | {f"{head}.weight": 2 * c, f"{head}.bias": -c.pow(2).sum(1)}
    loss = F.cross_entropy(functional_call(network, phi, (episode.query_x,)), episode.query_y)
    distances = torch.cdist(embed(episode.query_x), c, compute_mode="donot_use_mm_for_euclid_dist").pow(2)
    torch.testing.assert_close(loss, F.cross_entropy(-distances, episode.query_y), rtol=1e-9, atol=1e-12)
    return loss, phi


def index_of_inequality(losses: Tensor, index: str, parameter: float | None) -> Tensor:
    """The indices as science writes them."""
    M, mean = len(losses), losses.mean()
    x = losses / mean
    if index == "theil" or (index == "generalized-entropy" and parameter == 1):
        return (x * x.log()).sum() / M
    if index == "generalized-entropy":
        a = 2.0 if parameter is None else parameter
        return -x.log().sum() / M if a == 0 else (x**a - 1).sum() / (M * a * (a - 1))
    if index == "atkinson":
        e = 0.5 if parameter is None else parameter
        if e == 1:
            return 1 - losses.prod() ** (1 / M) / mean
        return 1 - ((losses ** (1 - e)).sum() / M) ** (1 / (1 - e)) / mean
    if index == "gini":
        return torch.stack([(a - b).abs() for a in losses for b in losses]).sum() / (2 * M * losses.sum())
    assert index == "log-variance"
    return (losses.log() - losses.log().mean()).pow(2).sum() / M


def with_grad(meta: Params) -> Params:
    return {name: p.detach().clone().requires_grad_() for name, p in meta.items()}


def gradient(value: Tensor, at: Params) -> Params:
    """Zero where the value does not depend on a parameter at all."""
    leaves = list(at.values())
    grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(at, grads, strict=True))


def assert_close(a: Params, b: Params, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.allclose(a[name], b[name], rtol=rtol, atol=atol), (
            f"{name}: {float((a[name] - b[name]).abs().max())} apart at {float(b[name].abs().max())}"
        )
