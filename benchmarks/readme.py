"""Writes the figures and tables of the documentation from the committed results files.

``python -m neuroada_kernels.benchmarks.readme [CHECKOUT]``, or ``make figures``. A table stands
between two markers of its page, and nothing else of the page changes. A figure says in its
description every number that it shows, and a test compares these with the results, as it does the
tables.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroada_kernels.benchmarks.html import (
    adapting,
    block_memory,
    linear_tables,
    memory,
    model,
    peers_training,
    plots,
    quality,
)
from neuroada_kernels.benchmarks.html.figures import Painter, draw, standalone
from neuroada_kernels.benchmarks.html.plots import Dot, dots, rows_height, stacked, styles
from neuroada_kernels.benchmarks.html.source import Source, kind_of
from neuroada_kernels.benchmarks.memory_model.document import tables

RESULTS = "benchmarks/results/cpu"
Content = Callable[..., str]


class DocumentError(ValueError):
    """A page cannot take what is to be written."""


@dataclass(frozen=True)
class Part:
    """What stands between ``<!-- marker -->`` and ``<!-- end of marker -->`` of a page.

    Of ``files`` those count that are committed and of that kind; where there is none, the page
    says so.
    """

    page: str
    marker: str
    kind: str
    files: tuple[str, ...]
    content: Content  # of a source for each file


@dataclass(frozen=True)
class Figure:
    """A panel is a title, a painter, and its numbers in words."""

    path: str
    title: str
    kind: str
    files: tuple[str, ...]
    panels: Callable[..., list[tuple[str, Painter, str]]]
    height: int
    parts: tuple[plots.Part, ...] = ()  # of its bars, for a legend


def linear_table(source: Source) -> str:
    """Ratios to frozen, and how they were taken."""
    content = linear_tables.ratios(source)
    return f"{content.markdown()}\n\n{linear_tables.measured(source)}"


def linear_ranges(*sources: Source) -> str:
    """The least and largest ratios, a table a machine."""
    parts = []
    for source in sources:
        content = linear_tables.ranges(source)
        note = f"{content.note} {linear_tables.measured(source)}"
        parts += [f"{source.chip}:", content.markdown(), note]
    return "\n\n".join(parts)


def growth_tables(source: Source) -> str:
    """PEFT's methods beside ours in short, and lines that were fitted over k and T."""
    content = linear_tables.ranges(source)
    fitted = linear_tables.growth_in_short(source.document, GROWTH_METHODS)
    note = f"{content.note} {linear_tables.measured(source)}"
    rest = f"{fitted.note} `neuroada report` has those of every method."
    return "\n\n".join((content.markdown(), note, fitted.markdown(), rest))


def block_table(source: Source) -> str:
    """What a block keeps."""
    text = f"{block_memory.described(source.document)} Commit {source.commit}."
    return (
        f"{block_memory.kept(source.document).markdown()}\n\n{text} `{source.command}` repeats it."
    )


def adapting_table(source: Source) -> str:
    """Seconds and memory of adapting."""
    content = adapting.costs(source.document)
    return f"{content.markdown()}\n\n{content.note} {source.machine}, commit {source.commit}."


def quality_tables(source: Source) -> str:
    """A table for every question on every task."""
    parts = [quality.described(source.document)]
    for group in quality.groups_of(source.document):
        content = quality.table(group)
        parts += [f"### {content.title}", content.markdown(), content.note]
    return "\n\n".join(parts)


def memory_tables(source: Source) -> str:
    """NeuroAda beside mask-based tuning, and how far the computation is to be trusted."""
    content = memory.against_masked(source.document)
    parts = (memory.described(source.document), content.markdown(), _noted(source, content.note))
    return "\n\n".join(parts)


def memory_part(name: str) -> Content:
    """Of ``docs/memory.md``: a table of the memory suite's own."""
    return lambda source: tables(source.document)[name]


def model_tables(source: Source) -> str:
    """A table a mode."""
    parts = [model.described(source)]
    for mode, rows in model.by_mode(source.document).items():
        content = model.steps(mode, rows)
        parts += [f"{content.title}:", content.markdown()]
    return "\n\n".join([*parts, _noted(source, "")])


def peers_table(source: Source) -> str:
    """A row a method."""
    content = peers_training.compared(source.document)
    return "\n\n".join((peers_training.described(source), content.markdown(), _noted(source, "")))


def _noted(source: Source, note: str) -> str:
    said = f"{note} {source.machine}, commit {source.commit}. `{source.command}` repeats it."
    return said.strip()


#: The case that the README's figure shows, and what of it: what a user would choose between.
CASE = "T512-2048to2048-k8"
_NOT_SHOWN = ("frozen", "reference", "neuroada-eager")


def ratio_panels(*sources: Source) -> list[tuple[str, Painter, str]]:
    """A panel for each machine and dtype: medians of the ratio to frozen, with quartiles."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for source in sources:
        for row in linear_tables.measurements(source.document):
            if row["case"]["name"] == CASE and row["candidate"] not in _NOT_SHOWN:
                title = f"{source.chip.removesuffix(' Processor')}, {row['dtype']}"
                groups.setdefault(title, []).append(row)
    spreads = [row["ratio_to_frozen"] for rows in groups.values() for row in rows]
    limits = (min(s["lower"] for s in spreads) - 0.1, max(s["upper"] for s in spreads) + 0.1)
    return [(title, _ratio_dots(rows, limits), _in_words(rows)) for title, rows in groups.items()]


def _ratio_dots(rows: list[Mapping[str, Any]], limits: tuple[float, float]) -> Painter:
    looks = styles(row["candidate"] for row in rows)
    points = []
    for row in rows:
        ratio, name = row["ratio_to_frozen"], row["candidate"]
        interval = (ratio["median"] - ratio["lower"], ratio["upper"] - ratio["median"])
        points.append(Dot(name, ratio["median"], interval, looks[name]))
    painter: Painter = dots(points, "ratio to frozen", 1, limits)
    return painter


def _in_words(rows: list[Mapping[str, Any]]) -> str:
    return ", ".join(
        "{} {median:.3f} [{lower:.3f}, {upper:.3f}]".format(
            row["candidate"], **row["ratio_to_frozen"]
        )
        for row in rows
    )


def block_panels(source: Source) -> list[tuple[str, Painter, str]]:
    """A panel for each dtype: what the block keeps, and of it the linears."""
    panels = []
    for dtype in dict.fromkeys(row["dtype"] for row in source.document["results"]):
        bars = block_memory.bars_of(source.document, dtype)
        said = ", ".join(f"{name} {rest:.1f} + {own:.1f}" for name, (rest, own) in bars)
        panels.append((dtype, stacked(bars, block_memory.PARTS, "MiB"), said))
    return panels


def model_memory_panels(source: Source) -> list[tuple[str, Painter, str]]:
    """A panel for each real model: the peak of a step without checkpointing, at the least k."""
    groups = memory.by_setting(source.document)
    least = min(k for _, k, _ in groups)
    panels = []
    for (name, k, checkpointing), rows in groups.items():
        if k == least and not checkpointing:
            shown = memory.bars_of([row for row in rows if row["method"] in MEMORY_METHODS])
            said = ", ".join(f"{method} {sum(parts):.2f}" for method, parts in shown)
            paint = stacked(shown, tuple(memory.BYTES.values()), f"GiB, k {k}")
            panels.append((name, paint, said))
    return panels


def quality_panels(source: Source) -> list[tuple[str, Painter, str]]:
    """On text: methods at one budget beside NeuroAda, and loss against budget."""
    groups = {(g["task"], g["name"]): g for g in quality.groups_of(source.document)}
    methods, budgets = groups["text", "methods"], groups["text", "k"]
    shown, series = quality.differences(methods), quality.budgets(budgets)
    differences = ", ".join(f"{d.label} {d.mean:+.4f} ± {d.spread[0]:.4f}" for d in shown)
    losses = ", ".join(
        f"{one.label} {trainable:,}: {loss:.4f}"
        for one in series
        for trainable, loss in zip(one.x, one.y, strict=True)
    )
    return [
        ("at one budget", quality.difference_dots(methods, shown), differences),
        ("by budget", quality.budget_lines(budgets, series), losses),
    ]


MEMORY_METHODS = (
    "neuroada",
    "neuroada-compact",
    "materialised",
    "masked-dense",
    "lora-r16",
    "full",
)
BLOCK_FILES = ("block-memory.json",)
BENCHMARKS = "docs/benchmarks.md"
GROWTH_METHODS = (
    "frozen",
    "neuroada-cpu",
    "resident",
    "materialised",
    "masked-dense",
    "peft-lora-r8",
)
LINEAR_FILES = ("linear.json", "linear-xeon-amx.json")
PARTS = (
    Part("README.md", "benchmark table", "linear", LINEAR_FILES[:1], linear_table),
    Part("README.md", "memory table", "block-memory", BLOCK_FILES, block_table),
    Part("docs/quality.md", "quality tables", "quality", ("quality.json",), quality_tables),
    Part(BENCHMARKS, "linear ranges", "linear", LINEAR_FILES, linear_ranges),
    Part(BENCHMARKS, "linear table", "linear", LINEAR_FILES[1:], linear_table),
    Part(BENCHMARKS, "linear vectors", "linear", ("linear-xeon-avx512.json",), linear_table),
    Part(BENCHMARKS, "linear llama", "linear", ("linear-xeon-llama.json",), linear_table),
    Part(BENCHMARKS, "linear growth", "linear", ("linear-peers.json",), growth_tables),
    Part(BENCHMARKS, "model memory", "memory", ("memory.json",), memory_tables),
    Part(BENCHMARKS, "model tables", "model", ("model.json",), model_tables),
    Part(BENCHMARKS, "peers table", "peers-training", ("peers-training.json",), peers_table),
    *(
        Part("docs/memory.md", name, "memory", ("memory.json",), memory_part(name))
        for name in ("validation", "headline", "parts", "parts with checkpointing")
    ),
    Part(BENCHMARKS, "adapting table", "adapting", ("adapting.json",), adapting_table),
)
FIGURES = (
    Figure(
        "docs/figures/ratio-to-frozen.svg",
        "Forward and backward of a 2048 × 2048 linear, T 512, k 8, as a ratio to the frozen one",
        "linear",
        LINEAR_FILES,
        ratio_panels,
        rows_height(5),
    ),
    Figure(
        "docs/figures/block-memory.svg",
        "MiB that a Llama-shaped block keeps for its backward",
        "block-memory",
        BLOCK_FILES,
        block_panels,
        rows_height(6) + 24,
        block_memory.PARTS,
    ),
    Figure(
        "docs/figures/model-memory.svg",
        "GiB at the peak of a training step of real models by method, computed",
        "memory",
        ("memory.json",),
        model_memory_panels,
        rows_height(len(MEMORY_METHODS)) + 24,
        tuple(memory.BYTES.values()),
    ),
    Figure(
        "docs/figures/quality.svg",
        "Held-out loss on text: methods at one budget beside NeuroAda, and by budget",
        "quality",
        ("quality.json",),
        quality_panels,
        rows_height(5),
        (plots.Part("NeuroAda", "blue"), plots.Part("LoRA", "orange")),
    ),
)


def write(root: Path) -> list[str]:
    """Write all of them in a checkout; the names of the files that changed.

    Raises
    ------
    DocumentError
        If a page lacks the markers; then nothing is written.
    """
    pages = written_pages(root)
    new = {root / name: text for name, text in pages.items()}
    for figure in figures(root):
        new[root / figure.path] = svg(root, figure)
    changed = [path for path, text in new.items() if not path.exists() or path.read_text() != text]
    for path in changed:
        path.parent.mkdir(exist_ok=True)
        path.write_text(new[path])
    return [str(path.relative_to(root)) for path in changed]


def written_pages(root: Path) -> dict[str, str]:
    """Every page as it should be."""
    pages: dict[str, str] = {}
    for part in PARTS:
        text = pages.get(part.page) or (root / part.page).read_text()
        sources = _sources(root, part)
        content = part.content(*sources) if sources else NONE_YET
        pages[part.page] = replaced(text, part.page, part.marker, content)
    return pages


def replaced(text: str, page: str, marker: str, content: str) -> str:
    """A page with new content between its two markers.

    Raises
    ------
    DocumentError
        If it lacks them.
    """
    begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
    if begin not in text or end not in text:
        raise DocumentError(f"{page}: has no {begin} and {end}")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    new = f"{begin}\n{content}\n{end}"
    return re.sub(pattern, lambda _: new, text, count=1, flags=re.DOTALL)


NONE_YET = "No results are committed yet."


def figures(root: Path) -> list[Figure]:
    """Those whose results are committed."""
    return [figure for figure in FIGURES if _sources(root, figure)]


def svg(root: Path, figure: Figure) -> str:
    """The figure's file."""
    panels = figure.panels(*_sources(root, figure))
    titles, painters, _ = zip(*panels, strict=True)
    width = 230 * len(panels) if len(panels) > 2 else 330 * len(panels)
    drawn = draw(
        figure.path,
        figure.title,
        *painters,
        width=width,
        height=figure.height,
        titles=titles,
        key=[(part.label, part.color, part.alpha) for part in figure.parts],
    )
    file: str = standalone(drawn, figure.title, description(root, figure))
    return file


def description(root: Path, figure: Figure) -> str:
    """Every number that a figure shows, and the files and commits that they come from."""
    sources = _sources(root, figure)
    said = "; ".join(f"{title}: {words}" for title, _, words in figure.panels(*sources))
    return f"{said}. From " + "; ".join(source.origin for source in sources) + "."


def _sources(root: Path, of: Part | Figure) -> list[Source]:
    found = []
    for name in of.files:
        path = root / RESULTS / name
        document = json.loads(path.read_text()) if path.exists() else None
        if kind_of(document) == of.kind:
            found.append(Source(f"{RESULTS}/{name}", of.kind, document))
    return found


def main(argv: list[str] | None = None) -> int:
    """Write everything; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path())
    options = parser.parse_args(argv)
    try:
        changed = write(options.checkout)
    except (DocumentError, OSError) as error:
        parser.error(str(error))
    print(f"written: {', '.join(changed) or 'nothing, all is as the results say'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
