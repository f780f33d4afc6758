"""Contents of a results file of the linear suite, also of one that predates the common frame.

A row of ``results`` is one of three: a measurement of a candidate at a case in a dtype
(:meth:`neuroada_kernels.benchmarks.measurement.Measurement.as_dict`), a ``skipped`` candidate with
the reason (``failed``, if it should have run), or ``host_cost``, the overhead of one forward call
at T = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from neuroada_kernels.benchmarks.bars import Verdict, judge
from neuroada_kernels.benchmarks.fits import Fit, fits
from neuroada_kernels.benchmarks.measurement import Measurement
from neuroada_kernels.benchmarks.timing import HostCost, Quartiles
from neuroada_kernels.testing import Case

KIND = "linear"
HOST_COST = "host-cost"


@dataclass(frozen=True)
class Skipped:
    """A candidate that was not timed; ``failed``: it is wrong or raised, and needs a fix."""

    case: Case
    dtype: str
    candidate: str
    reason: str
    failed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "case": {"name": self.case.name, **asdict(self.case)},
            "dtype": self.dtype,
            "candidate": self.candidate,
            "skipped": self.reason,
            **({"failed": True} if self.failed else {}),
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Skipped:
        """The inverse of :meth:`as_dict`."""
        case = {name: value for name, value in row["case"].items() if name != "name"}
        return cls(Case(**case), row["dtype"], row["candidate"], row["skipped"], "failed" in row)


@dataclass
class Results:
    """The rows of a file as objects, and what is computed from them."""

    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    host: HostCost | None = None
    verdicts: list[Verdict] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Results:
        """From a file's ``results``."""
        found = cls()
        for row in rows:
            if row["key"] == HOST_COST:
                parts = {name: Quartiles(**value) for name, value in row["host_cost"].items()}
                found.host = HostCost(**parts)
            elif "skipped" in row:
                found.skipped.append(Skipped.from_dict(row))
            else:
                found.measurements.append(Measurement.from_dict(row))
        return found

    @property
    def fits(self) -> list[Fit]:
        """Fits to measurements that differ in one size only, where these are enough."""
        found: list[Fit] = fits(self.measurements)
        return found

    def judge(self) -> None:
        """Judge every bar."""
        self.verdicts = judge(self.measurements, self.host)

    def summary(self) -> dict[str, Any]:
        """The ``summary`` of a file: what was computed from its rows."""
        return {
            "fits": [fit.as_dict() for fit in self.fits],
            "bars": [
                {**asdict(v.bar), "meaning": v.bar.meaning, "value": v.value, "outcome": v.outcome}
                for v in self.verdicts
            ],
        }


def row_key(case: Case, dtype: str, candidate: str) -> str:
    """The key of a measurement."""
    return f"{case.name} {dtype} {candidate}"


def framed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document in the common frame, unchanged if it already has that.

    In older files the facts of the only session were beside ``results``, ``rounds``, ``skipped``
    and ``host_cost``. What such a file lacks, such as the host's time, is None; operations and
    bytes are computed as its rates times the time.
    """
    if document.get("kind") == KIND:
        return dict(document)
    own = ("rounds", "results", "skipped", "host_cost", "bars")
    session = {name: value for name, value in document.items() if name not in own}
    rows = [_framed_row(row) for row in document["results"]]
    rows += [
        # Here the case was only a name.
        {"key": f"{s['case']} {s['dtype']} {s['candidate']}", **s, "skipped": s["reason"]}
        for s in document["skipped"]
    ]
    if document["host_cost"] is not None:
        rows.append({"key": HOST_COST, "host_cost": document["host_cost"]})
    names = [r["candidate"] for r in document["results"]]
    return {
        "kind": KIND,
        "command": "neuroada bench",
        "settings": {
            "rounds": document["rounds"],
            "device": document["device"],
            "candidates": list(dict.fromkeys(names)),
        },
        "sessions": [session],
        "results": rows,
        "summary": {"fits": [], "bars": document["bars"]},
    }


def _framed_row(row: Mapping[str, Any]) -> dict[str, Any]:
    new = {name: value for name, value in row.items() if name != "gflop_per_s"}
    time = row["total_us"]["median"]
    return {
        "key": f"{row['case']['name']} {row['dtype']} {row['candidate']}",
        **new,
        "host_us": None,
        "tflop_per_s": row["gflop_per_s"] / 1e3,
        "flops": round(row["gflop_per_s"] * time * 1e3),
        "bytes": round(row["gb_per_s"] * time * 1e3),
    }
