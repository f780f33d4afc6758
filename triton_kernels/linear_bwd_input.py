"""The input gradient of a fused GEMM and bypass, with one write of dx."""

import triton
import triton.language as tl
from torch import Tensor

from neuroada_kernels.triton_kernels.configs import (
    GemmConfig,
    dot_precision,
    gemm_configs,
    gpu_of,
)
from neuroada_kernels.triton_kernels.tiles import (
    add_product,
    tile_position,
    transposed_bypass_tile,
)
from neuroada_kernels.triton_kernels.tuning import pick, problem


@triton.jit(do_not_specialize=["most_light"])
def linear_bwd_input_kernel(
    grad,
    weight,
    grad_t,
    column_start,
    entry,
    delta,
    grad_x,
    tokens,
    d_in,
    d_out,
    live_entries,
    most_light,
    stride_grad_t0,
    stride_grad_j,
    stride_w_j,
    stride_w_c,
    stride_grad_t,
    stride_grad_x,
    k: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dx[t, c] = sum_j dy[t, j] W[j, c] + sum over (j, s) with index[j, s] = c of
    delta[j, s] dy_t[j, t]``

    grad [tokens, d_out] and weight [d_out, d_in] of any strides, grad_t [d_out, padded tokens],
    column_start [d_in + 1], entry [live], delta [d_out, k], grad_x [tokens, d_in]. As in the
    forward kernel, the accumulator of the GEMM is initialised with the bypass.
    """
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(d_in, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        t = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        out = tl.trans(
            transposed_bypass_tile(
                grad_t,
                column_start,
                entry,
                delta,
                c,
                d_in,
                t,
                stride_grad_t,
                live_entries,
                d_out * k,
                most_light,
                k,
                BLOCK_E,
                tl.float32,
            )
        )
        out = add_product(
            out,
            grad,
            weight,
            t,
            c,
            tokens,
            d_in,
            d_out,
            stride_grad_t0,
            stride_grad_j,
            stride_w_j,
            stride_w_c,
            BLOCK_K,
            EVEN_K,
            PRECISION,
        )
        inside = (t < tokens)[:, None] & (c < d_in)[None, :]
        place = grad_x + t.to(tl.int64)[:, None] * stride_grad_x + c[None, :]
        tl.store(place, out.to(grad_x.dtype.element_ty), mask=inside)


def linear_bwd_input(
    grad: Tensor,
    weight: Tensor,
    grad_t: Tensor,
    column_start: Tensor,
    entry: Tensor,
    delta: Tensor,
    grad_x: Tensor,
    config: GemmConfig | None = None,
) -> None:
    """Write ``grad_x [tokens, d_in]``, rows of unit stride; ``grad_t`` is ``grad`` through
    :func:`transpose`, with its padding."""
    tokens, d_out = grad.shape
    d_in = weight.shape[1]
    if config is None:
        config = pick(
            "linear_bwd_input",
            problem(tokens, d_in, delta, grad, delta),
            gemm_configs(tokens, grad.dtype, gpu_of(grad.device)),
            lambda c: linear_bwd_input(grad, weight, grad_t, column_start, entry, delta, grad_x, c),
            grad.device,
        )
    linear_bwd_input_kernel[(config.programs(tokens, d_in),)](
        grad,
        weight,
        grad_t,
        column_start,
        entry,
        delta,
        grad_x,
        tokens,
        d_in,
        d_out,
        entry.numel(),
        config.most_light(entry.numel(), d_in),
        *grad.stride(),
        *weight.stride(),
        grad_t.stride(0),
        grad_x.stride(0),
        k=delta.shape[1],
        BLOCK_E=config.block_e,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        EVEN_K=d_out % config.block_k == 0,
        PRECISION=dot_precision(grad.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
