"""``benchmarks/gpu_run.sh`` without a GPU: its dry run, how it ends, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_run.sh"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
for variable in ("OUT", "LIMIT", "PYTEST_ADDOPTS", "COVERAGE_PROCESS_START"):
    ENVIRONMENT.pop(variable, None)


def outcomes(out: Path) -> dict[str, str]:
    """What the summary says of each phase."""
    lines = (out / "summary.txt").read_text().splitlines()[1:]
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.timeout(600)  # half a dozen processes, each of which imports torch
def test_a_dry_run_has_a_phase_of_every_kind_and_leaves_few_valid_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [SCRIPT, out, "--dry-run", "--minutes", "15"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, log
    said = outcomes(out)
    assert {name for name, what in said.items() if what.startswith("ok, ")} >= {
        *("environment", "tests", "linear-8192", "model", "linear-peers")
    }
    assert said["cuda-tests"] == "skipped, the backend cuda cannot run"
    assert "memcheck" in said
    assert " passed" in log
    files = {file.name: file.read_text() for file in out.iterdir()}
    assert files.keys() == {
        *("log.txt", "summary.txt", "environment.json"),
        *("linear-triton.json", "linear-peers.json", "model-triton.json"),
    }
    found = {name: json.loads(text) for name, text in files.items() if name.endswith(".json")}
    ours = ["neuroada-triton", "resident", "materialised", "masked-dense", "full"]
    linear = found["linear-triton.json"]
    assert {row["candidate"] for row in linear["results"]} == {"frozen", *ours}
    assert not any("skipped" in row for row in linear["results"])
    set_for_it = {"NEUROADA_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    assert linear["sessions"][0]["environment"] == set_for_it
    assert {fit["over"] for fit in linear["summary"]["fits"]} == {"k"}


#: Stands for a python3 with a GPU: each of its calls a line of the file $CALLS, after what is said
#: of the kernels that it takes.
PYTHON = """#!/bin/bash
patched=${NEUROADA_CUDA_PATCHED:+patched=$NEUROADA_CUDA_PATCHED }
onto=${NEUROADA_CUDA_ONTO:+onto=$NEUROADA_CUDA_ONTO }
bulk=${NEUROADA_CUDA_BULK:+bulk=$NEUROADA_CUDA_BULK }
two=${NEUROADA_CUDA_TWO_TILES:+two=$NEUROADA_CUDA_TWO_TILES }
order=${NEUROADA_CUDA_ORDER:+order=$NEUROADA_CUDA_ORDER }
echo "$patched$onto$bulk$two$order$@" >>"$CALLS"
case "$*" in
  *"--forms $BROKEN") exit 139 ;;
  *"--forms "*) [[ -z ${HANGS:-} ]] || sleep 30 ;;
  *get_device_name*) echo 'NVIDIA H200' ;;
  *"bench linear"*neuroada-cuda*) exit 139 ;;
  *"bench linear"*) exit 10 ;;
esac
"""


def test_cuda_kernels_that_break_a_process_are_left_out_and_the_rest_is_measured(tmp_path: Path):
    python, calls = tmp_path / "python3", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**ENVIRONMENT, "PYTHON": str(python), "CALLS": str(calls)}
    phases = ["linear-8192", "linear-1024", "model"]
    done = subprocess.run([SCRIPT, tmp_path / "out", *phases], env=environment, capture_output=True)
    assert done.returncode == 1
    suites = [line for line in calls.read_text().splitlines() if " -m " in f" {line}"]
    assert ["neuroada-cuda" in line for line in suites] == [True, False, False, False]
    assert ["/linear.json" in line for line in suites] == [True, False, False, False]
    assert "--cases T1024- " in suites[2]
    assert "--backend triton" in suites[3]
    said = (tmp_path / "out" / "summary.txt").read_text()
    assert said.count("FAILED for some candidates, which its results name") == 2
    assert "linear-8192 broke with the backend cuda (FAILED, status 139, see log.txt)" in said


def test_other_kernels_than_the_default_ones_are_set_in_their_phases(tmp_path: Path):
    python, calls = tmp_path / "python3", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**ENVIRONMENT, "PYTHON": str(python), "CALLS": str(calls)}
    said = {
        "cuda-no-onto-tests": "onto=0",
        "cuda-plain-tests": "onto=0 bulk=0",
        "linear-patched": "patched=1",
        "linear-no-onto": "onto=0",
        "linear-no-bulk": "bulk=0",
        "linear-plain": "onto=0 bulk=0",
        "linear-two-tiles": "two=1",
        "linear-unordered": "order=0",
        "cuda-two-tiles-tests": "two=1",
        "kernels-plain": "onto=0 bulk=0",
        "kernels-two-tiles": "two=1",
        "kernels": "",
    }
    subprocess.run([SCRIPT, tmp_path / "out", *said], env=environment, capture_output=True)
    suites = [line for line in calls.read_text().splitlines() if " -m " in f" {line}"]
    for (phase, variables), line in zip(said.items(), suites, strict=True):
        assert line.startswith(f"{variables} -m ".lstrip()), phase
        assert (" -m pytest " in line) == phase.endswith("-tests")
        assert (f"/{phase}.json" in line) == phase.startswith("linear-")
        another_sddmm = "bulk" in variables or "two" in variables
        assert (" resident" in line) == (phase.startswith("linear-") and another_sddmm)


def test_without_cutlass_no_two_forms_that_are_the_same_are_measured(tmp_path: Path):
    python, calls = tmp_path / "python3", tmp_path / "calls"
    python.write_text(PYTHON.replace("case ", "[[ $* != *cutlass_version* ]] || exit 1\ncase "))
    python.chmod(0o755)
    environment = {**ENVIRONMENT, "PYTHON": str(python), "CALLS": str(calls)}
    phases = ["cuda-no-onto-tests", "linear-no-onto", "linear-no-bulk"]
    subprocess.run([SCRIPT, tmp_path / "out", *phases], env=environment, capture_output=True)
    reason = "skipped, the CUDA kernels were built without CUTLASS"
    assert outcomes(tmp_path / "out") == dict.fromkeys(phases, reason)
    assert " -m " not in calls.read_text()


@pytest.mark.parametrize(
    ("broken", "left"), [("0", False), ("1", True), ("2", True), ("3", True), ("4", True)]
)
def test_every_form_is_tried_and_without_the_default_one_the_backend_is_left_out(
    broken, left, tmp_path: Path
):
    python, calls, out = tmp_path / "python3", tmp_path / "calls", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    named = {"PYTHON": str(python), "CALLS": str(calls), "BROKEN": broken, "OUT": str(out)}
    arguments = [SCRIPT, out, "cuda-smoke", "linear-8192"]  # OUTDIR may be what OUT says already
    done = subprocess.run(arguments, env={**ENVIRONMENT, **named}, capture_output=True)
    assert done.returncode == 1
    assert calls.read_text().count("smoke_gpu.py cuda --large --forms") == 5
    assert f"form {broken} FAILED, status 139" in (out / "log.txt").read_text()
    assert ("neuroada-cuda" in calls.read_text()) == left


def test_forms_that_hang_leave_the_backend_out_before_the_phase_is_stopped(tmp_path: Path):
    python, calls = tmp_path / "python3", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    named = {"PYTHON": str(python), "CALLS": str(calls), "HANGS": "1"}
    arguments = [SCRIPT, tmp_path / "out", "cuda-smoke", "linear-8192", "--minutes", "1"]
    subprocess.run(arguments, env={**ENVIRONMENT, **named}, capture_output=True)
    assert calls.read_text().count("smoke_gpu.py cuda --large --forms") == 5
    assert "neuroada-cuda" not in calls.read_text()


def test_without_time_every_phase_says_so(tmp_path: Path) -> None:
    arguments = [SCRIPT, tmp_path, "--dry-run", "--minutes", "0"]
    assert subprocess.run(arguments, env=ENVIRONMENT, capture_output=True).returncode == 0
    assert set(outcomes(tmp_path).values()) == {"skipped, no time is left"}


def test_a_run_that_is_ended_says_how_far_it_came(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [SCRIPT, tmp_path, "--dry-run", "environment", "sweep-k"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    summary = tmp_path / "summary.txt"
    while not (summary.exists() and "environment: started" in summary.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 1
    said = outcomes(tmp_path)
    assert said["environment"].startswith("cut off after ")
    assert said["sweep-k"] == "not reached"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no GPU is visible"),
        (["tests", "linear-8192"], "no GPU is visible"),
        (["linear-7"], "linear-7 is no phase, expected of: build environment"),
        (["--minutes", "soon"], "--minutes: 'soon', expected a whole number"),
        (["--quick"], "--quick is no option, expected --minutes N or --dry-run"),
    ],
)
def test_it_stops_before_it_makes_anything(arguments, message, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [SCRIPT, *arguments],
        env={**ENVIRONMENT, "OUT": str(out)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"gpu_run.sh: {message}")
    assert not out.exists()
