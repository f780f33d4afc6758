"""One row of the results: a candidate at a case and a dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from neuroada_kernels.benchmarks.memory import Memory
from neuroada_kernels.benchmarks.timing import Quartiles, Timings
from neuroada_kernels.benchmarks.work import Work
from neuroada_kernels.testing import Case


@dataclass(frozen=True)
class Measurement:
    """``automatic``: this is the NeuroAda candidate that serves by default."""

    case: Case
    dtype: str
    candidate: str
    backend: str | None
    automatic: bool
    timings: Timings
    ratio: Quartiles  # to frozen, round by round
    work: Work
    memory: Memory
    host_us: Quartiles | None = None  # of a step's calls; None in older files

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
    def tflop_per_s(self) -> float:
        rate: float = self.work.flops / self.total_us.median / 1e6
        return rate

    def as_dict(self) -> dict[str, Any]:
        """Plain data, a row of the results file; other statistics can be taken of its samples.

        ``case`` (``name``, ``tokens``, ``d_in``, ``d_out``, ``k``, ``bias``, ``index``), ``dtype``,
        ``candidate``, ``backend``, ``automatic``; quartiles (``lower``, ``median``, ``upper``) of
        ``forward_us``, ``backward_us``, ``total_us``, ``ratio_to_frozen`` and ``host_us``;
        ``flops`` and ``bytes`` that the method needs at least, and their rates ``tflop_per_s`` and
        ``gb_per_s``; ``peak_bytes``, ``peak_bytes_beyond_y_and_dx``, ``kept_bytes``;
        ``samples_ns``, ``forward`` and ``backward`` of each round.
        """
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
            "host_us": None if self.host_us is None else asdict(self.host_us),
            "flops": self.work.flops,
            "bytes": self.work.bytes,
            "gb_per_s": self.gb_per_s,
            "tflop_per_s": self.tflop_per_s,
            "peak_bytes": self.memory.peak,
            "peak_bytes_beyond_y_and_dx": self.memory.beyond_outputs,
            "kept_bytes": self.memory.kept,
            "samples_ns": asdict(self.timings),
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Measurement:
        """The inverse of :meth:`as_dict`."""
        case = {name: value for name, value in row["case"].items() if name != "name"}
        peak, beyond = row["peak_bytes"], row["peak_bytes_beyond_y_and_dx"]
        return cls(
            case=Case(**case),
            dtype=row["dtype"],
            candidate=row["candidate"],
            backend=row["backend"],
            automatic=row["automatic"],
            timings=Timings(**{part: tuple(ns) for part, ns in row["samples_ns"].items()}),
            ratio=Quartiles(**row["ratio_to_frozen"]),
            work=Work(row["flops"], row["bytes"]),
            memory=Memory(peak, beyond, row["kept_bytes"]),
            host_us=None if row["host_us"] is None else Quartiles(**row["host_us"]),
        )


def _microseconds(samples: tuple[int, ...]) -> Quartiles:
    return Quartiles.of([sample / 1000 for sample in samples])
