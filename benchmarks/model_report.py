"""The tables of ``neuroada bench model`` and ``peers-training`` on the screen, and their page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from neuroada_kernels.benchmarks.html.source import machine_of
from neuroada_kernels.benchmarks.records import Records, Row

_HEADINGS = (
    "trainable",
    "step\nms",
    "tokens\n/ s",
    "x\nfrozen",
    "quartiles",
    "held\nMiB",
    "peak\nMiB",
)


def table(mode: str, rows: Sequence[Row]) -> Table:
    """What was measured in a mode."""
    found = plain_table(mode, "method", _HEADINGS)
    for row in rows:
        if "skipped" not in row:
            found.add_row(row["method"], *_cells(row))
    return found


def plain_table(title: str, first: str, headings: Sequence[str]) -> Table:
    """A table without rows: names on the left, figures on the right."""
    found = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.add_column(first, no_wrap=True)
    for heading in headings:
        found.add_column(heading, justify="right", no_wrap=True)
    return found


def mib(size: int) -> str:
    """Four digits at most, so that a table fits 80 columns."""
    return f"{size / 2**20:.1f}" if size < 1000 * 2**20 else f"{size / 2**20:.0f}"


def _cells(row: Row) -> Iterator[str]:
    ratio: dict[str, float] | None = row["ratio_to_frozen"]
    yield f"{row['trainable']:,}"
    yield f"{row['step_ms']['median']:.1f}"
    yield f"{row['tokens_per_second']:.0f}"
    yield "" if ratio is None else f"{ratio['median']:.3f}"
    yield "" if ratio is None else f"{ratio['lower']:.2f}-{ratio['upper']:.2f}"
    yield mib(row["held_bytes"])
    yield mib(row["peak_bytes"])


def described(records: Records, rows: Sequence[Row]) -> Iterator[str]:
    """What was left out, and what ran where."""
    for row in rows:
        if "skipped" in row:
            yield f"not run: {row['key']}: {row['skipped']}"
    left_out: dict[str, str] = records.settings["left_out"]
    for name, reason in left_out.items():
        yield f"not run: {name}: {reason}"
    for session in records.sessions:
        yield where(session)


def where(session: dict[str, Any]) -> str:
    """One line that describes a session."""
    return (
        f"{session['date']}, commit {session['commit']}, torch {session['torch']}, "
        f"{machine_of(session)}"
    )


def page(records: Records, path: Path) -> None:
    """Write the page that ``neuroada report`` makes of these results alone."""
    from neuroada_kernels.benchmarks.html import write_html

    write_html({f"{records.kind}.json": records.as_dict()}, path)
