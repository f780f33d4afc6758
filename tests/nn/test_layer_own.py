"""What a layer reads and writes itself: nobody computes it in its place, or changes its shape."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import neuroada_kernels as nk


class Scaled(nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return 1.5 * tensor


#: Ways of torch's to compute a tensor of a module anew in every forward.
WAYS = {
    "parametrization": lambda m, name: parametrize.register_parametrization(m, name, Scaled()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruning": lambda m, name: prune.l1_unstructured(m, name, 0.25),
    "old spectral_norm": spectral_norm,
    "old weight_norm": weight_norm,
}
every_way = pytest.mark.parametrize("way", WAYS)
both_strategies = pytest.mark.parametrize("strategy", ["bypass", "resident"])
# Both are deprecated by torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*:FutureWarning")


def layer_of(strategy: str, d_in: int = 12, d_out: int = 8) -> nk.NeuroAdaLinear:
    layer = nk.NeuroAdaLinear(d_in, d_out, k=2, strategy=strategy)
    with torch.no_grad():
        layer.delta.normal_()
    return layer


def values_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(layer.state_dict())


def assert_values(layer: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = layer.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].equal(value) for name, value in expected.items())


@both_strategies
def test_an_index_cannot_be_pruned(strategy):
    layer = layer_of(strategy)
    before, names = values_of(layer), [name for name, _ in layer.named_parameters()]
    with pytest.raises(ValueError, match=r"index: would be .* expected the layer's own"):
        prune.l1_unstructured(layer, "index", 1)
    assert_values(layer, before)
    assert [name for name, _ in layer.named_parameters()] == names
    layer.index = layer.index.clone()


@every_way
@both_strategies
def test_delta_cannot_be_computed(way, strategy):
    layer, x = layer_of(strategy), torch.randn(5, 12)
    before, y = values_of(layer), layer(x)
    with pytest.raises(ValueError, match=r"delta: would be .* expected the layer's own"):
        WAYS[way](layer, "delta")
    assert_values(layer, before)
    assert layer(x).equal(y)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["delta"]


@every_way
@pytest.mark.parametrize("held", ["resident", "merged"])
def test_a_weight_that_holds_the_bypass_cannot_be_computed(way, held):
    layer, x = layer_of("resident" if held == "resident" else "bypass"), torch.randn(5, 12)
    untouched = layer.state_dict()["weight"].clone()
    if held == "merged":
        layer.merge()
    before, y = values_of(layer), layer(x)
    with pytest.raises(ValueError, match=r"weight: would be .*expected one without the bypass"):
        WAYS[way](layer, "weight")
    assert_values(layer, before)
    assert layer(x).equal(y)
    layer.unmerge()
    layer.strategy = "bypass"
    assert layer.weight.equal(untouched)


@every_way
def test_a_weight_beside_the_bypass_may_be_computed_but_not_written(way):
    layer, x = layer_of("bypass").eval(), torch.randn(5, 12)  # else a norm goes on iterating
    WAYS[way](layer, "weight")
    for name, parameter in layer.named_parameters():  # the old weight_norm lets its own train
        parameter.requires_grad_(name == "delta")
    y = layer(x)
    plain = nk.reference.neuroada_linear(x, layer.weight, layer.index, layer.delta, layer.bias)
    torch.testing.assert_close(y, plain)
    with pytest.raises(ValueError, match=r"weight: is computed, .* expected a parameter"):
        layer.merge()
    assert not layer.merged
    with pytest.raises(ValueError, match="'resident' is refused: weight: is computed"):
        layer.strategy = "resident"
    assert layer(x).equal(y)
    with pytest.raises(ValueError, match=r"has (parametrizations|hooks), which its replacement"):
        nk.unload(nn.Sequential(layer))


@pytest.mark.parametrize("way", [way for way in WAYS if "spectral" not in way])
@both_strategies
def test_a_bias_may_be_computed(way, strategy):
    layer, x = layer_of(strategy), torch.randn(5, 12)
    y = layer(x)
    bias = layer.bias.detach().clone()
    WAYS[way](layer, "bias")
    torch.testing.assert_close(layer(x), y - bias + layer.bias)


@every_way
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_linear_of_computed_tensors_is_refused(way, name):
    linear = nn.Linear(12, 8)
    WAYS[way](linear, name)
    with pytest.raises(ValueError, match=r"linear: .*, expected (a weight|one) of its own"):
        nk.NeuroAdaLinear.from_linear(linear)
    with pytest.raises(ValueError, match=r"0: has (parametrizations|hooks), "):
        nk.adapt(nn.Sequential(linear))


WRONG_SHAPES = [("weight", (8, 10)), ("weight", (6, 12)), ("delta", (8, 3)), ("delta", (6, 2))]
WRONG_SHAPES += [("bias", (8, 1)), ("bias", (1,))]  # which would be broadcast


@pytest.mark.parametrize(("name", "shape"), WRONG_SHAPES)
@pytest.mark.parametrize("how", ["assigned", "data"])
@both_strategies
def test_a_tensor_of_another_shape_is_named(name, shape, how, strategy, backend):
    layer = layer_of(strategy)
    right = getattr(layer, name)

    def use() -> None:
        if how == "data":
            right.data = torch.zeros(shape)
        else:
            setattr(layer, name, nn.Parameter(torch.zeros(shape), right.requires_grad))
        layer(torch.randn(5, 12))

    message = f"{name}: shape {list(shape)}, expected {list(right.shape)}"
    with nk.use_backend(backend), pytest.raises(ValueError, match=re.escape(message)):
        use()


def test_a_resident_layer_keeps_its_weight_where_another_shape_is_refused():
    layer, x = layer_of("resident"), torch.randn(5, 12)
    weight, y = layer.weight, layer(x)
    with pytest.raises(ValueError, match="weight: shape"):
        layer.weight = nn.Parameter(torch.zeros(8, 10), False)
    assert layer.weight is weight
    assert layer(x).equal(y)
    assert y.equal(F.linear(x, weight, layer.bias))


@both_strategies
def test_an_index_on_another_device_is_named(strategy):
    layer = layer_of(strategy)
    layer.register_buffer("index", layer.index.to("meta"))
    with pytest.raises(ValueError, match="index: on meta, expected cpu, as delta"):
        layer(torch.randn(5, 12))
