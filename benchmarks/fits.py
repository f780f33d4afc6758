"""How a step's time grows with k and with T: lines fitted to the measurements.

``time = a + b k`` and ``time = a + b T``, fitted to the medians by least squares of the *relative*
errors: across four decades of T, absolute ones would fit only the largest times. The residual is
their root mean square: 0.1 means that the line is about 10 % off. Over T it is large where time is
not linear: few tokens cost the time of reading the weight, whatever their number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import torch

from neuroada_kernels.benchmarks.measurement import Measurement

Over = Literal["k", "tokens"]
Where = tuple[int, int, int, bool, str]  # at, d_in, d_out, bias, dtype
#: Minimum number of points of a fit: two parameters are fitted, and a residual needs a third.
LEAST = 3


@dataclass(frozen=True)
class Line:
    """``a + b x``, and the root mean square of its relative errors."""

    a: float
    b: float
    residual: float


@dataclass(frozen=True)
class Fit:
    """A fit of forward and backward, in microseconds, over ``k`` or ``tokens``, all else equal."""

    over: Over
    at: int  # tokens of a fit over k, k of one over tokens
    d_in: int
    d_out: int
    bias: bool
    dtype: str
    candidate: str
    values: tuple[int, ...]  # of k or tokens
    a_us: float
    b_us: float
    residual: float

    @property
    def title(self) -> str:
        """The layer, size and dtype of the fit."""
        other = f"T = {self.at}" if self.over == "k" else f"k = {self.at}"
        return f"{self.d_in} to {self.d_out}{', bias' * self.bias}, {other}, {self.dtype}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The line whose relative errors at the given ``y`` have the least sum of squares."""
    values, times = (torch.tensor(each, dtype=torch.float64) for each in (x, y))
    design = torch.stack([1 / times, values / times], dim=1)  # each row divided by its time
    ones = torch.ones(len(times), 1, dtype=torch.float64)
    # Scale the columns: T up to 16384 beside 1 would cost precision.
    scale = design.norm(dim=0)
    found = torch.linalg.lstsq(design / scale, ones).solution[:, 0] / scale
    error = (design @ found - 1).square().mean().sqrt()
    return Line(float(found[0]), float(found[1]), float(error))


def fits(measurements: Iterable[Measurement]) -> list[Fit]:
    """A fit wherever at least :data:`LEAST` measurements differ in k alone, or in tokens alone.

    The frozen linear does the same work at every k. So over k a time is each point's ratio to it
    multiplied by its median over all k, which cancels drift of the machine from point to point.
    """
    rows = list(measurements)
    return [*_over("k", rows), *_over("tokens", rows)]


def _over(over: Over, rows: Sequence[Measurement]) -> Iterator[Fit]:
    points: dict[tuple[Where, str], dict[int, Measurement]] = defaultdict(dict)
    for row in rows:
        case = row.case
        x, at = (case.k, case.tokens) if over == "k" else (case.tokens, case.k)
        where = (at, case.d_in, case.d_out, case.bias, row.dtype)
        points[where, row.candidate][x] = row
    for (where, candidate), found in points.items():
        if len(found) < LEAST:
            continue
        values = sorted(found)
        times = [found[x].total_us.median for x in values]
        if over == "k":
            frozen = median(row.total_us.median for row in points[where, "frozen"].values())
            times = [frozen * found[x].ratio.median for x in values]
        fit = line(values, times)
        yield Fit(over, *where, candidate, tuple(values), fit.a, fit.b, fit.residual)
