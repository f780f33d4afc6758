"""The page of all committed results, drawn once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks/results/cpu"


@pytest.fixture(scope="session")
def documents() -> dict:
    """The committed results files by name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


@pytest.fixture(scope="session")
def committed_page(tmp_path_factory, documents) -> Path:
    """With a file of unknown kind beside them."""
    pytest.importorskip("matplotlib")
    from neuroada_kernels.benchmarks.html import write_html

    path = tmp_path_factory.mktemp("report") / "report.html"
    left_out = write_html({**documents, "unknown.json": {"kind": "unknown"}}, path)
    assert left_out.keys() == {"unknown.json"}
    return path
