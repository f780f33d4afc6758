"""What the kernels compile to for GPUs that are not there: registers, spills, loads, instructions.

``python tests/triton_kernels/test_compiled.py`` writes the table anew; a spill more than it has is
to be explained in ``docs/kernels/triton.md``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from compiling import Compiled, compiling_for

from neuroada_kernels import triton_kernels as kernels
from neuroada_kernels.plan import plan_parts, plan_size
from neuroada_kernels.triton_kernels import configs

TABLE = Path(__file__).parents[1] / "data" / "triton_resources.json"
ARCHS = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Tokens of a decoding step, of a short prompt, and of training.
TOKENS = (1, 64, 8192)
D_IN, D_OUT, K = 4096, 1024, 8
TENSOR_CORE = {80: "mma.sync.", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
PRODUCTS = ("linear_fwd_kernel", "linear_bwd_input_kernel")

every_arch = pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")


@cache
def compiled(arch: int, dtype: torch.dtype, tokens: int) -> dict[str, Compiled]:
    """Every kernel, with the config that the launchers choose; no value is ever read."""
    x, grad = torch.empty(tokens, D_IN, dtype=dtype), torch.empty(tokens, D_OUT, dtype=dtype)
    weight = torch.empty(D_OUT, D_IN, dtype=dtype)
    index = torch.empty(D_OUT, K, dtype=torch.int32)
    delta = torch.empty(D_OUT, K)
    plan = plan_parts(torch.empty(plan_size(D_IN, index.numel()), dtype=torch.int32), D_IN)
    # What the backend has them add to: in 16 bits, the product.
    wide_y = wide_x = None
    if dtype.itemsize == 2:
        wide_y, wide_x = torch.empty(tokens, D_OUT), torch.empty(tokens, D_IN)
    gemm = configs.gemm_configs(tokens, dtype, _gpu(arch))[0]
    with compiling_for(arch) as found:
        x_t, grad_t = kernels.transpose(x), kernels.transpose(grad)
        kernels.bypass_fwd(x_t, index, delta, grad, onto=wide_y)
        kernels.bypass_bwd_input(grad_t, *plan, delta, x, onto=wide_x)
        kernels.sddmm(x_t, grad_t, index, torch.empty(4, index.numel()))
        kernels.linear_fwd(x, weight, x_t, index, delta, None, grad, gemm)
        kernels.linear_bwd_input(
            grad, weight, grad_t, plan.column_start, plan.entry, delta, x, gemm
        )
        original = kernels.merge(weight, index, delta)
        kernels.patch(weight, index, delta, original)
        kernels.unmerge(weight, index, original)
    return {kernel.name: kernel for kernel in found}


def _gpu(arch: int) -> configs.Gpu:
    return configs.KNOWN_GPUS[arch // 10, arch % 10]


def resources() -> Iterator[tuple[str, dict[str, int]]]:
    for arch in ARCHS:
        for dtype in DTYPES:
            for tokens in TOKENS:
                for name, kernel in compiled(arch, dtype, tokens).items():
                    yield f"{_key(arch, dtype, tokens)} {name}", kernel.resources


def _key(arch: int, dtype: torch.dtype, tokens: int) -> str:
    return f"sm_{arch} {str(dtype).removeprefix('torch.')} T{tokens}"


@every_arch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_no_kernel_needs_more_than_the_table_says(arch, dtype, tokens):
    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {table['triton']}, others allot registers otherwise")
    for name, kernel in compiled(arch, dtype, tokens).items():
        known = table["kernels"][f"{_key(arch, dtype, tokens)} {name}"]
        assert kernel.resources["stack"] <= known["stack"], f"{name}: a new spill"
        assert kernel.resources == known, f"{name}: is the table to be written anew?"


@every_arch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_shared_memory_fits_the_gpu(arch, dtype, tokens):
    for kernel in compiled(arch, dtype, tokens).values():
        assert kernel.shared <= _gpu(arch).shared_bytes


@every_arch
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_products_stage_x_and_w_sixteen_bytes_at_a_time(arch, name, tokens):
    ptx = compiled(arch, torch.bfloat16, tokens)[name].ptx
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    assert copies
    assert set(copies) == {"0x10"}
    assert "ld.global.b16" not in ptx


@every_arch
@pytest.mark.parametrize("name", ["transpose_kernel", "bypass_fwd_kernel", "sddmm_kernel"])
def test_gathers_and_transposes_load_sixteen_bytes(arch, name):
    ptx = compiled(arch, torch.bfloat16, 8192)[name].ptx
    assert "ld.global.v4.b32" in ptx
    assert "ld.global.b16" not in ptx


@every_arch
def test_transposes_store_sixteen_bytes(arch):
    ptx = compiled(arch, torch.bfloat16, 8192)["transpose_kernel"].ptx
    assert set(re.findall(r"st\.global\.\S+", ptx)) == {"st.global.v4.b32"}


@every_arch
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_products_run_on_tensor_cores(arch, name):
    assert TENSOR_CORE[arch] in compiled(arch, torch.bfloat16, 8192)[name].ptx


@every_arch
@pytest.mark.parametrize("name", PRODUCTS)
def test_float32_products_follow_torchs_tf32_setting(arch, name):
    assert "tf32" not in compiled(arch, torch.float32, 64)[name].ptx
    torch.set_float32_matmul_precision("high")
    try:
        assert "tf32" in compiled.__wrapped__(arch, torch.float32, 64)[name].ptx
    finally:
        torch.set_float32_matmul_precision("highest")


@every_arch
def test_what_tuning_tries_compiles_without_spilling_and_fits(arch):
    gpu, tokens, dtype = _gpu(arch), 8192, torch.bfloat16
    x, grad = torch.empty(tokens, D_IN, dtype=dtype), torch.empty(tokens, D_OUT, dtype=dtype)
    index, delta = torch.empty(D_OUT, K, dtype=torch.int32), torch.empty(D_OUT, K)
    weight, partial = torch.empty(D_OUT, D_IN, dtype=dtype), torch.empty(4, D_OUT * K)
    plan = plan_parts(torch.empty(plan_size(D_IN, index.numel()), dtype=torch.int32), D_IN)
    start, entry = plan.column_start, plan.entry
    wide_y, wide_x = torch.empty(tokens, D_OUT), torch.empty(tokens, D_IN)
    with compiling_for(arch) as found:
        x_t, grad_t = kernels.transpose(x), kernels.transpose(grad)
        for config in configs.bypass_configs(tokens, dtype):
            kernels.bypass_fwd(x_t, index, delta, grad, onto=wide_y, config=config)
        for config in configs.transposed_configs(tokens, dtype):
            kernels.bypass_bwd_input(grad_t, *plan, delta, x, onto=wide_x, config=config)
        for config in configs.sddmm_configs(tokens, dtype):
            kernels.sddmm(x_t, grad_t, index, partial, config=config)
        for config in configs.gemm_configs(tokens, dtype, gpu):
            kernels.linear_fwd(x, weight, x_t, index, delta, None, grad, config)
            kernels.linear_bwd_input(grad, weight, grad_t, start, entry, delta, x, config)
    assert len(found) > 15
    assert max(kernel.shared for kernel in found) <= gpu.shared_bytes
    assert max(kernel.stack for kernel in found) <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (16, 5, 1, 1)], ids=str)
def test_sizes_and_strides_of_one_compile(dtype, sizes):
    """A one is a constant to the compiler, and not to the interpreter."""
    tokens, d_in, d_out, k = sizes
    x, grad = torch.empty(tokens, d_in, dtype=dtype), torch.empty(tokens, d_out, dtype=dtype)
    weight, bias = torch.empty(d_out, d_in, dtype=dtype), torch.empty(d_out, dtype=dtype)
    index, delta = torch.empty(d_out, k, dtype=torch.int32), torch.empty(d_out, k)
    with compiling_for(90) as found:
        x_t, grad_t = kernels.transpose(x), kernels.transpose(grad)
        kernels.bypass_fwd(x_t, index, delta, grad, bias=bias)
        partial = kernels.sddmm_partial(index, tokens, dtype)
        kernels.sddmm(x_t, grad_t, index, partial)
        for live in {0, 1, d_out * k}:
            plan = plan_parts(torch.empty(plan_size(d_in, live), dtype=torch.int32), d_in)
            kernels.bypass_bwd_input(grad_t, *plan, delta, x, onto=x.float())
            if dtype != torch.float64:
                rest = (grad_t, plan.column_start, plan.entry, delta, x)
                kernels.linear_bwd_input(grad, weight, *rest)
        if dtype != torch.float64:
            kernels.linear_fwd(x, weight, x_t, index, delta, bias, grad)
        original = kernels.merge(weight, index, delta)
        kernels.patch(weight, index, delta, original)
        kernels.unmerge(weight, index, original)
    assert {kernel.name for kernel in found} >= {"sddmm_kernel", "bypass_bwd_input_kernel"}


if __name__ == "__main__":
    rows = ",\n".join(f'  "{key}": {json.dumps(used)}' for key, used in resources())
    TABLE.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{rows}\n }}\n}}\n')
