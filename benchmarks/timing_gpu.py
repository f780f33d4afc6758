"""Interleaved timing on a GPU: each step captured as a CUDA graph and replayed in every round.

A graph excludes the host's launch overhead, which is measured separately for every candidate.
Before each replay L2 is overwritten, as a model's other layers would do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from neuroada_kernels.benchmarks.timing import Step, Timings

#: Larger than any GPU's L2.
_FLUSH_BYTES = 256 << 20


def measure_on_gpu(
    steps: Mapping[str, Step],
    rounds: int,
    *,
    warmup: int = 2,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Timings]:
    """As :func:`neuroada_kernels.benchmarks.timing.measure`, in nanoseconds of the GPU's clock.

    The backward's time is that of forward and backward minus that of the forward.
    """
    replays = {name: (_capture(step, False), _capture(step, True)) for name, step in steps.items()}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    samples: dict[str, list[tuple[int, int]]] = {name: [] for name in steps}
    for number in range(-warmup, rounds):
        for name, (forward, both) in replays.items():
            sample = _time(forward, flush), _time(both, flush)
            if number >= 0:
                samples[name].append(sample)
        between()
    return {
        name: Timings(tuple(f for f, _ in pairs), tuple(max(b - f, 0) for f, b in pairs))
        for name, pairs in samples.items()
    }


def reason_not_captured(step: Step) -> str | None:
    """Why the step cannot be captured in a CUDA graph and timed here; None if it can."""
    try:
        _capture(step, True)
    except RuntimeError as error:
        return f"not captured in a CUDA graph: {str(error).splitlines()[0]}"
    return None


def _capture(step: Step, backward: bool) -> torch.cuda.CUDAGraph:
    """A graph of one step; what it allocates stays in the graph's own pool."""

    def work() -> tuple[Tensor, ...]:
        y = step.forward()
        return step.backward(y) if backward else (y,)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with step.serving():
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles kernels, creates handles and workspaces
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    return graph


def _time(graph: torch.cuda.CUDAGraph, flush: Tensor) -> int:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return round(milliseconds * 1e6)
