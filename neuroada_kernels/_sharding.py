"""Tensors that several processes hold parts of: torch's DTensor, known without importing it."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor, of which this process may hold a part only."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part of it that this process holds; all of a plain one. Autograd follows."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered where it is sharded; then every process of its mesh has to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def split_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of ``tensor``, which each process has whole, where ``like`` is and split as it is."""
    tensor = tensor.to(like.device, copy=True)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put its parts back, where a forward has left whole parameters in their place."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def on_first_rank(action: Callable[[], None]) -> None:
    """Let the first process do it while the others wait; they raise where it did.

    Raises
    ------
    RuntimeError
        In the others, with the words of the first one's error.
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
    """Whether ``fully_shard`` exchanges the parameters of this module for whole ones and back."""
    return getattr(module, "_is_fsdp_managed_module", False)
