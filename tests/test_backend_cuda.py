"""The CUDA backend where it cannot run: it says why in words, and everything else works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch

from neuroada_kernels import _extension, _registry, info, plan
from neuroada_kernels.backends import _compiled, cuda

CSRC = Path(__file__).parents[1] / "csrc"
CALL = """
import torch, neuroada_kernels as nk
layer = nk.NeuroAdaLinear(8, 6, 2)
print(nk.available_backends()["cuda"])
print(layer(torch.zeros(3, 8)).shape)
"""


@pytest.fixture(autouse=True)
def _asked_anew():
    caches = (
        _extension.cuda_archs,
        _extension.cutlass_version,
        _extension.serves_gpu,
        _extension.serves_by_default,
        cuda._unavailable,
        cuda._arch_reasons,
        cuda._not_sm90,
        cuda._untried_on,
    )
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def pretend(monkeypatch, *, archs="80 89 90a 100", cutlass="4.2.0", gpu=(9, 0), hip=None):
    """A build for these archs, on a machine with a GPU of this compute capability, or none."""
    facts = SimpleNamespace(build_facts=lambda: {"cuda_archs": archs, "cutlass": cutlass})
    monkeypatch.setattr(_extension, "module", facts)
    monkeypatch.setattr(_extension, "library_error", None)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpu)


def on_gpu(
    dtype: torch.dtype = torch.float32, shape=(6, 8), strides=(8, 1), address=256
) -> SimpleNamespace:
    """As much of a tensor on a GPU as a backend looks at before it serves."""
    return SimpleNamespace(
        is_cuda=True,
        device=torch.device("cuda", 0),
        dtype=dtype,
        stride=lambda axis: strides[axis],
        shape=shape,
        numel=lambda: shape[0] * shape[1],
        data_ptr=lambda: address,
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
    assert _extension.serves_gpu(0) == served
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


@pytest.mark.parametrize(
    ("dtype", "gpu", "hip", "copied"),
    [
        (torch.bfloat16, (9, 0), None, True),
        (torch.float32, (9, 0), None, True),
        (torch.float32, (8, 6), None, False),
        (torch.float64, (9, 0), None, False),
        (torch.int32, (9, 0), None, False),
        (torch.bfloat16, (7, 5), None, False),
        (torch.bfloat16, (9, 0), "7.0", False),
    ],
)
def test_columns_of_x_are_copied_by_the_kernel_on_the_gpu_it_has_run_on(
    monkeypatch, dtype, gpu, hip, copied
):
    pretend(monkeypatch, gpu=gpu, hip=hip)
    assert plan._copied_by_kernel(on_gpu(dtype)) == copied


def test_a_weight_whose_rows_have_gaps_is_not_written_into(monkeypatch):
    pretend(monkeypatch)
    merge = _registry._backends["cuda"].implementations["merge_"]
    assert merge.unsupported(on_gpu()) == []
    weight = on_gpu(strides=(1, 6))
    assert "weight with stride 6 along a row" in merge.unsupported(weight)[0]


BF16, F16 = torch.bfloat16, torch.float16


def test_an_h100_takes_a_product_of_patched_tiles(monkeypatch):
    pretend(monkeypatch)
    for dtype in (BF16, F16):
        assert cuda._not_patched(on_gpu(dtype), on_gpu(dtype), on_gpu(dtype)) == []
        padded = on_gpu(dtype, strides=(24, 1), address=16)
        assert cuda._not_patched(padded, padded) == []


@pytest.mark.parametrize(
    ("machine", "weight", "reason"),
    [
        ({"gpu": (8, 0)}, {}, "compute capability 8.0, expected 9.0"),
        ({"gpu": (10, 0)}, {}, "compute capability 10.0, expected 9.0"),
        ({"archs": "80 89"}, {}, "no kernels for sm_90a"),
        ({}, {"strides": (1, 8)}, "weight with stride 8 along a row, expected 1"),
        ({}, {"shape": (6, 12)}, "weight of shape [6, 12] with rows 8 apart"),
        ({}, {"shape": (0, 8)}, "weight of shape [0, 8]"),
        ({}, {"strides": (12, 1)}, "weight of shape [6, 8] with rows 12 apart"),
        ({}, {"strides": (0, 1)}, "weight with rows that overlap, 0 apart"),
        ({}, {"address": 264}, "weight not 16-byte aligned"),
    ],
)
def test_what_its_copies_cannot_read_goes_in_two_kernels(monkeypatch, machine, weight, reason):
    pretend(monkeypatch, **machine)
    reasons = cuda._not_patched(on_gpu(BF16), on_gpu(BF16, **weight))
    assert any(found.startswith(reason) for found in reasons)


def test_dtypes_of_which_no_tile_is_patched(monkeypatch):
    pretend(monkeypatch)
    (reason,) = cuda._not_patched(on_gpu(torch.float32), on_gpu(torch.float32))
    assert reason == "dtype torch.float32, expected bfloat16 or float16"
    (reason,) = cuda._not_patched(on_gpu(BF16), on_gpu(BF16), on_gpu(torch.float32))
    assert reason == "bias of dtype torch.float32, expected torch.bfloat16"


@pytest.mark.parametrize(
    ("machine", "weight", "reason"),
    [
        ({}, {}, None),
        ({"gpu": (8, 0)}, {}, "compute capability 8.0, expected 9.0"),
        ({"archs": "80 89"}, {}, "no kernels for sm_90a"),
        ({"cutlass": ""}, {}, "built without CUTLASS"),
        ({}, {"shape": (6, 8)}, "weight of shape [6, 8], expected multiples of 8"),
        ({}, {"strides": (12, 1)}, "weight of shape [16, 8] with rows 12 apart"),
        ({}, {"address": 264}, "weight not 16-byte aligned"),
    ],
)
def test_what_no_product_goes_onto_the_bypass_for(monkeypatch, machine, weight, reason):
    pretend(monkeypatch, **machine)
    weight = on_gpu(BF16, **{"shape": (16, 8), **weight})
    reasons = cuda._not_onto(on_gpu(BF16), weight)
    assert len(reasons) == (reason is not None)
    assert all(found.startswith(reason) for found in reasons)


#: How the two variables that choose among the kernels are set.
DEFAULT, PATCHED, ONTO = {}, {"NEUROADA_CUDA_PATCHED": "1"}, {"NEUROADA_CUDA_ONTO": "1"}
NOT_ONTO = {"NEUROADA_CUDA_ONTO": "0"}
NEITHER = {"NEUROADA_CUDA_PATCHED": "0", **NOT_ONTO}


@pytest.fixture
def named_kernels(monkeypatch):
    """Each function that runs a call is its name."""
    pretend(monkeypatch)
    for variable in NEITHER:
        monkeypatch.delenv(variable, raising=False)
    for where, name, kernels in (
        (cuda._compiled, "linear_backward", "bypass alone"),
        (cuda, "_linear_gemm_first", "onto product"),
        (cuda, "_linear_backward_gemm_first", "onto product"),
        (cuda._compiled, "linear_patched", "patched"),
        (cuda._compiled, "linear_backward_patched", "patched"),
        (cuda._compiled, "linear_bypass_first", "onto bypass"),
        (cuda._compiled, "linear_backward_bypass_first", "onto bypass"),
    ):
        monkeypatch.setattr(where, name, lambda *args, kernels=kernels: kernels)


@pytest.mark.parametrize(
    ("asked", "dtype", "bias", "mask", "forward", "backward"),
    [
        (DEFAULT, BF16, BF16, [True, True], "onto bypass", "onto bypass"),
        (DEFAULT, F16, None, [True, False], "onto bypass", "onto bypass"),
        (DEFAULT, BF16, torch.float32, [True, False], "onto product", "onto bypass"),
        (DEFAULT, BF16, None, [False, True], "onto bypass", "bypass alone"),
        (DEFAULT, torch.float32, None, [True, True], "onto product", "onto product"),
        (ONTO, BF16, BF16, [True, True], "onto bypass", "onto bypass"),
        (ONTO, torch.float32, None, [True, True], "onto product", "onto product"),
        (NOT_ONTO, BF16, BF16, [True, True], "onto product", "onto product"),
        (NOT_ONTO, BF16, None, [False, True], "onto product", "bypass alone"),
        (NEITHER, F16, BF16, [True, True], "onto product", "onto product"),
        (PATCHED, torch.float32, None, [True, True], "onto product", "onto product"),
        (PATCHED, BF16, BF16, [True, True], "patched", "patched"),
        (PATCHED, BF16, torch.float32, [True, False], "onto product", "patched"),
        (PATCHED, BF16, None, [False, True], "patched", "bypass alone"),
        (PATCHED | ONTO, BF16, BF16, [True, True], "patched", "patched"),
        (PATCHED | NOT_ONTO, BF16, BF16, [True, True], "patched", "patched"),
    ],
)
def test_which_kernels_a_call_takes(
    monkeypatch, named_kernels, asked, dtype, bias, mask, forward, backward
):
    for variable, value in asked.items():
        monkeypatch.setenv(variable, value)
    x = weight = on_gpu(dtype, shape=(8, 8))
    assert cuda._linear(x, weight, None, None, bias and on_gpu(bias)) == forward
    assert cuda._linear_backward(x, x, weight, None, None, None, mask) == backward


@pytest.mark.parametrize("asked", [DEFAULT, PATCHED, ONTO, PATCHED | ONTO], ids=str)
def test_what_kernels_for_sm90_do_not_take_goes_product_first(monkeypatch, named_kernels, asked):
    for variable, value in asked.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    x = weight = on_gpu(BF16, shape=(8, 8))
    assert cuda._linear(x, weight, None, None, None) == "onto product"
    mask = [True, True]
    assert cuda._linear_backward(x, x, weight, None, None, None, mask) == "onto product"


@pytest.mark.parametrize("asked", [DEFAULT, ONTO], ids=str)
def test_without_cutlass_the_product_goes_first(monkeypatch, named_kernels, asked):
    for variable, value in asked.items():
        monkeypatch.setenv(variable, value)
    pretend(monkeypatch, cutlass="")
    x = weight = on_gpu(BF16, shape=(8, 8))
    assert cuda._linear(x, weight, None, None, None) == "onto product"
    mask = [True, True]
    assert cuda._linear_backward(x, x, weight, None, None, None, mask) == "onto product"


def test_six_outputs_are_patched_but_no_product_goes_onto_them(monkeypatch, named_kernels):
    weight = on_gpu(BF16, shape=(6, 8))
    assert cuda._linear(on_gpu(BF16), weight, None, None, None) == "onto product"
    monkeypatch.setenv("NEUROADA_CUDA_PATCHED", "1")
    assert cuda._linear(on_gpu(BF16), weight, None, None, None) == "patched"


@pytest.mark.parametrize(
    ("variable", "wants"),
    [
        ("NEUROADA_CUDA_PATCHED", cuda._wants_patched),
        ("NEUROADA_CUDA_ONTO", cuda._wants_onto),
    ],
)
def test_what_the_environment_says_is_0_or_1(monkeypatch, variable, wants):
    for wrong in ("yes", "2", ""):
        monkeypatch.setenv(variable, wrong)
        with pytest.raises(ValueError, match=f"{variable}: '{wrong}', expected 0 or 1"):
            wants()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        ({"cuda_archs": "", "nvcc": "", "cutlass": ""}, "none, built without CUDA"),
        (
            {"cuda_archs": "80 90a", "nvcc": "13.0.88", "cutlass": ""},
            "80 90a, by nvcc 13.0.88, without CUTLASS",
        ),
        (
            {"cuda_archs": "80 90a", "nvcc": "13.0.88", "cutlass": "4.2.0"},
            "80 90a, by nvcc 13.0.88, with CUTLASS 4.2.0",
        ),
    ],
)
def test_info_tells_what_the_cuda_kernels_were_built_by(build, said):
    assert info._cuda_build(build) == said


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
    _extension.cuda_archs.cache_clear()
    pretend(monkeypatch, **machine)
    assert reason in cuda._unavailable()


def test_a_library_that_did_not_load_is_the_reason(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setattr(_extension, "library_error", "OSError: broken")
    assert cuda._unavailable() == "OSError: broken"


def test_unnamed_it_serves_where_its_tests_have_run(monkeypatch):
    pretend(monkeypatch)
    assert cuda._untried(on_gpu(BF16)) is None
    assert cuda._untried(on_gpu(F16)) is None
    assert "have not run in float32" in cuda._untried(on_gpu(torch.float32))
    cuda._untried_on.cache_clear()
    pretend(monkeypatch, gpu=(8, 0))
    assert "have not run on compute capability 8.0" in cuda._untried(on_gpu(BF16))
    assert cuda._untried(torch.empty(0)) is None, "that it is no tensor of a GPU is said elsewhere"


@pytest.mark.parametrize(
    ("gpu", "where"), [((9, 0), "in float32"), ((8, 0), "on compute capability 8.0")]
)
def test_info_tells_where_it_serves_only_when_named(monkeypatch, gpu, where):
    pretend(monkeypatch, gpu=gpu)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: on_gpu(dtype))
    state = info._backend_state("cuda", None)
    assert state.startswith(f"available; its tests have not run {where}")
    assert state.count("NEUROADA_BACKEND=cuda") == 1
    assert info._backend_state("cpu", None) == "available"


def test_it_comes_before_triton():
    backends = _registry._backends
    assert "cuda" not in _registry.experimental_backends()
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


def test_every_op_that_both_devices_serve_has_a_kernel_on_both():
    """An op in ``_compiled.implementations`` is asked of CUDA as well, on machines that have it."""

    def called(function: FunctionType, seen: set[FunctionType]) -> set[str]:
        names = set(function.__code__.co_names)
        others = {f for n in names if isinstance(f := getattr(_compiled, n, None), FunctionType)}
        new = others - seen
        return names.union(*(called(f, seen | new) for f in new))

    def registered(device: str) -> set[str]:
        text = (CSRC / device / "ops.cpp").read_text()
        return set(re.findall(r'm\.impl\("(\w+)"', text))

    schemas = set(re.findall(r'"(\w+)\(', (CSRC / "include/neuroada/schemas.h").read_text()))
    assert registered("cuda") | registered("cpu") <= schemas
    served = _compiled.implementations(lambda: None, lambda: None, lambda *_: [])
    kernels = set().union(*(called(op.run, set()) for op in served.values())) & schemas
    assert {"bypass_fwd", "sddmm", "patch"} <= kernels
    assert kernels <= registered("cpu") & registered("cuda")
