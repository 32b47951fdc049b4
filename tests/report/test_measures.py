"""Statistics by hand, and against worked examples."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from metaheed.errors import RunError
from metaheed.running.statistics import t_test
from metaheed.studies.report import measures
from metaheed.studies.report.measures import (
    attention_log,
    band,
    batch_correlations,
    first_reaching,
    holm,
    mean_curve,
    ranks,
)
from metaheed.studies.report.reading import Validation
from metaheed.types import TaskInfo
from tests.report.making import batch, write_lines


def test_holm() -> None:
    # The worked example of Wikipedia's "Holm-Bonferroni method": H4 and H1 are rejected at 0.05.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # R's manual way: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm").
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_t_test() -> None:
    # Two degrees of freedom have a closed form: P(|T| > t) = 1 − t/√(2 + t²).
    t = 0.03 / (math.sqrt(0.0007) / math.sqrt(3))
    assert t_test([0.01, 0.02, 0.06]) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    # One has another: 1 − (2/π) arctan t.
    assert t_test([0.0, 0.02]) == pytest.approx(1 - 2 / math.pi * math.atan(1))
    # Student's own sleep data: t = −4.0621 with 9 degrees of freedom, p = 0.002833.
    extra = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert t_test(extra) == pytest.approx(0.002833, abs=5e-7)
    assert t_test([-e for e in extra]) == pytest.approx(t_test(extra))
    assert t_test([0.0, 0.0, 0.0]) == 1.0


def test_correlations_within_batches_by_hand() -> None:
    values = np.array([[1, 2, 3, 4], [4, 3, 2, 1], [5, 5, 5, 5], [1, 2, 2, 3]], dtype=float)
    weights = np.array([[0.1, 0.2, 0.3, 0.4]] * 3 + [[0.25] * 4])
    r = batch_correlations(values, weights)
    assert r[:2] == pytest.approx([1, -1])
    assert np.isnan(r[2:]).all(), "constant inputs, constant weights"


def test_ranks_by_hand() -> None:
    losses = np.array([[1.0, 3, 2], [1, 3, 2], [1, 3, 2], [1, 3, 2]])
    weights = np.array([[0.2, 0.5, 0.3], [0.5, 0.2, 0.3], [1 / 3] * 3, [0.2, 0.4, 0.4]])
    assert ranks(losses, weights).tolist() == [1, 3, 2, 1.5]


def test_attention_log_by_hand(tmp_path: Path) -> None:
    rising = [0.1, 0.2, 0.3, 0.4]
    lines = [
        batch(1, [1, 2, 3, 4], rising, grad_norm=[4, 3, 2, 1], initial_loss=[2, 2, 2, 2]),
        batch(2, [4, 3, 2, 1], rising, grad_norm=[4, 3, 2, 1], initial_loss=[None] * 4),
    ]
    write_lines(tmp_path / "tasks.jsonl", lines)
    log = attention_log(tmp_path / "tasks.jsonl")
    assert (log.tasks, log.batches) == (4, 2)
    assert log.largest.mean.tolist() == [0.4, 0.4]
    assert log.smallest.mean.tolist() == [0.1, 0.1]
    assert log.rank.mean.tolist() == [1, 4]
    loss, norm, accuracy, ratio = (
        log.correlations[n] for n in ("query_loss", "grad_norm", "query_accuracy", "loss_ratio")
    )
    assert (loss.batches, loss.skipped) == (2, 0)
    assert loss.per_batch == pytest.approx(0)
    assert loss.pooled == pytest.approx(0)
    assert norm.per_batch == norm.pooled == pytest.approx(-1)
    assert (accuracy.batches, accuracy.skipped) == (0, 2)
    assert math.isnan(accuracy.per_batch)
    assert math.isnan(accuracy.pooled)
    assert (ratio.batches, ratio.skipped) == (1, 1), "the loss before adaptation of one batch was not logged"
    assert ratio.per_batch == ratio.pooled == pytest.approx(1)


def test_attention_log_of_many_batches(tmp_path: Path) -> None:
    """More than are read at once: pooled moments are merged, curves have few points."""
    generator = np.random.default_rng(0)
    losses = generator.gamma(2.0, size=(2345, 3)) + 1e3  # an offset on which naive sums of squares lose digits
    weights = generator.dirichlet([1, 1, 1], size=2345) * 0.5 + losses / losses.sum(axis=1, keepdims=True) * 0.5
    write_lines(tmp_path / "t", [batch(i + 1, losses[i], weights[i]) for i in range(len(losses))])
    log = attention_log(tmp_path / "t")
    expected = np.mean([np.corrcoef(x, w)[0, 1] for x, w in zip(losses, weights, strict=True)])
    assert log.correlations["query_loss"].per_batch == pytest.approx(expected)
    assert log.correlations["query_loss"].pooled == pytest.approx(np.corrcoef(losses.ravel(), weights.ravel())[0, 1])
    assert (len(log.largest.mean), len(log.rank.mean)) == (117, 50)
    assert log.largest.mean.mean() == pytest.approx(weights.max(axis=1).mean(), rel=1e-2)
    assert (log.largest.low <= log.largest.mean).all()
    assert (log.largest.mean <= log.largest.high).all()


def test_weights_that_go_by_position_are_told_from_those_that_go_by_task(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    n = 1500  # read in two parts
    losses = generator.gamma(2.0, size=(n, 4))
    by_task = generator.dirichlet([5] * 4, size=n)
    drifting = np.linspace(0, 1, n)[:, None]
    by_position = drifting * [0.4, 0.3, 0.2, 0.1] + (1 - drifting) * [0.1, 0.2, 0.3, 0.4]
    half = 0.25 + (by_position - 0.25) * (by_task - 0.25).std() / (by_position - 0.25).std() / 2 + (by_task - 0.25) / 2
    by_loss = [0.4, 0.3, 0.2, 0.1] + 0.01 * (losses - losses.mean(axis=1, keepdims=True)) / losses.max()
    write_lines(tmp_path / "loss", [batch(i + 1, losses[i], by_loss[i]) for i in range(n)])
    log = attention_log(tmp_path / "loss")
    assert log.by_position > 0.98
    assert abs(log.correlations["query_loss"].pooled) < 0.1
    assert log.apart_from_position["query_loss"] > 0.9
    expected = {"task": 0.01, "position": 1.0, "half": 0.5, "uniform": math.nan}
    for name, weights in zip(expected, (by_task, by_position, half, np.full((n, 4), 0.25)), strict=True):
        write_lines(tmp_path / name, [batch(i + 1, losses[i], weights[i]) for i in range(n)])
        assert attention_log(tmp_path / name).by_position == pytest.approx(expected[name], abs=0.02, nan_ok=True), name


def test_what_was_drawn_is_told_from_what_was_learned(tmp_path: Path) -> None:
    """Both ends of a run by an independent computation: weights that follow position, then the loss."""
    generator = np.random.default_rng(1)
    n = 2345  # read in three parts of 10, 10 and 3 stretches
    losses = generator.gamma(2.0, size=(n, 4))
    learned = np.linspace(0, 1, n)[:, None]
    by_loss = losses / losses.sum(axis=1, keepdims=True)
    noise = generator.dirichlet([50] * 4, size=n)
    weights = (1 - learned) * noise + learned * by_loss
    weights = 0.9 * weights + 0.1 * np.array([0.4, 0.3, 0.2, 0.1])
    write_lines(tmp_path / "t", [batch(i + 1, losses[i], weights[i]) for i in range(n)])
    log = attention_log(tmp_path / "t")

    def expected(stretches: list[tuple[int, int]]) -> tuple[float, float]:
        left, loss, off = [], [], []
        for begin, end in stretches:
            part = weights[begin:end]
            left.append(part - part.mean(axis=0))
            loss.append(losses[begin:end] - losses[begin:end].mean(axis=1, keepdims=True))
            off.append(part - 0.25)
        flat = np.concatenate(left).ravel(), np.concatenate(loss).ravel()
        return float(np.sqrt(np.mean(np.concatenate(off) ** 2))), float(np.corrcoef(*flat)[0, 1])

    first, last = expected([(0, 100), (100, 200)]), expected([(2115, 2230), (2230, 2345)])
    assert (log.deviation.first, log.apart_at_ends["query_loss"].first) == pytest.approx(first)
    assert (log.deviation.last, log.apart_at_ends["query_loss"].last) == pytest.approx(last)
    assert first[1] < 0.5 < last[1]


def test_a_short_run_is_its_own_beginning_and_end(tmp_path: Path) -> None:
    write_lines(tmp_path / "t", [batch(1, [1, 2], [0.25, 0.75]), batch(2, [1, 2], [0.5, 0.5])])
    log = attention_log(tmp_path / "t")
    assert log.deviation == pytest.approx((math.sqrt(0.25**2 / 2),) * 2)
    write_lines(tmp_path / "u", [batch(1, [1, 2], [0.5, 0.5])])
    uniform = attention_log(tmp_path / "u")
    assert uniform.deviation == (0, 0)
    assert all(math.isnan(value) for value in uniform.apart_at_ends["query_loss"])


def test_band_by_hand() -> None:
    summary = band(np.arange(1.0, 401), np.arange(400.0))
    assert len(summary.mean) == 20
    assert summary.iterations[:2].tolist() == [10.5, 30.5]
    assert summary.mean[:2].tolist() == [9.5, 29.5]
    assert summary.low[0] == pytest.approx(0.95)
    assert summary.high[0] == pytest.approx(18.05)
    assert len(band(np.arange(55_000.0), np.zeros(55_000)).mean) == 200
    assert len(band(np.arange(7.0), np.zeros(7)).mean) == 7


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        ('{"iteration": 1}\n', "weights"),
        ("{}}\n", "cannot be read"),
        ("[]\n", "is not an object"),
        (json.dumps(batch(1, [1, 2], [0.5, 0.5], grad_norm=[1])) + "\n", "different lengths"),
        (json.dumps(batch(1, [1, 2], [0.5, 0.5])) + "\n" + json.dumps(batch(2, [1], [1])) + "\n", "of 2 and of 1"),
        (json.dumps({**batch(1, [1, 2], [0.5, 0.5]), "weights": ["a", 0.5]}) + "\n", "damaged"),
        (json.dumps(batch(1, [1, math.nan], [0.5, 0.5])) + "\n", "not a number"),
        (json.dumps(batch(1, [1, 2], [0.5, 1.5])) + "\n", "not between 0 and 1"),
    ],
)
def test_damaged_logs_are_refused(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text(content)
    with pytest.raises(RunError, match=reason) as caught:
        attention_log(tmp_path / "tasks.jsonl")
    assert "tasks.jsonl" in str(caught.value)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "tasks.jsonl", [batch(1, [1, 2], [0.5, 0.5])])
    with (tmp_path / "tasks.jsonl").open("a") as file:
        file.write('{"iteration": 2, "query_l')
    assert attention_log(tmp_path / "tasks.jsonl").batches == 1


def test_curves_by_hand() -> None:
    one = [Validation(2, 0.2), Validation(4, 0.6), Validation(6, 0.5)]
    other = [Validation(2, 0.4), Validation(4, 0.4)]
    curve = mean_curve([one, other])
    assert curve.iterations.tolist() == [2, 4]
    assert curve.values == pytest.approx([0.3, 0.5])
    assert first_reaching(curve, 0.3) == 2
    assert first_reaching(curve, 0.31) == 4
    assert first_reaching(curve, 0.6) is None
    assert first_reaching(mean_curve([]), 0.1) is None
    rounded = mean_curve([[Validation(2, 0.1)], [Validation(2, 0.7)]])
    assert rounded.values[0] < 0.4
    assert first_reaching(rounded, 0.4) == 2


def test_numbers_too_large_to_be_squared_have_no_correlation(tmp_path: Path) -> None:
    write_lines(tmp_path / "t", [batch(1, [1, 2, 3], [0.2, 0.3, 0.5], grad_norm=[1e308, 1.0, -1e308])])
    found = attention_log(tmp_path / "t").correlations["grad_norm"]
    assert found.skipped == 1
    assert math.isnan(found.pooled)


def test_an_input_that_taskinfo_gains_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = measures.inputs_of((*TaskInfo._fields, "query_margin"))
    assert {**inputs} == {**measures.INPUTS, "query_margin": "query margin"}
    monkeypatch.setattr(measures, "INPUTS", inputs)
    weights = [0.1, 0.2, 0.3, 0.4]
    write_lines(tmp_path / "new", [batch(i, [1, 2, 3, 4], weights, query_margin=[4, 3, 2, 1]) for i in range(1, 5)])
    found = attention_log(tmp_path / "new").correlations["query_margin"]
    assert found.per_batch == pytest.approx(-1)
    write_lines(tmp_path / "old", [batch(i, [1, 2, 3, 4], weights) for i in range(1, 5)])
    assert attention_log(tmp_path / "old").correlations["query_margin"].skipped == 4, "earlier logs lack it"
