"""Who is told how training goes: a bar, lines, TensorBoard, MLflow, or a class of one's own."""

from collections.abc import Mapping

from metaheed.data.sources import Watcher


class Reporter:
    """A listener to one training run. Every method does nothing: subclass it and override what you want to know of.

    An exception that a method raises ends the training, which can be resumed from its last checkpoint.
    """

    def start(self, iteration: int, iterations: int) -> None:
        """Training begins after `iteration` of `iterations`."""

    def step(self, iteration: int, loss: float, accuracy: float) -> None:
        """An outer step is done; query loss in nats and accuracy in [0, 1] are means over the meta-batch."""

    def validating(self, done: int, tasks: int) -> None:
        """A validation has judged `done` of its tasks; 0 when it begins."""

    def validation(self, iteration: int, accuracy: float, half_width: float, best: bool) -> None:
        """A validation is done; accuracy and the half-width of its 95% interval are in [0, 1]."""

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Numbers by name, for programs that draw curves: `train/loss`, `validation/accuracy` and such."""

    def message(self, text: str) -> None:
        """Something is worth a line."""

    def stop(self) -> None:
        """Training has ended, for whatever reason; nothing more will be told."""

    def watcher(self) -> Watcher:
        """Who is told how reading the data set goes; a listener that passes on its messages unless overridden."""
        return _MessagesOnly(self)


class _MessagesOnly:
    """A watcher that hands messages to a reporter and ignores how far the work is."""

    def __init__(self, reporter: Reporter) -> None:
        self.message = reporter.message

    def start(self, what: str, items: int, done: int, unit: str = "images") -> None:
        pass

    def advance(self, items: int) -> None:
        pass

    def stop(self) -> None:
        pass


class Several(Reporter):
    """Passes on everything to several reporters, in their order."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def start(self, iteration: int, iterations: int) -> None:  # noqa: D102
        for reporter in self._reporters:
            reporter.start(iteration, iterations)

    def step(self, iteration: int, loss: float, accuracy: float) -> None:  # noqa: D102
        for reporter in self._reporters:
            reporter.step(iteration, loss, accuracy)

    def validating(self, done: int, tasks: int) -> None:  # noqa: D102
        for reporter in self._reporters:
            reporter.validating(done, tasks)

    def validation(self, iteration: int, accuracy: float, half_width: float, best: bool) -> None:  # noqa: D102
        for reporter in self._reporters:
            reporter.validation(iteration, accuracy, half_width, best)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:  # noqa: D102
        for reporter in self._reporters:
            reporter.log(iteration, values)

    def message(self, text: str) -> None:  # noqa: D102
        for reporter in self._reporters:
            reporter.message(text)

    def stop(self) -> None:  # noqa: D102
        for reporter in self._reporters:
            reporter.stop()
