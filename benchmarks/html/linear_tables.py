"""Tables and sentences of a file of the linear suite."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from neuroada_kernels.benchmarks.html.plots import rate_unit
from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.html.tables import Strong, Table

Row = Mapping[str, Any]


def measurements(document: Mapping[str, Any]) -> list[Row]:
    """Timed rows, with the rate in GFLOP/s for files of any age."""
    return [
        {"gflop_per_s": 1e3 * row["tflop_per_s"], **row} if "tflop_per_s" in row else row
        for row in document["results"]
        if "ratio_to_frozen" in row
    ]


def fits_of(document: Mapping[str, Any]) -> list[Row]:
    """The fitted lines of a file."""
    return list(document.get("summary", {}).get("fits", ()))


def _host_cost(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = [row["host_cost"] for row in document["results"] if "host_cost" in row]
    return found[0] if found else document.get("host_cost")


def host_sentence(document: Mapping[str, Any]) -> str:
    """The Python and dispatch overhead of a call, if it was measured."""
    host = _host_cost(document)
    if host is None:
        return ""
    return (
        f"A call at T = 1 costs {host['over_frozen_us']['median']:.0f} µs of Python and dispatch "
        f"overhead beyond the frozen linear's {host['frozen_us']['median']:.0f} µs."
    )


def ratios(source: Source) -> Table:
    """A row for each case and dtype, a column for each method; default backends in bold."""
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
    # A T with few cases is a point of a sweep, which has its own figure.
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
    """Sentences on how the ratios were taken, and on the overhead of a call."""
    document, here = source.document, source.sessions[-1]
    rounds = document.get("settings", document)["rounds"]
    text = (
        f"Forward and backward as a ratio to the frozen linear (`F.linear` and dx alone), medians "
        f"of {rounds} interleaved rounds, the ratio taken within each round; "
        f"{source.machine}, torch {here['torch']}, "
        f"commit {source.commit}. `{source.command}` repeats it."
    )
    return f"{text} {host_sentence(document)}".strip()


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
        for fit in fits_of(document)
    ]
    headings = ("method", "layer", "dtype", "over", "at", "a, ms", "b, µs", "residual")
    note = (
        "Time of forward and backward, a + b k or a + b T. The residual is the root mean square "
        "of the relative errors: where it is large, time is not linear."
    )
    return Table("Fitted lines", headings, rows, words=5, note=note)


def growth_in_short(document: Mapping[str, Any], methods: Collection[str]) -> Table:
    """Fitted lines: a row for each of ``methods``, a column for each sweep of a layer and dtype."""
    fits = [fit for fit in fits_of(document) if fit["candidate"] in methods]
    found = {(fit["candidate"], _sweep(fit)): _line_in_words(fit) for fit in fits}
    sweeps = list(dict.fromkeys(map(_sweep, fits)))
    names = dict.fromkeys(fit["candidate"] for fit in fits)
    rows = [[name, *(found.get((name, sweep), "") for sweep in sweeps)] for name in names]
    note = (
        "Lines fitted to the time of forward and backward. In brackets the root mean square of "
        "the relative errors: where it is large, time is not linear."
    )
    return Table("Fitted lines, in short", ("", *sweeps), rows, note=note)


def _sweep(fit: Row) -> str:
    over, at = ("k", "T") if fit["over"] == "k" else ("T", "k")
    layer = f"{fit['d_in']} → {fit['d_out']}{', bias' * bool(fit['bias'])}, {fit['dtype']}"
    return f"{layer}, {at} {fit['at']}, {over} {fit['values'][0]} to {fit['values'][-1]}"


def _line_in_words(fit: Row) -> str:
    b = round(fit["b_us"], 3)
    each = f"{'−' if b < 0 else '+'} {abs(b):.3g} µs × {'k' if fit['over'] == 'k' else 'T'}"
    return f"{fit['a_us'] / 1e3:.3g} ms {each} ({fit['residual']:.0%})"


def judged(document: Mapping[str, Any]) -> Table:
    """The bars that were measured, the missed ones first."""
    bars = document.get("summary", document).get("bars", ())
    found = [bar for bar in bars if bar["value"] is not None]
    found.sort(key=lambda bar: bar["outcome"] == "met")
    rows = [[bar["meaning"], bar["outcome"], f"{bar['value']:.3f}"] for bar in found]
    return Table("Bars", ("bar", "", "measured"), rows, words=2)


def everything(document: Mapping[str, Any]) -> Table:
    """Every measurement: times, rates and memory."""
    found = measurements(document)
    unit, scale = rate_unit(max((row["gflop_per_s"] for row in found), default=0.0))
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
            f"{scale * row['gflop_per_s']:.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['host_us']['median']:.0f}" if row.get("host_us") else "",
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['kept_bytes'] / 2**20:.1f}",
        ]
        for row in found
    ]
    headings = (
        "method", "case", "dtype", "forward, ms", "backward, ms", "both, ms", "x frozen",
        "quartiles", unit, "GB/s", "host, µs", "peak, MiB", "kept, MiB",
    )  # fmt: skip
    return Table(f"All {len(rows)} measurements", headings, rows, words=3)
