"""``benchmarks/gpu_run.sh`` as far as it goes without a GPU: it stops with one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_run.sh"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no GPU is visible"),
        (["tests", "linear-8192"], "no GPU is visible"),
        (["linear-7"], "linear-7 is no phase, expected of: environment tests"),
    ],
)
def test_it_stops_before_it_makes_anything(arguments, message, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [SCRIPT, *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(out), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"gpu_run.sh: {message}")
    assert not out.exists()
