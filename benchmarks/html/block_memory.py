"""Activations that a transformer's block saves for backward, by method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuroada_kernels.benchmarks.html import blocks
from neuroada_kernels.benchmarks.html.blocks import Section
from neuroada_kernels.benchmarks.html.figures import draw
from neuroada_kernels.benchmarks.html.plots import Part, legend, rows_height, stacked
from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.html.tables import Table

MIB = 1 << 20
PARTS = (Part("saved by the rest of the block", "grey", faint=True), Part("by its linears", "blue"))


def section(source: Source) -> Section:
    """A bar for each method and dtype, and the table."""
    found = Section("Activations saved for backward by a block", described(source.document))
    panels = []
    for dtype in _dtypes(source.document):
        bars = bars_of(source.document, dtype)
        paint = stacked(bars, PARTS, "MiB")
        name = f"{source.name} {dtype}"
        svg = draw(name, f"Bytes saved, {dtype}", paint, height=rows_height(len(bars)))
        panels.append((dtype, svg))
    note = "Storages that autograd saves, each once; parameters and buffers are not counted."
    title = "Saved for backward"
    found.blocks.append(blocks.figure(source, title, panels, legend=legend(PARTS), note=note))
    found.blocks.append(blocks.table(source, kept(source.document)))
    return found


def bars_of(document: Mapping[str, Any], dtype: str) -> list[tuple[str, tuple[float, float]]]:
    """Method, and MiB that the rest of the block and its linears keep."""
    rows = [row for row in document["results"] if row["dtype"] == dtype]
    pairs = [(row["method"], row["kept_bytes"], row["kept_bytes_by_the_linears"]) for row in rows]
    return [(name, ((total - own) / MIB, own / MIB)) for name, total, own in pairs]


def kept(document: Mapping[str, Any]) -> Table:
    """MiB that the block saves, and of these what its linears save."""
    dtypes = _dtypes(document)
    found = {(row["dtype"], row["method"]): row for row in document["results"]}
    headings = ["", *(f"{part}, {d}" for d in dtypes for part in ("block", "by its linears"))]
    rows = []
    for method in dict.fromkeys(row["method"] for row in document["results"]):
        cells = [
            f"{found[dtype, method][key] / MIB:.1f}{_less(found, dtype, method, key)}"
            for dtype in dtypes
            for key in ("kept_bytes", "kept_bytes_by_the_linears")
        ]
        rows.append([method, *cells])
    return Table("In MiB", headings, rows, note="In brackets: how much less than with full.")


def described(document: Mapping[str, Any]) -> str:
    """Sizes, in a sentence."""
    sizes = document["sizes"]
    return (
        f"MiB of activations that a Llama-shaped block saves for backward: T {sizes['tokens']}, "
        f"d {sizes['width']}, MLP {sizes['hidden']}, k {sizes['k']}, random weights."
    )


def _dtypes(document: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["dtype"] for row in document["results"]))


def _less(kept: dict[tuple[str, str], Mapping[str, Any]], dtype: str, method: str, key: str) -> str:
    """How much less than with ``full``; empty for ``frozen``, and below 1 %."""
    share = kept[dtype, method][key] / kept[dtype, "full"][key]
    return f" (−{1 - share:.0%})" if method != "frozen" and share < 0.99 else ""
