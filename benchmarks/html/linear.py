"""Time of the linear layers: against k, against T, under the roofline, and in full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from neuroada_kernels.benchmarks.html import blocks
from neuroada_kernels.benchmarks.html.blocks import Section
from neuroada_kernels.benchmarks.html.figures import HEIGHT, Painter, draw
from neuroada_kernels.benchmarks.html.plots import Series, Style, legend, lines, roofline, styles
from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.html.tables import Strong, Table

Row = Mapping[str, Any]
Group = tuple[str, list[Row]]
_SWEEPS = (("k", "k", "connections a neuron, k"), ("tokens", "T", "tokens, T"))


def section(source: Source) -> Section:
    """Ratios first, since they hold beyond this machine; then times, rates and all rows."""
    rows = measurements(source.document)
    # What serves only where nothing else does would take the room of all others.
    plotted = [row for row in rows if row["automatic"] or row["candidate"] not in FALLBACKS]
    looks = styles(row["candidate"] for row in rows)
    found = Section(
        f"Linear layers on {source.chip}",
        "Forward and backward of one linear layer by method, every one checked for what it "
        "computes before it is timed, and all interleaved round by round. Ratios are taken within "
        f"a round. {_host_sentence(source.document)}",
    )
    for axis, short, xlabel in _SWEEPS:
        groups = list(_swept(plotted, axis))
        fits = [fit for fit in _fits(source.document) if fit["over"] == axis]
        if groups:
            found.blocks.append(_ratios_against(source, groups, looks, axis, short, xlabel))
        if fits:
            found.blocks.append(_fitted(source, groups, looks, fits, axis, short, xlabel))
    found.blocks.append(_rates(source, plotted, looks))
    found.blocks.insert(0, blocks.table(source, ranges(source)))
    found.blocks.append(blocks.folded(source, "Ratio to frozen, every case", [ratios(source)]))
    if _fits(source.document):
        found.blocks.append(blocks.folded(source, "How time grows", [growth(source.document)]))
    if judged(source.document).rows:
        found.blocks.append(blocks.folded(source, "Bars", [judged(source.document)]))
    content = everything(source.document)
    found.blocks.append(blocks.folded(source, content.title, [content]))
    found.blocks += blocks.skipped(_skipped(source.document))
    return found


FALLBACKS = ("reference", "neuroada-eager")


def measurements(document: Mapping[str, Any]) -> list[Row]:
    """Rows of what was timed, with the rate in GFLOP/s whatever the file's age."""
    return [
        {"gflop_per_s": 1e3 * row["tflop_per_s"], **row} if "tflop_per_s" in row else row
        for row in document["results"]
        if "ratio_to_frozen" in row
    ]


def _skipped(document: Mapping[str, Any]) -> list[dict[str, str]]:
    found = [row for row in document["results"] if "skipped" in row]
    new = [
        {"candidate": r["candidate"], "case": r["case"]["name"], "dtype": r["dtype"]}
        | {"reason": r["skipped"]}
        for r in found
    ]
    return [*new, *document.get("skipped", ())]


def _host_cost(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = [row["host_cost"] for row in document["results"] if "host_cost" in row]
    return found[0] if found else document.get("host_cost")


def _fits(document: Mapping[str, Any]) -> list[Row]:
    return list(document.get("summary", {}).get("fits", ()))


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
    """Higher where there are many lines to tell apart."""
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
    """What a time in ms is read from, and divided by.

    Frozen does the same at every k, so there the ratio to it is taken, as the fits do: a drift of
    the machine from point to point cancels.
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


def ratios(source: Source) -> Table:
    """A row a case and dtype, a column a method; what serves where none is named in bold."""
    rows = measurements(source.document)
    names = [n for n in dict.fromkeys(row["candidate"] for row in rows) if n != "frozen"]
    ours = {row["candidate"] for row in rows if row["automatic"]}

    def marked(text: str, name: str) -> str:
        return Strong(text) if name in ours and text else text

    medians = {
        (row["case"]["name"], row["dtype"], row["candidate"]): row["ratio_to_frozen"]["median"]
        for row in rows
    }
    cases = {(row["dtype"], row["case"]["name"]): row["case"] for row in rows}
    content = []
    for (dtype, case_name), case in cases.items():
        cells = [str(case["tokens"]), f"{case['d_in']} × {case['d_out']}", dtype, str(case["k"])]
        for name in names:
            found = medians.get((case_name, dtype, name))
            cells.append(marked("" if found is None else f"{found:.2f}", name))
        content.append(cells)
    headings = ["T", "d_in × d_out", "dtype", "k", *(marked(name, name) for name in names)]
    return Table("Ratio to frozen", headings, content, words=4)


def ranges(source: Source) -> Table:
    """The least and the largest ratio of each method, by T and dtype, over shapes and k."""
    rows = [row for row in measurements(source.document) if row["candidate"] != "frozen"]
    cases: dict[int, set[str]] = {}
    for row in rows:
        cases.setdefault(row["case"]["tokens"], set()).add(row["case"]["name"])
    # A T of few cases is a point of a sweep, which has its own figure.
    columns = [
        (tokens, dtype)
        for tokens in sorted(tokens for tokens, names in cases.items() if len(names) >= 3)
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    ]
    ours = {row["candidate"] for row in rows if row["automatic"]}
    content = []
    for name in dict.fromkeys(row["candidate"] for row in rows):
        cells: list[str] = [Strong(name) if name in ours else name]
        for tokens, dtype in columns:
            medians = [
                row["ratio_to_frozen"]["median"]
                for row in rows
                if (row["candidate"], row["case"]["tokens"], row["dtype"]) == (name, tokens, dtype)
            ]
            cells.append(f"{min(medians):.2f} to {max(medians):.2f}" if medians else "")
        content.append(cells)
    headings = ["", *(f"T {tokens}, {dtype}" for tokens, dtype in columns)]
    note = "Least and largest median over shapes and k."
    return Table("Ratio to frozen, in short", headings, content, note=note)


def measured(source: Source) -> str:
    """How the ratios were taken, and what a call costs the host, in sentences."""
    document, here = source.document, source.sessions[-1]
    rounds = document.get("settings", document)["rounds"]
    text = (
        f"Forward and backward as a ratio to the frozen linear (`F.linear` and dx alone), medians "
        f"of {rounds} interleaved rounds, ratio taken round by round; "
        f"{source.machine}, torch {here['torch']}, "
        f"commit {source.commit}. `{source.command}` repeats it."
    )
    return f"{text} {_host_sentence(document)}".strip()


def _host_sentence(document: Mapping[str, Any]) -> str:
    host = _host_cost(document)
    if host is None:
        return ""
    return (
        f"One call at T = 1 costs {host['over_frozen_us']['median']:.0f} µs of host time "
        f"more than the frozen linear's {host['frozen_us']['median']:.0f} µs."
    )


def growth(document: Mapping[str, Any]) -> Table:
    """The fitted lines."""
    rows = [
        [
            fit["candidate"],
            f"{fit['d_in']} → {fit['d_out']}{', bias' * bool(fit['bias'])}",
            fit["dtype"],
            f"{'k' if fit['over'] == 'k' else 'T'} from {fit['values'][0]} to {fit['values'][-1]}",
            f"{'T' if fit['over'] == 'k' else 'k'} = {fit['at']}",
            f"{fit['a_us'] / 1e3:.4g}",
            f"{round(fit['b_us'], 3) + 0.0:.3g}",
            f"{fit['residual']:.1%}",
        ]
        for fit in _fits(document)
    ]
    headings = ("method", "layer", "dtype", "over", "at", "a, ms", "b, µs", "residual")
    note = (
        "Time of forward and backward, a + b k or a + b T. The residual is the root mean square "
        "of the relative errors: where it is large, a line is not what happens."
    )
    return Table("Fitted lines", headings, rows, words=5, note=note)


def judged(document: Mapping[str, Any]) -> Table:
    """The bars that a run was held against, the missed ones first."""
    bars = document.get("summary", document).get("bars", ())
    found = [bar for bar in bars if bar["value"] is not None]
    found.sort(key=lambda bar: bar["outcome"] == "met")
    rows = [[bar["meaning"], bar["outcome"], f"{bar['value']:.3f}"] for bar in found]
    return Table("Bars", ("bar", "", "measured"), rows, words=2)


def everything(document: Mapping[str, Any]) -> Table:
    """Every measurement: times, rates and memory."""
    rows = [
        [
            row["candidate"],
            row["case"]["name"],
            row["dtype"],
            *(
                f"{row[part]['median'] / 1e3:.4g}"
                for part in ("forward_us", "backward_us", "total_us")
            ),
            f"{row['ratio_to_frozen']['median']:.3f}",
            f"{row['ratio_to_frozen']['lower']:.2f}–{row['ratio_to_frozen']['upper']:.2f}",
            f"{row['gflop_per_s']:.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['host_us']['median']:.0f}" if row.get("host_us") else "",
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['kept_bytes'] / 2**20:.1f}",
        ]
        for row in measurements(document)
    ]
    headings = (
        "method", "case", "dtype", "forward, ms", "backward, ms", "both, ms", "of frozen",
        "quartiles", "GFLOP/s", "GB/s", "host, µs", "peak, MiB", "kept, MiB",
    )  # fmt: skip
    return Table(f"All {len(rows)} measurements", headings, rows, words=3)
