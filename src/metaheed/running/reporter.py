"""Who is told how training goes."""

from typing import Protocol, runtime_checkable

from metaheed.data.sources import Watcher


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


@runtime_checkable
class DetailedReporter(Reporter, Protocol):
    """A reporter that is also told how long reading the data set and each validation take."""

    def watcher(self) -> Watcher:
        """Who is told how reading the data set goes."""

    def validating(self, done: int, tasks: int) -> None:
        """A validation has judged `done` of its tasks; 0 when it begins."""


class _MessagesOnly:
    """A watcher for a reporter that takes nothing but messages."""

    def __init__(self, reporter: Reporter) -> None:
        self.message = reporter.message

    def start(self, what: str, items: int, done: int, unit: str = "images") -> None:
        pass

    def advance(self, items: int) -> None:
        pass

    def stop(self) -> None:
        pass


def watcher_of(reporter: Reporter) -> Watcher:
    """Who is told how reading the data set goes, on behalf of a reporter."""
    return reporter.watcher() if isinstance(reporter, DetailedReporter) else _MessagesOnly(reporter)


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
