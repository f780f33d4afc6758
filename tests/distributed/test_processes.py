"""Training in two and four processes gives the losses of one."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from foreign import make
from processes import (
    ROWS,
    STEPS,
    adapted,
    assert_same_adapter,
    assert_same_curve,
    assert_same_everywhere,
    connections,
    layers,
    loss_of,
    optimizer_of,
    own_rows,
    run_in_processes,
    train,
    train_shared,
)
from small_transformer import batch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import neuroada_kernels as nk
from neuroada_kernels.adapter_file import read_adapter
from neuroada_kernels.distributed import (
    NeuroAdaColwiseParallel,
    NeuroAdaRowwiseParallel,
    broadcast_adapter,
    replicate_trained,
)
from neuroada_kernels.nn.experts import StackedLinear

#: Torch has two names for it, and warns of the older one.
BUFFERS_LEFT_ALONE = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}
HALF = STEPS // 2


def sharded(model: nn.Module, **options: object) -> nn.Module:
    """FSDP2 over the blocks and the rest."""
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def parallel(model: nn.Module) -> nn.Module:
    """Tensor parallelism in every linear; what shares out heads gathers them again."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        "blocks.*.qkv": NeuroAdaColwiseParallel(output_layouts=Replicate()),
        "blocks.*.out": NeuroAdaRowwiseParallel(input_layouts=Replicate()),
        "blocks.*.up": NeuroAdaColwiseParallel(),
        "blocks.*.down": NeuroAdaRowwiseParallel(),
        "head": NeuroAdaColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


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
    """Indices that DDP sends before each forward are not planned anew, nor lost to autograd."""
    wrapped = DistributedDataParallel(model)
    loss_of(wrapped, own_rows(0))  # the first time they were sent, when it was wrapped
    plan = model.head.plan
    sum(loss_of(wrapped, own_rows(step)) for step in range(2)).backward()
    assert model.head.plan is plan
    single = adapted()
    (loss_of(single, batch(0, ROWS)) + loss_of(single, batch(1, ROWS))).backward()
    torch.testing.assert_close(model.head.delta.grad, single.head.delta.grad)


def choices_agree() -> None:
    """What is random follows the seed and the module; where seeds differ, it is made to agree."""
    rank = dist.get_rank()
    torch.manual_seed(1000 + rank)  # of torch's own generator nothing depends
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


def fsdp(folder: Path) -> None:
    single = adapted(bias="all")
    expected = train(single)
    model = sharded(adapted(bias="all"))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = optimizer_of(model)
    losses = train_shared(model, optimizer, range(HALF))
    if dist.get_world_size() == 2:
        goes_on(checkpoint(model, optimizer, folder), expected)
    losses += train_shared(model, optimizer, range(HALF, STEPS))
    assert_same_curve(losses, expected)
    assert_same_adapter(model, single)
    for layer in layers(model).values():
        assert layer.strategy == "bypass"
        assert "sharded" in layer._why_not_resident()
    if dist.get_world_size() == 2:
        saved_and_loaded(model, folder, sharded(adapted(bias="all")))
    foreign_bases(folder)


def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Path:
    parts = dcp_state.get_state_dict(model, optimizer)
    dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder / "half")
    return folder / "half"


def goes_on(saved: Path, expected: list[float]) -> None:
    """A model with another choice of connections takes it all from the checkpoint."""
    model = sharded(adapted(bias="all", selection="random"))
    optimizer = optimizer_of(model)
    parts = dcp_state.get_state_dict(model, optimizer)
    loaded = {"model": parts[0], "optimizer": parts[1]}
    dcp.load(loaded, checkpoint_id=saved)
    dcp_state.set_state_dict(
        model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    losses = train_shared(model, optimizer, range(HALF, STEPS))
    torch.testing.assert_close(losses, expected[HALF:], rtol=1e-12, atol=0)


def saved_and_loaded(model: nn.Module, folder: Path, other: nn.Module) -> None:
    """One file of the parts of ``model``, which loads into one process and into parts alike."""
    path = folder / "adapter.safetensors"
    nk.save_adapter(model, path)
    whole = adapted(bias="all", selection="random")
    nk.load_adapter(whole, path)
    assert_same_adapter(model, whole, 0)
    nk.load_adapter(other, path)
    assert_same_adapter(other, whole, 0)
    rows = own_rows(0)
    torch.testing.assert_close(loss_of(other, rows), loss_of(model, rows), rtol=0, atol=0)
    folder_error = ValueError if dist.get_rank() == 0 else RuntimeError
    with pytest.raises(folder_error, match="folder"):
        nk.save_adapter(model, folder)


def foreign_bases(folder: Path) -> None:
    """They train, are saved and loaded as whole ones; none is merged, not even after a forward."""
    single, model, other = (foreign_model(seed) for seed in (0, 0, 1))
    fully_shard(model)
    fully_shard(other)
    x = torch.linspace(-2, 2, 3 * 16, dtype=torch.float64).sin().view(3, 16)
    for one in (single, model):
        one(x).square().mean().backward()
        with torch.no_grad():
            for layer in one:
                layer.delta -= layer.delta.grad
    path = folder / "foreign.safetensors"
    nk.save_adapter(model, path)
    bases = read_adapter(path).modules
    assert [bases[name].base.kind for name in "01"] == ["transformers Conv1D", "module"]
    loaded = foreign_model(1)
    for one in (loaded, other):
        nk.load_adapter(one, path)
        for layer, expected in zip(one, single, strict=True):
            pairs = zip(layer.whole_connections(), expected.whole_connections(), strict=True)
            for mine, theirs in pairs:
                torch.testing.assert_close(mine, theirs)
    for forward in (False, True):
        if forward:
            other(x)
        for merge in (nk.merge, nk.merge_requantized):
            with pytest.raises(ValueError, match="0: weight: is sharded"):
                merge(other)
    weight = nn.Parameter(torch.randn(2, 4, 16), requires_grad=False)
    stack = StackedLinear(weight, model[0].index.clone(), torch.float32)
    expected = stack.base_entries(stack.index)
    assert torch.equal(fully_shard(stack).base_entries(stack.index), expected)


def foreign_model(seed: int) -> nn.Module:
    """The same bases, and connections of that seed."""
    torch.manual_seed(0)
    bases = [make("conv1d", 16, 8, torch.float64), make("scaled", 8, 4, torch.float64)]
    generator = torch.Generator().manual_seed(seed)
    options = {"selection": "random", "generator": generator, "delta_dtype": torch.float64}
    return nn.Sequential(*(nk.NeuroAdaBypass(base, 2, **options) for base in bases))


def fsdp_replicated(folder: Path) -> None:
    """Deltas stay whole and float32, beside weights that are split and cast."""
    for dtype, cast_to, allowed in (
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.bfloat16, 2**-6),
    ):
        expected = train(adapted(dtype=dtype).to(cast_to))
        model = adapted(dtype=dtype)
        policy = MixedPrecisionPolicy(param_dtype=cast_to)
        sharded(model, ignored_params=replicate_trained(model), mp_policy=policy)
        assert_same_curve(train_shared(model), expected, allowed)
        for layer in layers(model).values():
            assert layer.delta.dtype == dtype
            assert_same_everywhere(layer.delta)
        model.reshard()
        assert all(isinstance(p, DTensor) != p.requires_grad for p in model.parameters())
    gradients_accumulate()
    gradients_are_averaged_whatever_happened()


def gradients_accumulate() -> None:
    """Two backwards leave the sum of the means; what no process reaches has none."""
    model, single = adapted(), adapted()
    model.lonely, model.unused = (nn.Parameter(torch.ones(2)) for _ in range(2))
    sharded(model, ignored_params=replicate_trained(model))
    for step in range(2):
        loss = loss_of(model, own_rows(step))
        (loss + model.lonely.sum() if dist.get_rank() == 0 else loss).backward()
        loss_of(single, batch(step, ROWS)).backward()
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.delta.grad, layers(single)[name].delta.grad)
    assert model.lonely.grad.tolist() == [2 / dist.get_world_size()] * 2
    assert model.unused.grad is None


def gradients_are_averaged_whatever_happened() -> None:
    """After a backward that raised half-way, and in backwards within a backward."""
    single = adapted()
    loss_of(single, batch(0, ROWS)).backward()
    model = adapted()
    replicate_trained(model)
    handle = model.blocks[0].out.register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, own_rows(1)).backward()
    handle.remove()
    assert model.head.delta.grad is not None
    for model.checkpointing in (None, True):  # as reentrant checkpointing does
        model.zero_grad()
        loss_of(model, own_rows(0)).backward()
        for name, layer in layers(model).items():
            torch.testing.assert_close(layer.delta.grad, layers(single)[name].delta.grad)


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
        saved_and_loaded(model, folder, parallel(adapted(bias="all", selection="random")))
        another_k(folder)


def another_k(folder: Path) -> None:
    """Layers take an adapter with more connections, and save it whole; or they all refuse it."""
    wide, path = adapted(k=12), folder / "wide.safetensors"
    for layer in layers(wide).values():
        nn.init.ones_(layer.delta)
    nk.save_adapter(wide, path)
    model = parallel(adapted())
    nk.load_adapter(model, path)
    saved_and_loaded(model, folder, parallel(adapted()))
    assert_same_adapter(model, wide, 0)
    narrow = nk.NeuroAdaLinear(3, 4)
    parallelize_module(
        narrow, init_device_mesh("cpu", (dist.get_world_size(),)), NeuroAdaRowwiseParallel()
    )
    index = torch.arange(3, dtype=torch.int32).expand(4, 3)
    with pytest.raises(ValueError, match="in_features: 3 over 2 processes leave 1"):
        narrow.part_of_connections(index, torch.zeros(4, 3))


def ragged_parts() -> None:
    """Sizes that do not divide, rows without connections, tensors that come and go in parts."""
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
        for one in (single, layer):  # a step of descent, to compare slots that lie elsewhere
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


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("check", [ddp, fsdp, fsdp_replicated, tensor_parallel])
def test_processes_train_as_one(check, count, tmp_path):
    run_in_processes(check, count, tmp_path)
