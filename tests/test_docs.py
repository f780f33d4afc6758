"""The code in docs/ runs as it stands, block after block of a page; and so does the README's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small_llama import curve, llama

import neuroada_kernels as nk

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text()]


WRITTEN = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "benchmarks/README.md"]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text())
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": page.stem})


def test_there_are_pages_with_code():
    assert {"adapters.md", "adapting.md", "peft.md"} <= {page.name for page in PAGES}


def test_the_code_of_the_readme_runs():
    """Each block on a model of its own; those that are lines of an example run in that."""
    readme = re.sub(r"<!-- examples/\w+\.py -->\n```", "", (ROOT / "README.md").read_text())
    blocks = BLOCK.findall(readme)
    assert blocks
    for block in blocks:
        given = {"model": llama(), "train": lambda model: curve(model, 1)}
        exec(compile(block, "README.md", "exec"), {"nk": nk, "torch": torch, **given})
