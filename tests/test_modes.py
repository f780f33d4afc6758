"""Adapting under inference mode and under another default device."""

from __future__ import annotations

import copy

import pytest
import torch
from small_transformer import Transformer
from torch import nn

import neuroada_kernels as nk


class Product(nn.Module):
    """A base with a forward of its own."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(torch.randn(d_out, d_in))

    def forward(self, x):
        return x @ self.weight.t()


def test_what_is_adapted_in_inference_mode_trains(tmp_path):
    models = [Transformer() for _ in range(3)]
    nk.adapt(models[0], k=2)
    nk.save_adapter(models[0], tmp_path / "adapter.safetensors")
    with torch.inference_mode():
        nk.adapt(models[1], k=2)
        nk.add_adapter(models[1], "other", k=1)
        nk.load_adapter(models[2], tmp_path / "adapter.safetensors", allow_mismatch=True)
    for model in models:
        model(torch.tensor([[1, 2]])).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    nk.set_adapter(models[1], "other")
    models[1](torch.tensor([[1, 2]])).sum().backward()


def test_connections_are_chosen_by_gradient_and_late_in_inference_mode():
    def loss(model, batch):
        return model(batch).square().sum()

    data = [torch.randn(5, 6)]
    plain, by_gradient = (nn.Sequential(nn.Linear(6, 4)) for _ in range(2))
    by_gradient.load_state_dict(plain.state_dict())
    with torch.device("meta"):
        late = nn.Sequential(nn.Linear(6, 4))
    nk.adapt(late, k=2)
    late.to_empty(device="cpu").load_state_dict(plain.state_dict(), strict=False)
    with torch.inference_mode():
        nk.adapt(by_gradient, k=2, selection="gradient", data=data, loss=loss)
        assert nk.select_connections(late) == []
    nk.adapt(plain, k=2, selection="gradient", data=data, loss=loss)
    assert plain[0].index.equal(by_gradient[0].index)
    for model in (by_gradient, late):
        model(data[0]).sum().backward()


def test_biases_made_in_inference_mode_are_refused_before_anything_changes():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"0\.bias: was made under inference_mode"):
        nk.adapt(model, k=2, bias="all")
    assert type(model[0]) is nn.Linear


def test_the_default_device_is_not_that_of_a_model_on_the_cpu(tmp_path):
    model, file = nn.Sequential(nn.Linear(6, 4), Product(4, 4)), tmp_path / "adapter.safetensors"
    x = torch.randn(3, 6)
    with torch.device("meta"):
        nk.adapt(model, k=2, target_modules=["0", "1"])
        model(x).square().sum().backward()
        with torch.no_grad():
            for layer in model:
                layer.delta += 1
        nk.save_adapter(model, file)
        nk.load_adapter(copy.deepcopy(model), file)
        y = model(x)
        for strategy in ("resident", "bypass"):
            nk.set_strategy(model[0], strategy)
            torch.testing.assert_close(model(x), y)
        nk.merge(model)
        torch.testing.assert_close(model(x), y)


def test_a_model_made_in_inference_mode_is_adapted_and_loaded(tmp_path):
    file = tmp_path / "adapter.safetensors"
    with torch.inference_mode():
        model, other = (nn.Sequential(nn.Linear(6, 4)) for _ in range(2))
        nk.adapt(model, k=2, bias="all")
        nk.save_adapter(model, file)
        nk.load_adapter(other, file, allow_mismatch=True)
        nk.load_adapter(other, file, allow_mismatch=True)
        assert other[0].delta.requires_grad
        assert other[0].bias.requires_grad
        with pytest.raises(ValueError, match="was made under inference_mode"):
            nk.adapt(nn.Sequential(nn.Linear(6, 4)), k=2, strategy="resident")
