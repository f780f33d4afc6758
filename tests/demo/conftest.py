"""One quick run of the demo, which several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuroada_kernels import demo


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit status, and the folder written to."""
    output = tmp_path_factory.mktemp("demo") / "output"
    return demo.main(["--quick", "--output", str(output), "--threads", "1"]), output
