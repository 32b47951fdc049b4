"""What is said while something is computed: on a terminal and off it."""

import io
import re
import time

import pytest
from rich.console import Console

from metaheed.running.progress import Bar, Lines, Work, WorkLines
from metaheed.running.reporter import Reporter, Several


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still unless a test sets it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def drive(reporter: Bar | Lines, clock: list[float]) -> None:
    """Ten iterations of a second each, with a validation of 80 seconds in their midst."""
    reporter.start(0, 10)
    for iteration in range(1, 11):
        clock[0] += 1
        reporter.step(iteration, 1.5, 0.4)
        if iteration == 5:
            for done in range(0, 121, 30):
                reporter.validating(done, 120)
                clock[0] += 16
            reporter.validation(5, 0.5, 0.01, True)
    reporter.stop()


def test_lines_leave_validation_out_of_the_pace(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    drive(Lines(1.0), clock)
    said = capsys.readouterr().err
    assert "iteration 10/10  loss 1.500  accuracy 40.00%  1.00 it/s  left 0:00:00" in said
    assert "validating 60/120" in said
    assert "validation after 5: 50.00% ± 1.00% (best so far)" in said


def test_a_bar_shows_no_number_that_is_not_known(clock: list[float]) -> None:
    screen = io.StringIO()
    drive(Bar(Console(file=screen, force_terminal=True, width=120, color_system=None)), clock)
    said = screen.getvalue()
    assert "nan" not in said
    assert "accuracy 40.00%  1.00 it/s" in said
    assert not re.search(r"accuracy 0\.\d", said)


def test_work_of_less_than_a_second_is_not_worth_a_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for brief in (True, False):
        lines = WorkLines(brief)
        lines.start("reading", 2, 0)
        lines.advance(2)
        lines.stop()
    assert capsys.readouterr().err == "reading: 2/2 images  left 0:00:00\n"
    lines = WorkLines(brief=True)
    lines.start("judging", 40, 0, "tasks")
    for _ in range(4):
        clock[0] += 2
        lines.advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "judging: 10/40 tasks  left 0:00:06",
        "judging: 40/40 tasks  left 0:00:00",
    ]


def test_a_bar_of_work_names_its_unit() -> None:
    screen = io.StringIO()
    work = Work(Console(file=screen, force_terminal=True, width=100, color_system=None), transient=True)
    work.start("judging", 40, 0, "tasks")
    work.advance(40)
    work.stop()
    assert "40/40 tasks" in screen.getvalue()


class Minimal(Reporter):
    """A reporter of one's own that overrides a single method."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def test_a_reporter_of_ones_own_overrides_what_it_wants() -> None:
    minimal = Minimal()
    for each in (minimal, Several(minimal)):
        each.validating(3, 10)
        watcher = each.watcher()
        watcher.start("reading", 10, 0, "images")
        watcher.advance(10)
        watcher.message("a file is odd")
        watcher.stop()
    assert minimal.texts == ["a file is odd"] * 2
