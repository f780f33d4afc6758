"""The Triton backend where it cannot run: it says how to get it, and everything else works."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CALL = """
import sys
{before}
import torch, neuroada_kernels as nk
layer = nk.NeuroAdaLinear(8, 6, 2)
print(nk.available_backends()["triton"])
print(layer(torch.zeros(3, 8)).shape)
"""
NO_TRITON = "sys.modules['triton'] = None"


def run(before: str = "", **environment: str) -> subprocess.CompletedProcess:
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "NEUROADA_BACKEND")
    }
    return subprocess.run(
        [sys.executable, "-c", CALL.format(before=before)],
        env={**clean, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize(
    ("before", "remedy"),
    [(NO_TRITON, "install the extra 'triton'"), ("", "set TRITON_INTERPRET=1")],
    ids=["not_installed", "no_gpu"],
)
def test_named_it_says_how_to_get_it_and_unnamed_it_is_not_missed(before, remedy):
    if not before:
        pytest.importorskip("triton")
    named = run(before, NEUROADA_BACKEND="triton")
    assert named.returncode != 0
    assert "BackendError: backend 'triton' cannot run here" in named.stderr
    assert remedy in named.stderr
    unnamed = run(before)
    assert unnamed.returncode == 0, unnamed.stderr
    assert remedy in unnamed.stdout
    assert "torch.Size([3, 6])" in unnamed.stdout


def test_the_interpreter_serves_when_asked_for():
    pytest.importorskip("triton")
    done = run(NEUROADA_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["None", "torch.Size([3, 6])"]


def test_nothing_imports_triton_until_it_serves():
    before = "import atexit; atexit.register(lambda: print('triton' in sys.modules))"
    assert run(before).stdout.splitlines()[-1] == "False"
    interpreted = run(before, NEUROADA_BACKEND="triton", TRITON_INTERPRET="1")
    assert interpreted.stdout.splitlines()[-1] == "True"
