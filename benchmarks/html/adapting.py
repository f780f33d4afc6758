"""Time and memory of adapting a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuroada_kernels.benchmarks.html import blocks
from neuroada_kernels.benchmarks.html.blocks import Section
from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.html.tables import Table


def section(source: Source) -> Section:
    """A table only, with a row for each k."""
    sizes = source.document["sizes"]
    lead = (
        f"Selecting the connections of a randomly initialised Llama of width {sizes['hidden']} and "
        f"MLP {sizes['intermediate']}, {sizes['layers']} layers; as many of them as fit are made."
    )
    found = Section("Adapting a model", lead)
    found.blocks.append(blocks.table(source, costs(source.document)))
    return found


def costs(document: Mapping[str, Any]) -> Table:
    """Seconds and bytes of the layers that were made, and seconds extrapolated to all."""
    kept = ("index", "delta", "plan")
    rows = [
        [
            str(row["k"]),
            f"{row['parameters'] / 1e9:.2f} billion in {row['layers']} layers, {row['dtype']}",
            f"{row['seconds']:.2f}",
            f"{row['seconds_per_billion']:.2f}",
            *(f"{row[part + '_bytes'] / 1e6:.1f}" for part in kept),
            f"{row['peak_bytes_beside_what_is_kept'] / 1e6:.1f}",
            f"{row['extrapolated_to_all_layers']['seconds']:.1f}",
        ]
        for row in document["results"]
    ]
    headings = (
        "k", "parameters", "seconds", "s per 10⁹ parameters", "indices, MB", "deltas, MB",
        "plans, MB", "peak beside these, MB", "all layers, s",
    )  # fmt: skip
    note = (
        "Peak: of the process, beside the model, indices, deltas and plans; below zero where the "
        "process had enough free memory before. The last column is extrapolated: all layers cost "
        "the same."
    )
    return Table("Seconds and memory of adapt", headings, rows, words=2, note=note)
