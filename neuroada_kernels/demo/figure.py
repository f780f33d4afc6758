"""The demo's figure: losses, speed and memory side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuroada_kernels.demo.experiment import Results

INK, QUIET = "#26323f", "#9aa5b1"
LINES = ("#3b7ddd", "#e07a1f", "#2a9d6f")
OURS, OTHERS = "#3b7ddd", "#b8c4d0"

#: Parts of a memory bar: attribute of ``StepMemory``, label, colour.
STATE = (
    ("trained", "trained parameters", "#3b7ddd"),
    ("gradients", "gradients", "#8fb8f0"),
    ("optimizer", "AdamW state", "#e07a1f"),
)
PEAK = (
    ("frozen", "frozen parameters", "#cfd7e0"),
    ("trained", "trained parameters", "#3b7ddd"),
    ("optimizer", "AdamW state", "#e07a1f"),
    ("selection", "index and plan, or mask", "#f2c14e"),
    ("step_peak", "allocated in the step", "#7fb7be"),
)


def write_figure(results: Results, path: Path) -> None:
    """Draw to ``path``; raises ``ImportError`` where matplotlib is missing."""
    from matplotlib.figure import Figure  # an extra, and slow to import

    figure = Figure(figsize=(12, 7.6), dpi=140)
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.08)
    (loss, speed), (state, peak) = figure.subplots(2, 2)
    _draw_loss(loss, results)
    _draw_speed(speed, results)
    _draw_memory(state, results, STATE, "Training state")
    _draw_memory(peak, results, PEAK, "All memory at the peak of a step")
    for axes in (loss, speed, state, peak):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, length=0)
        axes.title.set_fontweight("bold")
        axes.title.set_color(INK)
    figure.savefig(path)


def _draw_loss(axes: Any, results: Results) -> None:
    for color, run in zip(LINES, results.adapted.values(), strict=False):
        steps, losses = zip(*run.curve, strict=True)
        label = f"k = {run.k} ({run.share:.2%} of parameters train)"
        axes.plot(steps, losses, "-o", color=color, markersize=4, label=label)
        axes.annotate(
            f"{losses[-1]:.2f}", (steps[-1], losses[-1]), xytext=(6, 0),
            textcoords="offset points", va="center", color=color,
        )  # fmt: skip
    before = next(iter(results.adapted.values())).loss_before
    axes.axhline(before, color=QUIET, linestyle="--", label=f"pretrained ({before:.2f})", zorder=0)
    axes.set_title("Adapting to Python source")
    axes.set_xlabel("training steps")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(axis="y", color="#e8ecf0")
    axes.set_axisbelow(True)
    axes.margins(x=0.1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
    axes.legend(frameon=False, loc="upper right")


def _draw_speed(axes: Any, results: Results) -> None:
    measured = list(results.compared.values())
    speeds = [m.tokens_per_second for m in measured]
    medians = [s.median for s in speeds]
    errors = ([s.median - s.lower for s in speeds], [s.upper - s.median for s in speeds])
    bars = _bars(axes, [m.label for m in measured])
    axes.barh(
        bars, medians, xerr=errors, height=0.6, ecolor=INK,
        color=[OURS] + [OTHERS] * (len(measured) - 1),
    )  # fmt: skip
    for bar, speed, m in zip(bars, speeds, measured, strict=True):
        share = "" if m is measured[0] else f" ({m.relative_speed.median:.2f}x)"
        _label(axes, bar, speed.upper, f"{speed.median:,.0f}{share}")
    axes.set_xlim(0, 1.35 * max(s.upper for s in speeds))
    axes.set_title(f"Training speed, k = {max(results.adapted)}")
    axes.set_xlabel("tokens per second (median, quartiles)")


def _draw_memory(
    axes: Any, results: Results, parts: tuple[tuple[str, str, str], ...], title: str
) -> None:
    measured = list(results.compared.values())
    bars = _bars(axes, [m.label for m in measured])
    left = [0.0] * len(measured)
    for attribute, label, color in parts:
        sizes = [getattr(m.memory, attribute) / 1e6 for m in measured]
        axes.barh(bars, sizes, left=left, height=0.6, color=color, label=label)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for bar, total in zip(bars, left, strict=True):
        _label(axes, bar, total, f"{total:,.1f} MB")
    axes.set_xlim(0, 1.2 * max(left))
    axes.set_title(title)
    axes.set_xlabel(f"MB, k = {max(results.adapted)}")
    axes.legend(frameon=False, loc="upper right")


def _bars(axes: Any, labels: list[str]) -> range:
    """Positions of labelled bars, from the top down."""
    positions = range(len(labels))
    axes.set_yticks(positions, labels)
    axes.invert_yaxis()
    return positions


def _label(axes: Any, bar: int, end: float, text: str) -> None:
    axes.annotate(
        text, (end, bar), xytext=(5, 0), textcoords="offset points", va="center", color=INK
    )
