"""Small networks for the tests; also found by name from the command line, as a user's own would be."""

import torch
from torch import Tensor, nn

from metaheed.learners import Conv4


class Tiny(nn.Sequential):
    """Smooth, so that finite differences are exact to their order; 8×8 pixels after pooling."""

    def __init__(self, ways: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(
            nn.AvgPool2d(2),
            nn.Conv2d(image_shape[0], 4, 3, stride=2),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, ways),
        )


class WithStatistics(Tiny):
    """As Tiny, with the running statistics that most networks in the wild have."""

    def __init__(self, ways: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(ways, image_shape)
        self[2] = nn.BatchNorm2d(4)


class WithDropout(Tiny):
    def __init__(self, ways: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(ways, image_shape)
        self.append(nn.Dropout(0.5))


class Exploding(Tiny):
    """Finite at first, and not a number once training has moved its first weights far enough."""

    start: Tensor

    def __init__(self, ways: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(ways, image_shape)
        self.register_buffer("start", self._first().detach().clone())

    def _first(self) -> Tensor:
        weight = self[1].weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        first = self._first()
        spread = (first - self.start.to(first.dtype)).abs().amax()
        return torch.where(spread > 0.04, torch.full_like(logits, float("nan")), logits)


class RandomEachTime(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5)  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    """A function that torch.func cannot see through, as many an extension's."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


class NoSecondDerivative(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = _Once.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return doubled


class WrongWays(Tiny):
    def __init__(self, ways: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(ways + 1, image_shape)


class FusedWeightNorm(Tiny):
    """Calls PyTorch's operation whose second derivative is wrong."""

    def __init__(self, ways: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(ways, image_shape)
        self.lengths = nn.Parameter(torch.rand(ways, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        features = nn.Sequential(*list(self.children())[:-1])(x)
        head = self[6]
        assert isinstance(head, nn.Linear)
        return nn.functional.linear(features, torch._weight_norm(head.weight, self.lengths.to(x), 0), head.bias)


class Distances(Tiny):
    """Its second derivative is not there on any device."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return -torch.cdist(logits, torch.eye(logits.shape[1]).to(logits))


class Checkpointed(Tiny):
    """Saves memory in a way that torch.func refuses."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        logits: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return logits


class LooksAtItsNumbers(Tiny):
    """vmap cannot take it."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return logits if float(logits.detach().abs().max()) < 1e9 else 0 * logits


class Attending(Tiny):
    """PyTorch's fused attention, whose second derivative is not there."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        tokens = logits.unsqueeze(0).unsqueeze(0)
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)[0, 0]


class WithBackwardHook(Tiny):
    def __init__(self, ways: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(ways, image_shape)
        self[1].register_full_backward_hook(lambda module, inputs, outputs: None)


class ReentrantlyCheckpointed(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        logits: Tensor = checkpoint(super().forward, x, use_reentrant=True)
        return logits


class WithoutGradient(Tiny):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return logits


class ThroughNumPy(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return logits + float(logits.detach().numpy().mean())


class KeepsItsWeight(Tiny):
    """Keeps what it makes of a weight in its first call."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        if self.kept is None:
            weight = self[6].weight
            assert isinstance(weight, Tensor)
            self.kept = weight.mean(1)
        return logits * self.kept.to(logits)


class Tuple(Tiny):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x  # type: ignore[no-untyped-call]


def parallel(ways: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return nn.DataParallel(Tiny(ways, image_shape))


def given_weights(ways: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """One of the package's own networks, with weights loaded into it."""
    network = Conv4(ways, image_shape, hidden=4)
    network.load_state_dict({name: torch.full_like(value, 0.01) for name, value in network.state_dict().items()})
    return network
