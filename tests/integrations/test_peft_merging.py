"""Merging under PEFT: into the weight and back out of it, bit for bit, or not at all."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_llama import batch, changed, give_values, llama, logits, values
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels.integrations.peft import NeuroAdaPeftConfig
from neuroada_kernels.integrations.peft.model import adapted_layers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def adapted(dtype: torch.dtype = torch.float32) -> PeftModel:
    """Two adapters with values, whose connections overlap; the first one is active."""
    model = get_peft_model(llama(dtype), NeuroAdaPeftConfig(k=4)).eval()
    give_values(model, 1)
    model.add_adapter("other", NeuroAdaPeftConfig(k=3, selection="random"))
    model.set_adapter("other")
    give_values(model, 2)
    model.set_adapter("default")
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerging_restores_the_base_bit_for_bit(dtype):
    model = adapted(dtype)
    before, expected = values(model), logits(model)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    for names in (["default"], ["default", "other"]):
        model.merge_adapter(names)
        touched = changed(model, before)
        assert touched
        assert all(name.endswith("base_layer.weight") for name in touched)
        if names == ["default"]:
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=tolerance)
        model.unmerge_adapter()
        assert not changed(model, before)
    assert logits(model).equal(expected)


def test_a_weight_that_two_layers_share_is_restored():
    base = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    base[1].weight = base[0].weight
    config = NeuroAdaPeftConfig(k=6, target_modules=["0", "1"])
    model = give_values(get_peft_model(base, config), 1)
    before = values(model)
    model.merge_adapter()
    assert len(changed(model, before)) == 2
    model.unmerge_adapter()
    assert not changed(model, before)


def test_merging_twice_changes_nothing():
    model = adapted()
    model.merge_adapter()
    merged = values(model)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert not changed(model, merged)
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["default", "other"])
    assert changed(model, merged)


def test_what_is_merged_is_the_package_s_own_merge():
    own = llama()
    nk.adapt(own, k=4)
    give_values(own, 1)
    nk.merge(own)
    theirs = adapted().merge_and_unload()
    assert type(theirs) is type(own)
    for name, tensor in theirs.state_dict().items():
        assert tensor.equal(own.state_dict()[name]), name
    tokens = theirs.generate(batch(0), max_new_tokens=3, do_sample=False)
    assert tokens.equal(own.generate(batch(0), max_new_tokens=3, do_sample=False))


def test_unloading_leaves_the_base():
    model = adapted().unload()
    expected = llama().state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_a_safe_merge_of_a_broken_adapter_changes_nothing(value):
    """Also in layers before the broken one, and where only the sum of two adapters overflows."""
    model = adapted()
    last = [*adapted_layers(model).values()][-1]
    last.neuroada_index["other"][:] = last.neuroada_index["default"][:, :3]
    with torch.no_grad():
        for delta in last.neuroada_delta.values():
            delta[5, 1] = value * 2  # 2e38 is finite, twice that is not
    before = values(model)
    names = ["default", "other"] if value == 1e38 else ["default"]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter"):
            merge(safe_merge=True, adapter_names=names)
        assert not changed(model, before)
        assert not any(layer.merged for layer in adapted_layers(model).values())
    model.merge_adapter(names)
    model.unmerge_adapter()
    assert not changed(model, before)


def test_a_safe_merge_is_the_merge():
    expected = adapted().merge_and_unload().state_dict()
    found = adapted().merge_and_unload(safe_merge=True).state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())


def test_merged_layers_compute_as_plain_ones_until_they_are_disabled():
    model = adapted()
    model.merge_adapter()
    expected = logits(model)
    layer = next(iter(adapted_layers(model).values()))
    with torch.no_grad():
        layer.neuroada_delta["default"].zero_()
    assert logits(model).equal(expected)
    with model.disable_adapter():
        assert logits(model).equal(logits(llama()))
    assert not layer.merged


def test_what_would_need_the_base_s_weight_is_refused_while_merged():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="default merged into it, unmerge first"):
        model.add_adapter("third", NeuroAdaPeftConfig())
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")


def test_merged_weights_may_be_cast_before_unmerging():
    linear = nn.Sequential(nn.Linear(6, 5))
    model = give_values(get_peft_model(linear, NeuroAdaPeftConfig(target_modules=["0"])), 1)
    weight = linear[0].base_layer.weight
    expected = weight.detach().bfloat16()
    model.merge_adapter()
    model.bfloat16().unmerge_adapter()
    assert weight.dtype == torch.bfloat16
    assert weight.equal(expected)
    assert linear[0].neuroada_delta["default"].dtype == torch.float32
