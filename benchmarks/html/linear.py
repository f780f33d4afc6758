"""Time of the linear layers: against k, against T, under the roofline, and in full tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from neuroada_kernels.benchmarks.html import blocks, llama_block
from neuroada_kernels.benchmarks.html.blocks import Section
from neuroada_kernels.benchmarks.html.figures import HEIGHT, Painter, draw
from neuroada_kernels.benchmarks.html.linear_tables import (
    Row,
    everything,
    fits_of,
    growth,
    host_sentence,
    judged,
    measurements,
    ranges,
    ratios,
)
from neuroada_kernels.benchmarks.html.plots import Series, Style, legend, lines, roofline, styles
from neuroada_kernels.benchmarks.html.source import Source

Group = tuple[str, list[Row]]
_SWEEPS = (("k", "k", "connections per neuron, k"), ("tokens", "T", "tokens, T"))


def section(source: Source) -> Section:
    """Ratios first, since they hold beyond this machine; then times, rates and all rows."""
    rows = measurements(source.document)
    # Fallbacks are so slow that they would take the room of all others.
    plotted = [row for row in rows if row["automatic"] or row["candidate"] not in FALLBACKS]
    looks = styles(row["candidate"] for row in rows)
    found = Section(
        f"Linear layers on {source.chip}",
        "Forward and backward of one linear layer by method, every one checked for what it "
        "computes before it is timed, and all interleaved round by round. Ratios are taken within "
        f"a round. {host_sentence(source.document)}",
    )
    for axis, short, xlabel in _SWEEPS:
        groups = list(_swept(plotted, axis))
        fits = [fit for fit in fits_of(source.document) if fit["over"] == axis]
        if groups:
            found.blocks.append(_ratios_against(source, groups, looks, axis, short, xlabel))
        if fits:
            found.blocks.append(_fitted(source, groups, looks, fits, axis, short, xlabel))
    found.blocks.append(_rates(source, plotted, looks))
    found.blocks.insert(0, blocks.table(source, ranges(source)))
    block = llama_block.summed(source.document)
    if block.rows:
        found.blocks.insert(0, blocks.table(source, block))
    found.blocks.append(blocks.folded(source, "Ratio to frozen, every case", [ratios(source)]))
    if fits_of(source.document):
        found.blocks.append(blocks.folded(source, "How time grows", [growth(source.document)]))
    if judged(source.document).rows:
        found.blocks.append(blocks.folded(source, "Bars", [judged(source.document)]))
    content = everything(source.document)
    found.blocks.append(blocks.folded(source, content.title, [content]))
    found.blocks += blocks.skipped(_skipped(source.document))
    return found


FALLBACKS = ("reference", "neuroada-eager")


def _skipped(document: Mapping[str, Any]) -> list[dict[str, str]]:
    found = [row for row in document["results"] if "skipped" in row]
    new = [
        {"candidate": r["candidate"], "case": r["case"]["name"], "dtype": r["dtype"]}
        | {"reason": r["skipped"]}
        for r in found
    ]
    return [*new, *document.get("skipped", ())]


def _swept(rows: Sequence[Row], axis: str) -> Iterator[Group]:
    """Rows that differ in one size alone, with the name of their panel."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        case = row["case"]
        bias = ", bias" * bool(case.get("bias"))
        parts = [f"{case['d_in']} → {case['d_out']}{bias}", row["dtype"]]
        parts += [f"{'T' if n == 'tokens' else n} {case[n]}" for n in ("tokens", "k") if n != axis]
        groups.setdefault(", ".join(parts), []).append(row)
    for name, group in groups.items():
        if len({row["case"][axis] for row in group}) > 1:
            yield name, group


def _by_method(group: list[Row], axis: str) -> Iterator[tuple[str, list[Row]]]:
    for name in dict.fromkeys(row["candidate"] for row in group):
        mine = [row for row in group if row["candidate"] == name]
        yield name, sorted(mine, key=lambda row: int(row["case"][axis]))


def _ratios_against(
    source: Source,
    groups: list[Group],
    looks: Mapping[str, Style],
    axis: str,
    short: str,
    xlabel: str,
) -> str:
    title, panels = f"Cost against {short}", []
    seen: dict[str, Style] = {}
    for name, group in groups:
        series = [
            _quartiles(method, mine, axis, "ratio_to_frozen", looks[method])
            for method, mine in _by_method(group, axis)
            if method != "frozen"
        ]
        seen |= {one.label: one.style for one in series}
        paint = lines(series, xlabel, "ratio to frozen", reference=1)
        panels.append(_panel(source, title, name, paint, len(series)))
    note = (
        "Forward and backward as a ratio to the frozen linear’s (dashed), medians with quartiles; "
        "both axes are logarithmic."
    )
    found: str = blocks.figure(source, title, panels, legend=legend(seen), note=note)
    return found


def _panel(source: Source, title: str, name: str, paint: Painter, series: int) -> tuple[str, str]:
    """A panel, higher for many series."""
    height = HEIGHT + 14 * max(0, series - 6)
    svg = draw(f"{source.name} {title} {name}", f"{title}: {name}", paint, height=height)
    return name, svg


def _quartiles(
    label: str, rows: list[Row], axis: str, key: str, style: Style, unit: float = 1
) -> Series:
    spread = [row[key] for row in rows]
    lower, middle, upper = (
        [quartiles[name] / unit for quartiles in spread] for name in ("lower", "median", "upper")
    )
    return Series(label, [row["case"][axis] for row in rows], middle, style, lower, upper)


def _fitted(
    source: Source,
    groups: list[Group],
    looks: Mapping[str, Style],
    fits: list[Row],
    axis: str,
    short: str,
    xlabel: str,
) -> str:
    """Times as points, and the lines that were fitted to them."""
    title, panels = f"Time against {short}", []
    seen: dict[str, Style] = {}
    for name, group in groups:
        series, curves = [], []
        key, unit = _time_of(group, axis)
        for method, mine in _by_method(group, axis):
            series.append(_quartiles(method, mine, axis, key, looks[method], unit))
            fit = next((fit for fit in fits if _fits_to(fit, mine[0], axis)), None)
            if fit is not None:
                curves.append((fit["a_us"] / 1e3, fit["b_us"] / 1e3, looks[method]))
        if not curves:
            continue
        seen |= {one.label: one.style for one in series}
        paint = lines(series, xlabel, "ms", curves=curves)
        panels.append(_panel(source, title, name, paint, len(series)))
    drift = ", each point’s ratio to frozen times frozen’s median over all k," * (axis == "k")
    note = (
        f"Forward and backward{drift} with quartiles, and lines a + b {short} fitted to them by "
        "the least relative errors; both axes are logarithmic."
    )
    found: str = blocks.figure(source, title, panels, legend=legend(seen), note=note)
    return found


def _time_of(group: list[Row], axis: str) -> tuple[str, float]:
    """The key that times are read from, and the divisor that gives ms.

    The frozen linear does the same work at every k, so over k the ratio to it is taken, as in the
    fits: drift of the machine from point to point cancels.
    """
    if axis != "k":
        return "total_us", 1e3
    frozen = [row["total_us"]["median"] for row in group if row["candidate"] == "frozen"]
    return "ratio_to_frozen", 1e3 / median(frozen)


def _fits_to(fit: Row, row: Row, axis: str) -> bool:
    case = row["case"]
    here = (row["candidate"], row["dtype"], case["d_in"], case["d_out"], case.get("bias", False))
    at = case["k" if axis == "tokens" else "tokens"]
    there = tuple(fit[name] for name in ("candidate", "dtype", "d_in", "d_out", "bias"))
    return (*here, at) == (*there, fit["at"])


def _rates(source: Source, rows: list[Row], looks: Mapping[str, Style]) -> str:
    panels = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        here = [row for row in rows if row["dtype"] == dtype]
        series = [
            Series(
                name,
                [row["gflop_per_s"] / row["gb_per_s"] for row in mine],
                [row["gflop_per_s"] for row in mine],
                looks[name],
            )
            for name, mine in _by_method(here, "tokens")
        ]
        best = (max(r["gb_per_s"] for r in here), max(r["gflop_per_s"] for r in here))
        paint = roofline(series, best)
        panels.append((dtype, draw(f"{source.name} roofline {dtype}", f"Roofline, {dtype}", paint)))
    note = (
        "Operations and bytes are those that the method needs at least, whatever an implementation "
        "does: a copy of W made on the way earns nothing. The roofs are the highest rates measured "
        "here, not the processor’s data sheet."
    )
    seen = {row["candidate"]: looks[row["candidate"]] for row in rows}
    marks = legend(seen, joined=False)
    found: str = blocks.figure(source, "Roofline", panels, legend=marks, note=note)
    return found
