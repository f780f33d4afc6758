"""Rounds are interleaved, ratios are paired, memory is counted; no speed is asserted."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from neuroada_kernels.benchmarks import timing
from neuroada_kernels.benchmarks.allocations import highest_alive
from neuroada_kernels.benchmarks.candidates import Run, bench_inputs, table
from neuroada_kernels.benchmarks.memory import measure_memory
from neuroada_kernels.benchmarks.timing import (
    Quartiles,
    Timings,
    host_cost,
    host_times,
    measure,
    paired_ratio,
)
from neuroada_kernels.testing import Case

CASE = Case(tokens=32, d_in=64, d_out=48, k=2)
FLOAT = 4


class Clocked:
    """A step that takes as long as it says, on a clock of its own."""

    def __init__(self, clock, log, name, forward, backward):
        self.clock, self.log, self.name = clock, log, name
        self.times = forward, backward

    @contextmanager
    def serving(self):
        self.log.append(f"{self.name}:enter")
        self.clock.now += 1000  # choosing a backend is no part of the step
        yield
        self.log.append(f"{self.name}:exit")

    def forward(self):
        self.log.append(f"{self.name}:forward")
        self.clock.now += self.times[0]
        return torch.zeros(())

    def backward(self, y):
        self.log.append(f"{self.name}:backward")
        self.clock.now += self.times[1]
        return (y,)


class Clock:
    now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "perf_counter_ns", made)
    return made


def test_candidates_are_interleaved_and_warm_up_counts_nowhere(clock: Clock) -> None:
    log: list[str] = []
    steps = {name: Clocked(clock, log, name, 3, 4) for name in "AB"}
    result = measure(steps, rounds=3, warmup=2, between=lambda: log.append("between"))
    one_round = [f"{n}:{s}" for n in "AB" for s in ("enter", "forward", "backward", "exit")]
    assert log == [*one_round, "between"] * 5
    assert {len(timings.total) for timings in result.values()} == {3}


def test_forward_and_backward_are_split_and_nothing_else_is_timed(clock: Clock) -> None:
    steps = {"A": Clocked(clock, [], "A", 30, 7)}

    def between() -> None:
        clock.now += 10**6

    timings = measure(steps, rounds=2, between=between)["A"]
    assert timings == Timings(forward=(30, 30), backward=(7, 7))
    assert timings.total == (37, 37)


def test_a_ratio_is_taken_round_by_round() -> None:
    # A machine that slows down a hundredfold: the medians' ratio would be 3, 10 or 1.
    frozen = (1, 10, 100)
    slower = (2, 30, 200)
    assert paired_ratio(slower, frozen) == Quartiles(lower=2.0, median=2.0, upper=2.5)


def test_ratios_of_different_rounds_are_not_paired() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio((1, 2, 3), (1, 2))


def test_quartiles() -> None:
    assert Quartiles.of([4, 1, 3, 2, 5]) == Quartiles(2, 3, 4)
    assert Quartiles.of([7]) == Quartiles(7, 7, 7)


def test_host_cost_is_a_difference_within_a_round(clock: Clock, monkeypatch) -> None:
    speed = iter([1, 1, 10, 10, 2, 2, 3, 3])

    def call(layer, x, calls):
        assert x.requires_grad
        assert torch.is_grad_enabled()
        return next(speed) * (5.0 if type(layer) is torch.nn.Linear else 15.0)

    monkeypatch.setattr(timing, "_time_calls", call)
    with torch.no_grad():
        cost = host_cost(rounds=3, calls=1)
    assert cost.over_frozen_us == Quartiles(25, 30, 65)
    assert cost.frozen_us.median == 15


def test_host_times_are_microseconds_of_one_call_without_what_is_waited_for(clock: Clock) -> None:
    log: list[str] = []

    def settle() -> None:
        log.append("settle")
        clock.now += 10**6

    steps = {"A": Clocked(clock, log, "A", 3000, 4000)}
    assert host_times(steps, rounds=2, calls=5, settle=settle) == {"A": Quartiles(7, 7, 7)}
    calls = ["A:forward", "A:backward"] * 5
    assert log == ["A:enter", "settle", *calls, "settle", "A:exit"] * 3, "a round to warm up"


def test_the_calls_of_a_layer_are_timed_in_microseconds_a_call(clock: Clock) -> None:
    def layer(x: torch.Tensor) -> None:
        clock.now += 3000

    assert timing._time_calls(layer, torch.zeros(1), 4) == 3


def test_host_cost_times_real_calls() -> None:
    cost = host_cost(rounds=2, calls=3)
    assert cost.frozen_us.median > 0
    assert cost.neuroada_us.median > 0


def test_the_peak_is_the_most_that_is_alive_at_once() -> None:
    # Address 9 was allocated before; 1 is freed, and its address is used again.
    events = [(1, 100), (9, -1000), (2, 50), (1, -100), (1, 60), (2, -50), (1, -60)]
    assert highest_alive(events) == 150
    assert highest_alive([]) == 0


def memory_of(name: str):
    return measure_memory(Run(table()[name], bench_inputs(CASE, torch.float32)))


def test_frozen_allocates_y_and_dx_and_keeps_nothing() -> None:
    memory = memory_of("frozen")
    assert memory.peak == FLOAT * 32 * (48 + 64)
    assert memory.beyond_outputs == 0
    assert memory.kept == 0


@pytest.mark.parametrize("name", [name for name in table() if name.startswith("neuroada")])
def test_neuroada_keeps_nothing_beside_x(name: str) -> None:
    assert memory_of(name).kept == 0


def test_materialised_keeps_a_copy_of_the_weight_and_makes_a_dense_gradient() -> None:
    memory = memory_of("materialised")
    assert memory.kept == FLOAT * 64 * 48
    assert memory.beyond_outputs >= 2 * FLOAT * 64 * 48


def test_masked_dense_makes_a_dense_gradient_and_keeps_nothing() -> None:
    memory = memory_of("masked-dense")
    assert memory.kept == 0
    assert memory.beyond_outputs >= FLOAT * 64 * 48


def test_lora_keeps_its_hidden_activations() -> None:
    assert memory_of("lora-r8").kept == FLOAT * 32 * 8


def test_measuring_memory_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    memory_of("frozen")
    assert capfd.readouterr() == ("", "")
