"""Results of the linear suite on the screen and as a chart, with their environment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from neuroada_kernels.benchmarks.bars import Verdict
from neuroada_kernels.benchmarks.environment import environment
from neuroada_kernels.benchmarks.fits import Fit
from neuroada_kernels.benchmarks.html.source import with_variables
from neuroada_kernels.benchmarks.linear_results import Results
from neuroada_kernels.benchmarks.measurement import Measurement
from neuroada_kernels.benchmarks.timing import HostCost, Quartiles

_HEADINGS = (
    "fwd\nms",
    "bwd\nms",
    "both\nms",
    "x\nfrozen",
    "quartiles",
    "T\nFLOP/s",
    "\nGB/s",
    "host\nus",
    "peak\nMiB",
    "kept\nMiB",
)


def print_environment(console: Console, device: str = "cpu") -> None:
    facts = environment(device)
    gpu = f"{facts['gpu']} (driver {facts['driver']}), " if device == "cuda" else ""
    console.print(
        f"neuroada_kernels {facts['package']}, torch {facts['torch']}, {gpu}{facts['cpu']} "
        f"({facts['cpu_capability']}){with_variables(facts)}, {facts['threads']} threads, "
        f"OpenMP: {', '.join(facts['openmp']) or 'none found'}",
        highlight=False,
        markup=False,
    )
    if len(facts["openmp"]) > 1:
        console.print("[red]More than one OpenMP runtime: their threads compete.[/red]")


def print_results(results: Results, console: Console) -> None:
    """A table for every case and dtype, what was left out, the fits, the host cost, the bars."""
    for (case, dtype), rows in groupby(results.measurements, lambda m: (m.case.name, m.dtype)):
        console.print(_table(f"{case} {dtype}", list(rows)))
    for skip in results.skipped:
        console.print(
            f"not timed: {skip.candidate}, {skip.case.name} {skip.dtype}: {skip.reason}",
            markup=False,
        )
    for (over, title), found in groupby(results.fits, lambda fit: (fit.over, fit.title)):
        console.print(_fits_table(over, title, list(found)))
    if results.host is not None:
        _print_host_cost(results.host, console)
    for verdict in results.verdicts:
        if verdict.outcome != "not measured":
            _print_verdict(verdict, console)
    unmeasured = sum(v.outcome == "not measured" for v in results.verdicts)
    if unmeasured:
        console.print(f"bars without a measurement in this run: {unmeasured}")


def write_png(measurements: Sequence[Measurement], path: Path, device: str = "cpu") -> None:
    """Bars of the ratio to frozen, a panel for each dtype, quartiles as whiskers."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(m.dtype for m in measurements))
    names = [n for n in dict.fromkeys(m.candidate for m in measurements) if n != "frozen"]
    cases = list(dict.fromkeys(m.case.name for m in measurements))
    size = (3 + 0.12 * len(cases) * len(names), 3.5 * len(dtypes))
    figure = Figure(figsize=(max(6.0, size[0]), size[1]), layout="constrained")
    width = 0.8 / max(1, len(names))
    facts = environment(device)
    where = facts.get("gpu") or f"{facts['threads']} threads, {facts['cpu']}"
    where += with_variables(facts)
    for axes, dtype in zip(figure.subplots(len(dtypes), squeeze=False)[:, 0], dtypes, strict=True):
        for position, name in enumerate(names):
            rows = [m for m in measurements if (m.dtype, m.candidate) == (dtype, name)]
            at = [cases.index(m.case.name) + (position + 0.5) * width - 0.4 for m in rows]
            middle = [m.ratio.median for m in rows]
            below = [m.ratio.median - m.ratio.lower for m in rows]
            above = [m.ratio.upper - m.ratio.median for m in rows]
            whiskers = {"yerr": (below, above), "error_kw": {"lw": 0.8}}
            axes.bar(at, [m - 1 for m in middle], width, bottom=1, label=name, **whiskers)
        axes.axhline(1, color="black", lw=0.8, label="frozen")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xticks(range(len(cases)), cases, rotation=30, ha="right")
        axes.set_ylabel("forward + backward, ratio to frozen")
        axes.set_title(f"{dtype}, {where}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)


def _table(title: str, rows: list[Measurement]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("candidate", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.candidate + " *" * row.automatic,
            f"{row.forward_us.median / 1e3:.3g}",
            f"{row.backward_us.median / 1e3:.3g}",
            f"{row.total_us.median / 1e3:.3g}",
            f"{row.ratio.median:.3f}",
            f"{row.ratio.lower:.2f}-{row.ratio.upper:.2f}",
            f"{row.tflop_per_s:.2g}",
            f"{row.gb_per_s:.1f}",
            "" if row.host_us is None else f"{row.host_us.median:.0f}",
            f"{row.memory.peak / 2**20:.1f}",
            f"{row.memory.kept / 2**20:.1f}",
        )
    return table


def _fits_table(over: str, title: str, rows: list[Fit]) -> Table:
    name = "T" if over == "tokens" else over
    first, last = rows[0].values[0], rows[0].values[-1]
    title = f"time = a + b {name}, {name} from {first} to {last}; {title}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("candidate", no_wrap=True)
    for heading in ("a\nms", f"b\nus per {name}", "b of a\npercent", "residual\npercent"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.candidate,
            f"{row.a_us / 1e3:.4g}",
            f"{row.b_us:.4g}",
            f"{100 * row.b_us / row.a_us:.2f}",
            f"{100 * row.residual:.1f}",
        )
    return table


def _print_host_cost(host: HostCost, console: Console) -> None:
    console.print(
        f"host time of one forward call at T = 1: frozen {_spread(host.frozen_us, 1)} us, "
        f"NeuroAda {_spread(host.neuroada_us, 1)} us, "
        f"difference {_spread(host.over_frozen_us, 1)} us",
        markup=False,
    )


def _print_verdict(verdict: Verdict, console: Console) -> None:
    assert verdict.value is not None
    colour = "green" if verdict.outcome == "met" else "red"
    digits = f"{verdict.value:.3f}"
    console.print(f"[{colour}]{verdict.outcome}[/{colour}] {verdict.bar.meaning}: {digits}")


def _spread(values: Quartiles, digits: int) -> str:
    return f"{values.median:.{digits}f} [{values.lower:.{digits}f}, {values.upper:.{digits}f}]"
