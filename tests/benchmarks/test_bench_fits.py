"""A line goes through what lies on one, and its residual says how far off the rest is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neuroada_kernels.benchmarks.fits import fits, line
from neuroada_kernels.benchmarks.measurement import Measurement
from neuroada_kernels.benchmarks.memory import Memory
from neuroada_kernels.benchmarks.timing import Quartiles, Timings
from neuroada_kernels.benchmarks.work import Work
from neuroada_kernels.testing import Case

CASE = Case(tokens=16, d_in=2048, d_out=2048, k=1)


def measured(case: Case, microseconds: float, name: str = "frozen", ratio: float = 1.0):
    return Measurement(
        case=case,
        dtype="float32",
        candidate=name,
        backend=None,
        automatic=False,
        timings=Timings((round(600 * microseconds),), (round(400 * microseconds),)),
        ratio=Quartiles(ratio, ratio, ratio),
        work=Work(1, 1),
        memory=Memory(0, 0, 0),
    )


def test_a_line_over_four_decades_is_found() -> None:
    tokens = (1, 16, 256, 4096, 16384)
    found = line(tokens, [50 + 3 * t for t in tokens])
    assert (found.a, found.b) == pytest.approx((50, 3), rel=1e-9)
    assert found.residual < 1e-9


def test_the_residual_is_that_of_relative_errors() -> None:
    # Alternately a tenth above and below, at any size: no line is nearer than about that.
    found = line((1, 10, 100, 1000), (1.1, 9.0, 110.0, 900.0))
    assert 0.07 < found.residual < 0.1


def test_there_is_a_fit_wherever_three_differ_in_one_thing() -> None:
    over_k = [measured(replace(CASE, k=k), 100) for k in (8, 1, 2)]
    over_tokens = [measured(replace(CASE, tokens=t), 100 + 5 * (t - 16)) for t in (32, 64)]
    other = [measured(replace(CASE, d_out=64, k=k), k) for k in (1, 2)]  # too few
    first, second = fits([*over_k, *over_tokens, *other])
    assert (first.over, first.at, first.values) == ("k", 16, (1, 2, 8))
    assert (first.a_us, first.b_us) == pytest.approx((100, 0))
    assert (second.over, second.at, second.values) == ("tokens", 1, (16, 32, 64))
    assert (second.a_us, second.b_us) == pytest.approx((20, 5))


def test_a_machine_that_slows_down_from_k_to_k_does_not_show() -> None:
    rows = []
    for k, slower in ((1, 1.0), (2, 2.0), (4, 3.0)):
        ratio = 1.1 + 0.01 * k
        rows.append(measured(replace(CASE, k=k), 100 * slower))
        rows.append(measured(replace(CASE, k=k), 100 * slower * ratio, "neuroada-cpu", ratio))
    _, fit = fits(rows)
    assert (fit.a_us, fit.b_us) == pytest.approx((220, 2))
    assert fit.residual < 1e-9
