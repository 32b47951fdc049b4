"""What a CUDA device makes of the package: is it right, how fast, does its memory stay flat. Self-contained.

    PYTHONPATH=src python benchmarks/on_cuda.py --out cuda.json                    all four parts
    PYTHONPATH=src python benchmarks/on_cuda.py --parts speed --settings a         one of them
    PYTHONPATH=src python benchmarks/on_cuda.py --device cpu --quick               that the script itself works

1. correctness: per-task and combined gradients in float32 on the device against the CPU's in float32 and float64, every
   learner, and of MAML every execution and rule. Relative: ‖g − g_cpu‖/‖g_cpu‖ over all parameters.
2. capture: steps captured against steps one by one on the device, bit for bit, every learner and rule.
3. speed: iterations a second, captured and not, float32 and TF32, of every execution; learn2learn's beside them where
   it is installed.
4. memory: what is held after 100 and after 1,000 captured iterations.

Results are written after each measurement, so that a run that is cut off leaves those made.

The file is not called cuda.py: PyTorch imports a package of that name, and a script's own folder is searched first.
"""

import argparse
import gc
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from metaheed.data import Episodes
from metaheed.data.images import Dataset, make_split
from metaheed.learners import ANIL, BOIL, MAML, Conv4, Learner, MetaLSTM, MetaSGD, ProtoNet
from metaheed.outer import (
    Buffered,
    Execution,
    OneByOne,
    OuterOptimizer,
    OuterState,
    Rule,
    Steps,
    Streams,
    TaskAttention,
    Tools,
    adam,
    attended,
    gradient_without_initial_loss,
    initial_gradient,
    loss_softmax,
    map_im2col,
    map_looped,
    map_streamed,
    map_together,
    map_vectorized,
    replayed,
    sequential,
    task_gradient,
    uniform,
    uniform_2b,
)
from metaheed.rules.equity import equity
from metaheed.running.process import float32_products, make_deterministic
from metaheed.types import Params

PAPER_ITERATIONS = 55_000


class Setting(NamedTuple):
    """Images, tasks, network."""

    shape: tuple[int, int, int]
    ways: int
    shots: int
    queries: int
    steps: int
    tasks: int
    hidden: int = 32


SETTINGS = {
    "a": Setting((3, 84, 84), 5, 1, 15, 5, 4),
    "b": Setting((3, 84, 84), 5, 5, 15, 5, 4),
    "omniglot": Setting((1, 28, 28), 20, 1, 15, 5, 16),
    "cifar": Setting((3, 32, 32), 5, 1, 15, 5, 4),
    "checked": Setting((3, 84, 84), 5, 1, 5, 5, 2),
    "quick": Setting((1, 16, 16), 3, 1, 2, 1, 2, hidden=4),
}
EXECUTIONS: dict[str, Callable[[Learner, Callable[..., Any]], Execution[Any]]] = {
    "vectorized": map_together,
    "vectorized, by autograd": lambda learner, function: map_vectorized(partial(function, learner)),
    "im2col, by autograd": lambda learner, function: map_im2col(partial(function, learner)),
    "streamed": lambda learner, function: map_streamed(partial(function, learner)),
    "looped": lambda learner, function: map_looped(partial(function, learner)),
}
LEARNERS: dict[str, Callable[..., Learner]] = {
    "maml": lambda net, T: MAML(net, adaptation_steps=T, fast_lr=0.01),
    "fomaml": lambda net, T: MAML(net, adaptation_steps=T, fast_lr=0.01, first_order=True),
    "metasgd": lambda net, T: MetaSGD(net, adaptation_steps=T, fast_lr=0.01),
    "metalstm": lambda net, T: MetaLSTM(net, adaptation_steps=T),
    "anil": lambda net, T: ANIL(net, adaptation_steps=T, fast_lr=0.01),
    "boil": lambda net, T: BOIL(net, adaptation_steps=T, fast_lr=0.01),
    "protonet": lambda net, T: ProtoNet(net),
}


def _attended(tasks: int, **options: Any) -> Rule:
    attention = TaskAttention(tasks, generator=torch.Generator().manual_seed(2))
    return attended(attention, options.pop("step", adam(1e-3)), 1e-3, **options)


RULES: dict[str, Callable[[int], Rule]] = {
    "uniform": lambda B: uniform(),
    "attended": _attended,
    "attended, probe reused": lambda B: _attended(B, reuse_probe=True),
    "attended, J of Adam": lambda B: _attended(B, jacobian="optimizer"),
    "equity": lambda B: equity(0.1),
    "sequential": lambda B: sequential(),
    "uniform-2b": lambda B: uniform_2b(),
    "loss-softmax": lambda B: loss_softmax(),
    "replayed": lambda B: replayed(torch.rand(64, B, generator=torch.Generator().manual_seed(1)), 0),
}


class Bench:
    """The device, the data of each setting, and the results so far."""

    def __init__(self, device: torch.device, out: Path, quick: bool) -> None:
        self.device, self.out, self.quick = device, out, quick
        self.results: list[dict[str, Any]] = []
        self._data: dict[tuple[Setting, torch.device], Streams] = {}
        self.about = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        }

    def note(self, part: str, **values: Any) -> None:
        """Keep, print and write a result."""
        self.results.append({"part": part, **values})
        if values.get("passed") is not True:
            print(part, json.dumps(values), flush=True)
        self.out.write_text(json.dumps({"about": self.about, "results": self.results}, indent=1) + "\n")

    def streams(self, setting: Setting, device: torch.device) -> Streams:
        """Random images with a mark of their class, the same on every device."""
        if (setting, device) not in self._data:
            rng = np.random.default_rng(0)
            per_class = setting.shots + setting.queries + 4
            images = []
            for _ in range(setting.ways + 12):
                mark = rng.integers(0, 200, setting.shape)
                noise = rng.integers(0, 56, (per_class, *setting.shape))
                images.append((mark + noise).astype(np.uint8))
            split = make_split("train", [str(k) for k in range(len(images))], images)
            dataset = Dataset("random", {"train": split}, (0.5,) * setting.shape[0], (0.25,) * setting.shape[0])
            train, probe = (
                Episodes(dataset.to(device), "train", setting.ways, setting.shots, setting.queries, 0, stream=name)
                for name in ("train", "probe")
            )
            self._data[setting, device] = Streams(train, probe, setting.tasks)
        return self._data[setting, device]

    def learner(self, name: str, setting: Setting) -> Learner:
        """On Conv4."""
        return LEARNERS[name](Conv4(setting.ways, setting.shape, hidden=setting.hidden), setting.steps)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def start(
    learner: Learner, rule: Rule, optimizer: OuterOptimizer, device: torch.device, dtype: torch.dtype
) -> OuterState:
    meta = {n: p.to(device, dtype) for n, p in learner.init(torch.Generator().manual_seed(0)).items()}
    return OuterState(meta, optimizer.init(meta), rule.init(meta))


def tools_of(learner: Learner, execution: str, optimizer: OuterOptimizer, streams: Streams) -> Tools:
    run = partial(EXECUTIONS[execution], learner)
    return Tools(
        gradients=run(task_gradient),
        initial_gradients=run(initial_gradient),
        optimizer=optimizer,
        train=lambda t: streams.batch("training", t),
        probe=lambda t: streams.batch("probe", t),
        gradients_without_initial_loss=run(gradient_without_initial_loss),
    )


def distance(found: Params, expected: Params) -> float:
    """‖found − expected‖/‖expected‖ over all leaves."""
    a, b = (torch.cat([tree[n].double().cpu().flatten() for n in expected]) for tree in (found, expected))
    return float((a - b).norm() / b.norm())


def correctness(bench: Bench, setting: Setting) -> None:
    """Gradients of every task, and the combined ones of every rule."""
    cpu = torch.device("cpu")
    places = {"cpu64": (cpu, torch.float64), "cpu32": (cpu, torch.float32), "device": (bench.device, torch.float32)}

    def compare(what: dict[str, Any], compute: Callable[[torch.device, torch.dtype, str], list[Params]]) -> None:
        double, single = (compute(*places[place], "looped") for place in ("cpu64", "cpu32"))
        rounding = max(map(distance, single, double))
        for execution in EXECUTIONS if what == {"learner": "maml", "rule": "each task"} else ["vectorized"]:
            found = compute(*places["device"], execution)
            errors = {f"to_{n}": max(map(distance, found, e)) for n, e in (("cpu32", single), ("cpu64", double))}
            passed = min(errors.values()) <= 1e-4
            bench.note("correctness", **what, execution=execution, **errors, cpu32_to_cpu64=rounding, passed=passed)

    for name in LEARNERS:
        learner = bench.learner(name, setting)

        def per_task(
            device: torch.device, dtype: torch.dtype, execution: str, learner: Learner = learner
        ) -> list[Params]:
            meta = start(learner, uniform(), adam(1e-3), device, dtype).meta
            batch = bench.streams(setting, device).batch("training", 0)
            grads, _ = EXECUTIONS[execution](learner, task_gradient)(meta, batch)
            return [{n: g[task] for n, g in grads.items()} for task in range(setting.tasks)]

        compare({"learner": name, "rule": "each task"}, per_task)
    for name, rule in [("maml", rule) for rule in (["attended"] if bench.quick else RULES)]:
        learner = bench.learner(name, setting)

        def combined(
            device: torch.device, dtype: torch.dtype, execution: str, learner: Learner = learner, rule: str = rule
        ) -> list[Params]:
            seen: list[Params] = []

            def note(meta: Params, state: Params, gradient: Params) -> tuple[Params, Params]:
                seen.append(gradient)
                return meta, state

            still = OuterOptimizer(lambda meta: {}, note)
            chosen = RULES[rule](setting.tasks)
            streams = bench.streams(setting, device)
            state = start(learner, chosen, still, device, dtype)
            chosen.step(state, 0, tools_of(learner, execution, still, streams))
            return seen[:1] if rule == "attended, J of Adam" else seen  # its pullback steps once more

        compare({"learner": name, "rule": rule}, combined)
    passed = [result["passed"] for result in bench.results if result["part"] == "correctness"]
    print(f"correctness: {sum(passed)} of {len(passed)} are within 1e-4 of the CPU", flush=True)


def steps_of(
    bench: Bench, setting: Setting, learner: str, rule: str, execution: str, captured: bool, block: int
) -> tuple[Steps, list[str]]:
    """A run's steps, and what was noticed of them."""
    made, chosen, optimizer = bench.learner(learner, setting), RULES[rule](setting.tasks), adam(1e-3)
    streams, notices = bench.streams(setting, bench.device), list[str]()
    tools = tools_of(made, execution, optimizer, streams)
    state = start(made, chosen, optimizer, bench.device, torch.float32)
    if not captured:
        return OneByOne(chosen, tools, streams, state), notices
    return Buffered(chosen, tools, streams, state, block, bench.device.type == "cuda", notices.append), notices


def advance(steps: Steps, t: int, until: int) -> list[list[float]]:
    """Make steps t … until−1; the losses and weights of each."""
    seen: list[list[float]] = []
    while t + len(seen) < until:
        first = t + len(seen)
        count = min(until - first, steps.block)
        seen += [[*r.info.query_loss.tolist(), *r.weights.tolist()] for r in steps.advance(first, count, lambda: False)]
    return seen


def capture(bench: Bench, setting: Setting) -> None:
    """Seven steps captured in blocks of three, against seven one by one."""
    pairs = [*((name, "attended") for name in LEARNERS), *(("maml", rule) for rule in RULES)]
    if bench.quick:
        pairs = [("anil", "attended, probe reused")]
    for (learner, rule), execution in ((p, e) for p in dict.fromkeys(pairs) for e in EXECUTIONS):
        if execution != "vectorized" and (learner, rule) != ("maml", "attended"):
            continue
        plain, _ = steps_of(bench, setting, learner, rule, execution, False, block=3)
        again, _ = steps_of(bench, setting, learner, rule, execution, False, block=3)
        blocks, notices = steps_of(bench, setting, learner, rule, execution, True, block=3)
        records = [advance(s, 0, 7) for s in (plain, again, blocks)]
        bench.note(
            "capture",
            learner=learner,
            rule=rule,
            execution=execution,
            notices=notices,
            records_equal=records[2] == records[0],
            state_equal=_equal(blocks.state, plain.state),
            plain_repeats_itself=records[1] == records[0] and _equal(again.state, plain.state),
            distance=distance(blocks.state.meta, plain.state.meta),
        )
        for steps in (plain, again, blocks):
            steps.close()


def _equal(a: OuterState, b: OuterState) -> bool:
    return all(torch.equal(one[n], other[n]) for one, other in zip(a, b, strict=True) for n in one)


class Variant(NamedTuple):
    """What is timed on a setting."""

    learner: str
    rule: str
    execution: str = "vectorized"
    captured: bool = True
    tf32: bool = False


def speed(bench: Bench, names: list[str], seconds: float) -> None:
    """Iterations a second, validations and checkpoints aside; what counts most first, for a run may be cut off."""
    peers: dict[str, float | None] = {}
    for name, variant in _timed(names, bench.quick):
        setting = SETTINGS[name]
        if name not in peers:
            peers[name] = peer = learn2learn_rate(bench, setting, seconds)
            if peer is not None:
                bench.note("speed", setting=name, rule="uniform", library="learn2learn", per_second=peer)
        values = {"setting": name, **variant._asdict()}
        with float32_products(variant.tf32):
            block = 4 if bench.quick else 50
            steps, notices = steps_of(
                bench, setting, variant.learner, variant.rule, variant.execution, variant.captured, block
            )
            try:
                rate, peak = _rate(bench, steps, seconds)
            except torch.OutOfMemoryError as error:
                bench.note("speed", **values, out_of_memory=str(error).partition("\n")[0])
                continue
            finally:
                steps.close()
                del steps
                gc.collect()
        minutes, peer = PAPER_ITERATIONS / rate / 60, peers[name]
        times = {"times_learn2learn": rate / peer} if peer and variant[:2] == ("maml", "uniform") else {}
        bench.note(
            "speed", **values, per_second=rate, minutes_of_55000=minutes, peak_gib=peak, notices=notices, **times
        )


def _timed(names: list[str], quick: bool) -> Iterator[tuple[str, Variant]]:
    """Settings and what is timed there; the first setting shows what all else changes."""
    first, attended = names[0], Variant("maml", "attended")
    if quick:
        for execution in EXECUTIONS:
            yield first, attended._replace(execution=execution)
            yield first, attended._replace(execution=execution, captured=False)
        return
    rules = ("attended", "uniform", "attended, probe reused")
    yield from ((first, Variant("maml", rule, tf32=tf32)) for tf32 in (False, True) for rule in rules)
    yield from ((name, Variant("maml", rule)) for name in names[1:] for rule in rules)
    yield from ((first, Variant(learner, "attended")) for learner in ("metasgd", "metalstm", "fomaml"))
    yield first, attended._replace(captured=False)
    yield from (
        (first, attended._replace(execution=execution)) for execution in EXECUTIONS if execution != "vectorized"
    )


def _rate(bench: Bench, steps: Steps, seconds: float) -> tuple[float, float | None]:
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
    block = max(steps.block, 2 if bench.quick else 10)
    done = 1 + block
    advance(steps, 0, 1)  # the first is by itself
    advance(steps, 1, done)  # and with the second comes the capture
    bench.synchronize()
    first, since = done, time.perf_counter()
    while done == first or time.perf_counter() - since < seconds:
        advance(steps, done, done + block)
        done += block
    bench.synchronize()
    rate = (done - first) / (time.perf_counter() - since)
    peak = torch.cuda.max_memory_reserved(bench.device) / 2**30 if bench.device.type == "cuda" else None
    return rate, peak


def learn2learn_rate(bench: Bench, setting: Setting, seconds: float) -> float | None:
    """MAML as learn2learn's own examples write it, on the same network and tasks; none: it is not installed."""
    # The folder of this file holds one called learn2learn, which says how that library is packed.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    try:
        from learn2learn.algorithms import maml as peer
    except ImportError:
        return None
    network = Conv4(setting.ways, setting.shape, hidden=setting.hidden).to(bench.device)
    maml = peer.MAML(network, lr=0.01, first_order=False)
    optimizer = torch.optim.Adam(maml.parameters(), 1e-3)
    streams = bench.streams(setting, bench.device)

    def iteration(t: int) -> None:
        optimizer.zero_grad()
        for support_x, support_y, query_x, query_y in zip(*streams.batch("training", t), strict=True):
            learner = maml.clone()
            for _ in range(setting.steps):
                learner.adapt(F.cross_entropy(learner(support_x), support_y))
            torch.autograd.backward(F.cross_entropy(learner(query_x), query_y) / setting.tasks)
        optimizer.step()

    for t in range(3):
        iteration(t)
    bench.synchronize()
    done, since = 3, time.perf_counter()
    while done == 3 or time.perf_counter() - since < seconds:
        iteration(done)
        done += 1
        bench.synchronize()
    return (done - 3) / (time.perf_counter() - since)


def memory(bench: Bench, setting: Setting) -> None:
    """What is held after some captured iterations, and after many more."""
    few, many = (20, 40) if bench.quick else (100, 1000)
    for rule in ("attended",) if bench.quick else ("attended", "attended, probe reused"):
        steps, notices = steps_of(bench, setting, "maml", rule, "vectorized", True, block=few // 2)
        held, t = [], 0
        for until in (few, many):
            advance(steps, t, until)
            t = until
            gc.collect()
            bench.synchronize()
            on_device = torch.cuda.memory_reserved(bench.device) if bench.device.type == "cuda" else 0
            held.append((on_device / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
        steps.close()
        bench.note(
            "memory",
            rule=rule,
            iterations=[few, many],
            device_mib=[on_device for on_device, _ in held],
            host_peak_mib=[host for _, host in held],
            notices=notices,
            flat=held[1][0] == held[0][0],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", default=["correctness", "capture", "speed", "memory"])
    parser.add_argument("--settings", nargs="+", default=["a", "omniglot", "cifar", "b"], choices=SETTINGS)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement of speed")
    parser.add_argument("--out", type=Path, default=Path("cuda.json"))
    parser.add_argument("--quick", action="store_true", help="small tasks and few of each, to try the script")
    given = parser.parse_args()
    make_deterministic()  # as the command line does
    bench = Bench(torch.device(given.device), given.out, given.quick)
    small = SETTINGS["quick" if given.quick else "checked"]
    names, seconds = (["quick"], 0.05) if given.quick else (given.settings, given.seconds)
    parts: dict[str, Callable[[], None]] = {
        "correctness": lambda: correctness(bench, small),
        "capture": lambda: capture(bench, small),
        "speed": lambda: speed(bench, names, seconds),
        "memory": lambda: memory(bench, small if given.quick else SETTINGS["a"]),
    }
    for part in given.parts:
        with float32_products(False):
            parts[part]()


if __name__ == "__main__":
    main()
