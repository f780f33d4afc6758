"""What tests of several suites need: one thread, and the page of all committed results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from neuroada_kernels.benchmarks.options import threads

RESULTS = Path(__file__).parents[2] / "benchmarks/results/cpu"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For work so small that a second thread only costs time."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def documents() -> dict:
    """The committed results files by name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


@pytest.fixture(scope="session")
def committed_page(tmp_path_factory, documents) -> Path:
    """The page of all committed results and of a file of unknown kind."""
    pytest.importorskip("matplotlib")
    from neuroada_kernels.benchmarks.html import write_html

    path = tmp_path_factory.mktemp("report") / "report.html"
    left_out = write_html({**documents, "unknown.json": {"kind": "unknown"}}, path)
    assert left_out.keys() == {"unknown.json"}
    return path
