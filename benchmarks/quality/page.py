"""The results as one self-contained HTML file, its figures inlined as SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from neuroada_kernels.benchmarks.quality.document import (
    baseline,
    cells,
    described,
    headings,
)
from neuroada_kernels.benchmarks.quality.suite import Store
from neuroada_kernels.benchmarks.quality.summary import Group, Interval, Row

OURS, OTHERS, INK = "#3b7ddd", "#7d8894", "#26323f"
CSS = """
:root { color-scheme: light dark; --ink: #26323f; --paper: #fff; --line: #d5dbe1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe5eb; --paper: #16191d; --line: #3b434c; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; background: #fff; border-radius: 4px; margin: .5rem 0; }
"""


def html(groups: Sequence[Group], store: Store) -> str:
    """The whole page; raises ``ImportError`` where matplotlib is missing."""
    parts = [f"<h2>{escape(g.task)}: {escape(g.question)}</h2>\n{_section(g)}" for g in groups]
    skipped = "".join(
        f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in store.skipped.items()
    )
    left_out = f"<h2>Not run</h2><ul>{skipped}</ul>" if skipped else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>neuroada bench quality</title><style>{CSS}</style></head><body>\n"
        f"<h1>Quality at equal budgets</h1>\n<p>{escape(described(store))}</p>\n"
        "<p>Better, worse: the 95 % interval of the paired difference leaves out 0. Nothing is "
        "corrected for the number of comparisons.</p>\n"
        + "\n".join(parts)
        + f"\n{left_out}</body></html>\n"
    )


def _section(group: Group) -> str:
    draw = _draw_budgets if group.name == "k" else _draw_rows
    head = "".join(f"<th>{escape(name)}</th>" for name in headings(group))
    base = baseline(group)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row, base)) + "</tr>"
        for row in group.rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'{_svg(group, draw)}\n<div class="wide">{table}</div>'


def _svg(group: Group, draw: Any) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    height = 3.4 if group.name == "k" else 0.8 + 0.32 * len(group.rows)
    # Fixed ids, and text as text: the same file from the same results, and a small one.
    name = f"{group.task}, {group.name}"
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.subplots()
        draw(axes, group)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None})
    # Names that all figures share would be ids twice in one page; nothing refers to a group.
    text = re.sub(r'<g id="[^"]*"', "<g", target.getvalue())
    text = re.sub("<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def _draw_rows(axes: Any, group: Group) -> None:
    """Means as dots with their intervals, from the top down; frozen as a line."""
    rows = [row for row in group.rows if row.loss is not None and row.method != "frozen"]
    for place, row in enumerate(rows):
        assert row.loss is not None
        color = OURS if row.method == "neuroada" else OTHERS
        axes.errorbar(row.loss.mean, place, xerr=_error(row.loss), fmt="o", color=color, capsize=3)
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.invert_yaxis()
    _mark_frozen(axes, group)
    axes.set_xlabel(f"held-out loss, {group.unit}")
    axes.grid(axis="x", color="#e8ecf0")


def _draw_budgets(axes: Any, group: Group) -> None:
    """Loss against what trains, a line for each method."""
    for method, label, color in (("neuroada", "NeuroAda", OURS), ("lora", "LoRA", "#e07a1f")):
        rows = [row for row in group.rows if row.method == method and row.loss is not None]
        rows.sort(key=lambda row: row.trainable)
        if rows:
            means, errors = _points(rows)
            trained = [row.trainable for row in rows]
            axes.errorbar(
                trained, means, yerr=errors, fmt="-o", color=color, capsize=3, label=label
            )
            for row, mean in zip(rows, means, strict=True):
                axes.annotate(
                    f"k = {row.k}" if method == "neuroada" else "", (row.trainable, mean),
                    xytext=(4, 5), textcoords="offset points", fontsize=8, color=color,
                )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(f"held-out loss, {group.unit}")
    axes.grid(axis="y", color="#e8ecf0")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)


def _points(rows: list[Row]) -> tuple[list[float], list[float]]:
    losses = [row.loss for row in rows if row.loss is not None]
    return [loss.mean for loss in losses], [_error(loss) for loss in losses]


def _error(interval: Interval) -> float:
    """Half the width; 0 where one seed has none."""
    return interval.half if math.isfinite(interval.half) else 0.0


def _mark_frozen(axes: Any, group: Group) -> None:
    for row in group.rows:
        if row.method == "frozen" and row.loss is not None:
            axes.axvline(row.loss.mean, color=OTHERS, linestyle="--", label="frozen")
            axes.legend(frameon=False, loc="lower right")
