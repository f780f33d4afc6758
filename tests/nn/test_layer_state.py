"""State dicts: what is in them, what is refused, and the merged state they carry."""

from __future__ import annotations

import io

import pytest
import torch
from layer_facts import assert_state, input_gradient, other_index, state_of
from torch import nn

from neuroada_kernels.testing import rms_error, tolerance

WRONG_INDEX = {
    "column 24": lambda index: index.clone().fill_diagonal_(24),
    "column -2": lambda index: index.clone().fill_diagonal_(-2),
    "stands twice": lambda index: index[:, :1].expand(-1, 3).clone(),
    "dtype torch.int64": lambda index: index.long(),
    "dtype torch.float32": lambda index: index.float(),
    "size mismatch|shape": lambda index: index[:, :2].clone(),
    "size mismatch|shape ": lambda index: index[:-1].clone(),
}


@pytest.mark.parametrize("bias", [True, False])
def test_keys_are_the_documented_ones(layer_type, bias):
    layer = layer_type(24, 16, 3, bias=bias)
    keys = {"weight", "index", "delta"} | ({"bias"} if bias else set())
    assert set(layer.state_dict()) == keys
    layer.merge()
    assert set(layer.state_dict()) == keys | {"original"}


@pytest.mark.parametrize("assign", [False, True])
def test_round_trip_through_a_file(trained, assign):
    source, layer = trained(neuron_fraction=0.5), trained()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    result = layer.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_state(layer, state_of(source))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["delta"]
    x = torch.randn(9, 24)
    assert torch.equal(layer(x), source(x))
    assert rms_error(*input_gradient(layer)) <= tolerance(torch.float32, 16)


def test_assign_takes_the_tensors_themselves(trained):
    source, layer = trained(), trained()
    state = source.state_dict()
    layer.load_state_dict(state, assign=True)
    for name in state:
        assert getattr(layer, name).data_ptr() == state[name].data_ptr(), name


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrong", WRONG_INDEX)
def test_wrong_index_is_refused_and_nothing_changes(trained, wrong, assign, merged):
    source, layer = trained(), trained()
    if merged:
        layer.merge()
    before = state_of(layer)
    state = source.state_dict()
    state["index"] = WRONG_INDEX[wrong](state["index"])
    with pytest.raises(RuntimeError, match=rf"index.*({wrong.strip()})"):
        layer.load_state_dict(state, assign=assign)
    assert_state(layer, before)
    layer.unmerge()
    assert rms_error(*input_gradient(layer)) <= tolerance(torch.float32, 16)


def test_error_in_a_model_names_the_layer(trained):
    model = nn.Sequential(trained(), nn.Sequential(trained(16, 8)))
    state = model.state_dict()
    state["1.0.index"] = torch.full_like(state["1.0.index"], 16)
    with pytest.raises(RuntimeError, match=r"1\.0.*index: column 16 in row 0 is out of range"):
        model.load_state_dict(state)


@pytest.mark.parametrize("key", ["weight", "bias", "index", "delta"])
def test_missing_key_is_reported(trained, key):
    source, layer = trained(), trained()
    state = source.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == [key]


def test_unexpected_key_is_reported(trained):
    layer = trained()
    state = {**layer.state_dict(), "gamma": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"gamma"'):
        layer.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_merged_state_loads_as_merged(trained, assign):
    source, layer = trained(neuron_fraction=0.5), trained()
    weight = source.weight.clone()
    source.merge()
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert layer.merged
    assert_state(layer, state_of(source))
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("assign", [False, True])
def test_unmerged_state_loads_as_unmerged(trained, assign):
    source, layer = trained(), trained()
    layer.merge()
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert not layer.merged
    assert_state(layer, state_of(source))
    x = torch.randn(9, 24)
    assert torch.equal(layer(x), source(x))


def test_kept_values_of_a_wrong_shape_do_not_make_the_layer_merged(trained):
    """Otherwise unmerging would write zeros over the chosen weights."""
    layer = trained()
    before = state_of(layer)
    state = layer.state_dict()
    state["original"] = torch.zeros(16, 2)
    with pytest.raises(RuntimeError, match="original"):
        layer.load_state_dict(state)
    layer.unmerge()
    assert_state(layer, before)


def test_adapter_alone_loaded_while_merged_does_not_spoil_the_weight(trained):
    """``index`` and ``delta`` of another run: unmerging afterwards must still restore W."""
    layer = trained()
    weight = layer.weight.clone()
    layer.merge()
    adapter = {"index": other_index(layer), "delta": torch.randn(16, 3)}
    try:
        layer.load_state_dict(adapter, strict=False)
    except RuntimeError as error:
        assert "merged" in str(error)  # noqa: PT017 - refusing is right as well
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
