import copy
import warnings

import pytest
import torch
from torch import nn

from metaheed.errors import ConfigError
from metaheed.learners import MAML, Conv4, build_backbone
from metaheed.outer import task_gradient
from tests.conftest import make_batch, task
from tests.networks import Tiny, WithDropout, WithStatistics


@pytest.mark.parametrize(
    ("ways", "shape", "hidden", "parameters"),
    [
        (5, (3, 84, 84), 32, 32_901),  # the paper's network
        (5, (3, 84, 84), 64, 121_093),
        (5, (1, 28, 28), 32, 28_485),
        (5, (3, 32, 32), 32, 29_541),
    ],
)
def test_conv4_has_the_fields_size(ways: int, shape: tuple[int, int, int], hidden: int, parameters: int) -> None:
    network = Conv4(ways, shape, hidden=hidden)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(2 * ways, *shape)).shape == (2 * ways, ways)


def test_strided_conv4_is_finns() -> None:
    network = Conv4(20, (1, 28, 28), hidden=64, downsample="stride")
    assert not any(isinstance(part, nn.MaxPool2d) for part in network.modules())
    assert network.head.in_features == 64
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 20)


def test_conv4_refuses_what_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"16 pixels a side, but got 15×28"):
        Conv4(5, (1, 15, 28))
    with pytest.raises(ConfigError, match=r"'pol'.*did you mean 'pool'"):
        Conv4(5, (1, 28, 28), downsample="pol")  # type: ignore[arg-type]


def test_own_backbones_are_redrawn_from_the_generator() -> None:
    learner = MAML(Conv4(5, (1, 28, 28)))
    one, two, three = (learner.init(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["head.weight"], three["head.weight"])


def test_a_users_weights_are_copied() -> None:
    network = Tiny(3, (1, 16, 16))
    meta = MAML(network).init(torch.Generator().manual_seed(1))
    assert list(meta) == [name for name, _ in network.named_parameters()]
    for name, p in network.named_parameters():
        assert torch.equal(meta[name], p)
        assert meta[name].data_ptr() != p.data_ptr()


def test_running_statistics_become_batch_statistics_on_a_copy() -> None:
    network = WithStatistics(3, (1, 16, 16))
    before = copy.deepcopy(network.state_dict())
    with pytest.warns(UserWarning, match=r"running statistics of 2 "):
        learner = MAML(network, adaptation_steps=2)
    plain = Tiny(3, (1, 16, 16))
    plain.load_state_dict(network.state_dict(), strict=False)
    meta = learner.init(torch.Generator())
    episode = task(make_batch(1, 3, 1, 4, (1, 16, 16), torch.float32), 0)
    g, _ = task_gradient(learner, meta, episode)
    expected, _ = task_gradient(MAML(plain, adaptation_steps=2), meta, episode)
    assert all(torch.equal(g[n], expected[n]) for n in g)
    after = network.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert network[2].track_running_stats


def test_no_warning_where_nothing_is_converted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MAML(Tiny(3, (1, 16, 16)))


def test_dropout_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"'7' has dropout 0\.5.*set its rate to 0 or remove it"):
        MAML(WithDropout(3, (1, 16, 16)))
    with pytest.raises(ConfigError, match=r"dropout 0\.1"):
        MAML(nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1)))
    MAML(nn.Sequential(Tiny(3, (1, 16, 16)), nn.Dropout(0.0)))


def test_tied_weights_are_refused_with_the_remedy() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    with pytest.raises(ConfigError, match=r"'0.weight' and '1.weight' are one tied tensor.*give each its own"):
        MAML(network)


def test_unusable_modules_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no shape yet: run the network once"):
        MAML(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ConfigError, match=r"nothing to learn"):
        MAML(nn.Flatten())
    with pytest.raises(ConfigError, match=r"an instance, not a class"):
        MAML(Tiny)  # type: ignore[arg-type]


def test_frozen_parameters_stay_constants() -> None:
    network = Tiny(3, (1, 16, 16))
    network[1].weight.requires_grad_(False)
    learner = MAML(network, adaptation_steps=1)
    meta = {n: p.double() for n, p in learner.init(torch.Generator()).items()}
    assert "1.weight" not in meta
    g, _ = task_gradient(learner, meta, task(make_batch(1, 3, 1, 2, (1, 16, 16)), 0))
    assert g.keys() == meta.keys()


def test_networks_by_name() -> None:
    assert isinstance(build_backbone("conv4-64", 5, (1, 28, 28), 0), Conv4)
    one, two, three = (build_backbone("tests.networks:Tiny", 5, (1, 28, 28), seed) for seed in (1, 1, 2))
    assert torch.equal(one[1].weight, two[1].weight)  # type: ignore[index]
    assert not torch.equal(one[1].weight, three[1].weight)  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conv4-46", r"unknown backbone 'conv4-46': did you mean 'conv4-64'"),
        ("no_such_module:Net", r"importing 'no_such_module' failed with ModuleNotFoundError.*backbone_path"),
        ("tests.networks:Tinny", r"has no class or function 'Tinny'"),
        ("tests.networks:WrongWays", r"output of shape \(10, 6\), but it must be \(10, 5\)"),
        ("math:sqrt", r"failed with TypeError"),
    ],
)
def test_bad_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(name, 5, (1, 28, 28), 0)


def test_bad_settings_are_refused() -> None:
    for wrong in ({"adaptation_steps": 0}, {"fast_lr": -0.1}, {"fast_lr": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MAML(Tiny(3, (1, 16, 16)), **wrong)
