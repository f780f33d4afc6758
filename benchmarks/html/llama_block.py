"""The seven linears of a Llama-3-8B block, summed from a file of the linear suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from neuroada_kernels.benchmarks.html.linear_tables import Row, measurements
from neuroada_kernels.benchmarks.html.tables import Strong, Table

#: d_in and d_out to how many linears of a block have them: q and o; k and v; gate and up; down.
LINEARS = {(4096, 4096): 2, (4096, 1024): 2, (4096, 14336): 2, (14336, 4096): 1}
FROZEN = "frozen"
#: Which columns come first; others follow by name.
_ORDER = (
    "neuroada-cuda",
    "neuroada-triton",
    "resident",
    "peft-lora-r16",
    "materialised",
    "masked-dense",
    "full",
)
#: What rows of one block share: T, dtype, k.
Block = tuple[int, str, int]


def rows_of(document: Mapping[str, Any]) -> dict[Block, dict[tuple[int, int], dict[str, Row]]]:
    """For each block the measurements of its linears, by d_in and d_out, then by candidate."""
    found: dict[Block, dict[tuple[int, int], dict[str, Row]]] = {}
    for row in measurements(document):
        case = row["case"]
        shape = (case["d_in"], case["d_out"])
        # The name of a case shows what differs from a Llama's linear: a bias, another index.
        plain = f"T{case['tokens']}-{case['d_in']}to{case['d_out']}-k{case['k']}"
        if shape in LINEARS and case["name"] == plain and row.get("samples_ns"):
            block = (case["tokens"], row["dtype"], case["k"])
            found.setdefault(block, {}).setdefault(shape, {})[row["candidate"]] = row
    return dict(sorted(found.items()))


def total(row: Row) -> list[int]:
    """Nanoseconds of forward and backward, round by round."""
    parts = row["samples_ns"]
    return [f + b for f, b in zip(parts["forward"], parts["backward"], strict=True)]


def block_total(rows: Mapping[tuple[int, int], Row]) -> list[int] | None:
    """Nanoseconds of the whole block, round by round; None where a linear is missing."""
    if not rows.keys() >= LINEARS.keys():
        return None
    linears = [[count * ns for ns in total(rows[shape])] for shape, count in LINEARS.items()]
    return [sum(each) for each in zip(*linears, strict=True)]


def paired(ours: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios round by round."""
    return median(a / b for a, b in zip(ours, others, strict=True))


def summed(document: Mapping[str, Any]) -> Table:
    """A row for each complete block, by T, k and dtype; a column for each candidate."""
    totals: dict[Block, dict[str, list[int]]] = {}
    for block, shapes in rows_of(document).items():
        for name in dict.fromkeys(name for of in shapes.values() for name in of):
            own = {shape: of[name] for shape, of in shapes.items() if name in of}
            if (ns := block_total(own)) is not None:
                totals.setdefault(block, {})[name] = ns
    totals = {block: found for block, found in totals.items() if FROZEN in found}
    names = _ordered({name for found in totals.values() for name in found})
    ours = {row["candidate"] for row in measurements(document) if row["automatic"]}
    dtypes = sorted({dtype for _, dtype, _ in totals})
    several = len(dtypes) > 1
    content = []
    for (tokens, dtype, k), found in totals.items():
        frozen = found[FROZEN]
        ratios = [f"{paired(found[name], frozen):.2f}" if name in found else "" for name in names]
        cells = [
            Strong(text) if name in ours and text else text
            for name, text in zip(names, ratios, strict=True)
        ]
        sizes = [str(tokens), *[dtype] * several, str(k)]
        content.append([*sizes, f"{median(frozen) / 1e6:.2f}", *cells])
    marked = [Strong(name) if name in ours else name for name in names]
    headings = ["T", *["dtype"] * several, "k", "frozen, ms", *marked]
    note = (
        "Forward and backward of q, k, v, o, gate, up and down, summed round by round; medians as "
        "a ratio to the frozen linears’ sum."
    )
    title = f"Linears of a Llama-3-8B block as a ratio to frozen, {', '.join(dtypes)}"
    return Table(title, headings, content, words=2 + several, note=note)


def _ordered(names: set[str]) -> list[str]:
    known = [name for name in _ORDER if name in names]
    return [*known, *sorted(names - {*known, FROZEN})]
