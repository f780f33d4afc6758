"""Adapters on disk know the base without the bypass that is resident in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuroada_kernels as nk


def model_of(strategy: str, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8))
    nk.adapt(model, 3, strategy=strategy, **options)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.delta.normal_()
    model(torch.randn(2, 24))
    return model


def test_an_adapter_saved_while_resident_is_the_one_saved_by_bypass(tmp_path):
    files = []
    for strategy in ("bypass", "resident"):
        files.append(tmp_path / f"{strategy}.safetensors")
        # The config names the strategy, and is the same where it is given.
        nk.save_adapter(model_of(strategy), files[-1], config=nk.NeuroAdaConfig(k=3))
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("selection", ["magnitude", "random"])
@pytest.mark.parametrize("into", ["bypass", "resident", "plain"])
def test_it_loads_into_any_model_over_the_same_base(into, selection, tmp_path):
    """Also into one that is resident with other connections, and has patched those."""
    source = model_of("resident")
    nk.save_adapter(source, tmp_path / "a.safetensors")
    if into == "plain":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8))
    else:
        model = model_of(into, selection=selection)
    base = {n: t for n, t in model.state_dict().items() if n.endswith("weight")}
    summary = nk.load_adapter(model, tmp_path / "a.safetensors")
    assert summary.resident == (("0", "2") if into == "resident" else ())
    x = torch.randn(9, 24)
    torch.testing.assert_close(model(x), source(x))
    nk.set_strategy(model, "bypass")
    assert all(tensor.equal(base[n]) for n, tensor in model.state_dict().items() if n in base)


def test_another_base_is_refused_and_a_resident_model_stays_as_it_was(tmp_path):
    nk.save_adapter(model_of("resident"), tmp_path / "a.safetensors")
    model = model_of("resident", seed=1)
    x = torch.randn(9, 24)
    y = model(x)
    with pytest.raises(ValueError, match="not what the adapter is for"):
        nk.load_adapter(model, tmp_path / "a.safetensors")
    assert model(x).equal(y)
    assert model[0].strategy == "resident"


def test_an_index_written_in_place_since_is_the_one_that_is_saved(tmp_path):
    """With W's own values there, some of which the layer has patched for its old index."""
    for strategy in ("bypass", "resident"):
        model = model_of(strategy)
        model[0].index.copy_((model[0].index + 5) % 24)
        nk.save_adapter(model, tmp_path / "a.safetensors", config=nk.NeuroAdaConfig(k=3))
        content = (tmp_path / "a.safetensors").read_bytes()
        if strategy == "bypass":
            expected = content
    assert content == expected
