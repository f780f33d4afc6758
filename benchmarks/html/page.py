"""The page's skeleton: contents, a section for each file, and what was left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from neuroada_kernels._files import replacing
from neuroada_kernels.benchmarks.html import (
    adapting,
    block_memory,
    linear,
    memory,
    model,
    peers_training,
    quality,
)
from neuroada_kernels.benchmarks.html.blocks import Section, prose
from neuroada_kernels.benchmarks.html.source import ReportError, Source, kind_of
from neuroada_kernels.benchmarks.html.style import CSS

#: Kind to the function that makes its section, in the order of the page.
KINDS: dict[str, Callable[[Source], Section]] = {
    "linear": linear.section,
    "memory": memory.section,
    "block-memory": block_memory.section,
    "model": model.section,
    "peers-training": peers_training.section,
    "quality": quality.section,
    "adapting": adapting.section,
}


def write_html(documents: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Write one self-contained page from results files: no script, no external resource.

    Parameters
    ----------
    documents
        Name of each file to its content, as ``json`` reads it.
    path
        Of the page; an old page is replaced atomically.

    Returns
    -------
    dict[str, str]
        Files that the page has no section for, with the reason; the page names them too.

    Raises
    ------
    ReportError
        If a file of a known kind lacks what its section shows, or there is nothing to show.
    ImportError
        If matplotlib is missing.
    """
    sources, left_out = _sorted(documents)
    if not sources:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ReportError(f"documents: none has results to show ({reasons or 'there are none'})")
    sections = [(source, _section(source)) for source in sources]
    with replacing(path) as new:
        new.write_text(_page(sections, left_out), encoding="utf-8")
    return left_out


def _sorted(documents: Mapping[str, Any]) -> tuple[list[Source], dict[str, str]]:
    """Sources in the order of the page, and what is left out."""
    found, left_out = [], {}
    for name, document in documents.items():
        kind = kind_of(document)
        if kind is None:
            left_out[name] = f"not a results file of a suite; known are {', '.join(KINDS)}"
        elif kind not in KINDS:
            left_out[name] = f"kind {kind!r}, expected one of {', '.join(KINDS)}"
        else:
            found.append(Source(name, kind, document))
    order = list(KINDS)
    return sorted(found, key=lambda source: order.index(source.kind)), left_out


def _section(source: Source) -> Section:
    try:
        source.facts()
        return KINDS[source.kind](source)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ReportError(
            f"{source.name}: holds no whole results of {source.kind} "
            f"({type(error).__name__}: {error})"
        ) from error


def _page(sections: Sequence[tuple[Source, Section]], left_out: Mapping[str, str]) -> str:
    contents = "".join(
        f'<li><a href="#s{place}">{escape(section.title)}<small>{escape(source.name)}</small></a>'
        for place, (source, section) in enumerate(sections)
    )
    body = "\n".join(_render(place, *pair) for place, pair in enumerate(sections))
    if left_out:
        rows = "".join(
            f"<li><code>{escape(name)}</code>: {escape(why)}</li>" for name, why in left_out.items()
        )
        contents += '<li><a href="#left-out">Left out</a>'
        body += f'\n<section id="left-out"><h2>Left out</h2><ul>{rows}</ul></section>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>neuroada-kernels: results</title>
<style>{CSS}</style></head>
<body><div class="page">
{_header(sections)}
<nav aria-label="Contents"><h2>Contents</h2><ol>{contents}</ol></nav>
<main>
{body}
<footer class="quiet">Written by <code>neuroada report</code>. Every figure and table names the
file, the commit and the command that it comes from.</footer>
</main></div></body></html>
"""


def _header(sections: Sequence[tuple[Source, Section]]) -> str:
    machines = list(dict.fromkeys(source.chip for source, _ in sections))
    files = f"{len(sections)} results file{'s' * (len(sections) > 1)}"
    return f"""<header><h1>NeuroAda kernels, measured</h1>
<p class="lead">{files} of <code>neuroada bench</code>, from {escape(_listed(machines))}. Frozen is
the baseline throughout: the same model, of which nothing trains.</p></header>"""


def _listed(names: Sequence[str]) -> str:
    return " and ".join(", ".join(names).rsplit(", ", 1))


def _render(place: int, source: Source, section: Section) -> str:
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{_fact(name, value)}</dd>"
        for name, value in source.facts().items()
    )
    blocks = "\n".join(section.blocks)
    return (
        f'<section id="s{place}"><h2>{escape(section.title)}</h2>\n'
        f'<p class="lead">{prose(section.lead)}</p>\n<dl class="facts">{facts}</dl>\n'
        f"{blocks}</section>"
    )


def _fact(name: str, value: str) -> str:
    return f"<code>{escape(value)}</code>" if name == "Repeat" else escape(value)
