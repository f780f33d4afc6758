"""The guard of the CPU kernels' instructions: what it reads of a profile, and when it fails."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parent / "cpp" / "count_instructions.py"
spec = importlib.util.spec_from_file_location("count_instructions", PATH)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

PROFILE = """fn=main
0 12
cfn=neuroada::cpu::avx2::sddmm(neuroada::cpu::Sddmm const&, neuroada::cpu::Executor const&)
calls=1 0
0 121460
cfn=neuroada::cpu::avx2::helper<float>(long)
calls=7 0
0 5
cfn=neuroada::cpu::generic::merge(neuroada::cpu::Merge const&, neuroada::cpu::Executor const&)
calls=1 0
0 9
"""


@pytest.fixture
def driver(tmp_path, monkeypatch) -> Path:
    """Stands for the compiled one: says by what it was compiled."""
    path = tmp_path / "driver"
    path.write_text("#!/bin/sh\necho 'GNU 12, -O3'\n")
    path.chmod(0o755)
    monkeypatch.setattr(script.shutil, "which", lambda name: "valgrind")
    return path


def run(driver: Path, figures: dict, *options: str) -> int:
    committed = driver.with_name("committed.json")
    committed.write_text(json.dumps(figures))
    return script.main([str(driver), "--committed", str(committed), *options])


def test_the_count_of_a_kernel_is_what_it_and_its_callees_take() -> None:
    assert script.counts_of(PROFILE) == {"sddmm": 121460}


@pytest.mark.parametrize(
    ("found", "status"), [(1000, 0), (1009, 0), (991, 0), (1011, 1), (989, 1), (0, 1)]
)
def test_a_count_that_differs_in_either_direction_fails(found, status, driver, monkeypatch):
    monkeypatch.setattr(script, "count", lambda *args: {"float32": {"sddmm": found}})
    figures = {"compiler": "GNU 12, -O3", "instructions": {"float32": {"sddmm": 1000}}}
    assert run(driver, figures) == status
    assert run(driver, figures, "--write") == 0
    written = json.loads(driver.with_name("committed.json").read_text())
    assert written["instructions"] == {"float32": {"sddmm": found}}


def test_a_kernel_without_a_figure_fails(driver, monkeypatch) -> None:
    monkeypatch.setattr(script, "count", lambda *args: {"float32": {"sddmm": 10}})
    assert run(driver, {"compiler": "GNU 12, -O3", "instructions": {}}) == 1


def test_what_cannot_be_compared_is_skipped_and_says_why(driver, monkeypatch, capsys) -> None:
    figures = {"compiler": "GNU 11, -O3", "instructions": {}}
    assert run(driver, figures) == 0
    assert "skipped: the figures are of GNU 11, -O3, not of GNU 12, -O3" in capsys.readouterr().out
    monkeypatch.setattr(script, "count", lambda *args: None)
    assert run(driver, {**figures, "compiler": "GNU 12, -O3"}) == 0
    assert "skipped: avx2 does not run here" in capsys.readouterr().out
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    assert run(driver, figures) == 0
    assert "skipped: valgrind is not found" in capsys.readouterr().out


def test_the_committed_figures_are_of_every_kernel() -> None:
    committed = json.loads(script.COMMITTED.read_text())
    kernels = {"bypass_fwd", "bypass_bwd_input", "linear_fwd", "linear_bwd_input", "sddmm", "merge"}
    assert {d: set(c) for d, c in committed["instructions"].items()} == dict.fromkeys(
        script.DTYPES, kernels | {"largest"}
    )
