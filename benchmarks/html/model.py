"""A training step of a whole transformer: its time and the parts of its memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuroada_kernels.benchmarks.html import blocks
from neuroada_kernels.benchmarks.html.blocks import Section
from neuroada_kernels.benchmarks.html.figures import draw
from neuroada_kernels.benchmarks.html.plots import (
    Dot,
    Part,
    dots,
    legend,
    rows_height,
    stacked,
    styles,
)
from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.html.tables import Strong, Table

Row = Mapping[str, Any]
MIB, GIB = 1 << 20, 1 << 30
PARTS = (
    Part("held between steps: weights, adapter, optimiser", "grey", faint=True),
    Part("added within a step, at most", "blue"),
)


def section(source: Source) -> Section:
    """Time and memory, a panel for each mode; then the tables and what did not run."""
    found = Section(f"Training steps of a whole model on {source.chip}", described(source))
    modes = by_mode(source.document)
    found.blocks.append(_times(source, modes))
    found.blocks.append(_memory(source, modes))
    found.blocks += [blocks.table(source, steps(mode, rows)) for mode, rows in modes.items()]
    found.blocks += blocks.skipped(skipped(source.document))
    return found


def described(source: Source) -> str:
    """Sizes, in a sentence."""
    settings = source.document["settings"]
    sizes = settings["sizes"]
    return (
        f"A Llama with random weights: {sizes['layers']} layers of width {sizes['hidden']}, MLP "
        f"{sizes['intermediate']}, vocabulary {sizes['vocabulary']}; {settings['dtype']}, "
        f"{settings['batch']} × {settings['sequence']} tokens, k {settings['k']}. Every method is "
        "checked for what it computes before it is timed."
    )


def by_mode(document: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Measured rows by mode."""
    found: dict[str, list[Row]] = {}
    for row in document["results"]:
        if "skipped" not in row:
            found.setdefault(row["mode"], []).append(row)
    return found


def incomplete(document: Mapping[str, Any]) -> bool:
    """Whether a mode lacks a method that another one has."""
    rows = {(row["mode"], row["method"]) for row in document["results"]}
    return len(rows) < len({mode for mode, _ in rows}) * len({method for _, method in rows})


def skipped(document: Mapping[str, Any]) -> dict[str, str]:
    """What did not run, with the reasons."""
    found = {row["key"]: row["skipped"] for row in document["results"] if "skipped" in row}
    return {**document["settings"].get("left_out", {}), **found}


def _times(source: Source, modes: Mapping[str, list[Row]]) -> str:
    looks = styles(row["method"] for rows in modes.values() for row in rows)
    panels = []
    for mode, rows in modes.items():
        shown = [r for r in rows if r["method"] != "frozen" and r["ratio_to_frozen"] is not None]
        points = [_dot(row["method"], row["ratio_to_frozen"], looks) for row in shown]
        if points:
            paint = dots(points, "ratio to frozen", reference=1)
            name = f"{source.name} time {mode}"
            svg = draw(name, f"Time, {mode}", paint, height=rows_height(len(points)))
            panels.append((mode, svg))
    note = (
        "Time of a training step as a ratio to the frozen model’s in the same mode (dashed), "
        "medians with quartiles; less is better."
    )
    found: str = blocks.figure(source, "Time of a step", panels, note=note)
    return found


def _dot(name: str, ratio: Mapping[str, float], looks: Mapping[str, Any]) -> Dot:
    sides = (ratio["median"] - ratio["lower"], ratio["upper"] - ratio["median"])
    return Dot(name, ratio["median"], sides, looks[name])


def _memory(source: Source, modes: Mapping[str, list[Row]]) -> str:
    panels = []
    for mode, rows in modes.items():
        unit, size = _unit(rows)
        parts = ("held_bytes", "step_bytes")
        bars = [(row["method"], [row[part] / size for part in parts]) for row in rows]
        paint = stacked(bars, PARTS, unit, digits=int(size == GIB))
        name = f"{source.name} memory {mode}"
        svg = draw(name, f"Peak memory, {mode}", paint, height=rows_height(len(bars)))
        panels.append((mode, svg))
    title, note = "Memory of a step", "What torch’s allocator hands out; the sum is the peak."
    found: str = blocks.figure(source, title, panels, legend=legend(PARTS), note=note)
    return found


def steps(mode: str, rows: list[Row]) -> Table:
    """A row for each method."""
    content = []
    unit, size = _unit(rows)
    for row in rows:
        ratio, ours = row["ratio_to_frozen"], row["method"].startswith("neuroada")
        content.append(
            [
                Strong(row["method"]) if ours else row["method"],
                f"{row['trainable']:,}",
                f"{row['step_ms']['median']:.1f}",
                f"{row['tokens_per_second']:,.0f}",
                "" if ratio is None else f"{ratio['median']:.3f}",
                "" if ratio is None else f"{ratio['lower']:.2f}–{ratio['upper']:.2f}",
                f"{row['held_bytes'] / size:,.1f}",
                f"{row['peak_bytes'] / size:,.1f}",
                row["source"],
            ]
        )
    headings = (
        "method", "trainable", "step, ms", "tokens/s", "x frozen", "quartiles", f"held, {unit}",
        f"peak, {unit}", "implementation",
    )  # fmt: skip
    return Table(f"Mode: {mode}", headings, content)


def _unit(rows: list[Row]) -> tuple[str, int]:
    """The unit for bytes, and its size: GiB for large models, else MiB."""
    largest = max(row["peak_bytes"] for row in rows)
    return ("GiB", GIB) if largest >= 8 * GIB else ("MiB", MIB)


def in_short(document: Mapping[str, Any]) -> Table:
    """One row per method: tokens per second and peak in every mode, or ``out of memory``."""
    modes = list(dict.fromkeys(row["mode"] for row in document["results"]))
    found = {(row["mode"], row["method"]): row for row in document["results"]}
    rows = []
    for name in dict.fromkeys(method for _, method in found):
        cells: list[str] = [Strong(name) if name.startswith("neuroada") else name]
        for mode in modes:
            cells += _speed_and_peak(found.get((mode, name)))
        if any(cells[1:]):
            rows.append(cells)
    headings = [text for mode in modes for text in (f"tokens/s, {mode}", f"peak GiB, {mode}")]
    return Table("A training step, in short", ("method", *headings), rows)


def _speed_and_peak(row: Row | None) -> tuple[str, str]:
    if row is None or "skipped" in row:
        memory = row is not None and "OutOfMemory" in row["skipped"]
        return ("out of memory" if memory else "", "")
    return f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / GIB:.1f}"
