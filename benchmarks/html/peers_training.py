"""Methods through Hugging Face's Trainer: what they learn, in which time, memory and file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuroada_kernels.benchmarks.html import blocks
from neuroada_kernels.benchmarks.html.blocks import Section
from neuroada_kernels.benchmarks.html.figures import Painter, draw
from neuroada_kernels.benchmarks.html.plots import (
    Dot,
    Part,
    Series,
    dots,
    legend,
    lines,
    rows_height,
    stacked,
    styles,
)
from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.html.tables import Strong, Table

Row = Mapping[str, Any]
MIB = 1 << 20
PEAK = (Part("peak", "blue"),)


def section(source: Source) -> Section:
    """What was learned first, then what it cost."""
    rows = measured(source.document)
    found = Section("PEFT’s methods and ours through Trainer", described(source))
    if rows:
        found.blocks.append(_learned(source, rows))
        found.blocks.append(_costs(source, rows))
        found.blocks.append(blocks.table(source, compared(source.document)))
    skipped = {
        row["method"]: row["skipped"] for row in source.document["results"] if "skipped" in row
    }
    left_out = source.document["settings"].get("left_out", {})
    found.blocks += blocks.skipped({**left_out, **skipped})
    return found


def measured(document: Mapping[str, Any]) -> list[Row]:
    """Rows of the methods that ran."""
    return [row for row in document["results"] if "skipped" not in row]


def described(source: Source) -> str:
    """What was trained, in a sentence."""
    settings = source.document["settings"]
    sizes = settings["sizes"]
    return (
        f"A Llama over bytes, {sizes['layers']} layers of width {sizes['hidden']}, pretrained here "
        f"on CPython’s documentation and trained by each method for {settings['steps']} steps on "
        "the source of its library, through Hugging Face’s Trainer. Budgets are not equal here: "
        "see the column “trainable”. Each method has the best of "
        f"{len(settings['rates'])} learning rates, chosen on other windows than those reported."
    )


def _learned(source: Source, rows: list[Row]) -> str:
    looks = styles(row["method"] for row in rows)
    # The loss of a step jumps from batch to batch: a running mean of a tenth of the steps.
    series = [
        Series(row["method"], *_smooth(row["curve"]), looks[row["method"]].plain) for row in rows
    ]
    paint = _from_the_data(lines(series, "steps", "training loss, bits per byte", log=""), series)
    curve = draw(f"{source.name} curves", "Training loss by method", paint, height=320)
    after = [
        Dot(row["method"], row["held_out"]["after"], (0, 0), looks[row["method"]]) for row in rows
    ]
    title, before = "Held-out loss after training", rows[0]["held_out"]["before"]
    paint = dots(after, "bits per byte", reference=before)
    held_out = draw(f"{source.name} held out", title, paint, height=rows_height(len(after)))
    panels = [("training loss", curve), ("held-out loss after training", held_out)]
    note = (
        "Training loss as a running mean over a tenth of the steps. Held-out loss was "
        f"{before:.3f} bits per byte before (dashed); one run of each method, so that small "
        "differences say nothing."
    )
    key = legend({row["method"]: looks[row["method"]].plain for row in rows})
    found: str = blocks.figure(source, "What is learned", panels, legend=key, note=note)
    return found


def _smooth(curve: list[float]) -> tuple[list[float], list[float]]:
    width = max(1, len(curve) // 10)
    means = [sum(curve[i : i + width]) / width for i in range(len(curve) - width + 1)]
    return [float(step) for step in range(width, len(curve) + 1)], means


def _from_the_data(paint: Painter, series: list[Series]) -> Painter:
    """A loss has no meaningful zero: the axis shows what was reached."""

    def closer(axes: Any) -> None:
        paint(axes)
        values = [y for one in series for y in one.y]
        margin = 0.05 * (max(values) - min(values))
        axes.set_ylim(min(values) - margin, max(values) + margin)

    return closer


def _costs(source: Source, rows: list[Row]) -> str:
    looks = styles(row["method"] for row in rows)
    timed = [row for row in rows if row["method"] != "full"]
    points = [
        Dot(
            row["method"],
            row["ratio_to_full"]["median"],
            (
                row["ratio_to_full"]["median"] - row["ratio_to_full"]["lower"],
                row["ratio_to_full"]["upper"] - row["ratio_to_full"]["median"],
            ),
            looks[row["method"]],
        )
        for row in timed
    ]
    time = draw(
        f"{source.name} time",
        "Time of a step",
        dots(points, "ratio to full fine-tuning", reference=1),
        height=rows_height(len(points)),
    )
    bars = [(row["method"], (row["peak_bytes"] / MIB,)) for row in rows]
    memory = draw(
        f"{source.name} memory",
        "Peak memory",
        stacked(bars, PEAK, "MiB"),
        height=rows_height(len(bars)),
    )
    panels = [("time of a step", time), ("memory at the peak", memory)]
    note = (
        "Time as a ratio to full fine-tuning (dashed), medians with quartiles over short "
        "interleaved runs. Memory: model, adapter, gradients and AdamW’s state included."
    )
    found: str = blocks.figure(source, "What it costs", panels, note=note)
    return found


def compared(document: Mapping[str, Any]) -> Table:
    """A row for each method."""
    rows = []
    for row in measured(document):
        name, ratio = row["method"], row["ratio_to_full"]
        rows.append(
            [
                Strong(name) if name.startswith("neuroada") else name,
                f"{row['trainable']:,}",
                f"{row['learning_rate']:g}",
                f"{row['held_out']['after']:.3f}",
                f"{row['step_ms']['median']:.1f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{ratio['median']:.2f}",
                f"{row['peak_bytes'] / MIB:.1f}",
                f"{row['saved_bytes'] / 1024:,.1f}",
                row["source"],
            ]
        )
    headings = (
        "method", "trainable", "rate", "held-out loss, bits per byte", "step, ms", "tokens/s",
        "x full", "peak, MiB", "saved, KiB", "implementation",
    )  # fmt: skip
    note = (
        "“x full” is the time of a step over that of full fine-tuning, whose steps ran interleaved "
        "with the method’s. The times of different rows were taken one after the other, so compare "
        "rows by “x full”, not by ms."
    )
    return Table("Methods compared", headings, rows, note=note)
