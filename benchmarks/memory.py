"""Bytes that a step allocates at its peak, and bytes that it keeps from forward to backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroada_kernels.benchmarks.allocations import allocated_peak
from neuroada_kernels.benchmarks.candidates import Run


@dataclass(frozen=True)
class Memory:
    """Bytes beside the inputs, the incoming gradient, parameters and buffers."""

    peak: int  # y, dx and the parameters' gradients included
    beyond_outputs: int  # of the peak, what is neither y nor dx
    kept: int  # for the backward, beside y


def measure_memory(run: Run) -> Memory:
    """Run a step that counts allocations, and a forward under saved-tensor hooks."""
    peak = _peak(run)
    outputs = run.grad_output.nbytes + run.x.nbytes  # y and dx have their shapes
    return Memory(peak, max(0, peak - outputs), _kept(run))


def _peak(run: Run) -> int:
    def step() -> object:
        y = run.forward()
        return y, run.backward(y)

    with run.serving():
        step()  # starts threads and fills libraries' caches, which do not count
        peak: int = allocated_peak(step) if run.x.is_cpu else _peak_on_gpu(step)
    return peak


def _peak_on_gpu(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _kept(run: Run) -> int:
    given = [run.x, run.grad_output, *run.layer.parameters(), *run.layer.buffers()]
    with run.serving():
        return kept_bytes(run.forward, given)


def kept_bytes(forward: Callable[[], Tensor], given: Iterable[Tensor]) -> int:
    """Bytes that a forward keeps for its backward, beside the tensors ``given`` and its output."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # A sparse tensor, of PEFT's SHiRA, has no storage of its own.
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for storage in (part.untyped_storage() for part in parts):
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    # The caller keeps y anyway, so saving it costs nothing.
    kept.pop(y.untyped_storage().data_ptr(), None)
    return sum(kept.values())
