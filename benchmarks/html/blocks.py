"""Blocks of the page's sections; each block names the file that its figures come from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.html.tables import Table


@dataclass
class Section:
    """The section of one file: a title, a sentence or two, and blocks of HTML."""

    title: str
    lead: str
    blocks: list[str] = field(default_factory=list)


def figure(
    source: Source,
    title: str,
    panels: Sequence[tuple[str, str]],
    *,
    legend: str = "",
    note: str = "",
) -> str:
    """Panels (title and SVG) under a common title and legend."""
    few = " few" * (len(panels) in (1, 2, 4))  # two by two
    inner = "\n".join(
        f'<div class="panel"><h4>{escape(name)}</h4>{svg}</div>' for name, svg in panels
    )
    return (
        f"<figure><h3>{escape(title)}</h3>{legend}\n"
        f'<div class="panels{few}">{inner}</div>\n{_caption(source, note)}</figure>'
    )


def table(source: Source, content: Table) -> str:
    """A table with its title."""
    inner = f"{content.html()}\n{_caption(source, content.note)}"
    return f"<figure><h3>{escape(content.title)}</h3>{inner}</figure>"


def folded(source: Source, title: str, tables: Sequence[Table]) -> str:
    """Tables, collapsed under their common title on the screen and expanded on paper."""
    inner = "\n".join(table(source, content) for content in tables)
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def prose(text: str) -> str:
    """HTML of a sentence, with text between backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def skipped(rows: Sequence[Mapping[str, str]] | Mapping[str, str]) -> list[str]:
    """What was not measured and why, if anything."""
    pairs = list(rows.items()) if isinstance(rows, Mapping) else [_reason(row) for row in rows]
    if not pairs:
        return []
    inner = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in pairs)
    return [f"<h3>Not measured</h3><ul>{inner}</ul>"]


def _reason(row: Mapping[str, str]) -> tuple[str, str]:
    what = ", ".join(str(value) for key, value in row.items() if key != "reason")
    return what, row["reason"]


def _caption(source: Source, note: str) -> str:
    said = f"{prose(note)} " if note else ""
    return (
        f"<figcaption>{said}From <code>{escape(source.name)}</code>: kind {escape(source.kind)}, "
        f"commit {escape(source.commit)}, <code>{escape(source.command)}</code>.</figcaption>"
    )
