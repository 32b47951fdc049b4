"""Who is told how training goes."""

from typing import Protocol


class Reporter(Protocol):
    """Who is told how training goes."""

    def start(self, iteration: int, iterations: int) -> None:
        """Training begins after `iteration`."""

    def step(self, iteration: int, loss: float, accuracy: float) -> None:
        """An outer step is done; means over the meta-batch."""

    def validation(self, iteration: int, accuracy: float, half_width: float, best: bool) -> None:
        """A validation is done."""

    def message(self, text: str) -> None:
        """Something worth a line."""

    def stop(self) -> None:
        """No more will be told."""


class Silent:
    """A reporter that says nothing."""

    def start(self, iteration: int, iterations: int) -> None:  # noqa: D102
        pass

    def step(self, iteration: int, loss: float, accuracy: float) -> None:  # noqa: D102
        pass

    def validation(self, iteration: int, accuracy: float, half_width: float, best: bool) -> None:  # noqa: D102
        pass

    def message(self, text: str) -> None:  # noqa: D102
        pass

    def stop(self) -> None:  # noqa: D102
        pass
