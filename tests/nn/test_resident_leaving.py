"""Whichever way the strategy is left, W is what it was, bit for bit, and delta stays."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from layer_facts import effective_weight
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import neuroada_kernels as nk
from neuroada_kernels import NeuroAdaLinear
from neuroada_kernels.testing import rms_error, tolerance

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """NaN, infinities and both zeros told apart."""
    return tensor.detach().clone().view(INTEGERS[tensor.element_size()])


@pytest.fixture(params=DTYPES, ids=str)
def linear(request):
    """Among its weights are a negative zero, infinities, a NaN and a subnormal number."""
    linear = nn.Linear(24, 16, dtype=request.param)
    values = [-0.0, float("inf"), float("-inf"), float("nan"), torch.finfo(request.param).tiny / 4]
    with torch.no_grad():
        linear.weight[2:7, 0] = torch.tensor(values, dtype=request.param)
    return linear


def trained(linear, steps=3, **options):
    """A layer whose delta has moved and acts; columns 0, 3 and 7, and one row without any."""
    index = torch.tensor([[0, 3, 7]], dtype=torch.int32).repeat(16, 1)
    index[5] = -1
    layer = NeuroAdaLinear.from_linear(linear, index=index, strategy="resident", **options)
    for _ in range(steps):
        with torch.no_grad():
            layer.delta.add_(torch.randn(16, 3))
        layer(torch.randn(2, 24, dtype=linear.weight.dtype))
    return layer


def raise_in_training(layer):
    def train():
        with nk.resident(nn.Sequential(layer)):
            layer(torch.randn(2, 24, dtype=layer.weight.dtype))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert layer.strategy == "bypass"


LEAVINGS = {
    "strategy": lambda layer: setattr(layer, "strategy", "bypass"),
    "merged and unmerged": lambda layer: (layer.merge(), layer.unmerge()),
    "model-wide": lambda layer: nk.set_strategy(nn.Sequential(layer), "bypass"),
    "error in a block": raise_in_training,
    "state_dict with the parameters themselves": lambda layer: layer.state_dict(keep_vars=True),
}


@pytest.mark.parametrize("way", LEAVINGS)
def test_w_is_restored_bit_for_bit(linear, way):
    before, pointer = bits(linear.weight), linear.weight.data_ptr()
    layer = trained(linear)
    delta = layer.delta.detach().clone()
    assert not bits(linear.weight).equal(before)
    LEAVINGS[way](layer)
    assert bits(linear.weight).equal(before)
    assert layer.weight is linear.weight
    assert linear.weight.data_ptr() == pointer
    assert layer.delta.equal(delta)


def test_a_deleted_layer_restores_it(linear):
    before = bits(linear.weight)
    layer = trained(linear)
    layer.me = [layer]  # only the collector finds it
    del layer
    gc.collect()
    assert bits(linear.weight).equal(before)


def functionalization() -> object:
    """As it is on while an op runs in export."""
    return torch._C._IncludeDispatchKeyGuard(torch._C.DispatchKey.Functionalize)


@pytest.mark.parametrize("tracing", [FakeTensorMode, functionalization])
def test_a_layer_that_is_collected_while_something_is_traced_restores_it(tracing, linear):
    before = bits(linear.weight)
    layer = trained(linear)
    with tracing():
        del layer
    assert bits(linear.weight).equal(before)


def test_a_layer_taken_out_of_its_model_restores_it(linear):
    before = bits(linear.weight)
    model = nn.Sequential(linear)
    nk.adapt(model, k=1, scores={"0": torch.rand(16, 24)}, strategy="resident")
    with torch.no_grad():
        model[0].delta.fill_(1)
    model(torch.randn(2, 24, dtype=linear.weight.dtype))
    model[0] = linear
    assert bits(linear.weight).equal(before)


def test_an_error_in_a_training_step_loses_nothing(linear):
    before = bits(linear.weight)

    def train():
        layer = trained(linear)
        raise ZeroDivisionError(layer)

    try:
        train()
    except ZeroDivisionError as error:
        layer = error.args[0]
        assert not bits(linear.weight).equal(before)
        layer.strategy = "bypass"
        assert bits(linear.weight).equal(before)


def test_an_interrupt_while_w_is_patched_loses_nothing(monkeypatch):
    linear = nn.Linear(24, 16)
    before = bits(linear.weight)
    layer = NeuroAdaLinear.from_linear(linear, 3)
    nn.init.normal_(layer.delta)
    plain = nk.ops.patch_

    def interrupted(*args):
        plain(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(nk.ops, "patch_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer.strategy = "resident"
    assert not bits(linear.weight).equal(before)
    layer.strategy = "bypass"
    assert bits(linear.weight).equal(before)


def test_a_state_dict_holds_the_base_and_goes_on_holding_it(linear):
    before = bits(linear.weight)
    layer = trained(linear)
    state = layer.state_dict()
    assert set(state) == {"weight", "bias", "index", "delta"}
    assert bits(state["weight"]).equal(before)
    patched = bits(linear.weight)
    assert not patched.equal(before)
    with torch.no_grad():
        layer.delta.add_(1)
    layer(torch.randn(2, 24, dtype=linear.weight.dtype))
    assert bits(state["weight"]).equal(before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("into", ["bypass", "resident"])
@pytest.mark.parametrize("out_of", ["bypass", "resident"])
def test_a_state_loads_into_either_strategy(out_of, into, assign):
    torch.manual_seed(0)
    source = trained(nn.Linear(24, 16))
    source.strategy = out_of
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    layer = trained(nn.Linear(24, 16))
    layer.strategy = into
    old, old_bits = layer.weight, bits(layer.state_dict()["weight"])
    layer.load_state_dict(torch.load(file), assign=assign)
    assert layer.strategy == into
    if assign:  # whoever shares the old weight
        assert bits(old).equal(old_bits)
    x = torch.randn(9, 24)
    assert rms_error(layer(x), source(x)) <= tolerance(torch.float32, 24)
    source.strategy = layer.strategy = "bypass"
    assert bits(layer.weight).equal(bits(source.weight))
    assert layer(x).equal(source(x))


def test_deltas_alone_can_be_loaded():
    layer, source = trained(nn.Linear(24, 16)), trained(nn.Linear(24, 16))
    before, pointer = bits(layer.state_dict()["weight"]), layer.weight.data_ptr()
    layer.load_state_dict({"delta": source.delta.detach()}, strict=False)
    expected = effective_weight(layer)
    layer(torch.randn(2, 24))
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-6, atol=1e-6)
    layer.strategy = "bypass"
    assert bits(layer.weight).equal(before)
    assert layer.weight.data_ptr() == pointer


def test_an_adapter_that_is_loaded_is_patched_at_once():
    """A compiled forward would not enter the strategy again."""
    layer, source = trained(nn.Linear(24, 16)), trained(nn.Linear(24, 16))
    before = bits(layer.state_dict()["weight"])
    adapter = {"index": source.index.flip(0), "delta": source.delta.detach()}
    layer.load_state_dict(adapter, strict=False)
    assert layer.base_values is not None
    torch.testing.assert_close(layer.weight.double(), effective_weight(layer), rtol=1e-6, atol=1e-6)
    layer.strategy = "bypass"
    assert bits(layer.weight).equal(before)


def test_a_weight_alone_can_be_loaded():
    """As a checkpoint of the base is."""
    layer, weight = trained(nn.Linear(24, 16)), torch.randn(16, 24)
    layer.load_state_dict({"weight": weight}, strict=False)
    assert layer.state_dict()["weight"].equal(weight)
    assert not layer.weight.equal(weight)
    layer.strategy = "bypass"
    assert layer.weight.equal(weight)


def test_a_refused_state_changes_nothing():
    layer = trained(nn.Linear(24, 16))
    state = layer.state_dict()
    patched = bits(layer.weight)
    with pytest.raises(RuntimeError, match=r"delta: shape \[2, 2\]"):
        layer.load_state_dict({**state, "delta": torch.zeros(2, 2)})
    assert bits(layer.weight).equal(patched)
    assert bits(layer.state_dict()["weight"]).equal(bits(state["weight"]))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_in_the_middle_of_training_is_whole_and_independent(linear, make_copy):
    before = bits(linear.weight)
    layer = trained(linear)
    optimiser = torch.optim.AdamW([layer.delta])
    optimiser.step()
    twin, x = make_copy(layer), torch.randn(9, 24, dtype=linear.weight.dtype)
    assert twin.strategy == "resident"
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        twin.delta.add_(1)
    twin(x)
    twin.strategy = "bypass"
    assert bits(twin.weight).equal(before)
    del twin
    gc.collect()
    assert not bits(linear.weight).equal(before), "the copy's end is not the layer's"
    layer.strategy = "bypass"
    assert bits(linear.weight).equal(before)


def test_a_shallow_copy_that_dies_does_not_take_the_bypass_along():
    layer, x = trained(nn.Linear(24, 16)), torch.randn(9, 24)
    y, patched = layer(x), bits(layer.weight)
    twin = copy.copy(layer)
    twin.strategy = "bypass"
    layer.strategy = "resident"  # whose state is the twin's too
    del twin
    gc.collect()
    assert bits(layer.weight).equal(patched)
    assert layer(x).equal(y)
    assert layer.strategy == "resident"


def test_a_replica_that_dies_leaves_the_weight_patched():
    """As nn.DataParallel makes one for each call."""
    layer = trained(nn.Linear(24, 16))
    patched, version = bits(layer.weight), layer.weight._version
    replica = layer._replicate_for_data_parallel()
    del replica
    gc.collect()
    assert bits(layer.weight).equal(patched)
    assert layer.weight._version == version


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_that_dies_before_its_first_forward_restores_its_weight(linear, make_copy):
    before = bits(linear.weight)
    twin = make_copy(trained(linear))
    weight = twin.weight
    assert not bits(weight).equal(before)
    del twin
    gc.collect()
    assert bits(weight).equal(before)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_a_cast_in_the_middle_of_training_casts_w_and_leaves_delta(linear, to):
    expected = linear.weight.detach().clone().to(to)
    layer = trained(linear, delta_dtype=torch.float32)
    delta = layer.delta.detach().clone()
    layer.to(to)
    assert layer.strategy == "resident"
    assert layer.delta.equal(delta)
    assert layer.delta.dtype == torch.float32
    x = torch.randn(9, 24, dtype=to)
    y = layer(x)
    whole = nk.reference.merged_weight(expected, layer.index, delta)
    torch.testing.assert_close(layer.weight.detach(), whole, rtol=0, atol=0, equal_nan=True)
    assert y.dtype == to
    layer.strategy = "bypass"
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=0, equal_nan=True)


def test_memory_without_values_takes_a_state_later():
    source, layer = trained(nn.Linear(24, 16)), trained(nn.Linear(24, 16))
    layer.to("meta")
    assert layer(torch.randn(2, 5, 24, device="meta")).shape == (2, 5, 16)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(9, 24)
    assert layer(x).equal(source(x))
    assert layer.strategy == "resident"
    layer.strategy = "bypass"
    assert layer.weight.equal(source.state_dict()["weight"])


def test_another_weight_that_is_set_is_patched_and_the_old_one_restored(linear):
    before = bits(linear.weight)
    layer = trained(linear)
    other = nn.Parameter(torch.randn_like(linear.weight), requires_grad=False)
    values = bits(other)
    layer.weight = other
    assert bits(linear.weight).equal(before)
    assert not bits(other).equal(values), "at once, since a compiled forward cannot"
    layer.strategy = "bypass"
    assert bits(other).equal(values)


def test_after_unmerging_the_strategy_goes_on():
    layer, x = trained(nn.Linear(24, 16)), torch.randn(9, 24)
    y = layer(x)
    layer.merge()
    assert layer.merged
    assert torch.equal(layer(x), y)
    layer.unmerge()
    assert torch.equal(layer(x), y)
    layer(x).sum().backward()
    assert layer.delta.grad.any()


def test_a_merged_layer_becomes_resident_once_it_is_unmerged(linear):
    before = bits(linear.weight)
    layer = trained(linear)
    layer.strategy = "bypass"
    layer.merge()
    layer.strategy = "resident"
    layer.unmerge()
    assert bits(linear.weight).equal(before)
    layer(torch.randn(2, 24, dtype=linear.weight.dtype))
    assert not bits(linear.weight).equal(before)
    layer.strategy = "bypass"
    assert bits(linear.weight).equal(before)
