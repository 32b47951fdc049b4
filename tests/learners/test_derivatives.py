import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp

from metaheed.learners import ANIL, MAML, Conv4, Learner, MetaLSTM, MetaSGD
from metaheed.outer import looped, vectorized
from metaheed.types import Params
from tests.conftest import ROOT, make_batch
from tests.networks import Tiny

SHAPE = (1, 16, 16)


@pytest.mark.parametrize("network", [Tiny, Conv4])
@pytest.mark.parametrize("kind", [MAML, MetaSGD, ANIL, MetaLSTM])
def test_steps_computed_again_give_the_same(kind: type, network: type) -> None:
    batch = make_batch(2, 3, 1, 2, SHAPE)
    results, module = [], network(3, SHAPE)
    for recompute in (False, True):
        learner: Learner = kind(module, adaptation_steps=3, recompute=recompute)
        meta = {n: p.double() for n, p in learner.init(torch.Generator().manual_seed(0)).items()}
        results.append([looped(learner)(meta, batch), vectorized(learner)(meta, batch)])
    for kept, again in zip(*results, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("network", [Tiny, Conv4])
def test_steps_computed_again_are_followed_where_their_graph_is_wanted_for_other_ends(network: type) -> None:
    module, images = network(3, SHAPE), make_batch(1, 3, 1, 2, SHAPE)
    x, y = images.support_x[0], images.support_y[0]
    results = []
    for recompute in (False, True):
        learner = MAML(module, adaptation_steps=2, recompute=recompute)
        meta = {n: p.double() for n, p in learner.init(torch.Generator().manual_seed(0)).items()}

        def size(x: Tensor, learner: Learner = learner, meta: Params = meta) -> Tensor:
            return torch.stack([p.square().sum() for p in learner.adapt(meta, x, y).values()]).sum()

        at = x.clone().requires_grad_()
        (by_autograd,) = torch.autograd.grad(size(at), at)
        ones = {n: torch.ones_like(p) for n, p in meta.items()}
        adapt = partial(learner.adapt, support_x=x, support_y=y)
        forward = jvp(lambda meta, adapt=adapt: adapt(meta), (meta,), (ones,))[1]
        results.append((by_autograd, grad(size)(x), forward))
    assert results[0][0].abs().max() > 0
    torch.testing.assert_close(results[1], results[0])


SCRIPT = """
import json, sys, torch
from metaheed.learners import MAML, Conv4
from metaheed.outer import task_gradient
from metaheed.types import Episode
torch.set_num_threads(1)
general, peaks = sys.argv[1] == "general", []
class Own(Conv4):
    pass
x, y = torch.randn(10, 3, 64, 64), torch.arange(5).repeat(2)
for recompute, steps in ((True, 1), (True, 7), (False, 7)):
    learner = MAML((Own if general else Conv4)(5, (3, 64, 64)), adaptation_steps=steps, recompute=recompute)
    meta = learner.init(torch.Generator().manual_seed(0))
    task_gradient(learner, meta, Episode(x, y, x, y))
    status = dict(line.split(':') for line in open('/proc/self/status').read().splitlines())
    peaks.append(int(status['VmHWM'].split()[0]) / 1024)
print(json.dumps([peaks[1] - peaks[0], peaks[2] - peaks[1]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("network", ["closed", "general"])
def test_memory_is_flat_in_the_number_of_steps(network: str) -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT, network], capture_output=True, text=True, check=True, cwd=ROOT)
    recomputed, kept = json.loads(out.stdout)
    # Six steps more, of which each keeps more than 15 MB; a network on its first use leaves some behind.
    assert recomputed < 80
    assert kept > 75
