"""``NeuroAdaBypass`` round bases of every kind: what it computes, and what it leaves alone."""

from __future__ import annotations

import copy
import pickle

import foreign
import pytest
import torch
from foreign import D_IN, D_OUT, KINDS
from torch.utils.checkpoint import checkpoint

import neuroada_kernels as nk
from neuroada_kernels.testing import rms_error, tolerance


def wrap(base, k=3, **options):
    """A layer whose ``delta`` is away from zero."""
    layer = nk.NeuroAdaBypass(base, k, **options)
    with torch.no_grad():
        layer.delta.normal_(std=0.1)
    return layer


def differentiated(function, x, grad_output):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, grad_output)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_the_formulas(kind):
    base = foreign.make(kind)
    before, weight = foreign.raw(base), foreign.dense(base).double()
    layer = wrap(base, neuron_fraction=0.9)
    x = torch.randn(2, 7, D_IN, requires_grad=True)
    grad_output = torch.randn(2, 7, D_OUT)
    y = layer(x)
    y.backward(grad_output)

    x_64, delta_64 = x.detach().double().requires_grad_(), layer.delta.detach().double()
    delta_64.requires_grad_()
    bias = None if layer.bias is None else layer.bias.double()
    y_64 = nk.reference.neuroada_linear(x_64, weight, layer.index, delta_64, bias)
    y_64.backward(grad_output.double())
    allowed = tolerance(torch.float32, D_IN)
    assert rms_error(y, y_64) <= allowed
    assert rms_error(x.grad, x_64.grad) <= allowed
    assert rms_error(layer.delta.grad, delta_64.grad) <= allowed
    assert foreign.same(foreign.raw(base), before)


@pytest.mark.parametrize("kind", ["conv1d", "nf4", "torchao-int8"])
def test_the_bypass_is_added_to_the_bases_own_output_and_rounded_once(kind):
    layer = wrap(foreign.make(kind, dtype=torch.bfloat16))
    x = torch.randn(9, D_IN, dtype=torch.bfloat16)
    grad_output = torch.randn(9, D_OUT, dtype=torch.bfloat16)
    y, grad = differentiated(layer, x, grad_output)
    base_y, base_grad = differentiated(layer.base, x, grad_output)
    assert y.dtype == torch.bfloat16
    exact = base_y.double() + nk.reference.bypass(x.double(), layer.index, layer.delta.double())
    assert torch.equal(y, exact.float().bfloat16())
    columns = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    columns.scatter_add_(1, layer.index.long(), layer.delta.detach().double())
    # The base rounds its part of dx, the bypass its own, and autograd their sum.
    expected = base_grad.double() + grad_output.double() @ columns
    assert rms_error(grad, expected) <= 2 * tolerance(torch.bfloat16, D_OUT)


@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_is_that_of_the_dequantised_weight(kind, monkeypatch):
    monkeypatch.setattr("neuroada_kernels.selection._BLOCK_ELEMENTS", 5 * D_IN)
    base = foreign.make(kind)
    layer = nk.NeuroAdaBypass(base, 4)
    assert torch.equal(layer.index, nk.order_slots(nk.select(foreign.dense(base), 4)))


@pytest.mark.parametrize("shape", [(34, 7), (50, 5), (6, 129)])
@pytest.mark.parametrize("nested", [True, False])
def test_rows_of_four_bits_need_not_end_where_blocks_do(shape, nested, monkeypatch):
    monkeypatch.setattr("neuroada_kernels.selection._BLOCK_ELEMENTS", 2 * shape[0])
    linear = torch.nn.Linear(*shape)
    base = foreign._nf4(linear, compress_statistics=nested)
    layer = nk.NeuroAdaBypass(base, 2)
    weight = foreign.dense(base)
    assert torch.equal(layer.index, nk.order_slots(nk.select(weight, 2)))
    assert torch.equal(layer.base_entries(layer.index), weight.gather(1, layer.index.long()))


def test_storage_of_four_bits_may_have_another_dtype():
    base = foreign._nf4(torch.nn.Linear(D_IN, D_OUT), quant_storage=torch.bfloat16)
    layer = nk.NeuroAdaBypass(base, 2)
    assert torch.equal(
        layer.base_entries(layer.index), foreign.dense(base).gather(1, layer.index.long())
    )


@pytest.mark.parametrize("kind", ["conv1d", "nf4", "int8", "torchao-float8"])
def test_autocast_casts_x_to_what_the_base_gives(kind):
    layer = wrap(foreign.make(kind))
    x = torch.randn(5, D_IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        base_y = layer.base(x)
    assert y.dtype == base_y.dtype
    seen = x.to(y.dtype).double()
    exact = base_y.double() + nk.reference.bypass(seen, layer.index, layer.delta.double())
    assert rms_error(y, exact) <= tolerance(y.dtype, layer.k)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["conv1d", "nf4"])
def test_checkpointing_changes_nothing(kind, reentrant):
    layer = wrap(foreign.make(kind))
    x, grad_output = torch.randn(5, D_IN), torch.randn(5, D_OUT)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.delta.grad = None
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.backward(grad_output)
        results.append((y.detach(), leaf.grad, layer.delta.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["scaled", "nf4", "int8"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_their_own(kind, copied):
    layer = wrap(foreign.make(kind))
    x = torch.randn(5, D_IN)
    twin = copied(layer)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.delta.zero_()
    twin.index = twin.index.flip(0).contiguous()
    assert torch.equal(layer(x), expected)
    assert torch.equal(twin(x), twin.base(x))


def test_a_torchao_base_is_copied_deeply():
    layer = wrap(foreign.make("torchao-int8"))
    x = torch.randn(5, D_IN)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


# Dynamo's own, where it sees an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_layer_round_a_quantised_base_is_one_graph(kind):
    layer = wrap(foreign.make(kind))
    torch.compiler.reset()
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, grad_output = torch.randn(5, D_IN), torch.randn(5, D_OUT)
    results = [differentiated(call, x, grad_output) for call in (function, layer)]
    torch.compiler.reset()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("how", ["load", "set"])
def test_a_compiled_layer_follows_its_index(how):
    layer, other = wrap(foreign.make("conv1d")), wrap(foreign.make("conv1d"))
    torch.compiler.reset()
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, grad_output = torch.randn(5, D_IN), torch.randn(5, D_OUT)
    for _ in range(2):
        y, grad = differentiated(function, x, grad_output)
        expected_y, expected_grad = differentiated(layer, x, grad_output)
        assert torch.equal(y, expected_y)
        assert torch.equal(grad, expected_grad)
        assert rms_error(grad, grad_output.double() @ foreign.effective(layer)) <= tolerance(
            torch.float32, D_OUT
        )
        if how == "load":
            layer.load_state_dict(other.state_dict())
        else:
            layer.index = other.index
    torch.compiler.reset()


def test_an_index_that_is_written_in_place_is_checked_and_planned():
    layer = wrap(foreign.make("conv1d"))
    layer.index.copy_(layer.index.flip(0))
    x, grad_output = torch.randn(5, D_IN), torch.randn(5, D_OUT)
    grad = differentiated(layer, x, grad_output)[1]
    expected = grad_output.double() @ foreign.effective(layer)
    assert rms_error(grad, expected) <= tolerance(torch.float32, D_OUT)
    layer.index.fill_(3)
    with pytest.raises(ValueError, match="stands twice"):
        layer(x)


def test_delta_keeps_its_dtype_when_the_layer_is_cast():
    layer = wrap(foreign.make("conv1d")).to(torch.bfloat16)
    assert (layer.weight.dtype, layer.delta.dtype) == (torch.bfloat16, torch.float32)
    assert layer(torch.randn(3, D_IN, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_else_the_forward_takes_goes_to_the_base():
    class Twice(foreign.Scaled):
        def forward(self, x, times=1, *, more=0):
            return super().forward(x) * times + more

    layer = wrap(Twice(D_IN, D_OUT))
    x = torch.randn(5, D_IN)
    assert torch.equal(
        layer(x, 2, more=1),
        nk.functional.neuroada_bypass(layer.base(x, 2, more=1), x, layer.index, layer.delta),
    )


def test_evaluating_four_bits_on_a_cpu_leaves_them_as_they_are():
    layer = wrap(foreign.make("nf4", d_out=64)).eval()
    before = foreign.raw(layer)
    x = torch.randn(5, D_IN)
    with torch.no_grad():
        expected = layer(x)
    assert foreign.same(foreign.raw(layer), before)
    leaf = x.clone().requires_grad_()
    y = layer.train()(leaf)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert rms_error(leaf.grad, foreign.effective(layer).sum(0).expand(5, -1)) <= tolerance(
        torch.float32, 64
    )
