import subprocess
import sys

import pytest
import torch
from torch import Tensor

from metaheed.outer import (
    FEATURES,
    TaskAttention,
    attention_features,
    stack_gradients,
    weight_gradient,
    weighted_sum,
)
from metaheed.types import TaskInfo

ARCHITECTURES = ("paper", "equivariant")


def _info(tasks: int = 4, dtype: torch.dtype = torch.float32) -> TaskInfo:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.rand(tasks, generator=generator, dtype=dtype) + 0.1 for _ in range(4)]
    return TaskInfo(*draw)


def test_features_in_the_papers_order() -> None:
    info = TaskInfo(*(torch.tensor([v]) for v in (2.0, 0.6, 4.0, 7.0)))
    assert FEATURES == ("grad_norm", "query_loss", "query_accuracy", "loss_ratio")
    torch.testing.assert_close(attention_features(info), torch.tensor([[7.0, 2.0, 0.6, 0.5]]))


def test_no_loss_at_all_gives_finite_weights() -> None:
    info = TaskInfo(torch.tensor([1.0, 0.0]), torch.rand(2), torch.zeros(2), torch.rand(2))
    assert bool(torch.isfinite(attention_features(info)).all())
    assert bool(torch.isfinite(TaskAttention(2)(info)).all())


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_a_distribution(architecture: str, standardize: bool, dtype: torch.dtype) -> None:
    weights = TaskAttention(4, architecture, standardize)(_info(dtype=dtype))
    assert weights.shape == (4,)
    assert weights.dtype == dtype
    assert bool((weights > 0).all())
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=dtype))
    assert float(weights.detach().std()) > 0, "the weights should depend on the tasks"


def test_paper_architecture_by_hand() -> None:
    attention = TaskAttention(4, generator=torch.Generator().manual_seed(0)).double()
    info = _info(dtype=torch.float64)
    p = dict(attention.named_parameters())
    mixed = attention_features(info) @ p["mix.weight"][0, :, 0] + p["mix.bias"]
    hidden = torch.relu(p["layers.0.weight"] @ mixed + p["layers.0.bias"])
    hidden = torch.relu(p["layers.2.weight"] @ hidden + p["layers.2.bias"])
    scores = p["layers.4.weight"] @ hidden + p["layers.4.bias"]
    assert [tuple(p[f"layers.{k}.weight"].shape) for k in (0, 2, 4)] == [(32, 4), (32, 32), (4, 32)]
    torch.testing.assert_close(attention(info), scores.exp() / scores.exp().sum())


@pytest.mark.parametrize("standardize", [False, True])
def test_permuted_tasks_get_permuted_weights(standardize: bool) -> None:
    attention = TaskAttention(architecture="equivariant", standardize=standardize).double()
    info = _info(5, torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = TaskInfo(*(part[order] for part in info))
    torch.testing.assert_close(attention(permuted), attention(info)[order], rtol=1e-12, atol=0)
    assert attention(_info(9, torch.float64)).shape == (9,)


def test_standardised_inputs_do_not_see_scale() -> None:
    attention = TaskAttention(4, standardize=True).double()
    info = _info(dtype=torch.float64)
    scaled = info._replace(grad_norm=1000 * info.grad_norm + 5)
    torch.testing.assert_close(attention(scaled), attention(info))
    alike = TaskInfo(*(torch.full((4,), float(k)) for k in range(1, 5)))
    assert bool(torch.isfinite(attention(alike)).all())
    nearly = info._replace(query_accuracy=torch.full((4,), 0.2666667, dtype=torch.float64))
    shifted = info._replace(query_accuracy=torch.full((4,), 0.9, dtype=torch.float64))
    torch.testing.assert_close(attention(nearly), attention(shifted))  # equal accuracies say nothing, whatever they are


def test_info_is_detached() -> None:
    info = TaskInfo(*(part.requires_grad_() for part in _info()))
    weights = TaskAttention(4)(info)
    weights[0].backward()
    assert all(part.grad is None for part in info)


def test_same_generator_same_start() -> None:
    a, b = (TaskAttention(3, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_bad_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'papr'"):
        TaskAttention(4, "papr")
    with pytest.raises(ValueError, match=r"give tasks=B"):
        TaskAttention()
    with pytest.raises(ValueError, match=r"built for 4 tasks but given 3"):
        TaskAttention(4)(_info(3))
    with pytest.raises(ValueError, match=r"must be a floating-point tensor of shape \(B,\)"):
        TaskAttention(4)(TaskInfo(*(torch.tensor(1.0) for _ in range(4))))


def test_stack_gradients_by_hand() -> None:
    one, two = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])
    for first, second, names in (
        ((one, two), (two, None), ["0", "1"]),
        ({"a": one, "b": two}, {"b": None, "a": two}, ["a", "b"]),
    ):
        stacked = stack_gradients([first, second])
        assert list(stacked) == names
        assert stacked[names[0]].tolist() == [[1, 2], [3, 4]]
        assert stacked[names[1]].tolist() == [[3, 4], [0, 0]], "a parameter that a task does not use"
        assert not any(leaf.requires_grad for leaf in stacked.values())


def test_stack_gradients_refuses_what_cannot_be_stacked() -> None:
    leaf = torch.ones(2)
    with pytest.raises(ValueError, match="at least one task"):
        stack_gradients([])
    with pytest.raises(ValueError, match="same parameters"):
        stack_gradients([{"a": leaf}, {"b": leaf}])
    with pytest.raises(ValueError, match="no task has a gradient of parameter '1'"):
        stack_gradients([(leaf, None), (leaf, None)])


def test_weighted_sum_by_hand() -> None:
    grads = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0, 6.0])}
    summed = weighted_sum(torch.tensor([0.25, 0.75]), grads)
    assert summed["a"].tolist() == [2.5, 3.5]
    assert float(summed["b"]) == 5.75


def test_weight_gradient_by_hand() -> None:
    grads = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0, 6.0])}
    probe = {"a": torch.tensor([1.0, -1.0]), "b": torch.tensor(2.0)}
    found = weight_gradient(grads, probe, lambda G: {n: -0.5 * leaf for n, leaf in G.items()})
    assert found.tolist() == [-0.5 * (1 - 2 + 10), -0.5 * (3 - 4 + 12)]


def test_stands_alone() -> None:
    """The module's file imports torch, the types and nothing else of the package."""
    code = (
        "import sys, importlib.util as u, metaheed.types;"
        "before = {m for m in sys.modules if m.startswith('metaheed')};"
        "from pathlib import Path; import metaheed;"
        "path = Path(metaheed.__file__).parent / 'rules/attention.py';"
        "spec = u.spec_from_file_location('alone', path); module = u.module_from_spec(spec);"
        "spec.loader.exec_module(module);"
        "assert {m for m in sys.modules if m.startswith('metaheed')} == before, sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query_loss": torch.ones(4, dtype=torch.int64)}, r"query_loss is torch.int64 of shape \(4,\), but it must"),
        ({"query_loss": torch.ones(4, 1)}, r"query_loss is torch.float32 of shape \(4, 1\)"),
        ({"query_loss": torch.ones(0)}, r"shape \(0,\), but"),
        ({"query_accuracy": torch.ones(3)}, r"info.query_accuracy is of shape \(3,\), but it must be.*, here 4"),
        ({"grad_norm": torch.ones(())}, r"info.grad_norm is of shape \(\)"),
        ({"initial_loss": None}, r"info.initial_loss is a NoneType"),
    ],
)
def test_what_is_no_batch_is_named(architecture: str, changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskAttention(4, architecture)(_info()._replace(**changed))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_omitted_input_may_be_absent(architecture: str) -> None:
    for omitted, field in (("grad_norm",) * 2, ("query_accuracy",) * 2, ("loss_ratio", "initial_loss")):
        attention = TaskAttention(4, architecture, omit=omitted)
        absent = {field: None}
        assert torch.equal(attention(_info()._replace(**absent)), attention(_info()))  # type: ignore[arg-type]


def test_inside_vmap_the_check_says_how_to_leave_it_out() -> None:
    attention, pair = TaskAttention(4), tuple(torch.stack([value, value]) for value in _info())
    with pytest.raises(ValueError, match="check=False"):
        torch.func.vmap(lambda fields: attention(TaskInfo(*fields)))(pair)
    weights = torch.func.vmap(lambda fields: attention(TaskInfo(*fields), check=False))(pair)
    torch.testing.assert_close(weights[0], attention(_info()))
