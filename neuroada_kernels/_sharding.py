"""Sharded tensors: torch's DTensor, recognized without importing it."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` is a DTensor, of which this process may hold only a shard."""
    return hasattr(tensor, "full_tensor")


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


def on_first_rank(action: Callable[[], None]) -> None:
    """Run ``action`` on rank 0 while the other ranks wait; if it raises, all ranks raise.

    Raises
    ------
    RuntimeError
        On the other ranks, with the message of rank 0's error.
    """
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as caught:
            error = caught
    words = [None if error is None else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(words, src=0)
    if error is not None:
        raise error
    if words[0] is not None:
        raise RuntimeError(f"rank 0 raised {words[0]}")


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` shards and all-gathers the parameters of this module."""
    return getattr(module, "_is_fsdp_managed_module", False)
