"""Bytes that a step allocates at its peak, and bytes that it keeps from forward to backward.

What goes through torch's allocator is counted: every tensor, those inside other libraries' ops
included. Not seen: scratch that a kernel takes from the C++ heap itself (ours, a block of tokens a
thread, and oneDNN's), and pages that the heap holds back after a free.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from neuroada_kernels.benchmarks.candidates import Run


@dataclass(frozen=True)
class Memory:
    """Bytes beside the inputs, the incoming gradient, parameters and buffers."""

    peak: int  # y, dx and the parameters' gradients included
    beyond_outputs: int  # of the peak, what is neither y nor dx
    kept: int  # for the backward, beside y


def measure_memory(run: Run) -> Memory:
    """Run two steps: one under the profiler, one under saved-tensor hooks."""
    peak = _peak(run)
    outputs = run.grad_output.nbytes + run.x.nbytes  # y and dx have their shapes
    return Memory(peak, max(0, peak - outputs), _kept(run))


def _peak(run: Run) -> int:
    # Threads started and libraries' caches filled, none of which is this step's.
    with run.serving():
        run.backward(run.forward())
        profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with _quiet():
            profiler.start()
        y = run.forward()
        grads = run.backward(y)
        with _quiet():
            profiler.stop()
    del y, grads
    return _highest(_memory_events(profiler))


def _kept(run: Run) -> int:
    given = [run.x, run.grad_output, *run.layer.parameters(), *run.layer.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with run.serving(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run.forward()
    # y is of use to the caller anyway, so keeping it costs nothing.
    kept.pop(y.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def _memory_events(profiler: Any) -> list[tuple[int, int]]:
    """``(address, bytes)`` of allocations, and of frees with negative bytes, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with _quiet():
            profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    records = [event for event in events if event.get("name") == "[memory]"]
    records.sort(key=lambda event: event["args"]["Ev Idx"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in records]


def _highest(events: list[tuple[int, int]]) -> int:
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
