"""Bytes that training holds between steps, and bytes that a step allocates at its peak.

The peak is what goes through torch's allocator, from the profiler's record. Not seen: scratch that
a kernel takes from the C++ heap itself (ours and oneDNN's), and pages the heap keeps after a free.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

UNSEEN = "scratch that kernels take from the C++ heap themselves, and pages kept after a free"


@dataclass(frozen=True)
class StepMemory:
    """All in bytes."""

    frozen: int  # parameters that do not train
    trained: int  # parameters that do
    gradients: int
    optimizer: int
    selection: int  # what says which connections train: index and plan, or a mask
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
    peak = _peak(lambda: step(window))
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


def _peak(run: Callable[[], None]) -> int:
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        profiler.start()
    run()
    with _quiet():
        profiler.stop()
    return highest(_events(profiler))


def _events(profiler: Any) -> list[tuple[int, int]]:
    """``(address, bytes)`` of allocations, and of frees with negative bytes, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with _quiet():
            profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    records = [event for event in events if event.get("name") == "[memory]"]
    records.sort(key=lambda event: event["args"]["Ev Idx"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in records]


def highest(events: list[tuple[int, int]]) -> int:
    """The most bytes alive at once; frees of what was allocated before do not count."""
    alive: dict[int, int] = {}
    now = peak = 0
    for address, size in events:
        if size > 0:
            alive[address] = size
            now += size
            peak = max(peak, now)
        else:
            now -= alive.pop(address, 0)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's C++ part writes to standard error on starting and stopping."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
