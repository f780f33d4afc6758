"""What trains, with which gradients, and under which of torch's contexts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_facts import assert_state, effective_weight, state_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from neuroada_kernels import NeuroAdaLinear
from neuroada_kernels.testing import rms_error, tolerance


@pytest.mark.parametrize("neuron_fraction", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradients_are_those_of_the_effective_weight(trained, dtype, neuron_fraction):
    layer = trained(dtype=dtype, neuron_fraction=neuron_fraction)
    layer.bias.requires_grad_()
    x = torch.randn(9, 24, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(9, 16, dtype=dtype)
    layer(x).backward(grad_output)

    wide_x, wide_grad = x.detach().double(), grad_output.double()
    dense = wide_grad.t() @ wide_x  # [d_out, d_in]
    grad_delta = dense.gather(1, layer.index.clamp(min=0).long()).masked_fill(layer.index < 0, 0)
    assert x.grad.dtype == layer.bias.grad.dtype == dtype
    assert layer.delta.grad.dtype == layer.delta.dtype
    assert rms_error(x.grad, wide_grad @ effective_weight(layer)) <= tolerance(dtype, 16)
    assert rms_error(layer.delta.grad, grad_delta) <= tolerance(dtype, 9, torch.float32)
    assert rms_error(layer.bias.grad, wide_grad.sum(0)) <= tolerance(dtype, 9)
    assert not layer.delta.grad[layer.index < 0].any()


def test_bias_trains_only_after_requires_grad(trained):
    layer, x = trained(), torch.randn(9, 24)
    layer(x).sum().backward()
    assert layer.bias.grad is None
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((16,), 9.0))


def test_frozen_input_gets_no_gradient(trained):
    layer, x = trained(), torch.randn(9, 24)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is None
    assert layer.delta.grad is not None


def test_gradients_accumulate_over_calls(trained):
    layer, x = trained(), torch.randn(9, 24)
    layer(x).sum().backward()
    once = layer.delta.grad.clone()
    (layer(x).sum() + layer(x).sum()).backward()
    torch.testing.assert_close(layer.delta.grad, 3 * once)


def test_weight_that_requires_grad_gets_no_silent_zero_gradient():
    layer = NeuroAdaLinear(24, 16, 3)
    layer.weight.requires_grad_()
    with pytest.raises((RuntimeError, ValueError), match="weight: requires grad"):
        layer(torch.randn(9, 24)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(trained, dtype):
    layer, x = trained(), torch.randn(9, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        linear = F.linear(x, layer.weight, layer.bias)
    expected = x.detach().double() @ effective_weight(layer).t() + layer.bias.double()
    assert y.dtype == linear.dtype == dtype
    # x, W and y are rounded to 16 bits, one after the other.
    assert rms_error(y, expected) <= 2 * tolerance(dtype, 24)
    grad_output = torch.randn_like(y)
    y.backward(grad_output)
    assert x.grad.dtype == torch.float32
    assert layer.delta.grad.dtype == torch.float32
    grad_x = grad_output.double() @ effective_weight(layer)
    assert rms_error(x.grad, grad_x) <= 2 * tolerance(dtype, 16)


def test_autocast_agrees_merged_and_unmerged(trained):
    layer, x = trained(), torch.randn(9, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        layer.merge()
        merged = layer(x)
    assert merged.dtype == y.dtype
    assert rms_error(merged, y) <= 2 * tolerance(torch.bfloat16, 24)


def test_autocast_leaves_float64_alone(trained):
    layer, x = trained(dtype=torch.float64), torch.randn(9, 24, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, expected)


def test_gradient_checkpointing_changes_nothing(trained):
    model = nn.Sequential(trained(24, 16), nn.GELU(), trained(16, 8))
    data, gradients, outputs = torch.randn(9, 24), [], []
    for recompute in (False, True):
        model.zero_grad()
        x = data.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().sum().backward()
        outputs.append(y)
        gradients.append([x.grad, model[0].delta.grad.clone(), model[2].delta.grad.clone()])
    assert torch.equal(*outputs)
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimiser_lowers_the_loss_and_moves_delta_alone(layer_type, dtype):
    layer = layer_type(24, 16, 3, dtype=dtype)
    before = state_of(layer)
    x, target = torch.randn(64, 24, dtype=dtype), torch.randn(64, 16, dtype=dtype)
    optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(x).float(), target.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert layer.delta.all()
    assert_state(layer, {**before, "delta": layer.delta.detach()})


def test_delta_written_after_the_forward_makes_backward_raise():
    layer = NeuroAdaLinear(24, 16, k=3)
    y = layer(torch.randn(9, 24, requires_grad=True))
    with torch.no_grad():
        layer.delta.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
