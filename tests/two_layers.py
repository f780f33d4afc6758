"""Two adapted layers with nonzero deltas, for tests of compilation and export."""

from __future__ import annotations

import torch
from torch import nn

import neuroada_kernels as nk


def two_layers(
    strategy: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: object
) -> nn.Module:
    """24 to 40 to 12, k 3; a bias trains as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 12, bias=False))
    model.to(device, dtype)
    nk.adapt(model, k=3, strategy=strategy, **options)
    move_deltas(model)
    model[0].bias.requires_grad_()
    return model


def move_deltas(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.delta.add_(torch.randn_like(layer.delta), alpha=0.1)
