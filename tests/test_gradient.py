"""Selection by gradient: the choice of the dense gradient, without the dense gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from adapted import NAMES, TARGETS, Model, Unchanged
from test_memory import allocations
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels import gradient

Batch = tuple[Tensor, Tensor]


def batches(count: int = 3, dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2, 5, 6, generator=generator).to(dtype),
            torch.randn(2, 5, 4, generator=generator).to(dtype),
        )
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    x, target = batch
    return F.mse_loss(model(x), target)


def dense_gradients(model: nn.Module, data: list[Batch], function=loss) -> dict[str, Tensor]:
    """What autograd leaves in ``weight.grad``, in magnitude."""
    for batch in data:
        function(model, batch).backward()
    return {
        name: module.weight.grad.abs()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def gathered(model: nn.Module, data, function=loss, **options) -> dict[str, Tensor]:
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = gradient.each_gradient(model, linears, data, function, **options)
    return {name: magnitude.clone() for name, magnitude in found}


@pytest.mark.parametrize("score_bytes", [1, 4 * 2 * 72, 1 << 30], ids=["one", "two", "all"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_the_gradients_are_those_of_autograd(frozen, score_bytes):
    expected = dense_gradients(Model(), batches())
    model = Model().requires_grad_(not frozen)
    with Unchanged(model):
        found = gathered(model, batches(), score_bytes=score_bytes)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_double_precision_stays():
    data = batches(dtype=torch.float64)
    found = gathered(Model(dtype=torch.float64), data)
    for name, expected in dense_gradients(Model(dtype=torch.float64), data).items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-15)


def test_sixteen_bits_are_summed_in_float32():
    data = batches(dtype=torch.bfloat16)
    found = gathered(Model(dtype=torch.bfloat16), data)
    exact = dense_gradients(
        Model(dtype=torch.bfloat16).double(), [(x.double(), t.double()) for x, t in data]
    )
    for name, expected in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("score_bytes", [1, 1 << 30])
def test_the_largest_gradients_are_chosen(score_bytes):
    dense = dense_gradients(Model(dtype=torch.float64), batches(dtype=torch.float64))
    model = Model(dtype=torch.float64)
    config = nk.NeuroAdaConfig(
        k=2, target_modules=TARGETS, selection="gradient", k_pattern={"up": 3}
    )
    summary = nk.adapt(
        model, config, data=batches(dtype=torch.float64), loss=loss, score_bytes=score_bytes
    )
    assert summary.modules == tuple(NAMES)
    for name in NAMES:
        layer = model.get_submodule(name)
        k = 3 if name.endswith("up") else 2
        chosen = layer.index.sort(1).values
        assert torch.equal(chosen, nk.select(layer.weight, k, scores=dense[name]))
        assert not torch.equal(chosen, nk.select(layer.weight, k))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.delta" for name in NAMES}


def test_a_share_of_the_neurons_is_drawn_as_elsewhere():
    def chosen(**options) -> Tensor:
        model = Model()
        nk.adapt(model, 2, ["blocks.0.up"], neuron_fraction=0.5, seed=3, **options)
        return (model.blocks[0].up.index < 0).all(1)

    expected = chosen()
    assert expected.sum() == 6
    assert torch.equal(chosen(selection="gradient", data=batches(), loss=loss), expected)


class Twice(nn.Module):
    """One linear in two places, called by keyword in one, and changed in place after."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6)
        self.other = self.inner
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(input=x).relu_()
        return self.head(self.other(x).mul_(2))


def test_all_calls_of_a_module_count():
    expected = dense_gradients(Twice(), batches())
    found = gathered(Twice(), batches())
    for name in ("inner", "head"):
        torch.testing.assert_close(found[name], expected[name])


def test_recomputed_activations_count_once():
    def checkpointed(model: nn.Module, batch: Batch) -> Tensor:
        x, target = batch
        for block in model.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return F.mse_loss(model.head(x), target)

    expected = dense_gradients(Model(), batches())
    found = gathered(Model(), batches(), checkpointed)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_the_callers_no_grad_does_not_matter():
    with torch.no_grad():
        found = gathered(Model(), batches())
    assert found.keys() == dense_gradients(Model(), batches()).keys()


def test_an_iterator_is_enough_where_the_data_is_gone_through_once():
    found = gathered(Model(), iter(batches()))
    expected = gathered(Model(), batches())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_under_autocast_a_module_has_read_a_copy_that_nobody_writes():
    def writing(value: float) -> Callable[[nn.Module, Batch], Tensor]:
        def function(model: nn.Module, batch: Batch) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = batch[0].clone()
                y = model(x)
                x.add_(value)
            return F.mse_loss(y.float(), batch[1])

        return function

    found = gathered(Model(), batches(), writing(1))
    for name, expected in gathered(Model(), batches(), writing(0)).items():
        assert found[name].equal(expected)


def part_of_the_model(model: nn.Module, batch: Batch) -> Tensor:
    return model.blocks[0](batch[0]).square().mean()


def spoilt_input(model: nn.Module, batch: Batch) -> Tensor:
    """As a residual that is added in place is."""
    x = batch[0].clone()
    y = model(x)
    x.add_(1)
    return F.mse_loss(y, batch[1])


def fails_at_last(model: nn.Module, batch: Batch) -> Tensor:
    fails_at_last.calls += 1
    if fails_at_last.calls > 4:
        raise RuntimeError("out of memory")
    return loss(model, batch)


WRONG = {
    "no data": ({"data": None}, ValueError, "data: missing with selection 'gradient'"),
    "no loss": ({"loss": None}, ValueError, "loss: missing with selection 'gradient'"),
    "not asked for": ({"selection": "magnitude"}, ValueError, "data: given with selection 'mag"),
    "no batch": ({"data": []}, ValueError, "loss: does not depend on blocks.0.up"),
    "not reached": ({"loss": part_of_the_model}, ValueError, "does not depend on blocks.1.up"),
    "a number": ({"loss": lambda model, batch: 1.0}, TypeError, "loss: gave float, expected a te"),
    "a vector": (
        {"loss": lambda model, batch: model(batch[0])},
        ValueError,
        r"loss: gave shape \[2, 5, 4\], expected a scalar",
    ),
    "a constant": (
        {"loss": lambda model, batch: batch[0].sum()},
        ValueError,
        "loss: does not depend on the modules that are adapted",
    ),
    "an input that is written": (
        {"loss": spoilt_input},
        ValueError,
        "loss: what blocks.0.up reads is written in place",
    ),
    "an iterator": (
        {"data": iter(batches()), "score_bytes": 1},
        ValueError,
        "data: an iterator, which can be gone through once, expected one for 4 times",
    ),
    "k": ({"k": 7}, ValueError, "blocks.0.up: k: 7, expected 1 to 6"),
    "nan": (
        {"loss": lambda model, batch: loss(model, batch) * float("nan")},
        ValueError,
        "blocks.0.up: scores: has NaN",
    ),
    "a failing loss": ({"loss": fails_at_last, "score_bytes": 1}, RuntimeError, "out of memory"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_leaves_the_model_as_it_was(wrong):
    change, error, message = WRONG[wrong]
    fails_at_last.calls = 0
    options = {"selection": "gradient", "data": batches(), "loss": loss} | change
    options.setdefault("k", 2)
    model = Model()
    model.head.bias.requires_grad_(False)
    with Unchanged(model), pytest.raises(error, match=message):
        nk.adapt(model, target_modules=TARGETS, **options)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("together", [1, 16])
def test_memory_holds_the_gradients_of_a_few_layers(together, tmp_path):
    """Of 16 weights, with what selecting takes for one of them."""
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(16)])
    size = model[0].weight.nbytes
    config = nk.NeuroAdaConfig(selection="gradient")
    options = {"data": [torch.randn(4, 256)], "loss": lambda model, x: model(x).square().mean()}
    sizes = allocations(
        lambda: nk.adapt(model, config, score_bytes=together * size, **options), tmp_path
    )
    peak = max(itertools.accumulate(sizes))
    if together == 1:
        assert peak < 7 * size
    else:  # or the measurement would not see them
        assert peak > 16 * size
