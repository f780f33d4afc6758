"""Merging folds the bypass into W, unmerging takes it out again, bit for bit."""

from __future__ import annotations

import pytest
import torch
from layer_facts import effective_weight, input_gradient
from torch import nn

from neuroada_kernels import use_backend
from neuroada_kernels.testing import rms_error, tolerance

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=[None, "eager"], ids=["automatic", "eager"])
def _backend(request):
    with use_backend(request.param):
        yield


pytestmark = pytest.mark.usefixtures("_backend")


@pytest.mark.parametrize("neuron_fraction", [1.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weight_is_the_effective_weight_rounded_once(trained, dtype, neuron_fraction):
    layer = trained(dtype=dtype, neuron_fraction=neuron_fraction)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = layer.weight.detach().to(wide)
    for j, columns in enumerate(layer.index.tolist()):
        for s, column in enumerate(columns):
            if column >= 0:
                expected[j, column] += layer.delta.detach()[j, s].to(wide)
    layer.merge()
    assert layer.merged
    assert torch.equal(layer.weight, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_output_agrees_with_the_bypass(trained, dtype):
    layer = trained(96, 64, 4, dtype=dtype)
    x = torch.randn(33, 96, dtype=dtype)
    y = layer(x)
    layer.merge()
    merged = layer(x)
    assert merged.dtype == dtype
    assert rms_error(merged, y) <= tolerance(dtype, 96)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("neuron_fraction", [1.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_restores_every_bit(trained, dtype, neuron_fraction, scale):
    layer = trained(dtype=dtype, neuron_fraction=neuron_fraction)
    with torch.no_grad():
        layer.delta.mul_(10 * scale)
    weight = layer.weight.clone()
    for _ in range(20):
        layer.merge()
        layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, weight)


def test_unmerge_restores_after_delta_has_changed(trained):
    layer = trained()
    weight = layer.weight.clone()
    layer.merge()
    with torch.no_grad():
        layer.delta.normal_()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_merging_or_unmerging_twice_changes_nothing(trained):
    layer = trained()
    weight = layer.weight.clone()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    layer.merge()
    merged, original = layer.weight.clone(), layer.original.clone()
    layer.merge()
    assert torch.equal(layer.weight, merged)
    assert torch.equal(layer.original, original)
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_merge_writes_into_the_weight_it_holds(trained):
    layer = trained()
    parameter, storage = layer.weight, layer.weight.data_ptr()
    layer.merge()
    assert layer.weight is parameter
    assert layer.weight.data_ptr() == storage
    assert layer.original.shape == (16, 3)


@pytest.mark.parametrize("pending", ["merge", "unmerge"])
def test_backward_through_a_weight_written_since_raises(trained, pending):
    """The gradient of x would be that of another weight."""
    layer = trained()
    if pending == "unmerge":
        layer.merge()
    y = layer(torch.randn(9, 24, requires_grad=True))
    getattr(layer, pending)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_merged_layer_passes_gradients_to_its_input(trained):
    layer = trained()
    expected_weight = effective_weight(layer)
    layer.merge()
    x = torch.randn(9, 24, requires_grad=True)
    layer(x).sum().backward()
    expected = torch.ones(9, 16, dtype=torch.float64) @ expected_weight
    assert rms_error(x.grad, expected) <= tolerance(torch.float32, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_with_other_strides(layer_type, dtype):
    linear = nn.Linear(24, 16, dtype=dtype)
    linear.weight = nn.Parameter(torch.randn(24, 16, dtype=dtype).t())
    layer = layer_type.from_linear(linear, 3)
    with torch.no_grad():
        layer.delta.normal_(std=0.1)
    x, weight = torch.randn(9, 24, dtype=dtype), linear.weight.clone()
    y = layer(x)
    expected = x.double() @ effective_weight(layer).t() + layer.bias.double()
    assert rms_error(y, expected) <= tolerance(dtype, 24)
    assert rms_error(*input_gradient(layer)) <= tolerance(dtype, 16)
    layer.merge()
    assert layer.weight is linear.weight
    assert rms_error(layer(x), y) <= tolerance(dtype, 24)
    layer.unmerge()
    assert torch.equal(linear.weight, weight)


def test_what_was_merged_in_inference_mode_takes_a_state_later(trained):
    layer = trained()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.inference_mode():
        layer.merge()
    merged = layer.state_dict()
    layer.load_state_dict(merged)
    layer.unmerge()
    assert all(tensor.equal(before[name]) for name, tensor in layer.state_dict().items())
