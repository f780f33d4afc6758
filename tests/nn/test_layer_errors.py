"""Arguments that are refused, by name, with the given linear left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

INDEX = torch.arange(3, dtype=torch.int32).expand(16, 3).contiguous()

WRONG_ARGUMENTS = {
    "k zero": ({"k": 0}, ValueError, "k: 0, expected 1 to 24"),
    "k negative": ({"k": -1}, ValueError, "k: -1, expected 1 to 24"),
    "k too large": ({"k": 25}, ValueError, "k: 25, expected 1 to 24"),
    "k a float": ({"k": 2.0}, TypeError, r"k: 2\.0, expected an integer"),
    "k a bool": ({"k": True}, TypeError, "k: True, expected an integer"),
    "k None": ({"k": None}, TypeError, "k: None, expected an integer"),
    "selection": ({"selection": "largest"}, ValueError, "method: 'largest', expected one of"),
    "fraction": ({"neuron_fraction": 0.0}, ValueError, r"neuron_fraction: 0\.0"),
    "delta int": ({"delta_dtype": torch.int32}, TypeError, "delta_dtype: torch.int32"),
    "delta text": ({"delta_dtype": "float32"}, TypeError, "delta_dtype: float32"),
    "scores": ({"scores": torch.zeros(2, 2)}, ValueError, r"scores: shape \[2, 2\]"),
}

WRONG_INDEX = {
    "rows": (INDEX[:15], ValueError, r"index: shape \[15, 3\], expected \[16, k\]"),
    "a vector": (INDEX[:, 0], ValueError, r"index: shape \[16\], expected"),
    "no columns": (INDEX[:, :0], ValueError, "index: 0 connections"),
    "too many": (INDEX[:, :1].expand(16, 25), ValueError, "index: 25 connections"),
    "dtype": (INDEX.long(), TypeError, "index: dtype torch.int64, expected torch.int32"),
    "range": (INDEX + 22, ValueError, "index: column 24 in row 0 is out of range .* 24 inputs"),
    "repeated": (INDEX * 0, ValueError, "index: column 0 stands twice in row 0"),
    "no tensor": (INDEX.tolist(), TypeError, "index: list, expected"),
}


def assert_untouched(linear, weight) -> None:
    assert linear.weight.requires_grad
    assert linear.bias.requires_grad
    assert torch.equal(linear.weight, weight)
    assert set(linear.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS)
def test_wrong_argument(layer_type, wrong):
    arguments, error, message = WRONG_ARGUMENTS[wrong]
    linear = nn.Linear(24, 16)
    weight = linear.weight.detach().clone()
    with pytest.raises(error, match=message):
        layer_type.from_linear(linear, **arguments)
    assert_untouched(linear, weight)
    with pytest.raises(error, match=message):
        layer_type(24, 16, **arguments)


@pytest.mark.parametrize("wrong", WRONG_INDEX)
def test_wrong_index(layer_type, wrong):
    index, error, message = WRONG_INDEX[wrong]
    linear = nn.Linear(24, 16)
    weight = linear.weight.detach().clone()
    with pytest.raises(error, match=message):
        layer_type.from_linear(linear, index=index)
    assert_untouched(linear, weight)


@pytest.mark.parametrize("given", [nn.Conv1d(4, 4, 1), nn.Bilinear(2, 2, 2), torch.zeros(4, 4)])
def test_no_linear(layer_type, given):
    with pytest.raises(TypeError, match=f"linear: {type(given).__name__}, expected"):
        layer_type.from_linear(given)


def test_layer_is_no_linear_to_adapt_again(layer_type):
    with pytest.raises(TypeError, match=f"linear: {layer_type.__name__}, expected"):
        layer_type.from_linear(layer_type(24, 16))


def test_parametrized_linear(layer_type):
    linear = weight_norm(nn.Linear(24, 16))
    with pytest.raises(ValueError, match="linear: has parametrizations"):
        layer_type.from_linear(linear)
    assert all(parameter.requires_grad for parameter in linear.parameters())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weight_of_another_dtype(layer_type, dtype):
    linear = nn.Linear(24, 16)
    linear.weight = nn.Parameter(torch.ones(16, 24).to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"weight: dtype {dtype}, expected float32, "):
        layer_type.from_linear(linear)
    assert linear.bias.requires_grad


def test_meta_linear_with_an_index(layer_type):
    linear = nn.Linear(24, 16, device="meta")
    with pytest.raises(ValueError, match="weight: is on the meta device, expected values"):
        layer_type.from_linear(linear, index=INDEX)
    assert linear.weight.requires_grad


def test_weight_with_nan(layer_type):
    linear = nn.Linear(24, 16)
    with torch.no_grad():
        linear.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="weight: has NaN"):
        layer_type.from_linear(linear)
    assert linear.weight.requires_grad


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def test_linear_with_a_forward_of_its_own(layer_type):
    linear = Scaled(24, 16)
    with pytest.raises(TypeError, match="linear: Scaled has a forward of its own; see NeuroAdaB"):
        layer_type.from_linear(linear)
    assert linear.weight.requires_grad


def test_linear_whose_own_forward_was_put_back(layer_type):
    linear = nn.Linear(24, 16)
    linear.forward = linear.forward  # as accelerate does when it removes its hooks
    assert layer_type.from_linear(linear).weight is linear.weight


def test_linear_with_hooks(layer_type):
    linear = nn.Linear(24, 16)
    linear.register_forward_hook(lambda module, args, y: 3 * y)
    with pytest.raises(ValueError, match="linear: has hooks, which the layer would lose"):
        layer_type.from_linear(linear)
    assert linear.weight.requires_grad


@pytest.mark.parametrize("x", [[1.0] * 24, None], ids=str)
def test_x_is_no_tensor(layer_type, x):
    with pytest.raises(TypeError, match=f"x: {type(x).__name__}, expected a tensor"):
        layer_type(24, 16)(x)
