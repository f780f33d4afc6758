"""What must not go wrong quietly: stale plans, half-loaded states, subclasses, freed tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels import NeuroAdaLinear, ReferenceNeuroAdaLinear

BOTH = pytest.mark.parametrize("kind", [NeuroAdaLinear, ReferenceNeuroAdaLinear])


def _grad_x(layer: nn.Module, x: torch.Tensor, **buffers: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    y = torch.func.functional_call(layer, buffers, x) if buffers else layer(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    return grad


def _expected(layer: nn.Module, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    y = nk.reference.neuroada_linear(x, layer.weight, index, layer.delta, layer.bias)
    (grad,) = torch.autograd.grad(y.sum(), x)
    return grad


def _layer_and_other_index() -> tuple[NeuroAdaLinear, torch.Tensor]:
    layer = NeuroAdaLinear(6, 5, k=2)
    nn.init.normal_(layer.delta)
    return layer, nk.select(torch.randn(5, 6), 2, "random")


@pytest.mark.parametrize("how", ["functional_call", "data", "register_buffer"])
def test_the_gradient_follows_an_index_however_it_was_replaced(how):
    layer, other = _layer_and_other_index()
    x = torch.randn(7, 6)
    _grad_x(layer, x)
    if how == "functional_call":
        grad = _grad_x(layer, x, index=other)
    else:
        if how == "data":
            layer.index.data = other
        else:
            layer.register_buffer("index", other)
        grad = _grad_x(layer, x)
    torch.testing.assert_close(grad, _expected(layer, x, other))


def test_the_gradient_follows_the_layers_own_index_after_a_functional_call():
    layer, other = _layer_and_other_index()
    x = torch.randn(7, 6)
    _grad_x(layer, x, index=other)
    torch.testing.assert_close(_grad_x(layer, x), _expected(layer, x, layer.index))


@pytest.mark.parametrize("strategy", ["bypass", "resident"])
def test_an_ensemble_runs_under_vmap(strategy):
    """As torch's tutorial has it: the buffers are stacked too, and the index can not be read."""
    layers = [_layer_and_other_index()[0] for _ in range(3)]
    for layer in layers:
        layer.strategy = strategy
        layer(torch.randn(7, 6))
    stacked = torch.func.stack_module_state(layers)
    x = torch.randn(7, 6)
    y = torch.func.vmap(lambda *state: torch.func.functional_call(layers[0], state, x))(*stacked)
    torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]))


@BOTH
@pytest.mark.parametrize("spoilt", ["weight", "bias", "delta"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_refused_state_leaves_the_merged_state_as_it_was(kind, spoilt, merged):
    layer, source = kind(6, 5, k=2), kind(6, 5, k=2)
    nn.init.normal_(layer.delta)
    untouched = layer.weight.clone()
    (layer if merged else source).merge()
    state = {**source.state_dict(), spoilt: torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match=f"{spoilt}: shape"):
        layer.load_state_dict(state)
    assert layer.merged == merged
    layer.unmerge()
    assert torch.equal(layer.weight, untouched)


@BOTH
def test_delta_alone_is_not_loaded_into_a_merged_layer(kind):
    layer = kind(6, 5, k=2)
    layer.merge()
    with pytest.raises(RuntimeError, match="delta: cannot change while merged"):
        layer.load_state_dict({"delta": torch.ones(5, 2)}, strict=False)


@BOTH
def test_unmerging_restores_signed_zeros(kind):
    layer = kind(6, 5, k=1)
    with torch.no_grad():
        layer.weight.fill_(-0.0)
    layer.merge()
    layer.unmerge()
    assert layer.weight.signbit().all()


@BOTH
def test_unmerging_restores_what_was_merged_though_the_index_was_written(kind):
    layer = kind(6, 5, k=1)
    nn.init.normal_(layer.delta)
    untouched = layer.weight.clone()
    layer.merge()
    layer.index.fill_(2)
    layer.unmerge()
    assert torch.equal(layer.weight, untouched)


@BOTH
def test_an_index_that_was_spoilt_in_place_is_not_merged(kind):
    layer = kind(6, 5, k=2)
    untouched = layer.weight.clone()
    layer.index.fill_(1)
    with pytest.raises(ValueError, match="column 1 stands twice in row 0"):
        layer.merge()
    assert torch.equal(layer.weight, untouched)
    assert not layer.merged


@BOTH
def test_an_index_of_another_k_is_refused(kind):
    layer = kind(6, 5, k=1)
    with pytest.raises(ValueError, match=r"index: shape \[5, 3\], expected \[5, 1\]"):
        layer.index = nk.select(torch.randn(5, 6), 3)
    assert layer.index.shape == (5, 1)


def test_a_partial_load_does_not_plan_an_index_that_it_did_not_bring():
    layer = NeuroAdaLinear(6, 5, k=2)
    weight = layer.weight.clone()
    layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict({"weight": weight}, strict=False)
    assert torch.equal(layer.weight, weight)


def test_a_weight_that_was_unfrozen_is_refused_in_the_forward():
    layer = NeuroAdaLinear(6, 5).requires_grad_(True)
    with pytest.raises(ValueError, match="weight: requires grad"):
        layer(torch.randn(2, 6))


def test_input_of_another_kind_or_device_is_named():
    layer = NeuroAdaLinear(6, 5)
    with pytest.raises(TypeError, match=r"x: dtype torch\.int64"):
        layer(torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight: on cpu, expected meta"):
        layer(torch.ones(2, 6, device="meta"))


class _Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_linear_with_a_forward_of_its_own_is_not_replaced():
    model = nn.Sequential(_Doubled(6, 5))
    with pytest.raises(ValueError, match="0: _Doubled has a forward of its own"):
        nk.adapt(model)
    assert type(model[0]) is _Doubled
    assert model[0].weight.requires_grad


def test_the_planner_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="expected 1 to -66"):
        nk.make_plan(torch.empty(0, 1, dtype=torch.int32), -66)
    with pytest.raises(TypeError, match=r"index: dtype torch\.int64"):
        nk.make_plan(torch.zeros(3, 1, dtype=torch.int64), 4)


@pytest.mark.skipif(nk._extension.module is None, reason="the extension is not built")
def test_the_extension_refuses_sizes_that_overflow():
    empty = (nk.plan.ctypes.c_int32 * 0)()
    for sizes in ((2**32, 2**32, 4), (-1, 1, 4), (1, 1, -4)):
        with pytest.raises(ValueError, match="index: sizes"):
            nk._extension.module.check_index(empty, *sizes)


@pytest.mark.skipif(nk._extension.module is None, reason="the extension is not built")
def test_the_extension_refuses_values_of_another_kind():
    floats = (nk.plan.ctypes.c_float * 2)()
    with pytest.raises(ValueError, match=r"index: 2 elements of 4 bytes, format '<f', expected 2"):
        nk._extension.module.check_index(floats, 1, 2, 4)


def test_a_tensor_whose_storage_was_freed_is_refused():
    layer = NeuroAdaLinear(6, 5)
    x = torch.randn(4, 6)
    x.untyped_storage().resize_(0)
    with nk.use_backend("cpu"), pytest.raises(RuntimeError, match="x: its storage is empty"):
        layer(x)


@pytest.mark.parametrize("save_activations", ["full", "compact"])
@pytest.mark.parametrize("strategy", ["bypass", "resident"])
def test_what_an_evaluation_plans_serves_training(strategy, save_activations):
    linear = nn.Linear(24, 16)
    layer = nk.NeuroAdaLinear.from_linear(
        linear, k=2, strategy=strategy, save_activations=save_activations
    )
    layer.to("cpu")  # after which it plans anew
    with torch.inference_mode():
        layer(torch.randn(3, 24))
    layer(torch.randn(3, 24)).sum().backward()
    assert layer.delta.grad.any()


def test_a_resident_layer_is_patched_again_by_loading():
    layer = nk.NeuroAdaLinear(24, 16, k=2, strategy="resident")
    layer.load_state_dict(nk.NeuroAdaLinear(24, 16, k=2, selection="random").state_dict())
    assert layer.base_values is not None
