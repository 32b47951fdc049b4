"""The benchmark: what it compares is equal, what it says of fixed numbers is right. No speed is asserted."""

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import limit, peers, processes, reference, sampling, scaling, speed, table, tasks
from benchmarks.processes import Process, WorkerError
from benchmarks.settings import ALGORITHMS, PEERS, SETTINGS, Setting
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from metaheed.config import default_config
from metaheed.outer import pick_for_run
from metaheed.types import Params
from tests.forked import Subprocess

TINY = Setting("tiny", "tiny", (3, 16, 16), ways=3, shots=2, queries=4, steps=2, tasks=2)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forks of a process that has imported everything, which saves seconds for each."""
    monkeypatch.setattr(processes, "subprocess", Subprocess)


def _installed(name: str) -> Any:
    """The peer's file, importable with the peer: skipped where `make peers` has not been run."""
    return pytest.importorskip(f"benchmarks.peers.{name}", reason=f"{name} is not installed: make peers")


@pytest.fixture(scope="module")
def maml_grads() -> Params:
    return reference.task_gradients(TINY, "maml")


@pytest.mark.parametrize(("name", "algorithm"), [(name, a) for name, offered in PEERS.items() for a in offered])
def test_peer_computes_the_reference(name: str, algorithm: str) -> None:
    """And steps: the second gradient is of another θ, and is not piled upon the first."""
    _installed(name)
    entry = peers.build(name, TINY, algorithm)
    entry.step(0)
    gradient, weights = entry.gradient()
    expected = reference.task_gradients(TINY, algorithm)
    assert reference.difference(gradient, weights, expected) < reference.LARGEST
    entry.step(0)
    assert reference.LARGEST < reference.difference(entry.gradient()[0], weights, expected) < 0.8


def test_second_order_is_told_from_first(maml_grads: Params) -> None:
    first_order = reference.task_gradients(TINY, "fomaml")
    found = {name: g.mean(0) for name, g in first_order.items()}
    assert reference.difference(found, torch.full((2,), 0.5), maml_grads) > 10 * reference.LARGEST


def test_difference(maml_grads: Params) -> None:
    weights = torch.tensor([0.3, 0.7])
    right = {name: 0.3 * g[0] + 0.7 * g[1] for name, g in maml_grads.items()}

    def off(found: Params, w: Tensor = weights) -> float:
        return reference.difference(found, w, maml_grads)

    assert off(right) < 1e-7
    assert off({name: 1.01 * g for name, g in right.items()}) == pytest.approx(0.01, rel=1e-3)
    assert off(right | {"head.bias": torch.zeros(3)}) == pytest.approx(1)
    assert off(right | {"body.0.conv.bias": torch.ones(32)}) == off(right), "exactly zero, but for rounding"
    assert off(right, torch.tensor([0.5, 0.5])) > 0.01
    for wrong in (
        {name: g for name, g in right.items() if name != "head.bias"},
        right | {"head.bias": torch.zeros(4)},
        right | {"head.bias": torch.full((3,), torch.nan)},
    ):
        assert off(wrong) == float("inf")
    assert off(right, torch.tensor([0.6, 1.4])) == float("inf"), "the weights do not sum to 1"


def test_ours_computes_the_reference(tmp_path: Path) -> None:
    """All our algorithms, as they are timed: with the process-wide settings, so in a process of their own."""
    path = tmp_path / "gradient.safetensors"
    with Process() as process:
        for algorithm in ALGORITHMS:
            process.ask("build", entry="ours", algorithm=algorithm, setting=TINY.to_json(), speed_settings=True)
            process.ask("step")
            process.ask("gradient", path=str(path))
            tensors = load_file(path)
            weights = tensors.pop("weights")
            found = {name.removeprefix("gradient."): g for name, g in tensors.items()}
            expected = reference.task_gradients(TINY, algorithm)
            assert reference.difference(found, weights, expected) < reference.LARGEST, algorithm


@pytest.mark.usefixtures("forked")
def test_a_turn_is_steps_until_the_time_is_over() -> None:
    with Process() as process:
        process.ask("build", entry="ours", algorithm="maml", setting=TINY.to_json(), speed_settings=True)
        process.ask("step")
        one = process.ask("turn", seconds=0.0)
        many = process.ask("turn", seconds=0.5)
    assert one["steps"] == 1
    assert one["seconds"] > 0
    assert many["steps"] > 1
    assert 0.5 <= many["steps"] * many["seconds"] < 0.5 + 10 * many["seconds"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_driver_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and a peer twice, each in a process of its own; then the three files."""
    monkeypatch.setattr(speed, "TURN", 0.02)
    monkeypatch.setattr(speed, "MACHINE", 0.01)
    setting = replace(TINY, algorithms=("maml", "ta-maml-reuse"))
    result = speed.run([setting], ["ours", "torch_func"], rounds=2, out=tmp_path)
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    rows = {(r["entry"], r["algorithm"], r["speed_settings"]): r for r in result["rows"]}
    ours = {("ours", algorithm, True) for algorithm in setting.algorithms}
    assert set(rows) == ours | {("torch_func", "maml", False), ("torch_func", "maml", True)}
    for row in rows.values():
        assert row["status"] == "measured", row
        assert row["difference"] < reference.LARGEST
        assert len(row["seconds"]) == len(row["ratios"]) == 2
        assert row["peak_bytes"] > 5e7
        assert row["share_of_limit"] > 0
        assert row["threads"] >= row["torch_threads"] >= 1
    for entry in (("torch_func", "maml", False), ("ours", "ta-maml-reuse", True)):
        assert rows[entry]["baseline"] == "ours maml"
    assert result["versions"]["torch"] == metadata.version("torch")
    assert result["machine"]["flops"] > 0
    text = (tmp_path / "speed.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert text.count("\n| MAML | torch.func, vmap |") == 2
    assert text.count("\n| MAML | metaheed |") == 1, "our MAML runs beside both rows of the peers and is shown once"


class _Wrong(speed.References):
    """References of which one parameter's is a percent too large."""

    def __call__(self, setting: Setting, algorithm: str) -> Params:
        right = reference.task_gradients(setting, algorithm)
        return right | {"head.weight": 1.01 * right["head.weight"]}


@pytest.mark.usefixtures("forked")
def test_wrong_and_missing_entries_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "absent", ("maml",))
    monkeypatch.setitem(speed.DISTRIBUTIONS, "absent", "absent")
    monkeypatch.setitem(table.LABELS, "absent", "Absent")
    chosen = [speed.Key("ours", "maml", True), speed.Key("absent", "maml", False)]
    rows = speed.measure(TINY, chosen, 1, _Wrong(tmp_path))
    speed.add_limits(rows, [TINY], limit.Machine(1e9, 1e9))
    wrong, missing = rows
    assert (wrong.status, wrong.seconds, wrong.ratios) == ("wrong", [], [])
    assert wrong.difference == pytest.approx(0.01, rel=0.1)
    assert missing.status == "missing"
    lines = [table._line(vars(row)) for row in rows]
    assert "wrong: its meta-gradient is" in lines[0]
    assert "absent" in lines[1]
    assert all(line.count("|") == table.HEADER.splitlines()[0].count("|") for line in lines)


def test_a_death_has_a_reason() -> None:
    with Process() as process:
        with pytest.raises(WorkerError, match=r"ConfigError: .*nonsense"):
            process.ask("build", entry="ours", algorithm="nonsense", setting=TINY.to_json(), speed_settings=True)
        with pytest.raises(WorkerError, match="ended with status"):
            process.ask("step")


def _row(entry: str, algorithm: str, given: bool, seconds: list[float]) -> speed.Row:
    row = speed.Row("a", entry, algorithm, given, "1", seconds=seconds, difference=1e-5)
    row.peak_bytes, row.torch_threads, row.threads, row.share_of_limit = 10**9, 2, 3, 0.25
    return row


def test_table_of_fixed_times() -> None:
    rows = [
        _row("ours", "maml", True, [1.0, 2.0, 1.0]),
        _row("ours", "ta-maml", True, [2.0, 4.4, 2.1]),
        _row("higher", "maml", False, [3.0, 6.2, 2.5]),
        _row("iteryne", "maml", False, [4.0, 4.0, 2.0]),
        _row("iteryne", "maml", True, [1.0, 1.0, 1.0]),
    ]
    speed._compare(rows)
    assert rows[2].ratios == pytest.approx([3.0, 3.1, 2.5])
    assert rows[4].ratios == pytest.approx([1.0, 0.5, 1.0])
    values = [vars(row) for row in rows]
    fastest = table.fastest_peer(values)
    assert fastest is not None
    assert fastest["entry"] == "iteryne", "a median of 2 is below one of 3; its row with our settings does not count"
    assert not fastest["speed_settings"]
    assert table.summary(values) == (
        "The fastest peer with its own settings is iteryne: 2.00 (2.00 – 4.00) times. "
        "TA-MAML takes 2.10 (2.00 – 2.20) times the time of our MAML."
    )
    names = [(r["entry"], r["speed_settings"]) for r in table.ordered(values)]
    assert names[:4] == [("ours", True), ("iteryne", False), ("iteryne", True), ("higher", False)]
    assert table._line(values[2]) == (
        "| MAML | higher | 1 | its own | 3.000 (2.500 – 6.200) | 3.00 (2.50 – 3.10) | 1000 | 2 (3) | 25% | 1e-05 |\n"
    )


def test_convolution_by_hand() -> None:
    # 2 images, 3 -> 4 channels, 5×6 outputs of 3·9 multiplications and additions each.
    assert limit.conv_flops(2, 3, 4, 3, 5, 6) == 2 * 4 * 5 * 6 * 27 * 2 == 12960


def _counted(work: Any) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


def test_necessary_work_against_pytorchs_count() -> None:
    """Forward and gradient to the operation; the product is what double backward does, but for the first layer."""
    net, batch = tasks.network(TINY), tasks.stream(TINY, "train")(0)
    images, parameters = len(batch.support_y[0]), list(net.parameters())
    flops, logits = _counted(lambda: net(batch.support_x[0]))
    assert flops == limit.forward(TINY, images).flops
    loss = cross_entropy(logits, batch.support_y[0])
    flops, grads = _counted(lambda: torch.autograd.grad(loss, parameters, create_graph=True))
    assert flops == limit.backward(TINY, images).flops
    along = sum((g * torch.ones_like(g)).sum() for g in grads)
    assert isinstance(along, Tensor)
    flops, _ = _counted(lambda: torch.autograd.grad(along, parameters))
    first = limit.conv_flops(images, 3, 32, 3, 16, 16)
    assert flops - first <= limit.product(TINY, images).flops <= flops


def test_work_of_a_step() -> None:
    both = limit.forward(TINY, 12).plus(limit.backward(TINY, 12))
    inner = limit.forward(TINY, 6).plus(limit.backward(TINY, 6))
    fomaml = limit.step_work(TINY, "fomaml")
    assert fomaml.flops == 2 * (both.flops + 2 * inner.flops)
    maml = limit.step_work(TINY, "maml")
    assert maml.flops - fomaml.flops == 2 * 2 * limit.product(TINY, 6).flops
    start = 2 * limit.forward(TINY, 12).flops
    assert limit.step_work(TINY, "ta-maml").flops == 2 * maml.flops + start
    assert limit.step_work(TINY, "ta-maml-reuse").flops == maml.flops + start
    assert limit.step_work(TINY, "metalstm++").flops > fomaml.flops
    assert limit.Work(6.0, 8.0).seconds(limit.Machine(2.0, 4.0)) == 3.0
    assert limit.Work(6.0, 8.0).seconds(limit.Machine(6.0, 2.0)) == 4.0


def test_lstm_counts_its_coordinates() -> None:
    D = sum(p.numel() for p in tasks.network(TINY).parameters())
    extra = limit.step_work(TINY, "metalstm++").flops - limit.step_work(TINY, "fomaml").flops
    per_coordinate = extra / (TINY.tasks * TINY.steps * D)
    # 4 + 20 inputs to 80 gates, two outputs of 22 inputs; backward twice as much, but once for the 4, constants.
    assert per_coordinate == 2 * (2 * 4 * 80 + 3 * 20 * 80 + 3 * 2 * 22)


@pytest.mark.usefixtures("forked")
def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "BASE", TINY)
    monkeypatch.setitem(scaling.AXES, "tasks", (1, 2))
    monkeypatch.setitem(scaling.AXES, "steps", (1,))
    result = scaling.run(["tasks", "steps"], 1, tmp_path)
    assert [(p["axis"], p["value"], p["algorithm"]) for p in result["points"]] == [
        ("tasks", 1, "maml"),
        ("tasks", 2, "maml"),
        ("steps", 1, "maml"),
        ("steps", 1, "maml-recompute"),
    ]
    several = pick_for_run(default_config("maml"), "auto", torch.device("cpu"), TINY.tasks)
    assert [p["execution"] for p in result["points"]] == ["looped", several, several, several], "as training picks"
    assert json.loads((tmp_path / "scaling.json").read_text()) == result
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert scaling.varied("side", 20).image_shape == (3, 20, 20)
    assert scaling.varied("steps", 7) == Setting.from_json(TINY.to_json() | {"steps": 7})


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--settings", "e"], ["--entries", "nobody"]])
def test_bad_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        speed.main(wrong)
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_settings_are_the_papers() -> None:
    for setting in SETTINGS.values():
        assert Setting.from_json(json.loads(json.dumps(setting.to_json()))) == setting
        assert (setting.queries, setting.steps) == (15, 5)
    assert {name for name, s in SETTINGS.items() if set(ALGORITHMS) <= set(s.algorithms)} == {"a", "c"}


def test_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sampling, "SHARED", {"c": TINY})
    monkeypatch.setattr(sampling, "COUNTS", {"omniglot": (6, 20)})
    options = ["--settings", "c", "--rounds", "2", "--iterations", "2", "--seconds", "0.01", "--images", "20"]
    monkeypatch.setattr(sampling, "ROOT", tmp_path)
    sampling.main(options)
    result = json.loads((tmp_path / "runs" / "bench" / "sampling.json").read_text())  # the evidence is left alone
    assert [row["algorithm"] for row in result["shares"]] == ["maml", "fomaml", "protonet"]
    for row in result["shares"]:
        assert 0 < row["waited_seconds"] < row["iteration_seconds"]
        assert row["alone_seconds"] > 0
        assert len(row["rounds"]) == 2
    ways = result["meta_batches_per_second"]
    assert {"memory", "memory map, warm", "learn2learn's way (image by image)"} <= set(ways)
    assert min(ways.values()) > 0
    assert "benchmarks.sampling --settings c" in result["command"]
    assert "waits" in capsys.readouterr().out
