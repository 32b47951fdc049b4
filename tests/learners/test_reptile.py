"""Reptile's meta-gradient against plain autograd steps, and what it is the limit of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metaheed.errors import ConfigError
from metaheed.learners import Conv4, Reptile
from metaheed.outer import looped, task_gradient, vectorized
from metaheed.types import Episode, Params
from tests.conftest import make_batch, task
from tests.networks import Tiny

WAYS, SHAPE, STEPS, RATE = 3, (1, 16, 16), 2, 0.2


def reference(network: nn.Module, meta: Params, episode: Episode) -> tuple[Params, torch.Tensor]:
    """The sum of the gradients on T steps over the support set and T over the query set; the loss in between."""
    phi = {n: p.clone().requires_grad_() for n, p in meta.items()}
    total = {n: torch.zeros_like(p) for n, p in meta.items()}
    judged = torch.empty(0)
    for step in range(2 * STEPS):
        support = step < STEPS
        x, y = (episode.support_x, episode.support_y) if support else (episode.query_x, episode.query_y)
        loss = F.cross_entropy(functional_call(network, phi, (x,)), y)
        judged = loss.detach() if step == STEPS else judged
        gradients = torch.autograd.grad(loss, list(phi.values()))
        for (name, p), g in zip(list(phi.items()), gradients, strict=True):
            total[name] += g
            phi[name] = (p - RATE * g).detach().requires_grad_()
    return total, judged


@pytest.mark.parametrize("network", [Tiny(WAYS, SHAPE), Conv4(WAYS, SHAPE, hidden=4)], ids=["tiny", "conv4"])
def test_meta_gradient_is_the_sum_of_the_gradients_on_the_way(network: nn.Module) -> None:
    network = network.double()
    learner = Reptile(network, adaptation_steps=STEPS, fast_lr=RATE)
    meta = {name: p.double() for name, p in learner.init(torch.Generator().manual_seed(0)).items()}
    batch = make_batch(3, WAYS, 2, 4, SHAPE)
    for execution in (looped, vectorized):
        gradients, info = execution(learner)(meta, batch)
        for index in range(3):
            expected, loss = reference(network, meta, task(batch, index))
            torch.testing.assert_close(info.query_loss[index], loss)
            for name, g in expected.items():
                torch.testing.assert_close(gradients[name][index], g, rtol=1e-6, atol=1e-9)


def test_of_a_small_rate_it_is_the_joint_gradient() -> None:
    """As α → 0 all gradients are taken at θ: T times that of the support loss and T times that of the query loss."""
    network = Tiny(WAYS, SHAPE).double()
    learner = Reptile(network, adaptation_steps=STEPS, fast_lr=1e-5)
    meta = {name: p.double() for name, p in learner.init(torch.Generator().manual_seed(0)).items()}
    episode = task(make_batch(1, WAYS, 2, 4, SHAPE), 0)
    found, _ = task_gradient(learner, meta, episode)
    at = {n: p.clone().requires_grad_() for n, p in meta.items()}
    sides = ((episode.support_x, episode.support_y), (episode.query_x, episode.query_y))
    joint = STEPS * sum(F.cross_entropy(functional_call(network, at, (x,)), y) for x, y in sides)
    assert isinstance(joint, torch.Tensor)
    for (name, _), g in zip(at.items(), torch.autograd.grad(joint, list(at.values())), strict=True):
        torch.testing.assert_close(found[name], g, rtol=1e-2, atol=1e-3)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"fast.lr"):
        Reptile(Tiny(WAYS, SHAPE), fast_lr=0.0)
