"""The CUDA backend where it cannot run: it says why in words, and everything else works."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from neuroada_kernels import _extension, _registry
from neuroada_kernels.backends import cuda

CALL = """
import torch, neuroada_kernels as nk
layer = nk.NeuroAdaLinear(8, 6, 2)
print(nk.available_backends()["cuda"])
print(layer(torch.zeros(3, 8)).shape)
"""


@pytest.fixture(autouse=True)
def _asked_anew():
    caches = (cuda._archs, cuda._unavailable, cuda._arch_reasons)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def pretend(monkeypatch, *, archs="80 89 90a 100", gpu=(9, 0), hip=None):
    """A build for these archs, on a machine with a GPU of this compute capability, or none."""
    facts = SimpleNamespace(build_facts=lambda: {"cuda_archs": archs})
    monkeypatch.setattr(_extension, "module", facts)
    monkeypatch.setattr(_extension, "library_error", None)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpu)


def on_gpu(dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """As much of a tensor on a GPU as a backend looks at before it serves."""
    return SimpleNamespace(
        is_cuda=True,
        device=torch.device("cuda", 0),
        dtype=dtype,
        stride=lambda axis: (8, 1)[axis],
        shape=(6, 8),
    )


@pytest.mark.parametrize(
    ("capability", "served"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 6), True),  # by sm_80
        ((8, 9), True),
        ((9, 0), True),
        ((9, 1), False),  # sm_90a is for 9.0 alone
        ((10, 0), True),
        ((10, 3), True),
        ((12, 0), False),
    ],
    ids=str,
)
def test_a_gpu_is_served_where_the_binary_has_code_for_it(monkeypatch, capability, served):
    pretend(monkeypatch, gpu=capability)
    reasons = cuda._unsupported(on_gpu())
    assert (reasons == []) == served
    if not served:
        major, minor = capability
        (reason,) = reasons
        assert reason.startswith(
            f"no kernels for compute capability {major}.{minor}, built for sm_80"
        )


def test_a_library_that_serves_only_what_was_built(monkeypatch):
    pretend(monkeypatch, archs="89", gpu=(8, 6))
    assert "no kernels for compute capability 8.6, built for sm_89" in cuda._unsupported(on_gpu())


def test_float64_is_left_to_others(monkeypatch):
    pretend(monkeypatch)
    (reason,) = cuda._unsupported(on_gpu(torch.float64))
    assert "torch.float64, expected float32, bfloat16 or float16" in reason
    (reason,) = cuda._unsupported(torch.zeros(2, 2))
    assert reason == "tensors on cpu, expected a GPU"


def test_a_weight_whose_rows_have_gaps_is_not_written_into(monkeypatch):
    pretend(monkeypatch)
    weight = on_gpu()
    assert cuda._merge_unsupported(weight) == []
    weight.stride = lambda axis: (1, 6)[axis]
    assert "weight with stride 6 along a row" in cuda._merge_unsupported(weight)[0]


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"archs": ""}, "built without CUDA"),
        ({"gpu": None}, "no GPU is visible"),
        ({"hip": "6.4"}, "for ROCm"),
    ],
    ids=["not_built", "no_gpu", "rocm"],
)
def test_what_is_missing_is_said_in_words(monkeypatch, machine, reason):
    pretend(monkeypatch)
    assert cuda._unavailable() is None
    cuda._unavailable.cache_clear()
    cuda._archs.cache_clear()
    pretend(monkeypatch, **machine)
    assert reason in cuda._unavailable()


def test_a_library_that_did_not_load_is_the_reason(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setattr(_extension, "library_error", "OSError: broken")
    assert cuda._unavailable() == "OSError: broken"


def test_it_is_experimental_and_would_come_before_triton():
    backends = _registry._backends
    assert "cuda" in _registry.experimental_backends()
    assert backends["cuda"].priority["cuda"] > backends["triton"].priority["cuda"]
    assert set(backends["cuda"].implementations) == set(backends["cpu"].implementations)


def test_named_it_says_why_and_unnamed_it_is_not_missed():
    clean = {name: value for name, value in os.environ.items() if name != "NEUROADA_BACKEND"}

    def run(**environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", CALL],
            env={**clean, "CUDA_VISIBLE_DEVICES": "", **environment},
            capture_output=True,
            text=True,
            timeout=100,
        )

    unnamed = run()
    assert unnamed.returncode == 0, unnamed.stderr
    reason, shape = unnamed.stdout.splitlines()
    assert shape == "torch.Size([3, 6])"
    named = run(NEUROADA_BACKEND="cuda")
    assert named.returncode != 0
    assert f"BackendError: backend 'cuda' cannot run here: {reason}" in named.stderr
