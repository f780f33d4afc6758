"""FSDP2: sharded parameters, and replicated deltas beside sharded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_transformer
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
    assert_saved_and_loaded,
    layers,
    loss_of,
    optimizer_of,
    own_rows,
    train,
    train_shared,
)
from small_transformer import batch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import neuroada_kernels as nk
from neuroada_kernels.adapter_file import read_adapter
from neuroada_kernels.distributed import replicate_trained
from neuroada_kernels.nn.experts import StackedLinear

HALF = STEPS // 2


def sharded(model: nn.Module, **options: object) -> nn.Module:
    """FSDP2 over the blocks and the rest."""
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


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
        assert_saved_and_loaded(model, folder, sharded(adapted(bias="all")))
    foreign_bases(folder)
    assert_trains_once_it_has_values(sharded(on_meta()), set())
    if dist.get_world_size() == 4:
        stages_are_saved(folder)


def on_meta() -> nn.Module:
    """The model of ``adapted()``, before its weights have values."""
    with torch.device("meta"):
        model = small_transformer.Transformer().to(torch.float64)
    nk.adapt(model, k=4, delta_dtype=torch.float64)
    return model


def assert_trains_once_it_has_values(model: nn.Module, whole: set[nn.Parameter]) -> None:
    """The base's values come from rank 0 by torch's own means, which pass on what else is there."""
    assert all(p.is_meta for p in model.parameters())
    assert {isinstance(p, DTensor) for p in whole} <= {False}
    torch.manual_seed(0)
    base = small_transformer.Transformer().to(torch.float64).state_dict()
    options = dcp_state.StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True, strict=False
    )
    model.to_empty(device="cpu")
    dcp_state.set_model_state_dict(model, base if dist.get_rank() == 0 else {}, options=options)
    for layer in layers(model).values():
        assert layer.deferred
    assert nk.select_connections(model) == []
    for name, layer in layers(adapted()).items():
        assert torch.equal(layers(model)[name].index, layer.index)
    assert_same_curve(train_shared(model), train(adapted()))


def stages_are_saved(folder: Path) -> None:
    """Each stage of a pipeline by its own processes, and one of them alone too."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))
    stage = mesh["stage"].get_local_rank()
    model = adapted(seed=stage, selection="random")
    single = adapted(seed=stage, selection="random")
    with torch.no_grad():
        for layer in (*layers(model).values(), *layers(single).values()):
            layer.delta += 1 + stage
    sharded(model, mesh=mesh["shard"])
    for saved in ((0, 1), (1,)):
        path = folder / f"{len(saved)}-{stage}.safetensors"
        if stage in saved:
            nk.save_adapter(model, path)
            loaded = adapted()
            nk.load_adapter(loaded, path)
            assert_same_adapter(loaded, single, 0)
            with pytest.raises((ValueError, RuntimeError), match="folder"):
                nk.save_adapter(model, folder)
        dist.barrier()


def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Path:
    parts = dcp_state.get_state_dict(model, optimizer)
    dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder / "half")
    return folder / "half"


def goes_on(saved: Path, expected: list[float]) -> None:
    """A model with other connections loads all from the checkpoint and resumes."""
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


def foreign_bases(folder: Path) -> None:
    """They train, are saved and loaded as unsharded ones; merging raises, even after a forward."""
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
    """Deltas stay replicated and in their dtype, beside weights that are sharded and cast."""
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
    model = on_meta()
    whole = replicate_trained(model)
    assert_trains_once_it_has_values(sharded(model, ignored_params=whole), whole)
    if dist.get_world_size() == 2:
        another_k(folder)
    gradients_accumulate()
    gradients_are_averaged_whatever_happened()


def another_k(folder: Path) -> None:
    """FSDP does not hold a replicated delta, which may be replaced, and is averaged still."""
    path, single = folder / "another.safetensors", adapted(k=6)
    if dist.get_rank() == 0:
        nk.save_adapter(single, path)
    dist.barrier()
    model = adapted()
    sharded(model, ignored_params=replicate_trained(model))
    with pytest.warns(UserWarning, match="delta: new parameters in"):
        nk.load_adapter(model, path)
    loss_of(model, own_rows(0)).backward()
    loss_of(single, batch(0, ROWS)).backward()
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.delta.grad, layers(single)[name].delta.grad)


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
