"""Results on the screen and as a chart, and the environment: all that it takes to repeat them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from neuroada_kernels._version import __version__
from neuroada_kernels.benchmarks.bars import Verdict
from neuroada_kernels.benchmarks.fits import Fit
from neuroada_kernels.benchmarks.linear_results import Results
from neuroada_kernels.benchmarks.measurement import Measurement
from neuroada_kernels.benchmarks.timing import HostCost, Quartiles

_HEADINGS = (
    "fwd\nms",
    "bwd\nms",
    "both\nms",
    "of\nfrozen",
    "quartiles",
    "T\nFLOP/s",
    "\nGB/s",
    "host\nus",
    "peak\nMiB",
    "kept\nMiB",
)
_OPENMP = re.compile(r"/(lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*)$")


def environment(device: str = "cpu") -> dict[str, Any]:
    """What ran, and on what; ``commit`` is NEUROADA_COMMIT or None outside of a checkout."""
    commit, changed = _commit(Path(__file__).resolve().parent)
    return {
        "package": __version__,
        "commit": commit,
        "uncommitted_changes": changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "openmp": _openmp_runtimes(),
        **(_gpu() if device == "cuda" else {}),
    }


def _gpu() -> dict[str, Any]:
    """The GPU, its driver, and the versions of what compiled for it."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "peft": _version("peft"),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.splitlines()[0].strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def print_environment(console: Console, device: str = "cpu") -> None:
    facts = environment(device)
    gpu = f"{facts['gpu']} (driver {facts['driver']}), " if device == "cuda" else ""
    console.print(
        f"neuroada_kernels {facts['package']}, torch {facts['torch']}, {gpu}{facts['cpu']} "
        f"({facts['cpu_capability']}), {facts['threads']} threads, "
        f"OpenMP: {', '.join(facts['openmp']) or 'none found'}",
        highlight=False,
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
    on_cpu = device == "cpu"
    where = f"{torch.get_num_threads()} threads, {_cpu_model()}" if on_cpu else _gpu()["gpu"]
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


def _commit(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of the checkout that tracks this package, and whether files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An environment inside of somebody else's checkout is ignored there, not tracked.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        # A checkout may have come without its .git to where the GPU is.
        return os.environ.get("NEUROADA_COMMIT"), None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes in this process; there should be one, torch's."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({found[1] for line in lines if (found := _OPENMP.search(line))})
