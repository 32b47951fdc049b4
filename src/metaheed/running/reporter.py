"""Who is told how training goes: a bar, lines, TensorBoard, MLflow, or a class of one's own."""

from collections.abc import Mapping


class Reporter:
    """A listener to one training run. Every method does nothing: subclass it and override what you want to know of.

    An exception that a method raises ends the training, which can be resumed from its last checkpoint.
    """

    def start(self, iteration: int, iterations: int) -> None:
        """Training begins after `iteration` of `iterations`."""

    def step(self, iteration: int, loss: float, accuracy: float) -> None:
        """An outer step is done; query loss in nats and accuracy in [0, 1] are means over the meta-batch."""

    def validation(self, iteration: int, accuracy: float, half_width: float, best: bool) -> None:
        """A validation is done; accuracy and the half-width of its 95% interval are in [0, 1]."""

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Numbers by name, for programs that draw curves: `train/loss`, `validation/accuracy` and such."""

    def message(self, text: str) -> None:
        """Something is worth a line."""

    def stop(self) -> None:
        """Training has ended, for whatever reason; nothing more will be told."""


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
