"""The first table of the README: what the bypass adds to the frozen linear, one row per machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from neuroada_kernels.benchmarks.html.linear_tables import measurements
from neuroada_kernels.benchmarks.html.llama_block import FROZEN, block_total, paired, rows_of
from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.html.tables import Table

RESULTS = "benchmarks/results"
#: File to the name of its machine in the table.
MACHINES = {
    "cpu/linear.json": "AMD EPYC with AVX-512",
    "cpu/linear-xeon-amx.json": "Intel Xeon with AMX, where torch's GEMM is faster",
    "h200/linear.json": "NVIDIA H200",
}
TOKENS, GPU_TOKENS = 512, 8192
DTYPES = ("float32", "bfloat16")
RESIDENT = "resident"


def table(*sources: Source) -> str:
    """A row for each file; for a GPU the linears of a Llama-3-8B block, summed."""
    rows = [row for s in sources if (row := _row(s)) is not None]
    content: str = Table("What is left to pay", ("", *DTYPES), rows, words=3).markdown()
    return content


def _row(source: Source) -> list[str] | None:
    """None if the file lacks measurements that the row needs."""
    return _of_gpu(source) if source.sessions[-1].get("gpu") else _of_cpu(source)


def _machine(source: Source) -> str:
    return MACHINES[source.name.removeprefix(f"{RESULTS}/")]


def _of_cpu(source: Source) -> list[str] | None:
    """The range over shapes and k."""
    cells = []
    for dtype in DTYPES:
        ratios = [
            row["ratio_to_frozen"]["median"]
            for row in measurements(source.document)
            if row["automatic"] and (row["dtype"], row["case"]["tokens"]) == (dtype, TOKENS)
        ]
        if not ratios:
            return None
        cells.append(added(min(ratios), max(ratios)))
    return [f"{_machine(source)}; {TOKENS} tokens", *cells]


def added(least: float, most: float) -> str:
    """Ratios to frozen as percentages of its time."""
    low, high = (round(100 * (ratio - 1)) for ratio in (least, most))
    if high < 0:
        return f"{-high} to {-low} % *less* time"
    if low < 0:
        return f"{-low} % less to {high} % more"
    return f"{low} to {high} % more" if low > 0 else f"up to {high} % more"


def _of_gpu(source: Source) -> list[str] | None:
    found = _block(source.document, "bfloat16")
    if not found:
        return None
    ours, resident = (
        " / ".join(f"{100 * (by_k[name] - 1):.0f}" for by_k in found.values())
        for name in ("bypass", RESIDENT)
    )
    k = " / ".join(map(str, found))
    served = f"{ours} % more at k = {k} (`resident`: {resident} %)"
    where = f"{_machine(source)}; {GPU_TOKENS} tokens, the linears of a Llama-3-8B block"
    return [where, "not served by default", served]


def _block(document: Mapping[str, Any], dtype: str) -> dict[int, dict[str, float]]:
    """Ratio to frozen of the summed linears, by k and strategy."""
    found = {}
    for (tokens, of, k), shapes in rows_of(document).items():
        if (tokens, of) == (GPU_TOKENS, dtype):
            served = _automatic(row for rows in shapes.values() for row in rows.values())
            totals = [
                block_total({shape: rows[name] for shape, rows in shapes.items() if name in rows})
                for name in (served, RESIDENT, FROZEN)
            ]
            bypass, resident, frozen = totals
            if bypass is not None and resident is not None and frozen is not None:
                found[k] = {"bypass": paired(bypass, frozen), RESIDENT: paired(resident, frozen)}
    return found


def _automatic(rows: Iterable[Mapping[str, Any]]) -> str:
    """The candidate of the backend chosen by default."""
    (name,) = {str(row["candidate"]) for row in rows if row["automatic"]}
    return name
