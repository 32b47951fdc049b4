"""The examples: `TaskAttention` in other libraries' loops computes what the package's own rule computes.

Both ways in are held, in float64, against the `attended` rule and against plain autograd through a look-ahead.
"""

import gc
import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metaheed.learners import MAML
from metaheed.outer import OuterOptimizer, OuterState, TaskAttention, Tools, adam, attended, looped, sgd
from metaheed.types import Episode, Params
from tests.conftest import ROOT
from tests.reference import assert_close, gradient, maml_query_loss, with_grad

EXAMPLES = ROOT / "examples"
NAMES = ("torch_func", "higher", "torchopt", "learn2learn", "iteryne")
WAYS_IN = ("stacked", "freed")
F64 = torch.float64


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tasks() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("tasks")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(params=NAMES)
def example(request: pytest.FixtureRequest, tasks: ModuleType) -> ModuleType:
    _need(request.param)
    return importlib.import_module(f"attention_{request.param}")


def _need(name: str) -> None:
    module = {"torch_func": "torch.func", "learn2learn": "learn2learn.algorithms.maml"}.get(name, name)
    pytest.importorskip(module, reason=f"{name} is not installed: make peers", exc_type=ImportError)


@pytest.fixture
def batch(tasks: ModuleType) -> Episode:
    sampled: Episode = tasks.sample(torch.Generator().manual_seed(3), F64)
    return sampled


@pytest.fixture
def probe(tasks: ModuleType) -> Episode:
    sampled: Episode = tasks.sample(torch.Generator().manual_seed(4), F64)
    return sampled


class Outcome(NamedTuple):
    """One iteration: what θ and δ were given, and the next θ."""

    weights: Tensor
    outer_gradient: Params
    delta_gradient: Params
    theta: Params


def _network(tasks: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = tasks.network().double()
    return network


def _attention(tasks: ModuleType) -> TaskAttention:
    return TaskAttention(tasks.TASKS, generator=torch.Generator().manual_seed(1)).double()


def _wrapped(name: str, net: nn.Module, tasks: ModuleType) -> Any:
    if name.endswith("learn2learn"):
        return importlib.import_module("learn2learn.algorithms.maml").MAML(net, lr=tasks.FAST_LR)
    if name.endswith("iteryne"):
        return importlib.import_module("iteryne").MAML(net, inner_lr=tasks.FAST_LR, inner_steps=tasks.STEPS)
    return net


def _run(example: ModuleType, way_in: str, tasks: ModuleType, kind: str, batch: Episode, probe: Episode) -> Outcome:
    """The loop of examples/tasks.py, once."""
    net, attention = _network(tasks), _attention(tasks)
    wrapped = _wrapped(example.__name__, net, tasks)
    meta_opt = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind](wrapped.parameters(), lr=tasks.META_LR)
    weights, task_grads = getattr(example, way_in)(wrapped, attention, batch)
    outer = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    meta_opt.step()
    theta = {name: p.detach().clone() for name, p in net.named_parameters()}
    example.attend(wrapped, weights, task_grads, probe)
    assert_close({n: p.detach() for n, p in net.named_parameters()}, theta, rtol=0, atol=0)
    assert_close({n: p.grad for n, p in net.named_parameters() if p.grad is not None}, outer, rtol=0, atol=0)
    delta = {name: p.grad for name, p in attention.named_parameters() if p.grad is not None}
    return Outcome(weights.detach(), outer, delta, theta)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("way_in", WAYS_IN)
def test_example_is_the_attended_rule(
    way_in: str, kind: str, example: ModuleType, tasks: ModuleType, batch: Episode, probe: Episode
) -> None:
    found = _run(example, way_in, tasks, kind, batch, probe)
    seen: list[Params] = []

    def note(params: Params, state: Params, g: Params) -> tuple[Params, Params]:
        seen.append(g)
        return params, state

    learner = MAML(_network(tasks), tasks.STEPS, tasks.FAST_LR)
    meta = learner.init(torch.Generator())
    rule = attended(_attention(tasks), OuterOptimizer(lambda params: {}, note), tasks.META_LR, "sgd")
    optimizer = {"sgd": sgd, "adam": adam}[kind](tasks.META_LR)

    def unused(meta: Params, batch: Episode) -> tuple[Params, Tensor]:
        raise AssertionError

    tools = Tools(looped(learner), unused, optimizer, lambda t: batch, lambda t: probe)
    state, record = rule.step(OuterState(meta, optimizer.init(meta), rule.init(meta)), 0, tools)
    torch.testing.assert_close(found.weights, record.weights.detach(), rtol=1e-10, atol=0)
    assert_close(found.theta, state.meta)
    assert max(float(g.abs().max()) for g in seen[0].values()) > 1e-7, "the comparison would be empty"
    assert_close(found.delta_gradient, seen[0])


@pytest.mark.parametrize("way_in", WAYS_IN)
def test_example_is_autograd_through_the_look_ahead(
    way_in: str, example: ModuleType, tasks: ModuleType, batch: Episode, probe: Episode
) -> None:
    """One graph: δ -> weights -> SGD step -> θ' -> adaptation on the probe batch -> its mean query loss."""
    found = _run(example, way_in, tasks, "sgd", batch, probe)
    net, attention = _network(tasks), _attention(tasks)
    theta = with_grad(dict(net.named_parameters()))
    losses = [maml_query_loss(net, theta, task, tasks.STEPS, tasks.FAST_LR) for task in tasks.split(batch)]
    logits = [functional_call(net, phi, (t.query_x,)) for (_, phi), t in zip(losses, tasks.split(batch), strict=True)]
    infos = [
        tasks.TaskInfo(
            loss,
            (y.argmax(1) == task.query_y).double().mean(),
            nn.functional.cross_entropy(functional_call(net, theta, (task.query_x,)), task.query_y),
            torch.cat([v.flatten() for v in gradient(loss, phi).values()]).norm(),
        )
        for (loss, phi), y, task in zip(losses, logits, tasks.split(batch), strict=True)
    ]
    weights = attention(tasks.collate(infos))
    task_grads = [gradient(loss, theta) for loss, _ in losses]
    combined = {n: torch.stack([w * g[n] for w, g in zip(weights, task_grads, strict=True)]).sum(0) for n in theta}
    ahead = {n: p.detach() - tasks.META_LR * combined[n] for n, p in theta.items()}
    objective = torch.stack(
        [maml_query_loss(net, ahead, task, tasks.STEPS, tasks.FAST_LR)[0] for task in tasks.split(probe)]
    ).mean()
    expected = gradient(objective, dict(attention.named_parameters()))
    assert_close(found.outer_gradient, {n: g.detach() for n, g in combined.items()})
    assert_close(found.theta, {n: p.detach() for n, p in ahead.items()})
    assert_close(found.delta_gradient, expected)


def test_both_ways_agree(example: ModuleType, tasks: ModuleType, batch: Episode, probe: Episode) -> None:
    stacked, freed = (_run(example, way_in, tasks, "adam", batch, probe) for way_in in WAYS_IN)
    assert_close(stacked.outer_gradient, freed.outer_gradient)
    assert_close(stacked.delta_gradient, freed.delta_gradient)


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The storages of all results of all operations that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.seen |= {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}  # type: ignore[no-untyped-call]
        return result

    def alive(self) -> int:
        self.seen = {reference for reference in self.seen if not reference.expired()}  # type: ignore[no-untyped-call]
        return len(self.seen)


@pytest.fixture
def _frozen() -> Iterator[None]:
    """Collections within the test look only at what the test makes: each takes a fraction of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_frozen")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "torch_func"])  # that stacks by vmap
def test_freed_keeps_one_graph(name: str, tasks: ModuleType, batch: Episode, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a task begins, of those before it only gradients and infos are left; all graphs where losses are stacked."""
    _need(name)
    example = importlib.import_module(f"attention_{name}")
    query, growth = example.query, {}
    for way_in in WAYS_IN:
        at_start: list[int] = []
        wrapped, attention = _wrapped(name, _network(tasks), tasks), _attention(tasks)
        with _Storages() as storages:

            def counting(*arguments: Any, storages: _Storages = storages, at_start: list[int] = at_start) -> Any:
                gc.collect()
                at_start.append(storages.alive())
                return query(*arguments)

            monkeypatch.setattr(example, "query", counting)
            getattr(example, way_in)(wrapped, attention, batch)
        growth[way_in] = [after - before for before, after in pairwise(at_start)]
    left = len([*wrapped.parameters()]) + len(tasks.TaskInfo._fields)
    assert growth["freed"][1:] == [left] * (tasks.TASKS - 2)
    assert growth["freed"][0] < 2 * left, "beside them a few scalars, but no graph, of the last task"
    assert min(growth["stacked"]) > 3 * left


@pytest.mark.parametrize("name", NAMES)
def test_script_runs(name: str, tasks: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """As `python examples/attention_NAME.py` runs it, in a process that has imported PyTorch."""
    _need(name)
    runpy.run_path(str(EXAMPLES / f"attention_{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    pairs = re.findall(r"^(\w+): query loss ([\d.]+) .* ([\d.]+) over the last$", printed, flags=re.MULTILINE)
    assert [way_in for way_in, _, _ in pairs] == [*WAYS_IN]
    assert pairs[0][1:] == pairs[1][1:], "both ways train alike"
    assert float(pairs[0][2]) < float(pairs[0][1]), "and learn"


@pytest.mark.parametrize("name", NAMES)
def test_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"attention_{name}.py").read_text().splitlines()) < 60


def test_guide_quotes_the_examples() -> None:
    """The two ways in and the attention update of docs/attention.md stand in an example, indentation aside."""
    code = "\n".join(_unindented(path.read_text()) for path in sorted(EXAMPLES.glob("*.py")))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attention.md").read_text(), flags=re.DOTALL)
    quoted = [block for block in blocks if "import " not in block]
    assert len(quoted) == 3
    for block in quoted:
        assert _unindented(block) in code, block


def _unindented(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines() if line.strip())
