"""The C++ backend: product and bypass in one kernel or two, by choice, and what its ops refuse."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from gradients import (
    differentiate,
    differentiate_in_float64,
    linear,
    linear_tensors,
    reference_linear,
)
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels import _extension, reference
from neuroada_kernels.backends import cpu
from neuroada_kernels.plan import make_plan
from neuroada_kernels.testing import CASES, Case, Inputs, make_inputs, rms_error, tolerance

pytestmark = pytest.mark.skipif(
    _extension.library_error is not None, reason=f"not built: {_extension.library_error}"
)
C = torch.ops.neuroada_C
CASE = Case(tokens=33, d_in=72, d_out=90, k=2)
ENTRIES = CASE.d_out * CASE.k
LOWEST, HIGHEST = -(2**31), 2**31 - 1


@pytest.fixture(autouse=True)
def choice_is_made_anew():
    cpu._fused_tokens.cache_clear()
    yield
    cpu._fused_tokens.cache_clear()


def outputs(inputs: Inputs) -> tuple[Tensor, ...]:
    """y, dx and ddelta, and the gradient of a bias where there is one."""
    with nk.use_backend("cpu"):
        return differentiate(linear(inputs), linear_tensors(inputs), inputs.grad_output)


def expected(inputs: Inputs) -> tuple[Tensor, ...]:
    return differentiate_in_float64(
        reference_linear(inputs), linear_tensors(inputs), inputs.grad_output
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("fused", ["0", "1"], ids=["two_kernels", "one_kernel"])
def test_both_ways_are_the_formula(case, fused, dtype, monkeypatch):
    monkeypatch.setenv("NEUROADA_CPU_FUSED", fused)
    inputs = make_inputs(case, dtype)
    lengths = (case.d_in + case.k, case.d_out * (1 + case.k), case.tokens, case.tokens)
    for ours, truth, length in zip(outputs(inputs), expected(inputs), lengths, strict=False):
        assert rms_error(ours, truth) <= tolerance(dtype, length, ours.dtype)


@pytest.mark.parametrize(("d_in", "d_out"), [(2048, 64), (200, 200), (64, 2048)])
def test_float32_sums_of_one_kernel_are_as_exact_as_torchs(d_in, d_out, monkeypatch):
    """2 % for the one rounding more where the bypass joins a sum that is short itself."""
    monkeypatch.setenv("NEUROADA_CPU_FUSED", "1")
    inputs = make_inputs(Case(tokens=64, d_in=d_in, d_out=d_out, k=1), torch.float32)
    y, grad_x, _ = outputs(inputs)
    exact_y, exact_grad_x, _ = expected(inputs)
    merged = reference.merged_weight(inputs.weight, inputs.index, inputs.delta)
    theirs = rms_error(inputs.x @ merged.t(), exact_y)
    assert rms_error(y, exact_y) <= 1.02 * theirs
    theirs = rms_error(inputs.grad_output @ merged, exact_grad_x)
    assert rms_error(grad_x, exact_grad_x) <= 1.02 * theirs


def test_a_weight_that_lies_by_columns_takes_torchs_product(monkeypatch):
    monkeypatch.setenv("NEUROADA_CPU_FUSED", "1")
    inputs = make_inputs(CASE, torch.float32)
    plain = outputs(inputs)
    inputs = replace(inputs, weight=inputs.weight.t().contiguous().t())
    for name in ("linear_fused", "linear_backward_fused"):
        monkeypatch.setattr(cpu._compiled, name, lambda *args: pytest.fail("reads W by rows"))
    for ours, theirs in zip(outputs(inputs), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


ALWAYS, NEVER = (0, math.inf), (math.inf, math.inf)


@pytest.mark.parametrize(
    ("isa", "has_onednn_gemm", "amx", "vendor", "tokens"),
    [
        ("generic", True, False, "intel", {F32: NEVER, F64: NEVER, BF16: NEVER, F16: NEVER}),
        ("avx2", False, False, "amd", {F32: (2, math.inf), F64: NEVER, BF16: ALWAYS, F16: ALWAYS}),
        ("avx512", True, False, "amd", {F32: (2, math.inf), BF16: (4, math.inf), F16: NEVER}),
        ("avx512_bf16", True, False, "amd", {F32: (2, math.inf), BF16: (9, math.inf), F16: NEVER}),
        ("avx512_bf16", True, True, "intel", {F32: (2, 32), F64: NEVER, BF16: NEVER, F16: NEVER}),
        ("amx_bf16", True, True, "intel", {F32: (2, 32), BF16: ALWAYS, F16: NEVER}),
    ],
)
def test_one_kernel_is_chosen_where_it_was_measured_faster(
    isa, has_onednn_gemm, amx, vendor, tokens, monkeypatch
):
    monkeypatch.delenv("NEUROADA_CPU_FUSED", raising=False)
    monkeypatch.setattr(cpu, "has_onednn_gemm", lambda dtype: has_onednn_gemm)
    monkeypatch.setattr(cpu, "_has_amx", lambda: amx)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)

    class Module:
        cpu_isa = staticmethod(lambda: isa)
        cpu_vendor = staticmethod(lambda: vendor)

    monkeypatch.setattr(_extension, "module", Module)
    assert {dtype: cpu._fused_tokens(dtype) for dtype in tokens} == tokens


@pytest.mark.parametrize(
    ("held_to", "amx"),
    [(None, True), ("DEFAULT", True), ("AVX512_CORE_AMX", True), ("AVX512_CORE_BF16", False)],
)
def test_torch_has_tiles_unless_its_library_is_kept_from_them(held_to, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if held_to is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held_to)
    assert cpu._has_amx() == amx


def test_what_the_environment_says_must_be_0_or_1(monkeypatch):
    monkeypatch.setenv("NEUROADA_CPU_FUSED", "yes")
    with pytest.raises(ValueError, match=r"NEUROADA_CPU_FUSED: 'yes', expected 0 or 1"):
        outputs(make_inputs(CASE, torch.float32))


def ends_in(tensor: Tensor, value: int) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def arguments() -> dict[str, Tensor]:
    inputs = make_inputs(CASE, torch.float32)
    return {
        "x": inputs.x,
        "grad": inputs.grad_output,
        "weight": inputs.weight,
        "index": inputs.index,
        "delta": inputs.delta,
        "plan": make_plan(inputs.index, CASE.d_in),
    }


def call(op: str, given: dict[str, Tensor]) -> Tensor:
    if op == "linear_fwd":
        return C.linear_fwd(given["x"], given["weight"], given["index"], given["delta"], None)
    return C.linear_bwd_input(given["grad"], given["weight"], given["plan"], given["delta"])


BY_COLUMNS = "weight: stride 90 along a row, expected 1"


@pytest.mark.parametrize(
    ("op", "argument", "change", "message"),
    [
        ("linear_fwd", "x", lambda x: x[:, :-1], "weight: shape .* expected .* 71"),
        ("linear_fwd", "weight", lambda w: w[:, :-1], "weight: shape .* expected .* 72"),
        ("linear_fwd", "weight", lambda w: w[:-1], "index: shape .* expected .89"),
        ("linear_fwd", "weight", torch.Tensor.double, "weight: dtype differs from that of x"),
        ("linear_fwd", "weight", lambda w: w.t().contiguous().t(), BY_COLUMNS),
        ("linear_fwd", "delta", lambda d: d[:-1], "delta: shape .* expected .90, 2"),
        ("linear_fwd", "delta", torch.Tensor.double, "delta: dtype is not the expected float32"),
        ("linear_fwd", "index", lambda i: i + 72, "index: column .* is out of range"),
        ("linear_fwd", "index", lambda i: ends_in(i, 72), "index: column 72 is out of range"),
        ("linear_fwd", "index", lambda i: ends_in(i, -2), "index: column -2 is out of range"),
        ("linear_fwd", "index", lambda i: ends_in(i, LOWEST), f"index: column {LOWEST} is out"),
        ("linear_fwd", "index", lambda i: ends_in(i, HIGHEST), f"index: column {HIGHEST} is out"),
        ("linear_bwd_input", "grad", lambda g: g[:, :-1], "weight: shape .* expected .89"),
        ("linear_bwd_input", "weight", lambda w: w[:, :-1], "plan: "),
        ("linear_bwd_input", "weight", lambda w: w[:-1], "weight: shape .* expected .90"),
        (
            "linear_bwd_input",
            "weight",
            torch.Tensor.double,
            "weight: dtype differs from that of grad",
        ),
        ("linear_bwd_input", "weight", lambda w: w.t().contiguous().t(), BY_COLUMNS),
        ("linear_bwd_input", "delta", lambda d: d[:-1], "grad: shape .* expected .* 89"),
        ("linear_bwd_input", "delta", torch.Tensor.double, "delta: dtype is not the expected"),
        ("linear_bwd_input", "plan", lambda p: p + 1, "plan: not the plan of an index"),
        ("linear_bwd_input", "plan", lambda p: ends_in(p, -1), "plan: entry -1 is out"),
        ("linear_bwd_input", "plan", lambda p: ends_in(p, LOWEST), f"plan: entry {LOWEST} is out"),
        ("linear_bwd_input", "plan", lambda p: ends_in(p, HIGHEST), f"plan: entry {HIGHEST} is"),
        ("linear_bwd_input", "plan", lambda p: ends_in(p, ENTRIES), f"plan: entry {ENTRIES} is"),
    ],
)
def test_ops_refuse_what_would_reach_outside(op, argument, change, message):
    given = arguments()
    given[argument] = change(given[argument])
    with pytest.raises(RuntimeError, match=message):
        call(op, given)


def test_the_backward_in_one_call_is_that_of_two(dtype):
    inputs = make_inputs(CASE, dtype)
    grad, weight, index = inputs.grad_output, inputs.weight, inputs.index
    plan, delta = make_plan(index, CASE.d_in), inputs.delta.to(torch.promote_types(dtype, F32))
    grad_x, grad_delta = C.linear_bwd(grad, inputs.x, weight, index, plan, delta)
    assert grad_x.equal(C.linear_bwd_input(grad, weight, plan, delta))
    assert grad_delta.equal(C.sddmm(grad, inputs.x, index))
    with pytest.raises(RuntimeError, match=r"index: column .* is out of range"):
        C.linear_bwd(grad, inputs.x, weight, index + CASE.d_in, plan, delta)


@pytest.mark.parametrize("fused", ["0", "1"], ids=["two_kernels", "one_kernel"])
@pytest.mark.parametrize("bias", ["strided", "expanded"])
def test_index_and_bias_may_be_views(bias, fused, dtype, monkeypatch):
    monkeypatch.setenv("NEUROADA_CPU_FUSED", fused)
    inputs = make_inputs(CASE, dtype)
    values = torch.randn(2 * CASE.d_out).to(dtype)
    view = values[::2] if bias == "strided" else values[:1].expand(CASE.d_out)
    index = torch.stack([inputs.index, inputs.index], 2)[:, :, 0]
    assert not view.is_contiguous()
    assert not index.is_contiguous()
    viewed = replace(inputs, bias=view, index=index)
    plain = replace(inputs, bias=view.contiguous())
    for ours, theirs in zip(outputs(viewed), outputs(plain), strict=True):
        assert ours.equal(theirs)


def test_a_bias_of_another_dtype_joins_torchs_product(monkeypatch):
    monkeypatch.setenv("NEUROADA_CPU_FUSED", "1")
    inputs = make_inputs(replace(CASE, bias=True), torch.float32)
    narrow = inputs.bias.bfloat16()
    y = cpu._linear(inputs.x, inputs.weight, inputs.index, inputs.delta, narrow)
    wide = cpu._linear(inputs.x, inputs.weight, inputs.index, inputs.delta, narrow.float())
    torch.testing.assert_close(y, wide)


def overlapping(rows: int, columns: int) -> Tensor:
    return torch.zeros(1, columns).expand(rows, columns)


def test_what_is_written_has_rows_apart():
    given = arguments()
    index, delta, plan = given["index"], given["delta"], given["plan"]
    refused = pytest.raises(RuntimeError, match=r"stride 0 between rows .* not overlap")
    with refused:
        C.bypass_fwd(given["x"], index, delta, None, None, overlapping(CASE.tokens, CASE.d_out))
    with refused:
        C.bypass_bwd_input(given["grad"], plan, delta, None, overlapping(CASE.tokens, CASE.d_in))
    with refused:
        C.merge(overlapping(CASE.d_out, CASE.d_in), index, delta)
    assert C.gather(overlapping(CASE.d_out, CASE.d_in), index).eq(0).all()  # read alone


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("x", lambda x: x[:, :-2], "x: shape .* expected .* 72"),
        ("index", lambda i: i[:, :1].contiguous(), "delta: shape .* expected .90, 1"),
    ],
)
def test_the_backward_in_one_call_has_arguments_that_fit(argument, change, message):
    given = arguments()
    given[argument] = change(given[argument])
    names = ("grad", "x", "weight", "index", "plan", "delta")
    with pytest.raises(RuntimeError, match=message):
        C.linear_bwd(*(given[name] for name in names))


OUT_OF_MEMORY = """
import resource, sys, torch, neuroada_kernels as nk
torch.set_num_threads(int(sys.argv[1]))
x, out = torch.zeros(32, 1 << 20), torch.zeros(32, 64)
index, delta = torch.zeros(64, 1, dtype=torch.int32), torch.zeros(64, 1)
torch.ops.neuroada_C.bypass_fwd(x[:, :64], index, delta, None, None, out)  # its threads are there
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + (16 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    torch.ops.neuroada_C.bypass_fwd(x, index, delta, None, None, out)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
def test_memory_that_is_not_to_be_had_reads_the_same_for_any_number_of_threads():
    said = [run_python(OUT_OF_MEMORY, threads) for threads in ("1", "2")]
    assert said[0] == said[1]
    assert "bad_alloc" in said[0]


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
