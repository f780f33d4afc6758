"""Statistics over seeds: means with t-intervals, and paired differences from NeuroAda."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from neuroada_kernels.benchmarks.quality.suite import SEARCH_SEED, Run, Suite
from neuroada_kernels.benchmarks.quality.variants import OURS, QUESTIONS, groups

CONFIDENCE = 0.95
#: Differences of means below this are rounding, whatever their interval.
NEGLIGIBLE = 1e-4


@dataclass(frozen=True)
class Interval:
    """``lower`` and ``upper`` bound the mean; NaN for a single value."""

    mean: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's t-interval of the mean."""
        mean = float(np.mean(values))
        if len(values) < 2:
            return cls(mean, math.nan, math.nan)
        scale = stats.sem(values)
        if scale == 0:
            return cls(mean, mean, mean)
        lower, upper = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=scale)
        return cls(mean, float(lower), float(upper))

    @property
    def half(self) -> float:
        return (self.upper - self.lower) / 2


@dataclass(frozen=True)
class Row:
    """A variant of a group. ``difference`` is from NeuroAda, seed by seed; below 0 is better."""

    variant: str
    trainable: int
    rate: float | None
    at_edge: bool  # the rate is the smallest or the largest of those searched
    loss: Interval | None  # None where a seed diverged
    difference: Interval | None  # None for NeuroAda itself too
    accuracy: Interval | None
    k: int
    method: str

    @property
    def verdict(self) -> str:
        """Whether the interval of the difference excludes 0; empty without an interval."""
        if self.difference is None or not math.isfinite(self.difference.half):
            return ""
        if abs(self.difference.mean) < NEGLIGIBLE:
            return "even"
        if self.difference.upper < 0:
            return "better"
        return "worse" if self.difference.lower > 0 else "even"


@dataclass(frozen=True)
class Group:
    """Rows that answer one question on one task."""

    task: str
    unit: str
    name: str
    rows: list[Row]

    @property
    def question(self) -> str:
        question: str = QUESTIONS[self.name]
        return question


def summarise(suite: Suite) -> list[Group]:
    """The groups of the stored runs; variants without results are left out."""
    found = []
    for task in suite.tasks:
        results = _results(suite, task.name)
        for name, variants in groups(task.name, suite.settings).items():
            known = [v for v in variants if v.name in results]
            rows = [
                _row(results[v.name], results.get(OURS, []), suite.settings.rates, v.k, v.method)
                for v in known
            ]
            found.append(Group(task.name, task.unit, name, rows))
    return [group for group in found if group.rows]


def _results(suite: Suite, task: str) -> dict[str, list[Run]]:
    """Runs on test data, by variant, in the order of seeds."""
    found: dict[str, list[Run]] = {}
    for run in sorted(suite.runs, key=lambda run: run.seed):
        if run.task == task and run.part == "test" and run.seed != SEARCH_SEED:
            found.setdefault(run.variant, []).append(run)
    return found


def _row(runs: list[Run], ours: list[Run], rates: Sequence[float], k: int, method: str) -> Row:
    first = runs[0]
    losses = _all(run.loss for run in runs)
    ours_by_seed = {run.seed: run.loss for run in ours}
    differences = None
    if first.variant != OURS and losses is not None:
        pairs = [(run.loss, ours_by_seed.get(run.seed)) for run in runs]
        differences = _all(None if a is None or b is None else a - b for a, b in pairs)
    accuracies = _all(run.accuracy for run in runs)
    return Row(
        variant=first.variant,
        trainable=first.trainable,
        rate=first.rate,
        at_edge=first.rate in (min(rates), max(rates)),
        loss=None if losses is None else Interval.of(losses),
        difference=None if differences is None else Interval.of(differences),
        accuracy=None if accuracies is None else Interval.of(accuracies),
        k=k,
        method=method,
    )


def _all(values: Iterable[float | None]) -> list[float] | None:
    """The values, or None where one is missing."""
    found = list(values)
    present = [value for value in found if value is not None]
    return present if found and len(present) == len(found) else None


def as_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The summary for JSON."""
    return [
        {**asdict(group), "question": group.question, "rows": [_plain(row) for row in group.rows]}
        for group in groups
    ]


def _plain(row: Row) -> dict[str, Any]:
    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(entry) for key, entry in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    found: dict[str, Any] = finite(asdict(row) | {"verdict": row.verdict})
    return found
