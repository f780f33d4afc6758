"""One row of the results: a candidate at a case and a dtype."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from neuroada_kernels.benchmarks.candidates import Work
from neuroada_kernels.benchmarks.memory import Memory
from neuroada_kernels.benchmarks.timing import Quartiles, Timings
from neuroada_kernels.testing import Case


@dataclass(frozen=True)
class Measurement:
    """``automatic``: this is the NeuroAda candidate that serves where no backend is named."""

    case: Case
    dtype: str
    candidate: str
    backend: str | None
    automatic: bool
    timings: Timings
    ratio: Quartiles  # to frozen, round by round
    work: Work
    memory: Memory

    @property
    def forward_us(self) -> Quartiles:
        return _microseconds(self.timings.forward)

    @property
    def backward_us(self) -> Quartiles:
        return _microseconds(self.timings.backward)

    @property
    def total_us(self) -> Quartiles:
        return _microseconds(self.timings.total)

    @property
    def gb_per_s(self) -> float:
        rate: float = self.work.bytes / self.total_us.median / 1e3
        return rate

    @property
    def gflop_per_s(self) -> float:
        rate: float = self.work.flops / self.total_us.median / 1e3
        return rate

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the samples included so that other statistics can be taken of them."""
        return {
            "case": {"name": self.case.name, **asdict(self.case)},
            "dtype": self.dtype,
            "candidate": self.candidate,
            "backend": self.backend,
            "automatic": self.automatic,
            "forward_us": asdict(self.forward_us),
            "backward_us": asdict(self.backward_us),
            "total_us": asdict(self.total_us),
            "ratio_to_frozen": asdict(self.ratio),
            "gb_per_s": self.gb_per_s,
            "gflop_per_s": self.gflop_per_s,
            "peak_bytes": self.memory.peak,
            "peak_bytes_beyond_y_and_dx": self.memory.beyond_outputs,
            "kept_bytes": self.memory.kept,
            "samples_ns": asdict(self.timings),
        }


def _microseconds(samples: tuple[int, ...]) -> Quartiles:
    return Quartiles.of([sample / 1000 for sample in samples])
