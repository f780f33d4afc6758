"""What an ``nn.Linear`` user expects of a layer: its tensors, its outputs, its inputs' shapes."""

from __future__ import annotations

import inspect

import pytest
import torch
from layer_facts import effective_weight
from torch import nn

from neuroada_kernels import NeuroAdaLinear, ReferenceNeuroAdaLinear
from neuroada_kernels.testing import rms_error, tolerance

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_the_parameters_and_freezes_them(layer_type, bias):
    linear = nn.Linear(24, 16, bias=bias)
    weight, values = linear.weight, linear.weight.detach().clone()
    layer = layer_type.from_linear(linear, 3)
    assert layer.weight is weight
    assert linear.weight is weight
    assert torch.equal(weight, values)
    assert layer.bias is linear.bias
    trainable = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trainable == ["delta"]
    assert not linear.weight.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_from_linear_keeps_the_training_flag(layer_type, training):
    assert layer_type.from_linear(nn.Linear(4, 4).train(training)).training is training


@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_index_and_delta_are_as_documented(layer_type, dtype, delta_dtype):
    layer = layer_type(24, 16, 3, dtype=dtype, delta_dtype=delta_dtype)
    assert layer.index.dtype == torch.int32
    assert layer.index.shape == layer.delta.shape == (16, 3)
    assert all(len(set(row)) == 3 for row in layer.index.tolist())
    assert layer.delta.dtype == delta_dtype
    assert not layer.delta.any()
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.original is None
    assert not layer.merged
    assert layer.k == 3


def test_initialises_as_nn_linear_does(layer_type):
    torch.manual_seed(7)
    linear = nn.Linear(24, 16)
    torch.manual_seed(7)
    layer = layer_type(24, 16, 3)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_untrained_layer_is_the_linear(layer_type, dtype, bias):
    linear = nn.Linear(96, 64, bias=bias, dtype=dtype)
    x = torch.randn(33, 96, dtype=dtype)
    expected = linear(x)
    y = layer_type.from_linear(linear, 4)(x)
    assert y.dtype == dtype
    assert rms_error(y, expected) <= tolerance(dtype, 96)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 3, 4), (0,), (2, 0)])
def test_takes_any_leading_dimensions(trained, leading, bias):
    layer = trained(bias=bias)
    x = torch.randn(*leading, 24)
    y = layer(x)
    expected = x.double() @ effective_weight(layer).t()
    if bias:
        expected = expected + layer.bias.double()
    assert y.shape == (*leading, 16)
    assert rms_error(y, expected) <= tolerance(torch.float32, 24)
    y.sum().backward()
    assert layer.delta.grad.shape == layer.delta.shape


@pytest.mark.parametrize("strategy", ["bypass", "resident"])
def test_its_output_may_be_written_in_place(trained, strategy):
    layer, x = trained(strategy=strategy), torch.randn(2, 3, 24)
    upper = torch.randn(2, 3, 16)
    layer(x).mul(2).backward(upper)
    expected, layer.delta.grad = layer.delta.grad, None
    layer(x).mul_(2).backward(upper)
    assert torch.equal(layer.delta.grad, expected)


@pytest.mark.parametrize("shape", [(), (23,), (24, 23), (0, 25)])
def test_input_of_another_width_is_refused(layer_type, shape):
    with pytest.raises(ValueError, match=r"x: shape .*expected \[\.\.\., 24\]"):
        layer_type(24, 16)(torch.zeros(shape))


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.t().contiguous().t(), id="transposed"),
        pytest.param(lambda x: x.repeat(1, 2)[:, ::2], id="strided"),
        pytest.param(lambda x: x[:1].expand(9, -1), id="expanded"),
        pytest.param(lambda x: x[:, :1].expand(-1, 24), id="expanded-columns"),
        pytest.param(lambda x: x.flip(0)[2:], id="offset"),
        pytest.param(lambda x: x.view(3, 3, 24).transpose(0, 1), id="permuted-tokens"),
    ],
)
def test_layout_of_the_input_does_not_matter(trained, view):
    layer = trained()
    base = torch.randn(9, 24, requires_grad=True)
    y = layer(view(base))
    grad_output = torch.randn_like(y)
    y.backward(grad_output)
    grads = base.grad.clone(), layer.delta.grad.clone()
    base.grad = layer.delta.grad = None
    again = layer(view(base).contiguous())
    again.backward(grad_output)
    assert rms_error(y, again) <= tolerance(torch.float32, 24)
    assert rms_error(grads[0], base.grad) <= tolerance(torch.float32, 16)
    assert rms_error(grads[1], layer.delta.grad) <= tolerance(torch.float32, 9)


def test_layout_of_the_upper_gradient_does_not_matter(trained):
    layer = trained()
    x = torch.randn(9, 24, requires_grad=True)
    layer(x).sum().backward()  # an expanded gradient: every stride is zero
    expected = torch.ones(9, 16, dtype=torch.float64) @ effective_weight(layer)
    assert rms_error(x.grad, expected) <= tolerance(torch.float32, 16)


def test_both_layers_have_one_interface():
    assert inspect.signature(NeuroAdaLinear) == inspect.signature(ReferenceNeuroAdaLinear)
    ours, plain = NeuroAdaLinear(24, 16, 3), ReferenceNeuroAdaLinear(24, 16, 3)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.merge()
    plain.merge()
    assert set(ours.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("neuron_fraction", [1.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_layer_loads_from_the_other_and_agrees(layer_type, dtype, neuron_fraction):
    types = (NeuroAdaLinear, ReferenceNeuroAdaLinear)
    other_type = types[layer_type is NeuroAdaLinear]
    source = other_type(24, 16, 3, dtype=dtype, neuron_fraction=neuron_fraction)
    with torch.no_grad():
        source.delta.normal_(std=0.1)
    layer = layer_type(24, 16, 3, dtype=dtype)
    layer.load_state_dict(source.state_dict(), strict=True)

    outputs, gradients = [], []
    data, grad_output = torch.randn(9, 24, dtype=dtype), torch.randn(9, 16, dtype=dtype)
    for module in (layer, source):
        x = data.clone().requires_grad_()
        y = module(x)
        y.backward(grad_output)
        outputs.append(y)
        gradients.append((x.grad, module.delta.grad))
    assert rms_error(*outputs) <= tolerance(dtype, 24)
    assert rms_error(gradients[0][0], gradients[1][0]) <= tolerance(dtype, 16)
    assert rms_error(gradients[0][1], gradients[1][1]) <= tolerance(dtype, 9, torch.float32)


def test_repr_says_what_the_layer_is(layer_type):
    layer = layer_type(24, 16, 3, bias=False, delta_dtype=torch.bfloat16)
    text = "in_features=24, out_features=16, k=3, bias=False, delta_dtype=bfloat16"
    strategy = ", strategy=resident" if layer.strategy == "resident" else ""
    assert repr(layer) == f"{layer_type.__name__}({text}{strategy})"
    layer.merge()
    assert repr(layer) == f"{layer_type.__name__}({text}, merged{strategy})"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_same_output_without_gradients(trained, mode):
    layer, x = trained(), torch.randn(9, 24)
    expected = layer(x)
    with mode():
        y = layer(x)
    assert not y.requires_grad
    assert torch.equal(y, expected)


def test_layer_made_in_inference_mode_infers(trained):
    x = torch.randn(9, 24)
    with torch.inference_mode():
        layer = trained()
        weight, y = layer.weight.clone(), layer(x)
        expected = x.double() @ effective_weight(layer).t() + layer.bias.double()
        assert rms_error(y, expected) <= tolerance(torch.float32, 24)
        layer.merge()
        assert rms_error(layer(x), y) <= tolerance(torch.float32, 24)
        layer.unmerge()
        assert torch.equal(layer.weight, weight)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
