"""Fused GEMM and bypass, with one write of y."""

import triton
import triton.language as tl
from torch import Tensor

from neuroada_kernels.triton_kernels.configs import (
    GemmConfig,
    dot_precision,
    gemm_configs,
    gpu_of,
)
from neuroada_kernels.triton_kernels.tiles import add_product, bypass_tile, tile_position
from neuroada_kernels.triton_kernels.tuning import pick, problem


@triton.jit
def linear_fwd_kernel(
    x,
    weight,
    x_t,
    index,
    delta,
    bias,
    y,
    tokens,
    d_in,
    d_out,
    stride_x_t0,
    stride_x_c,
    stride_w_j,
    stride_w_c,
    stride_x_t,
    stride_y,
    k: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y[t, j] = sum_c x[t, c] W[j, c] + b[j] + sum_s delta[j, s] x_t[index[j, s], t]``

    x [tokens, d_in] and weight [d_out, d_in] of any strides, x_t [d_in, padded tokens], index and
    delta [d_out, k], bias [d_out], y [tokens, d_out]. Persistent: each program takes every n-th
    tile. The accumulator of the GEMM is initialised with the bypass, in float32, instead of zero,
    so that it needs no second set of registers, and y is rounded and written once.
    """
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(d_out, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        t = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        out = tl.trans(bypass_tile(x_t, index, delta, j, t, d_in, d_out, stride_x_t, k, tl.float32))
        if HAS_BIAS:
            out += tl.load(bias + j, mask=j < d_out, other=0).to(tl.float32)[None, :]
        out = add_product(
            out,
            x,
            weight,
            t,
            j,
            tokens,
            d_out,
            d_in,
            stride_x_t0,
            stride_x_c,
            stride_w_c,
            stride_w_j,
            BLOCK_K,
            EVEN_K,
            PRECISION,
        )
        inside = (t < tokens)[:, None] & (j < d_out)[None, :]
        place = y + t.to(tl.int64)[:, None] * stride_y + j[None, :]
        tl.store(place, out.to(y.dtype.element_ty), mask=inside)


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    x_t: Tensor,
    index: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: GemmConfig | None = None,
) -> None:
    """Write ``y [tokens, d_out]``, rows of unit stride; ``x_t`` is ``x`` through :func:`transpose`,
    with its padding."""
    tokens, d_in = x.shape
    d_out = weight.shape[0]
    if config is None:
        config = pick(
            "linear_fwd",
            problem(tokens, d_in, index, x, delta, bias),
            gemm_configs(tokens, x.dtype, gpu_of(x.device)),
            lambda c: linear_fwd(x, weight, x_t, index, delta, bias, y, c),
            x.device,
        )
    linear_fwd_kernel[(config.programs(tokens, d_out),)](
        x,
        weight,
        x_t,
        index,
        delta,
        bias,
        y,
        tokens,
        d_in,
        d_out,
        *x.stride(),
        *weight.stride(),
        x_t.stride(0),
        y.stride(0),
        k=index.shape[1],
        HAS_BIAS=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        EVEN_K=d_in % config.block_k == 0,
        PRECISION=dot_precision(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
