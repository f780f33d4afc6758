"""Memory of training, by method: computed for real models, and compared with measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuroada_kernels.benchmarks.html import blocks
from neuroada_kernels.benchmarks.html.blocks import Section
from neuroada_kernels.benchmarks.html.figures import draw
from neuroada_kernels.benchmarks.html.plots import (
    Part,
    Series,
    legend,
    parity,
    rows_height,
    stacked,
    styles,
)
from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.html.tables import Strong, Table

Row = Mapping[str, Any]
MIB, GIB = 1 << 20, 1 << 30
OURS, MASKED = "neuroada", "masked-dense"
#: Bytes of a row to the part of a bar that shows them; together they are the peak.
BYTES = {
    "weights": Part("frozen weights", "grey", faint=True),
    "trained": Part("what trains", "blue"),
    "selection": Part("which of it trains", "olive"),
    "optimizer": Part("AdamW’s state", "orange"),
    "peak_gradients": Part("gradients", "purple"),
    "peak_kept": Part("saved activations", "green", faint=True),
    "peak_scratch": Part("scratch", "red"),
}


def section(source: Source) -> Section:
    """Real models first, then the validation of the analytical model."""
    found = Section("Memory of training, by method", described(source.document))
    found.blocks.append(blocks.table(source, against_masked(source.document)))
    groups = by_setting(source.document)
    least = min((k for _, k, _ in groups), default=0)
    for checkpointing in (False, True):
        shown = {
            name: rows
            for (name, k, checkpointed), rows in groups.items()
            if (k, checkpointed) == (least, checkpointing)
        }
        if shown:
            found.blocks.append(_bars(source, shown, least, checkpointing))
    tables = [models(rows) for rows in groups.values()]
    found.blocks.append(blocks.folded(source, "Tables: every part, model, k and mode", tables))
    found.blocks.append(_validation(source))
    found.blocks.append(blocks.folded(source, "Every measurement", [validation(source.document)]))
    found.blocks += blocks.skipped(
        {row["key"]: row["skipped"] for row in source.document["results"] if "skipped" in row}
    )
    return found


def described(document: Mapping[str, Any]) -> str:
    """What was computed, what was measured, and how far the two are apart."""
    errors = [
        abs(row["error"][name]) for row in _validated(document) for name in ("peak", "step_peak")
    ]
    said = (
        "Bytes at the peak of a training step with AdamW, computed for real models by an "
        "analytical model of torch’s autograd and allocator."
    )
    if not errors:
        return f"{said} No measurement checks it."
    tolerance = document["settings"]["tolerance"]
    inside = sum(error <= tolerance for error in errors)
    return (
        f"{said} Compared with {len(_validated(document))} measured training steps, {inside} of "
        f"{len(errors)} computed peaks (in total, and what the step adds) are within "
        f"{tolerance:.0%}; the largest error is {max(errors):.2%}."
    )


def by_setting(document: Mapping[str, Any]) -> dict[tuple[str, int, bool], list[Row]]:
    """Rows of real models, by model, k and checkpointing."""
    found: dict[tuple[str, int, bool], list[Row]] = {}
    for row in document["results"]:
        if row["part"] == "models":
            setting = row["setting"]
            key = (row["model"], setting["k"], setting["checkpointing"])
            found.setdefault(key, []).append(row)
    return found


def _validated(document: Mapping[str, Any]) -> list[Row]:
    return [row for row in document["results"] if "measured" in row]


def _mode(checkpointing: bool) -> str:
    return "with gradient checkpointing" if checkpointing else "without gradient checkpointing"


def bars_of(rows: list[Row]) -> list[tuple[str, tuple[float, ...]]]:
    """Method, and GiB of every part."""
    return [(row["method"], tuple(row["predicted"][name] / GIB for name in BYTES)) for row in rows]


def _bars(source: Source, groups: Mapping[str, list[Row]], k: int, checkpointing: bool) -> str:
    title = f"Peak of a training step, k {k}, {_mode(checkpointing)}"
    panels = []
    for name, rows in groups.items():
        bars = bars_of(rows)
        digits = 1 if max(sum(parts) for _, parts in bars) > 10 else 2
        paint = stacked(bars, tuple(BYTES.values()), "GiB", digits)
        unique, label = f"{source.name} {title} {name}", f"{name}: {title}"
        svg = draw(unique, label, paint, height=rows_height(len(rows)))
        setting = rows[0]["setting"]
        tokens = f"{setting['batch']} × {setting['sequence']} tokens"
        panels.append((f"{name}, {setting['dtype']}, {tokens}", svg))
    parts, note = legend(tuple(BYTES.values())), "Computed, not measured."
    found: str = blocks.figure(source, title, panels, legend=parts, note=note)
    return found


def against_masked(document: Mapping[str, Any]) -> Table:
    """NeuroAda beside mask-based tuning, a row for each model."""
    groups = by_setting(document)
    columns = list(dict.fromkeys((k, checkpointing) for _, k, checkpointing in groups))
    rows = []
    for name in dict.fromkeys(name for name, _, _ in groups):
        cells = [name]
        for k, checkpointing in columns:
            found = {row["method"]: row for row in groups.get((name, k, checkpointing), ())}
            if OURS not in found or MASKED not in found:
                cells.append("")
                continue
            ours, masked = (found[method]["predicted"]["peak"] for method in (OURS, MASKED))
            less = 1 - ours / masked
            cells.append(f"{ours / GIB:.1f} of {masked / GIB:.1f} ({_percent(less)})")
        rows.append(cells)
    headings = ["", *(f"k {k}{', checkpointing' * c}" for k, c in columns)]
    note = (
        "Peak in GiB with NeuroAda, of that with mask-based tuning, and the difference. Computed, "
        "not measured."
    )
    return Table("NeuroAda beside mask-based tuning", headings, rows, note=note)


def _percent(less: float) -> str:
    return f"−{less:.0%}" if less >= 0 else f"+{-less:.0%}"


def models(rows: list[Row]) -> Table:
    """Every part of the peak, a row for each method."""
    setting = rows[0]["setting"]
    peaks = {row["method"]: row["predicted"]["peak"] for row in rows}
    content = []
    for row in rows:
        predicted, name = row["predicted"], row["method"]
        less = 1 - predicted["peak"] / peaks[MASKED] if MASKED in peaks else None
        content.append(
            [
                Strong(name) if name.startswith(OURS) else name,
                *(f"{predicted[part] / GIB:.2f}" for part in BYTES),
                f"{predicted['peak'] / GIB:.2f}",
                "" if less is None else _percent(less),
                *(f"{nbytes / MIB:,.1f}" for nbytes in _of_a_layer(row)),
                predicted["at"],
            ]
        )
    headings = (
        "GiB", "weights", "trains", "selection", "AdamW", "gradients", "saved", "scratch", "peak",
        "vs masked", "held per layer, MiB", "saved, MiB", "peak in",
    )  # fmt: skip
    title = (
        f"{rows[0]['model']}, k {setting['k']}, {setting['dtype']}, "
        f"{setting['batch']} × {setting['sequence']} tokens, {_mode(setting['checkpointing'])}"
    )
    note = (
        "Gradients, saved activations and scratch are those at the instant of the peak, which the "
        "last column names. Held per layer: what stays between steps, and the gradients."
    )
    return Table(title, headings, content, note=note)


def _of_a_layer(row: Row) -> tuple[int, int]:
    """Bytes that a layer holds, gradients included, and that it saves for the backward."""
    layer = row["layer"]
    return sum(layer.values()) - layer["kept"], layer["kept"]


def _validation(source: Source) -> str:
    rows = _validated(source.document)
    looks = styles(row["method"] for row in rows)
    series = []
    for name, look in looks.items():
        mine = [row for row in rows if row["method"] == name]
        x = [row["measured"]["step_peak"] / MIB for row in mine]
        y = [row["predicted"]["step_peak"] / MIB for row in mine]
        series.append(Series(name, x, y, look))
    tolerance = source.document["settings"]["tolerance"]
    title = "The analytical model and measurements"
    paint = parity(series, tolerance, "measured, MiB", "computed, MiB")
    panel = ("what a step adds at its peak", draw(f"{source.name} {title}", title, paint))
    note = f"Scaled models on this machine’s CPU; the band is {tolerance:.0%} on either side."
    marks = legend(looks, joined=False)
    found: str = blocks.figure(source, title, [panel], legend=marks, note=note)
    return found


def validation(document: Mapping[str, Any]) -> Table:
    """Measured, computed, and the error."""
    rows = [
        [
            row["key"].removeprefix("validation, "),
            f"{row['measured']['at_rest'] / MIB:.2f}",
            f"{row['measured']['kept'] / MIB:.2f}",
            f"{row['measured']['step_peak'] / MIB:.2f}",
            f"{row['predicted']['step_peak'] / MIB:.2f}",
            *(f"{row['error'][name]:+.2%}" for name in ("step_peak", "peak", "kept")),
        ]
        for row in _validated(document)
    ]
    headings = (
        "model, tokens, dtype, k, mode, method", "at rest", "kept", "step, measured",
        "step, computed", "error of step", "of all", "of kept",
    )  # fmt: skip
    return Table("Measured and computed, MiB", headings, rows)
