"""The figures of the documentation: which results each shows, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from neuroada_kernels.benchmarks.html import block_memory, linear_tables, memory, plots, quality
from neuroada_kernels.benchmarks.html.figures import Painter
from neuroada_kernels.benchmarks.html.plots import Dot, dots, rows_height, stacked, styles
from neuroada_kernels.benchmarks.html.source import Source

RESULTS = "benchmarks/results/cpu"
BLOCK_FILES = ("block-memory.json",)
LINEAR_FILES = ("linear.json", "linear-xeon-amx.json")


@dataclass(frozen=True)
class Figure:
    """A panel is a title, a painter, and its numbers as text."""

    path: str
    title: str
    kind: str
    files: tuple[str, ...]
    panels: Callable[..., list[tuple[str, Painter, str]]]
    height: int
    parts: tuple[plots.Part, ...] = ()  # of its bars, for a legend
    folder: str = RESULTS


#: The case that the README's figure shows, and candidates that no user would choose.
CASE = "T512-2048to2048-k8"
_NOT_SHOWN = ("frozen", "reference", "neuroada-eager")


def ratio_panels(*sources: Source) -> list[tuple[str, Painter, str]]:
    """A panel for each machine and dtype: medians of the ratio to frozen, with quartiles."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for source in sources:
        for row in linear_tables.measurements(source.document):
            if row["case"]["name"] == CASE and row["candidate"] not in _NOT_SHOWN:
                title = f"{source.chip.removesuffix(' Processor')}, {row['dtype']}"
                groups.setdefault(title, []).append(row)
    spreads = [row["ratio_to_frozen"] for rows in groups.values() for row in rows]
    limits = (min(s["lower"] for s in spreads) - 0.1, max(s["upper"] for s in spreads) + 0.1)
    return [(title, _ratio_dots(rows, limits), _in_words(rows)) for title, rows in groups.items()]


def _ratio_dots(rows: list[Mapping[str, Any]], limits: tuple[float, float]) -> Painter:
    looks = styles(row["candidate"] for row in rows)
    points = []
    for row in rows:
        ratio, name = row["ratio_to_frozen"], row["candidate"]
        interval = (ratio["median"] - ratio["lower"], ratio["upper"] - ratio["median"])
        points.append(Dot(name, ratio["median"], interval, looks[name]))
    painter: Painter = dots(points, "ratio to frozen", 1, limits)
    return painter


def _in_words(rows: list[Mapping[str, Any]]) -> str:
    return ", ".join(
        "{} {median:.3f} [{lower:.3f}, {upper:.3f}]".format(
            row["candidate"], **row["ratio_to_frozen"]
        )
        for row in rows
    )


def block_panels(source: Source) -> list[tuple[str, Painter, str]]:
    """A panel for each dtype: what the block saves, and the part of its linears."""
    panels = []
    for dtype in dict.fromkeys(row["dtype"] for row in source.document["results"]):
        bars = block_memory.bars_of(source.document, dtype)
        said = ", ".join(f"{name} {rest:.1f} + {own:.1f}" for name, (rest, own) in bars)
        panels.append((dtype, stacked(bars, block_memory.PARTS, "MiB"), said))
    return panels


def model_memory_panels(source: Source) -> list[tuple[str, Painter, str]]:
    """A panel for each real model: the peak of a step without checkpointing, at the least k."""
    groups = memory.by_setting(source.document)
    least = min(k for _, k, _ in groups)
    panels = []
    for (name, k, checkpointing), rows in groups.items():
        if k == least and not checkpointing:
            shown = memory.bars_of([row for row in rows if row["method"] in MEMORY_METHODS])
            said = ", ".join(f"{method} {sum(parts):.2f}" for method, parts in shown)
            paint = stacked(shown, tuple(memory.BYTES.values()), f"GiB, k {k}")
            panels.append((name, paint, said))
    return panels


def quality_panels(source: Source) -> list[tuple[str, Painter, str]]:
    """On text: methods at one budget beside NeuroAda, and loss against budget."""
    groups = {(g["task"], g["name"]): g for g in quality.groups_of(source.document)}
    methods, budgets = groups["text", "methods"], groups["text", "k"]
    shown, series = quality.differences(methods), quality.budgets(budgets)
    differences = ", ".join(f"{d.label} {d.mean:+.4f} ± {d.spread[0]:.4f}" for d in shown)
    losses = ", ".join(
        f"{one.label} {trainable:,}: {loss:.4f}"
        for one in series
        for trainable, loss in zip(one.x, one.y, strict=True)
    )
    return [
        ("at one budget", quality.difference_dots(methods, shown), differences),
        ("by budget", quality.budget_lines(budgets, series), losses),
    ]


MEMORY_METHODS = (
    "neuroada",
    "neuroada-compact",
    "materialised",
    "masked-dense",
    "lora-r16",
    "full",
)
FIGURES = (
    Figure(
        "docs/figures/ratio-to-frozen.svg",
        "Forward and backward of a 2048 × 2048 linear, T 512, k 8, as a ratio to the frozen one",
        "linear",
        LINEAR_FILES,
        ratio_panels,
        rows_height(5),
    ),
    Figure(
        "docs/figures/block-memory.svg",
        "MiB of activations that a Llama-shaped block saves for backward",
        "block-memory",
        BLOCK_FILES,
        block_panels,
        rows_height(6) + 24,
        block_memory.PARTS,
    ),
    Figure(
        "docs/figures/model-memory.svg",
        "GiB at the peak of a training step of real models by method, computed",
        "memory",
        ("memory.json",),
        model_memory_panels,
        rows_height(len(MEMORY_METHODS)) + 24,
        tuple(memory.BYTES.values()),
    ),
    Figure(
        "docs/figures/quality.svg",
        "Held-out loss on text: methods at one budget beside NeuroAda, and by budget",
        "quality",
        ("quality.json",),
        quality_panels,
        rows_height(5),
        (plots.Part("NeuroAda", "blue"), plots.Part("LoRA", "orange")),
    ),
)
