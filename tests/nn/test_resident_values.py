"""What a resident layer computes, and what it keeps: torch's own linear of ``round(W + delta)``."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from neuroada_kernels import NeuroAdaLinear, ReferenceNeuroAdaLinear, reference
from neuroada_kernels.testing import CASES, make_inputs, rms_error, tolerance


def resident_layer(inputs):
    """A layer over the tensors of a case, the inputs' own weight kept as it is."""
    d_out, d_in = inputs.weight.shape
    linear = nn.Linear(d_in, d_out, inputs.bias is not None, device="meta")
    linear.weight = nn.Parameter(inputs.weight.clone())
    linear.bias = None if inputs.bias is None else nn.Parameter(inputs.bias.clone())
    layer = NeuroAdaLinear.from_linear(
        linear, index=inputs.index, delta_dtype=inputs.delta.dtype, strategy="resident"
    )
    with torch.no_grad():
        layer.delta.copy_(inputs.delta)
    return layer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_dx_are_those_of_the_rounded_weight(case, dtype, backend, device):
    inputs = make_inputs(case, dtype, device=device)
    layer = resident_layer(inputs)
    whole = reference.merged_weight(inputs.weight, inputs.index, inputs.delta)
    x, given = (inputs.x.clone().requires_grad_() for _ in range(2))

    y, expected = layer(x), F.linear(given, whole, inputs.bias)
    assert layer.weight.equal(whole)
    assert y.equal(expected)
    y.backward(inputs.grad_output)
    expected.backward(inputs.grad_output)
    assert x.grad.equal(given.grad)

    dense = inputs.grad_output.double().t() @ inputs.x.double()
    truth = dense.gather(1, inputs.index.clamp(min=0).long()).masked_fill(inputs.index < 0, 0)
    assert layer.delta.grad.dtype == layer.delta.dtype
    assert rms_error(layer.delta.grad, truth) <= tolerance(dtype, case.tokens, layer.delta.dtype)
    assert not layer.delta.grad[inputs.index < 0].any()


@pytest.mark.parametrize("leading", [(), (9,), (2, 5), (0, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_it_agrees_with_the_reference_layer(leading, bias, dtype):
    torch.manual_seed(0)
    layer = NeuroAdaLinear(24, 16, 3, bias=bias, dtype=dtype, strategy="resident")
    plain = ReferenceNeuroAdaLinear(24, 16, 3, bias=bias, dtype=dtype, strategy="resident")
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        plain.delta.copy_(layer.delta.normal_(std=0.1))
    if bias:
        layer.bias.requires_grad_()
        plain.bias.requires_grad_()
    x = torch.randn(*leading, 24, dtype=dtype, requires_grad=True)
    given = x.detach().clone().requires_grad_()
    y, expected = layer(x), plain(given)
    assert y.equal(expected)
    grad_output = torch.randn_like(y)
    y.backward(grad_output)
    expected.backward(grad_output)
    torch.testing.assert_close(x.grad, given.grad)
    # The reference makes the dense gradient first, rounded to the weight's dtype.
    torch.testing.assert_close(
        layer.delta.grad, plain.delta.grad, rtol=4 * torch.finfo(dtype).eps, atol=1e-2
    )
    if bias:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_the_product_is_one_call_of_f_linear(monkeypatch):
    layer, calls = NeuroAdaLinear(24, 16, 3, strategy="resident"), []
    plain = F.linear

    def spy(x, weight, bias=None):
        calls.append((x.data_ptr(), weight, bias))
        return plain(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    x = torch.randn(2, 5, 24, requires_grad=True)
    layer(x).sum().backward()
    ((pointer, weight, bias),) = calls
    assert pointer == x.data_ptr()
    assert weight is layer.weight
    assert bias is layer.bias


def test_a_linear_with_another_backward_is_differentiated_by_it(monkeypatch):
    """A library that puts a product of its own in the place of torch's brings dx along."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx, grad_output):
            return 2 * grad_output @ ctx.saved_tensors[0], None

    layer = NeuroAdaLinear(24, 16, 3, bias=False, strategy="resident")
    monkeypatch.setattr(F, "linear", lambda x, weight, bias: Doubled.apply(x, weight))
    x = torch.randn(5, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.ones(5, 16) @ layer.weight)


def test_a_forward_keeps_x_and_references_alone(dtype, backend, device):
    layer = NeuroAdaLinear(96, 64, 4, dtype=dtype, device=device, strategy="resident")
    x = torch.randn(2, 4, 96, device=device).to(dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    held = {t.untyped_storage().data_ptr() for t in (x, layer.weight, layer.index, layer.delta)}
    assert {t.untyped_storage().data_ptr() for t in saved} <= held
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1


def test_the_output_is_not_copied_and_can_be_written_in_place():
    layer = NeuroAdaLinear(24, 16, 3, strategy="resident")
    x, produced = torch.randn(2, 5, 24, requires_grad=True), []
    with pytest.MonkeyPatch.context() as patch:
        plain = F.linear
        patch.setattr(F, "linear", lambda *given: produced.append(plain(*given)) or produced[0])
        y = layer(x)
    assert y.data_ptr() == produced[0].data_ptr()
    y += 1
    y.mul_(3)
    y.sum().backward()
    expected = torch.full((10, 16), 3.0)
    torch.testing.assert_close(x.grad.view(10, 24), expected @ layer.weight)
    dense = expected.t() @ x.detach().view(10, 24)
    torch.testing.assert_close(layer.delta.grad, dense.gather(1, layer.index.long()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_far_below_a_unit_in_the_last_place_add_up(dtype):
    """They are rounded away one by one in W, but not in the master."""
    layer = NeuroAdaLinear(24, 16, 3, dtype=dtype, strategy="resident")
    before = layer.weight.clone()
    step = torch.finfo(dtype).eps * before.gather(1, layer.index.long()).abs().float() / 16
    x = torch.randn(2, 24, dtype=dtype)
    for number in range(16):
        with torch.no_grad():
            layer.delta.add_(step)
        layer(x)
        if number == 0:
            assert layer.weight.equal(before)
    changed = layer.weight != before
    assert changed.gather(1, layer.index.long()).all()
    assert changed.sum() == layer.delta.numel()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_patched_weight(autocast):
    layer = NeuroAdaLinear(24, 16, 3, strategy="resident")
    layer.bias.requires_grad_()
    x = torch.randn(9, 24, requires_grad=True)
    for _ in range(2):  # a cast of the weight that was cached would be the first one's
        with torch.no_grad():
            layer.delta.add_(0.5)
        with torch.autocast("cpu", dtype=autocast):
            y = layer(x)
            expected = F.linear(x, layer.weight, layer.bias)
        assert y.dtype == autocast
        assert y.equal(expected)
    y.float().square().sum().backward()
    for leaf in (x, layer.delta, layer.bias):
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.any()


@pytest.mark.parametrize("strategy", ["bypass", "resident"])
def test_torch_func_differentiates_the_formula(strategy):
    index = torch.tensor([[0, 3], [2, -1], [-1, 0], [-1, -1], [5, 4]], dtype=torch.int32)
    linear = torch.nn.Linear(6, 5, dtype=torch.float64)
    layer = NeuroAdaLinear.from_linear(linear, index=index, strategy=strategy)
    with torch.no_grad():
        layer.delta.normal_()
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    plain.strategy = "bypass"
    weight, index, bias = plain.weight, plain.index, plain.bias

    def loss(delta, x):
        return torch.func.functional_call(layer, {"delta": delta}, x).square().sum()

    def expected_loss(delta, x):
        return reference.neuroada_linear(x, weight, index, delta, bias).square().sum()

    layer(x)
    delta = torch.randn_like(layer.delta.detach())
    for transform in (torch.func.grad, lambda f: torch.func.jacrev(torch.func.grad(f))):
        torch.testing.assert_close(transform(loss)(delta, x), transform(expected_loss)(delta, x))
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(delta, x)
    torch.testing.assert_close(each.sum(0), torch.func.grad(expected_loss)(delta, x))
    torch.testing.assert_close(layer(x), plain(x))


# torch's own forward-mode rules are scripted, and say so on their first use.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("strategy", ["bypass", "resident"])
def test_a_tangent_of_delta_comes_through_in_forward_mode(strategy, grad):
    layer = NeuroAdaLinear(6, 5, 2, dtype=torch.float64, strategy=strategy)
    x, along = torch.randn(3, 6, dtype=torch.float64), torch.randn(5, 2)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        delta = forward_ad.make_dual(layer.delta.detach(), along)
        y = torch.func.functional_call(layer, {"delta": delta}, x)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, reference.bypass(x, layer.index, along))


@pytest.mark.parametrize("of", ["delta", "x"])
def test_a_graph_of_the_gradient_is_made_under_checkpointing_too(of):
    layer = NeuroAdaLinear(6, 5, 2, strategy="resident")
    x = torch.randn(3, 6, requires_grad=True)
    wanted = layer.delta if of == "delta" else x
    found, expected = (
        torch.autograd.grad(run(x).square().sum(), wanted, create_graph=True)[0]
        for run in (lambda x: checkpoint(layer, x, use_reentrant=False), layer)
    )
    assert found.equal(expected)


@pytest.mark.parametrize("of", ["delta", "x"])
def test_a_second_derivative_is_refused(of):
    layer = NeuroAdaLinear(6, 5, 2, strategy="resident")
    x = torch.randn(3, 6, requires_grad=True)
    loss = layer(x).square().sum()
    wanted = layer.delta if of == "delta" else x
    (grad,) = torch.autograd.grad(loss, wanted, create_graph=True)
    expected = torch.autograd.grad(layer(x).square().sum(), wanted)[0]
    assert grad.equal(expected)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.square().sum().backward()
