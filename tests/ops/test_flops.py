"""``FlopCounterMode`` counts the ops: two operations a multiply-add, dense and bypass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import neuroada_kernels as nk
import neuroada_kernels.flops

TOKENS, D_IN, D_OUT, K = 6, 24, 40, 3
DENSE, BYPASS = 2 * TOKENS * D_IN * D_OUT, 2 * TOKENS * D_OUT * K


def counted(layer: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("save_activations", ["full", "compact"])
@pytest.mark.parametrize("first", [False, True], ids=["", "first"])
def test_a_layer(first, save_activations, device):
    layer = nk.NeuroAdaLinear(D_IN, D_OUT, K, save_activations=save_activations, device=device)
    x = torch.randn(2, TOKENS // 2, D_IN, device=device, requires_grad=not first)
    # Forward and the gradient of delta; dx, where it is wanted, as the forward.
    assert counted(layer, x) == DENSE + 2 * BYPASS + (0 if first else DENSE + BYPASS)


def test_a_resident_layer_has_torchs_products():
    layer = nk.NeuroAdaLinear(D_IN, D_OUT, K, strategy="resident")
    x = torch.randn(TOKENS, D_IN, requires_grad=True)
    assert counted(layer, x) == 2 * DENSE + BYPASS


def test_the_bypass_alone():
    layer = nk.NeuroAdaBypass(nn.Linear(D_IN, D_OUT).requires_grad_(False), K)
    x = torch.randn(TOKENS, D_IN, requires_grad=True)
    assert counted(layer, x) == 2 * DENSE + 3 * BYPASS
