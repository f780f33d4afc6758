"""Bars and goals of an H200, and how each is read from results of the suites linear and model.

A bar must hold, a goal is aimed at. ``bypass`` is, for each case, the NeuroAda candidate that
serves by default; if that was not measured, the fastest one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from neuroada_kernels.benchmarks.candidates import PEFT_LORA_RANK, RESIDENT
from neuroada_kernels.benchmarks.html.llama_block import (
    FROZEN,
    LINEARS,
    Row,
    block_total,
    paired,
    rows_of,
    total,
)
from neuroada_kernels.benchmarks.llama import Sizes
from neuroada_kernels.testing import GPU_BENCH_CASES

BYPASS = "bypass"
MATERIALISED = "materialised"
LORA = f"peft-lora-r{PEFT_LORA_RANK}"
DTYPE = "bfloat16"
KS = (1, 8, 20)
MIB = 1 << 20


@dataclass(frozen=True)
class Limit:
    """The largest value that passes; ``below``: values have to be below it."""

    most: float
    below: bool = False

    def passes(self, value: float) -> bool:
        return value < self.most if self.below else value <= self.most


@dataclass(frozen=True)
class Value:
    """Smaller is better. ``of``: the rows of the value; ``lacking``: what was not measured."""

    value: float | None = None
    of: str = ""
    lacking: str = ""


class Files:
    """The measurements, by the names that targets use."""

    def __init__(
        self, linear: Mapping[str, Any] | None = None, model: Mapping[str, Any] | None = None
    ) -> None:
        self.linears = {} if linear is None else rows_of(linear)
        self.model = model

    def rows(self, candidate: str, tokens: int, k: int) -> dict[tuple[int, int], Row]:
        """A candidate's measurements of a block, by d_in and d_out."""
        shapes = self.linears.get((tokens, DTYPE, k), {})
        found = {shape: _named(rows, candidate) for shape, rows in shapes.items()}
        return {shape: row for shape, row in found.items() if row is not None}

    def step(self, mode: str, method: str) -> tuple[int | None, str]:
        """The peak of a training step of a Llama-3-8B, or why there is none."""
        if self.model is None:
            return None, "a training step"
        settings = self.model["settings"]
        here = (settings["sizes"], settings["dtype"], settings["k"])
        if here != (asdict(Sizes()), DTYPE, max(KS)):
            return None, f"a Llama-3-8B in {DTYPE} at k {max(KS)}"
        for row in self.model["results"]:
            if (row["mode"], row["method"]) == (mode, method):
                skipped = row.get("skipped")
                return row.get("peak_bytes"), "" if skipped is None else f"{method}: {skipped}"
        return None, f"{method}, {mode}"


def _named(rows: Mapping[str, Row], candidate: str) -> Row | None:
    if candidate != BYPASS:
        return rows.get(candidate)
    ours = [row for name, row in rows.items() if name.startswith("neuroada-")]
    chosen = [row for row in ours if row["automatic"]]
    return min(chosen or ours, key=lambda row: float(row["total_us"]["median"]), default=None)


@dataclass(frozen=True)
class Target:
    """A bar and a goal; a subclass defines the quantity and reads its value from files."""

    bar: Limit | None
    goal: Limit | None

    @property
    def meaning(self) -> str:
        raise NotImplementedError

    def value(self, files: Files) -> Value:
        raise NotImplementedError

    def shown(self, value: float) -> str:
        """A value as text."""
        return f"{value:.3f}"

    def limit(self, limit: Limit | None) -> str:
        """A limit as text."""
        if limit is None:
            return ""
        return f"below {limit.most:g}" if limit.below else f"at most {limit.most:.2f}"


@dataclass(frozen=True)
class BlockTime(Target):
    """Forward and backward of the seven linears of a block, summed, over another candidate's."""

    k: int
    candidate: str = BYPASS
    against: str = FROZEN
    tokens: int = 8192

    @property
    def meaning(self) -> str:
        return f"block, T {self.tokens}, k {self.k}: {self.candidate} over {self.against}"

    def value(self, files: Files) -> Value:
        names = (self.candidate, self.against)
        pair = [files.rows(name, self.tokens, self.k) for name in names]
        for name, rows in zip(names, pair, strict=True):
            if missing := LINEARS.keys() - rows.keys():
                return Value(lacking=f"{name} of {len(missing)} of {len(LINEARS)} shapes")
        ours, others = (block_total(rows) for rows in pair)
        assert ours is not None
        assert others is not None
        return Value(paired(ours, others), _names(pair[0].values()))


def _names(rows: Iterable[Row]) -> str:
    return ", ".join(dict.fromkeys(row["candidate"] for row in rows))


@dataclass(frozen=True)
class BlockSpeedUp(BlockTime):
    """The same, shown as a speedup."""

    @property
    def meaning(self) -> str:
        return f"block, T {self.tokens}, k {self.k}: {self.candidate}, faster than {self.against}"

    def shown(self, value: float) -> str:
        return f"{1 / value:.2f}x"

    def limit(self, limit: Limit | None) -> str:
        return "" if limit is None else f"at least {1 / limit.most:.3g}x"


@dataclass(frozen=True)
class _EveryCase(Target):
    """The worst of all shapes and T of the GPU's cases."""

    k: int
    candidate: str

    def worst(self, found: Mapping[str, tuple[float, Row]]) -> Value:
        cases = {case.name for case in GPU_BENCH_CASES if case.k == self.k}
        if not found:
            return Value(lacking=f"{self.candidate} at k {self.k}")
        name = max(found, key=lambda one: found[one][0])
        missing = len(cases - found.keys())
        lacking = f"{missing} of {len(cases)} cases" if missing else ""
        return Value(found[name][0], f"{found[name][1]['candidate']}, {name}", lacking)

    def _pairs(self, files: Files, against: str) -> Iterator[tuple[Row, Row | None]]:
        for tokens in dict.fromkeys(case.tokens for case in GPU_BENCH_CASES):
            others = files.rows(against, tokens, self.k)
            for shape, row in files.rows(self.candidate, tokens, self.k).items():
                yield row, others.get(shape)


@dataclass(frozen=True)
class EveryShapeTime(_EveryCase):
    """Forward and backward of a linear over another candidate's."""

    against: str = LORA

    @property
    def meaning(self) -> str:
        return f"every shape and T, k {self.k}: {self.candidate} over {self.against}"

    def value(self, files: Files) -> Value:
        pairs = self._pairs(files, self.against)
        return self.worst(
            {
                row["case"]["name"]: (paired(total(row), total(other)), row)
                for row, other in pairs
                if other is not None
            }
        )


@dataclass(frozen=True)
class EveryShapeScratch(_EveryCase):
    """Bytes at the peak of forward and backward beyond y, dx and what is kept between them."""

    @property
    def meaning(self) -> str:
        return f"every shape and T, k {self.k}: scratch of {self.candidate}"

    def shown(self, value: float) -> str:
        return f"{value / MIB:.1f} MiB"

    def limit(self, limit: Limit | None) -> str:
        return "" if limit is None else f"at most {limit.most / MIB:g} MiB"

    def value(self, files: Files) -> Value:
        rows = [row for row, _ in self._pairs(files, self.candidate)]
        return self.worst(
            {
                row["case"]["name"]: (row["peak_bytes_beyond_y_and_dx"] - row["kept_bytes"], row)
                for row in rows
            }
        )


@dataclass(frozen=True)
class ModelPeak(Target):
    """Peak memory of a training step of a whole Llama-3-8B, over another method's."""

    against: str
    mode: str
    method: str = "neuroada"

    @property
    def meaning(self) -> str:
        return f"peak of a Llama-3-8B's step, {self.mode}: {self.method} beside {self.against}"

    def shown(self, value: float) -> str:
        return f"{100 * (value - 1):+.1f} %"

    def limit(self, limit: Limit | None) -> str:
        if limit is None:
            return ""
        if limit.most == 1:
            return "less" if limit.below else "not more"
        return f"{100 * (limit.most - 1):+.0f} %"

    def value(self, files: Files) -> Value:
        (ours, why), (others, why_not) = (
            files.step(self.mode, name) for name in (self.method, self.against)
        )
        if ours is None or others is None:
            return Value(lacking=why or why_not)
        return Value(ours / others, f"{ours / 2**30:.1f} of {others / 2**30:.1f} GiB")


#: The seven linears of a block over the frozen ones, bar and goal, by strategy and k.
_OVER_FROZEN = {
    BYPASS: {1: (1.15, 1.05), 8: (1.20, 1.08), 20: (1.30, 1.13)},
    RESIDENT: {1: (1.06, 1.03), 8: (1.08, 1.04), 20: (1.12, 1.06)},
}
#: Speedup over the materialised scheme, bar and goal, by T.
_FASTER = {8192: (1.35, 1.5), 1024: (1.8, 2.5)}
#: Peak of a whole model's step over another method's, bar and goal.
_PEAK = {
    "masked-dense": (Limit(0.40), Limit(0.25)),
    MATERIALISED: (Limit(0.60), Limit(0.50)),
    LORA: (Limit(1.0), Limit(1.0, below=True)),
}
_LESS = Limit(1.0, below=True)


def _targets() -> Iterator[Target]:
    for candidate, by_k in _OVER_FROZEN.items():
        for k, (bar, goal) in by_k.items():
            yield BlockTime(Limit(bar), Limit(goal), k, candidate)
    for tokens, (bar, goal) in _FASTER.items():
        for k in KS:
            limits = Limit(1 / bar), Limit(1 / goal)
            yield BlockSpeedUp(*limits, k, against=MATERIALISED, tokens=tokens)
    yield from (BlockTime(_LESS, None, k, against=LORA) for k in KS if k <= 8)
    yield from (EveryShapeTime(_LESS, _LESS, k, RESIDENT) for k in KS)
    yield from (EveryShapeTime(None, _LESS, k, BYPASS) for k in KS)
    yield from (EveryShapeScratch(Limit(64 * MIB), None, k, BYPASS) for k in KS)
    for mode in ("plain", "checkpointed"):
        yield from (ModelPeak(*limits, against, mode) for against, limits in _PEAK.items())


TARGETS: tuple[Target, ...] = tuple(_targets())
