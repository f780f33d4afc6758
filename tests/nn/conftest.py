"""Tests with ``layer_type`` run on all three types of layer, which have the same interface."""

from __future__ import annotations

import pytest
import torch
from resident_layer import ResidentNeuroAdaLinear

from neuroada_kernels import NeuroAdaLinear, ReferenceNeuroAdaLinear


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(
    params=[NeuroAdaLinear, ResidentNeuroAdaLinear, ReferenceNeuroAdaLinear],
    ids=lambda t: t.__name__,
)
def layer_type(request):
    return request.param


@pytest.fixture
def trained(layer_type):
    """A factory of layers whose ``delta`` is nonzero, also in empty slots."""

    def make(d_in=24, d_out=16, k=3, **options):
        layer = layer_type(d_in, d_out, k, **options)
        with torch.no_grad():
            layer.delta.normal_(std=0.1)
        return layer

    return make
