"""The copies that ``nn.DataParallel`` makes for a call, but for its broadcast, which is of GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import neuroada_kernels as nk


def replica_of(model: nn.Module) -> nn.Module:
    """As ``torch.nn.parallel.replicate`` makes one: parameters are computed, and put by setattr."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            setattr(copy, name, copies[child])
        for name, held in {**module._parameters, **module._buffers}.items():
            if held is not None:
                setattr(copy, name, held * 1 if held.requires_grad else held.clone())
            elif name in module._parameters:
                copy._parameters[name] = None
    return copies[model]


def trained(strategy: str, wrap: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    first, second = nn.Linear(16, 32), nn.Linear(32, 4, bias=False)
    if wrap:
        model = nn.Sequential(nk.NeuroAdaBypass(first.requires_grad_(False), 2), nn.ReLU())
    else:
        model = nn.Sequential(first, nn.ReLU(), second)
        nk.adapt(model, k=2, target_modules="all-linear", strategy=strategy)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("delta"):
                parameter.normal_()
    return model, torch.randn(8, 16)


@pytest.mark.parametrize(
    ("strategy", "wrap"),
    [("bypass", False), ("resident", False), ("bypass", True)],
    ids=["bypass", "resident", "wrapped"],
)
def test_replicas_compute_what_the_model_does(strategy, wrap):
    model, x = trained(strategy, wrap)
    deltas = [p for n, p in model.named_parameters() if n.endswith("delta")]
    y = model(x)
    expected = torch.autograd.grad(y.square().sum(), deltas)
    parts = torch.cat([replica_of(model)(part) for part in x.chunk(2)])
    torch.testing.assert_close(parts, y)
    for grad, wanted in zip(
        torch.autograd.grad(parts.square().sum(), deltas), expected, strict=True
    ):
        torch.testing.assert_close(grad, wanted)


def test_a_replica_follows_delta_and_leaves_the_resident_weight_to_its_layer():
    model, x = trained("resident", wrap=False)
    layer = model[0]
    model(x)
    with torch.no_grad():
        layer.delta.zero_()
    version = layer.weight._version
    y = replica_of(model)(x)
    assert layer.weight._version == version
    assert model(x).equal(y)
