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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neuroada_kernels.benchmarks import readme_gpu, readme_headline
from neuroada_kernels.benchmarks.html import (
    adapting,
    block_memory,
    linear_tables,
    memory,
    model,
    peers_training,
    quality,
)
from neuroada_kernels.benchmarks.html.figures import draw, standalone
from neuroada_kernels.benchmarks.html.source import Source, kind_of
from neuroada_kernels.benchmarks.memory_model.document import tables
from neuroada_kernels.benchmarks.readme_figures import (
    BLOCK_FILES,
    FIGURES,
    LINEAR_FILES,
    RESULTS,
    Figure,
)

Content = Callable[..., str]
NONE_YET = "No results are committed yet."


class DocumentError(ValueError):
    """A page lacks the markers of a part."""


@dataclass(frozen=True)
class Part:
    """What stands between ``<!-- marker -->`` and ``<!-- end of marker -->`` of a page.

    ``files`` count if they are committed and of that kind (None: of any); if there are none, the
    page says ``without``.
    """

    page: str
    marker: str
    kind: str | None
    files: tuple[str, ...]
    content: Content  # of a source for each file
    folder: str = RESULTS
    without: str = NONE_YET


def linear_table(source: Source) -> str:
    """Ratios to frozen, and how they were taken."""
    content = linear_tables.ratios(source)
    return f"{content.markdown()}\n\n{linear_tables.measured(source)}"


def linear_ranges(*sources: Source) -> str:
    """The least and largest ratios, a table for each machine."""
    parts = []
    for source in sources:
        content = linear_tables.ranges(source)
        note = f"{content.note} {linear_tables.measured(source)}"
        parts += [f"{source.chip}:", content.markdown(), note]
    return "\n\n".join(parts)


def growth_tables(source: Source) -> str:
    """PEFT's methods beside ours in short, and lines fitted over k and T."""
    content = linear_tables.ranges(source)
    fitted = linear_tables.growth_in_short(source.document, GROWTH_METHODS)
    note = f"{content.note} {linear_tables.measured(source)}"
    rest = f"{fitted.note} `neuroada report` has those of every method."
    return "\n\n".join((content.markdown(), note, fitted.markdown(), rest))


def block_table(source: Source) -> str:
    """Activations that a block saves."""
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
    """NeuroAda beside mask-based tuning, and the accuracy of the computation."""
    content = memory.against_masked(source.document)
    parts = (memory.described(source.document), content.markdown(), _noted(source, content.note))
    return "\n\n".join(parts)


def memory_part(name: str) -> Content:
    """A table of ``docs/memory.md``, as the memory suite makes it."""
    return lambda source: tables(source.document)[name]


def model_tables(source: Source) -> str:
    """A table for each mode."""
    parts = [model.described(source)]
    for mode, rows in model.by_mode(source.document).items():
        content = model.steps(mode, rows)
        parts += [f"{content.title}:", content.markdown()]
    missing = "Rows that a mode lacks were not measured." * model.incomplete(source.document)
    return "\n\n".join([*parts, _noted(source, missing)])


def peers_table(source: Source) -> str:
    """A row for each method."""
    content = peers_training.compared(source.document)
    note = _noted(source, content.note)
    return "\n\n".join((peers_training.described(source), content.markdown(), note))


def _noted(source: Source, note: str) -> str:
    said = f"{note} {source.machine}, commit {source.commit}. `{source.command}` repeats it."
    return said.strip()


def _on_gpu(page: str, marker: str, kind: str | None, content: Content) -> Part:
    """A part on a GPU's results, which is empty if none are committed."""
    return Part(page, marker, kind, readme_gpu.FILES, content, readme_gpu.RESULTS, without="")


BENCHMARKS = "docs/benchmarks.md"
GROWTH_METHODS = (
    "frozen",
    "neuroada-cpu",
    "resident",
    "materialised",
    "masked-dense",
    "peft-lora-r8",
)
PARTS = (
    Part(
        "README.md",
        "headline",
        "linear",
        tuple(readme_headline.MACHINES),
        readme_headline.table,
        readme_headline.RESULTS,
    ),
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
    _on_gpu("README.md", "GPU linears", "linear", readme_gpu.block_table),
    _on_gpu("README.md", "GPU training step", "model", readme_gpu.model_table),
    _on_gpu(BENCHMARKS, "GPU targets", None, readme_gpu.targets),
    _on_gpu(BENCHMARKS, "GPU cases", "linear", linear_table),
    _on_gpu(BENCHMARKS, "GPU model tables", "model", model_tables),
)


def write(root: Path) -> list[str]:
    """Write all parts and figures in a checkout; returns the names of the files that changed.

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
    """Every page with its present content."""
    pages: dict[str, str] = {}
    for part in PARTS:
        text = pages.get(part.page) or (root / part.page).read_text()
        sources = _sources(root, part)
        content = part.content(*sources) if sources else part.without
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


def figures(root: Path) -> list[Figure]:
    """The figures whose results are committed."""
    return [figure for figure in FIGURES if _sources(root, figure)]


def svg(root: Path, figure: Figure) -> str:
    """The content of the figure's file."""
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
        path = root / of.folder / name
        document = json.loads(path.read_text()) if path.exists() else None
        kind = kind_of(document)
        if kind is not None and of.kind in (kind, None):
            found.append(Source(f"{of.folder}/{name}", kind, document))
    return found


def main(argv: list[str] | None = None) -> int:
    """Write everything; returns the exit status."""
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
