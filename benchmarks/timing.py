"""Interleaved timing on a CPU: all candidates in every round, ratios taken within a round.

A machine's speed drifts by more than the differences to be measured. Steps in the same round share
the drift, so their ratio cancels it.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol

import torch
from torch import Tensor, nn

from neuroada_kernels import NeuroAdaLinear

MIN_ROUNDS = 9


class Step(Protocol):
    """What can be timed, such as :class:`neuroada_kernels.benchmarks.candidates.Run`."""

    def serving(self) -> AbstractContextManager[None]: ...

    def forward(self) -> Tensor: ...

    def backward(self, y: Tensor) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Quartiles:
    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """The quartiles; of one value, that value three times."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Timings:
    """Nanoseconds of each round, warm-up not among them."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]

    @property
    def total(self) -> tuple[int, ...]:
        return tuple(f + b for f, b in zip(self.forward, self.backward, strict=True))


def measure(
    steps: Mapping[str, Step],
    rounds: int,
    *,
    warmup: int = 2,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Timings]:
    """Time forward and backward of every step in every round: A B C A B C.

    Parameters
    ----------
    steps : mapping of str to Step
        In the order in which they run.
    rounds : int
        At least :data:`MIN_ROUNDS` for a meaningful median.
    warmup : int
        Rounds before the first that counts.
    between : callable
        Called after each round, warm-up included; its time is not counted.
    """
    samples: dict[str, list[tuple[int, int]]] = {name: [] for name in steps}
    with _without_gc():
        for number in range(-warmup, rounds):
            for name, step in steps.items():
                sample = _time(step)
                if number >= 0:
                    samples[name].append(sample)
            between()
    return {
        name: Timings(tuple(f for f, _ in pairs), tuple(b for _, b in pairs))
        for name, pairs in samples.items()
    }


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios round by round, which is not the ratio of the medians."""
    return Quartiles.of([n / d for n, d in zip(numerator, denominator, strict=True)])


@dataclass(frozen=True)
class HostCost:
    """Microseconds of one forward call where there is next to nothing to compute."""

    frozen_us: Quartiles
    neuroada_us: Quartiles
    over_frozen_us: Quartiles  # differences round by round


def host_cost(rounds: int = 15, calls: int = 1000, device: str = "cpu") -> HostCost:
    """Time a forward at T = 1 through a 64 x 64 layer with k = 1, grad mode on, x requiring grad.

    ``nn.Linear`` frozen against ``NeuroAdaLinear`` with the backend chosen automatically. A call
    includes freeing the graph of the previous call.
    """
    x = torch.randn(1, 64, device=device, requires_grad=True)
    linear = nn.Linear(64, 64, bias=False, device=device)
    layers = (linear, NeuroAdaLinear.from_linear(linear, k=1))
    samples: list[tuple[float, float]] = []
    with torch.enable_grad(), _without_gc():
        for layer in layers:
            _time_calls(layer, x, calls)
        for _ in range(rounds):
            frozen, neuroada = (_time_calls(layer, x, calls) for layer in layers)
            samples.append((frozen, neuroada))
    return HostCost(
        Quartiles.of([frozen for frozen, _ in samples]),
        Quartiles.of([neuroada for _, neuroada in samples]),
        Quartiles.of([neuroada - frozen for frozen, neuroada in samples]),
    )


def host_times(
    steps: Mapping[str, Step],
    rounds: int = MIN_ROUNDS,
    calls: int = 5,
    settle: Callable[[], None] = lambda: None,
) -> dict[str, Quartiles]:
    """Microseconds of the host for the calls of a step, forward and backward, interleaved.

    Work of a step on the CPU is included, work on a GPU is not: ``settle`` waits for the GPU before
    and after the timed calls.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    with _without_gc():
        for number in range(-1, rounds):
            for name, step in steps.items():
                with step.serving():
                    settle()
                    start = perf_counter_ns()
                    for _ in range(calls):
                        step.backward(step.forward())
                    each = (perf_counter_ns() - start) / calls / 1000
                    settle()
                if number >= 0:
                    samples[name].append(each)
    return {name: Quartiles.of(values) for name, values in samples.items()}


def _time(step: Step) -> tuple[int, int]:
    """Nanoseconds of forward and backward; their results are freed after the timed part."""
    with step.serving():
        start = perf_counter_ns()
        y = step.forward()
        middle = perf_counter_ns()
        grads = step.backward(y)
        end = perf_counter_ns()
    del y, grads
    return middle - start, end - middle


def _time_calls(layer: nn.Module, x: Tensor, calls: int) -> float:
    start = perf_counter_ns()
    for _ in itertools.repeat(None, calls):
        layer(x)
    return (perf_counter_ns() - start) / calls / 1000


@contextmanager
def _without_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
