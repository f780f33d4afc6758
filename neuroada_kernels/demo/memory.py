"""Bytes that training holds between steps, and bytes that a step allocates at its peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels.benchmarks.allocations import allocated_peak


@dataclass(frozen=True)
class StepMemory:
    """All in bytes."""

    frozen: int  # parameters that do not train
    trained: int  # parameters that do
    gradients: int
    optimizer: int
    selection: int  # of connections: index and plan, or a mask
    step_peak: int  # allocated during a step, gradients included

    @property
    def training_state(self) -> int:
        """Trained parameters, their gradients and the optimiser's state."""
        return self.trained + self.gradients + self.optimizer

    @property
    def total_peak(self) -> int:
        """Everything alive at the peak of a step."""
        return self.frozen + self.trained + self.optimizer + self.selection + self.step_peak


def measure_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[Tensor], None],
    window: Tensor,
) -> StepMemory:
    """Take a step under the profiler; the optimiser must have taken one before."""
    optimizer.zero_grad()
    peak = allocated_peak(lambda: step(window))
    parameters = list(model.parameters())
    state = [t for values in optimizer.state.values() for t in values.values()]
    return StepMemory(
        frozen=_bytes(p for p in parameters if not p.requires_grad),
        trained=_bytes(p for p in parameters if p.requires_grad),
        gradients=_bytes(p.grad for p in parameters if p.grad is not None),
        optimizer=_bytes(t for t in state if isinstance(t, Tensor)),
        selection=_bytes(
            buffer
            for name, buffer in model.named_buffers()
            if name.rpartition(".")[2] in ("index", "plan", "mask")
        ),
        step_peak=peak,
    )


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)
