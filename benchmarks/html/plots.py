"""Painters, which fill the axes of a panel, and the legend that panels share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from typing import Any

from neuroada_kernels.benchmarks.html.figures import Painter, color

#: Part of a method's name to its colour; the first match. Others are grey.
_FAMILIES = {
    "neuroada": "blue",
    "resident": "teal",
    "dora": "olive",
    "lora": "orange",
    "shira": "green",
    "super": "pink",
    "ia3": "brown",
    "masked": "purple",
    "materialised": "red",
    "full": "ink",
}
#: Tell members of a family apart, and families without relying on colour.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
_SWATCHES = {"-": "", "--": "5 3", ":": "1.5 2.5", "-.": "6 2 1.5 2"}


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure of a page."""

    color: str
    marker: str = "o"
    dash: str = "-"

    @property
    def plain(self) -> Style:
        """A line without markers, where there are too many points for them."""
        return replace(self, marker="")


@dataclass(frozen=True)
class Series:
    """Points in the order of x; ``lower`` and ``upper`` where there are quartiles."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style
    lower: Sequence[float] = ()
    upper: Sequence[float] = ()


@dataclass(frozen=True)
class Part:
    """A part of a stacked bar."""

    label: str
    color: str
    faint: bool = False

    @property
    def alpha(self) -> float:
        return 0.45 if self.faint else 1.0


@dataclass(frozen=True)
class Dot:
    """A mean or median; ``spread`` is how far its interval reaches to the left and right of it."""

    label: str
    mean: float
    spread: tuple[float, float]
    style: Style


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for every method; the same names in the same order get the same styles."""
    found: dict[str, Style] = {}
    members: dict[str, int] = {}
    for name in dict.fromkeys(names):
        hue = next((c for part, c in _FAMILIES.items() if part in name.lower()), "grey")
        member = members.get(hue, 0)
        members[hue] = member + 1
        place = (list(_FAMILIES.values()).index(hue) if hue != "grey" else 3) + member
        marker = _MARKERS[place % len(_MARKERS)]
        found[name] = Style(hue, marker, _DASHES[member % len(_DASHES)])
    return found


def lines(
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    *,
    reference: float | None = None,
    curves: Sequence[tuple[float, float, Style]] = (),
    log: str = "xy",
) -> Painter:
    """A line for each series, quartiles as whiskers; ``log`` names the logarithmic axes.

    With ``curves`` (a, b and style) the points are not joined; ``a + b x`` is drawn instead.
    """

    def paint(axes: Any) -> None:
        for one in series:
            look = {"color": color(one.style.color), "ls": "" if curves else one.style.dash}
            axes.plot(one.x, one.y, marker=one.style.marker, **look)
            if one.lower:
                axes.vlines(one.x, one.lower, one.upper, color=look["color"], lw=0.9)
        if curves:
            _draw_curves(axes, curves, min(series[0].x), max(series[0].x))
        if reference is not None:
            axes.axhline(reference, color=color("quiet"), lw=1, ls=(0, (4, 3)))
        _scale(axes, series, log)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y")

    return paint


def _draw_curves(
    axes: Any, curves: Sequence[tuple[float, float, Style]], low: float, high: float
) -> None:
    xs = [low * (high / low) ** (step / 60) for step in range(61)]
    for a, b, style in curves:
        ys = [a + b * x for x in xs]
        axes.plot(xs, ys, color=color(style.color), ls=style.dash, lw=1.1)


def roofline(series: Sequence[Series], rates: tuple[float, float]) -> Painter:
    """FLOP/s over FLOP per byte, below the roofs of ``rates``, GB/s and GFLOP/s.

    Series are in GFLOP/s; the axis is in TFLOP/s if the roof is high.
    """
    unit, scale = rate_unit(rates[1])

    def paint(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for one in series:
            work = [rate * scale for rate in one.y]
            axes.plot(one.x, work, one.style.marker, color=color(one.style.color), ms=4, alpha=0.8)
        _roof(axes, *rates)
        axes.set_xlabel("FLOP per byte")
        axes.set_ylabel(unit)
        axes.grid(axis="both")
        _log_ticks(axes.yaxis, *axes.get_ylim())
        _log_ticks(axes.xaxis, *axes.get_xlim())

    return paint


def rate_unit(most: float) -> tuple[str, float]:
    """The unit for rates of up to ``most`` GFLOP/s, and the factor that converts to it."""
    return ("TFLOP/s", 1e-3) if most >= 1e4 else ("GFLOP/s", 1.0)


def _roof(axes: Any, bandwidth: float, compute: float) -> None:
    unit, scale = rate_unit(compute)
    low, high = axes.get_xlim()
    ridge = compute / bandwidth
    low, high = min(low, ridge / 2), max(high, ridge * 2)
    start, top = low * bandwidth * scale, compute * scale
    axes.plot([low, ridge, high], [start, top, top], color=color("ink"), lw=1.2)
    axes.set_xlim(low, high)
    axes.annotate(
        f"{top:,.0f} {unit}", (high, top), xytext=(0, 4),
        textcoords="offset points", ha="right", fontsize=11,
    )  # fmt: skip
    axes.annotate(
        f"{bandwidth:,.3g} GB/s", (low, start), xytext=(4, 12),
        textcoords="offset points", fontsize=11,
    )  # fmt: skip


def parity(series: Sequence[Series], tolerance: float, xlabel: str, ylabel: str) -> Painter:
    """Computed over measured values; the band around the diagonal is the tolerance."""

    def paint(axes: Any) -> None:
        values = [value for one in series for value in (*one.x, *one.y)]
        low, high = min(values) / 1.3, max(values) * 1.3
        edges = [[end * (1 + side) for end in (low, high)] for side in (-tolerance, tolerance)]
        axes.fill_between([low, high], *edges, color=color("quiet"), alpha=0.3, lw=0)
        for one in series:
            axes.plot(one.x, one.y, one.style.marker, color=color(one.style.color), ms=4.5)
        for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
            getattr(axes, f"set_{name}scale")("log")
            getattr(axes, f"set_{name}lim")(low, high)
            _log_ticks(axis, low, high)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid()

    return paint


def stacked(
    rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[Part], xlabel: str, digits: int = 1
) -> Painter:
    """A bar for each row, with its name above and its sum at its end."""

    def paint(axes: Any) -> None:
        left = [0.0] * len(rows)
        for place, part in enumerate(parts):
            sizes = [values[place] for _, values in rows]
            axes.barh(
                range(len(rows)), sizes, left=left, height=0.42, color=color(part.color),
                alpha=part.alpha, edgecolor=color("paper"), lw=0.6,
            )  # fmt: skip
            left = [start + size for start, size in zip(left, sizes, strict=True)]
        for place, ((name, _), total) in enumerate(zip(rows, left, strict=True)):
            _name_above(axes, place, name, 0.24)
            axes.annotate(
                f"{total:,.{digits}f}", (total, place), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=11.5,
            )  # fmt: skip
        axes.set_xlim(0, 1.17 * max(left, default=1) or 1)
        _rows_down(axes, len(rows), xlabel)

    return paint


def dots(
    rows: Sequence[Dot],
    xlabel: str,
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Painter:
    """Means as dots with their intervals, from the top down; ``reference`` as a dashed line."""

    def paint(axes: Any) -> None:
        for place, row in enumerate(rows):
            look = {"color": color(row.style.color), "marker": row.style.marker}
            whiskers = ([row.spread[0]], [row.spread[1]])
            axes.errorbar(row.mean, place, xerr=whiskers, ls="", capsize=3, lw=1.4, ms=5.5, **look)
            _name_above(axes, place, row.label, 0.2)
        if reference is not None:
            axes.axvline(reference, color=color("quiet"), lw=1, ls=(0, (4, 3)))
        axes.margins(x=0.12)
        if limits is not None:
            axes.set_xlim(*limits)
        _rows_down(axes, len(rows), xlabel)

    return paint


def rows_height(rows: int) -> int:
    """The height of a panel with ``rows`` bars or dots."""
    return 54 + 38 * rows


def legend(entries: Mapping[str, Style] | Sequence[Part], *, joined: bool = True) -> str:
    """The legend of a figure; ``joined``: markers are on lines."""
    if isinstance(entries, Mapping):
        items = [(name, _swatch(style, joined)) for name, style in entries.items()]
    else:
        items = [(part.label, _patch(part)) for part in entries]
    inner = "".join(f"<li>{swatch}{escape(name)}</li>" for name, swatch in items)
    return f'<ul class="legend">{inner}</ul>'


def _swatch(style: Style, joined: bool) -> str:
    shapes = {
        "o": '<circle cx="14" cy="6" r="3.6"/>',
        "s": '<path d="M10.6 2.6h6.8v6.8h-6.8z"/>',
        "^": '<path d="M14 1.6l4 7.6h-8z"/>',
        "v": '<path d="M14 10.4l4-7.6h-8z"/>',
        "D": '<path d="M14 1.4l4.4 4.6-4.4 4.6-4.4-4.6z"/>',
        "P": '<path d="M12.6 2h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z"/>',
        "X": '<path d="M10 3.8l1.8-1.8 2.2 2.2 2.2-2.2 1.8 1.8-2.2 2.2 2.2 2.2-1.8 1.8-2.2-2.2'
        '-2.2 2.2-1.8-1.8 2.2-2.2z"/>',
    }
    ink = f"var(--{style.color})"
    dash = f' stroke-dasharray="{_SWATCHES[style.dash]}"' if _SWATCHES[style.dash] else ""
    line = f'<path d="M0 6h28" stroke="{ink}" stroke-width="1.8"{dash}/>' * joined
    inner = line + shapes.get(style.marker, "")
    return f'<svg viewBox="0 0 28 12" aria-hidden="true" fill="{ink}">{inner}</svg>'


def _patch(part: Part) -> str:
    fade = ' fill-opacity=".45"' if part.faint else ""
    return (
        '<svg viewBox="0 0 28 12" aria-hidden="true"><rect x="4" width="20" height="12" rx="2" '
        f'fill="var(--{part.color})"{fade}/></svg>'
    )


def _name_above(axes: Any, place: int, name: str, height: float) -> None:
    axes.annotate(
        name, (0, place - height), xycoords=("axes fraction", "data"), xytext=(1, 1),
        textcoords="offset points", va="bottom", fontsize=11.5, zorder=5,
        bbox={"facecolor": color("paper"), "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _rows_down(axes: Any, rows: int, xlabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(rows - 0.55, -0.85)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    axes.grid(axis="x")


def _scale(axes: Any, series: Sequence[Series], log: str) -> None:
    if "y" in log:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, *axes.get_ylim())
    else:
        axes.set_ylim(bottom=0)
    if "x" in log:
        axes.set_xscale("log")
        _ticks_at(axes.xaxis, sorted({x for one in series for x in one.x}))


def _ticks_at(axis: Any, values: Sequence[float]) -> None:
    """Ticks at measured values, or every n-th of many; logarithmic ones if these are too close."""
    from matplotlib.ticker import NullLocator

    shown = values[:: -(-len(values) // 7)]
    if any(b < 1.5 * a for a, b in pairwise(shown)):
        _log_ticks(axis, *axis.get_view_interval())
        return
    axis.set_ticks(shown, [f"{value:g}" for value in shown])
    axis.set_minor_locator(NullLocator())


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at 1, 2, 5, 10; powers of ten over more than two decades; linear in a small range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if high < 4 * low:
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    else:
        axis.set_major_locator(LogLocator(subs=(1,) if high > 150 * low else (1, 2, 5), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())
