"""What the examples share: small few-shot tasks, a small network, and the loop over iterations."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaheed.outer import TaskAttention
from metaheed.types import Episode, Params, TaskInfo

TASKS, WAYS, SHOTS, QUERIES = 4, 3, 2, 10
STEPS, FAST_LR, META_LR, ATTENTION_LR = 3, 0.3, 0.01, 0.01

Slopes = Callable[[Params], Tensor]
"""A direction u of θ -> how each task's query loss rises along it, ⟨g_i, u⟩, (B,)."""


def network() -> nn.Module:
    """From points of four coordinates to logits."""
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, WAYS))


def sample(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Episode:
    """A meta-batch (leading B): a class is a cloud of points, and some tasks have wider clouds than others."""
    centres = 2 * torch.randn(TASKS, WAYS, 1, 4, generator=generator, dtype=dtype)
    width = 2 * torch.rand(TASKS, 1, 1, 1, generator=generator, dtype=dtype)

    def draw(each: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(TASKS, WAYS, each, 4, generator=generator, dtype=dtype)
        return (centres + width * noise).flatten(1, 2), torch.arange(WAYS).repeat_interleave(each).repeat(TASKS, 1)

    return Episode(*draw(SHOTS), *draw(QUERIES))


def split(batch: Episode) -> list[Episode]:
    """The tasks of a meta-batch."""
    return [Episode(*task) for task in zip(*batch, strict=True)]


def collate(infos: Sequence[TaskInfo]) -> TaskInfo:
    """What attention sees of one task each -> of the meta-batch, (B,)."""
    return TaskInfo(*map(torch.stack, zip(*infos, strict=True)))


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of right answers, 0-d."""
    return (logits.argmax(-1) == y).to(logits.dtype).mean()


def run(
    attend: Callable[..., None], *ways_in: Callable[..., Any], build: Callable[[], nn.Module] = network, steps: int = 20
) -> None:
    """Train θ and δ from the same start by each way in, and print the query loss after adaptation."""
    torch.set_num_threads(1)  # so small a network gains nothing from more
    for way_in in ways_in:
        torch.manual_seed(0)
        net, attention = build(), TaskAttention(TASKS)
        losses: list[float] = []
        attention.register_forward_pre_hook(lambda _, seen, log=losses: log.append(seen[0].query_loss.mean().item()))
        meta_opt = torch.optim.Adam(net.parameters(), lr=META_LR)
        attention_opt = torch.optim.Adam(attention.parameters(), lr=ATTENTION_LR)
        batches, probes = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        for _ in range(steps):
            meta_opt.zero_grad()
            weights, task_grads = way_in(net, attention, sample(batches))  # fills θ's .grad
            meta_opt.step()
            attention_opt.zero_grad()
            attend(net, weights, task_grads, sample(probes))  # at the new θ; fills δ's .grad
            attention_opt.step()
        first, last = (sum(part) / len(part) for part in (losses[:5], losses[-5:]))
        print(f"{way_in.__name__}: query loss {first:.4f} over the first five steps, {last:.4f} over the last")
