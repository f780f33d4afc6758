"""Sharded tensors: torch's DTensor, recognized without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` is a DTensor, of which this process may hold only a shard."""
    module = sys.modules.get("torch.distributed.tensor")  # there is none before its import
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor; a plain tensor as it is. Differentiable."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; a DTensor is all-gathered, and every rank of its mesh has to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def split_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of the replicated ``tensor`` on the device of ``like``, sharded as ``like`` is."""
    tensor = tensor.to(like.device, copy=True)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Reshard FSDP2 modules whose parameters a forward has left all-gathered."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The processes over which the model's parameters are sharded, None if they are whole.

    A stage of a pipeline has a part of all processes. If parameters have several meshes, the one
    with the most dimensions, of which the others usually are parts.
    """
    sharded: list[Any] = [p for p in model.parameters() if is_sharded(p)]
    return max((p.device_mesh for p in sharded), key=lambda mesh: mesh.ndim, default=None)


def on_first_rank(action: Callable[[], None], mesh: DeviceMesh) -> None:
    """Run ``action`` on the first rank of ``mesh`` while its other ranks wait.

    Raises
    ------
    Exception
        What ``action`` raised, on the first rank.
    RuntimeError
        On the other ranks, with that error's message.
    """
    error: Exception | None = None
    if not any(mesh.get_coordinate() or ()):
        try:
            action()
        except Exception as caught:
            error = caught
    words = [None if error is None else f"{type(error).__name__}: {error}"]
    for dim in range(mesh.ndim):
        dist.broadcast_object_list(words, group=mesh.get_group(dim), group_src=0)
    if error is not None:
        raise error
    if words[0] is not None:
        raise RuntimeError(f"rank {int(mesh.mesh.flatten()[0])} raised {words[0]}")


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` shards and all-gathers the parameters of this module."""
    return getattr(module, "_is_fsdp_managed_module", False)
