"""DistributedDataParallel, and what makes layers of several processes agree."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from foreign import make
from processes import (
    ROWS,
    adapted,
    assert_same_curve,
    assert_same_everywhere,
    layers,
    loss_of,
    own_rows,
    train,
    train_shared,
)
from small_transformer import batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import neuroada_kernels as nk
from neuroada_kernels.distributed import broadcast_adapter, replicate_trained
from neuroada_kernels.nn.experts import StackedLinear

#: Without broadcasts of buffers. Torch has two names for it, and warns of the older one.
BUFFERS_LEFT_ALONE = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


def ddp(folder: Path) -> None:
    expected = train(adapted())
    for strategy, options in (("bypass", BUFFERS_LEFT_ALONE), ("resident", {})):
        model = adapted(strategy=strategy)
        wrapped = DistributedDataParallel(model, **options)
        # Resident, W + delta is rounded to W's dtype, which in float64 is next to nothing.
        assert_same_curve(train_shared(wrapped), expected)
        assert model.head.strategy == strategy
        for layer in layers(model).values():
            assert_same_everywhere(layer.delta)
    plans_are_kept(adapted())
    choices_agree()


def plans_are_kept(model: nn.Module) -> None:
    """Indices that DDP broadcasts before each forward are not replanned, nor lost to autograd."""
    wrapped = DistributedDataParallel(model)
    loss_of(wrapped, own_rows(0))  # replans once, after the broadcast on wrapping
    plan = model.head.plan
    sum(loss_of(wrapped, own_rows(step)) for step in range(2)).backward()
    assert model.head.plan is plan
    single = adapted()
    (loss_of(single, batch(0, ROWS)) + loss_of(single, batch(1, ROWS))).backward()
    torch.testing.assert_close(model.head.delta.grad, single.head.delta.grad)


def choices_agree() -> None:
    """Random choices depend on seed and module; other seeds are made to agree by a broadcast."""
    rank = dist.get_rank()
    torch.manual_seed(1000 + rank)  # torch's own generator has no effect
    for layer in layers(adapted(selection="random", seed=3)).values():
        assert_same_everywhere(layer.index)
    model = adapted(selection="random", seed=rank, bias="all")
    mine = model.head.index.clone()
    with torch.no_grad():
        model.head.bias += rank
        model.head.delta += rank
    broadcast_adapter(model)
    for layer in layers(model).values():
        assert_same_everywhere(layer.index)
    assert torch.equal(model.head.index, mine) == (rank == 0)
    assert not model.head.delta.any()
    assert_same_everywhere(model.head.bias)
    first = dist.new_group([0])
    model = adapted()
    broadcast_adapter(model, first)  # of others, which are not of the group, nothing happens
    replicate_trained(model, first)
    assert (model.head.averaging is None) == (rank > 0)
    model = adapted(k=4 + (rank == 1))
    shapes = (
        r"head.*delta: \(\d+, 4\) of torch.float64 on the first rank and \(\d+, 5\) of .* on rank 1"
    )
    with pytest.raises(ValueError, match=shapes.replace("head.*delta", r"blocks\.0\..*")):
        broadcast_adapter(model)
    resident_follows()
    other_layers_agree()
    parked_adapters_agree()


def resident_follows() -> None:
    """A weight that holds another delta is patched by the next forward."""
    model = adapted(strategy="resident")
    rows = batch(0, ROWS)
    with torch.no_grad():
        model.head.delta += dist.get_rank() + 1
    loss_of(model, rows)
    broadcast_adapter(model)
    assert_same_everywhere(loss_of(model, rows))


def parked_adapters_agree() -> None:
    model = adapted()
    nk.add_adapter(model, "other", 2, ["head"], selection="random", seed=dist.get_rank())
    parked = model.head.holder_of("other")
    torch.nn.init.constant_(parked.delta, dist.get_rank())
    broadcast_adapter(model)
    assert_same_everywhere(parked.index)
    assert not parked.delta.any()
    nk.set_adapter(model, "other")
    assert model.head.plan.equal(nk.make_plan(model.head.index, model.head.in_features))


def other_layers_agree() -> None:
    torch.manual_seed(0)
    base, stack = make("scaled", 16, 8), nn.Parameter(torch.randn(2, 4, 16), requires_grad=False)
    generator = torch.Generator().manual_seed(dist.get_rank())
    bypass = nk.NeuroAdaBypass(base, 2, selection="random", generator=generator)
    model = nn.ModuleList([bypass, StackedLinear(stack, bypass.index.clone(), torch.float32)])
    broadcast_adapter(model)
    for layer in model:
        assert_same_everywhere(layer.index)
