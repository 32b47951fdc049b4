"""The interface by which training reports its progress."""

from typing import Protocol


class Reporter(Protocol):
    """Receives the progress of a training run."""

    def start(self, iteration: int, iterations: int) -> None:
        """Training begins, after `iteration` of `iterations` outer steps are done."""

    def step(self, iteration: int, loss: float, accuracy: float) -> None:
        """An outer step is done; loss and accuracy are means over the meta-batch's query sets."""

    def validation(self, iteration: int, accuracy: float, half_width: float, best: bool) -> None:
        """A validation is done; accuracies are in [0, 1], and `best` says whether it is the best one so far."""

    def message(self, text: str) -> None:
        """A notice that is worth a line of output."""

    def stop(self) -> None:
        """Training has ended; no further call follows."""


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
