"""The bars: the largest times that a NeuroAda linear may take, and verdicts on measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from neuroada_kernels.benchmarks.candidates import LORA_RANK, RESIDENT
from neuroada_kernels.benchmarks.measurement import Measurement
from neuroada_kernels.benchmarks.timing import HostCost, paired_ratio
from neuroada_kernels.testing import BENCH_CASES

HOST = "host"
LORA = f"lora-r{LORA_RANK}"


@dataclass(frozen=True)
class Bar:
    """The largest value that passes.

    Against a candidate: the median over the rounds of NeuroAda's forward and backward divided by
    that candidate's. Against :data:`HOST`: the microseconds that one forward call at T = 1 takes
    beyond the frozen linear's. ``candidate`` is judged, or if it is None the NeuroAda candidate
    of the backend chosen by default.
    """

    limit: float
    against: str
    case: str = "T1-64to64-k1"
    dtype: str = "float32"
    candidate: str | None = None

    @property
    def meaning(self) -> str:
        if self.against == HOST:
            return f"host cost of one call over the frozen linear: at most {self.limit:g} us"
        judged = "" if self.candidate is None else f"{self.candidate} "
        return f"{self.case} {self.dtype}: {judged}at most {self.limit:.3g}x {self.against}"


#: T = 512, forward and backward over the frozen linear's, by dtype and k.
_OVER_FROZEN = {
    ("float32", 1): 1.05,
    ("float32", 8): 1.08,
    ("float32", 20): 1.12,
    ("bfloat16", 1): 1.08,
    ("bfloat16", 8): 1.15,
    ("bfloat16", 20): 1.25,
}
_DTYPES = ("float32", "bfloat16")
#: T = 512, N = K = 2048, resident, forward and backward over the frozen linear's, by k.
_RESIDENT_OVER_FROZEN = {1: 1.03, 8: 1.05, 20: 1.08}


def _bars() -> Iterator[Bar]:
    for case in BENCH_CASES:
        for dtype in _DTYPES:
            if case.tokens == 512:
                yield Bar(_OVER_FROZEN[dtype, case.k], "frozen", case.name, dtype)
            elif case.tokens == 16 and case.k == 8:
                yield Bar(1.15, "frozen", case.name, dtype)
            if case.tokens == 512 and case.d_in == case.d_out:
                limit = _RESIDENT_OVER_FROZEN[case.k]
                yield Bar(limit, "frozen", case.name, dtype, RESIDENT)
            # At least 1.5 times faster.
            yield Bar(1 / 1.5, "materialised", case.name, dtype)
            if case.k <= 8:
                yield Bar(1.0, LORA, case.name, dtype)
    yield Bar(25.0, HOST)


BARS: tuple[Bar, ...] = tuple(_bars())


@dataclass(frozen=True)
class Verdict:
    """``value`` is None if nothing was measured for the bar."""

    bar: Bar
    value: float | None

    @property
    def outcome(self) -> Literal["met", "missed", "not measured"]:
        if self.value is None:
            return "not measured"
        return "met" if self.value <= self.bar.limit else "missed"


def judge(
    measurements: Sequence[Measurement],
    host: HostCost | None,
    bars: Sequence[Bar] = BARS,
) -> list[Verdict]:
    """A verdict for every bar."""
    return [Verdict(bar, _value(bar, measurements, host)) for bar in bars]


def status(verdicts: Sequence[Verdict]) -> int:
    """The exit status: 1 where a bar is missed, or where not one was measured."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return int("missed" in outcomes or "met" not in outcomes)


def _value(bar: Bar, measurements: Sequence[Measurement], host: HostCost | None) -> float | None:
    median: float
    if bar.against == HOST:
        if host is None:
            return None
        median = host.over_frozen_us.median
        return median
    here = [m for m in measurements if (m.case.name, m.dtype) == (bar.case, bar.dtype)]
    ours = [m for m in here if (m.candidate == bar.candidate if bar.candidate else m.automatic)]
    others = [m for m in here if m.candidate == bar.against]
    if not ours or not others:
        return None
    median = paired_ratio(ours[0].timings.total, others[0].timings.total).median
    return median
