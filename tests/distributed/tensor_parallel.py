"""Tensor parallelism in every linear: sharded layers, and sizes that do not divide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import (
    ROWS,
    adapted,
    assert_same_adapter,
    assert_same_curve,
    assert_saved_and_loaded,
    connections,
    layers,
    loss_of,
    train,
)
from small_transformer import batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import neuroada_kernels as nk
from neuroada_kernels.distributed import NeuroAdaColwiseParallel, NeuroAdaRowwiseParallel


def parallel(model: nn.Module) -> nn.Module:
    """Tensor parallelism in every linear; qkv and head all-gather their outputs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        "blocks.*.qkv": NeuroAdaColwiseParallel(output_layouts=Replicate()),
        "blocks.*.out": NeuroAdaRowwiseParallel(input_layouts=Replicate()),
        "blocks.*.up": NeuroAdaColwiseParallel(),
        "blocks.*.down": NeuroAdaRowwiseParallel(),
        "head": NeuroAdaColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def tensor_parallel(folder: Path) -> None:
    single = adapted(bias="all")
    expected = train(single)
    model = parallel(adapted(bias="all"))
    assert_same_curve(train(model), expected)
    assert_same_adapter(model, single)
    ragged_parts()
    if dist.get_world_size() > 1:
        narrow_parts()
    if dist.get_world_size() == 2:
        assert_saved_and_loaded(model, folder, parallel(adapted(bias="all", selection="random")))
        another_k(folder)
    if dist.get_world_size() == 1:
        compiled_as_eager(model)


def compiled_as_eager(model: nn.Module) -> None:
    deltas = [layer.delta for layer in layers(model).values()]
    steps = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = loss_of(call, batch(0, ROWS))
        loss.backward()
        steps.append((loss.detach(), *(delta.grad.full_tensor() for delta in deltas)))
    torch.testing.assert_close(*steps)


def another_k(folder: Path) -> None:
    """Layers load an adapter with more connections and save it unsharded, or all of them raise."""
    wide, path = adapted(k=12), folder / "wide.safetensors"
    for layer in layers(wide).values():
        nn.init.ones_(layer.delta)
    nk.save_adapter(wide, path)
    model = parallel(adapted())
    nk.load_adapter(model, path)
    assert_saved_and_loaded(model, folder, parallel(adapted()))
    assert_same_adapter(model, wide, 0)
    narrow = nk.NeuroAdaLinear(3, 4)
    parallelize_module(
        narrow, init_device_mesh("cpu", (dist.get_world_size(),)), NeuroAdaRowwiseParallel()
    )
    index = torch.arange(3, dtype=torch.int32).expand(4, 3)
    with pytest.raises(ValueError, match="in_features: 3 over 2 processes leave 1"):
        narrow.part_of_connections(index, torch.zeros(4, 3))


def ragged_parts() -> None:
    """Sizes that do not divide, rows without connections, sharded inputs and outputs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns, rows, tokens = Shard(2), Replicate(), Shard(1)
    for style, takes, gives in (
        (NeuroAdaColwiseParallel, columns, columns),
        (NeuroAdaColwiseParallel, tokens, rows),
        (NeuroAdaRowwiseParallel, rows, rows),
        (NeuroAdaRowwiseParallel, columns, tokens),
    ):
        single, layer = ragged_layer(15), ragged_layer(15)
        parallelize_module(layer, mesh, style(output_layouts=gives, use_local_output=False))
        x = torch.linspace(-2, 2, 3 * 5 * 15, dtype=torch.float64).sin().view(3, 5, 15)
        parts = distribute_tensor(x, mesh, [takes]).requires_grad_()
        x.requires_grad_()
        y, out = single(x), layer(parts)
        assert out.placements == (gives,)
        torch.testing.assert_close(out.full_tensor(), y)
        y.square().sum().backward()
        out.full_tensor().square().sum().backward()
        torch.testing.assert_close(parts.grad.full_tensor(), x.grad)
        torch.testing.assert_close(layer.bias.grad.full_tensor(), single.bias.grad)
        for one in (single, layer):  # a step of descent, as slots have another order
            with torch.no_grad():
                one.delta -= one.delta.grad
        torch.testing.assert_close(connections(layer), connections(single))
        assert layer.connections == single.connections == 3 * 6


def narrow_parts() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    narrow = ragged_layer(3)
    with pytest.raises(ValueError, match=r"in_features: 3 over \d processes leave [01]"):
        parallelize_module(narrow, mesh, NeuroAdaRowwiseParallel())
    assert not isinstance(narrow.weight, DTensor)


def ragged_layer(d_in: int) -> nk.NeuroAdaLinear:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = nk.NeuroAdaLinear(
        d_in,
        10,
        3,
        neuron_fraction=0.6,
        generator=generator,
        delta_dtype=torch.float64,
        dtype=torch.float64,
    )
    layer.bias.requires_grad_()
    with torch.no_grad():
        layer.delta.copy_(torch.randn(10, 3, generator=generator)).masked_fill_(layer.index < 0, 0)
    return layer
