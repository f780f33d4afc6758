"""The bypass of the forward pass, written into y or added to a given one."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroada_kernels.triton_kernels.configs import BypassConfig, accumulator, bypass_configs
from neuroada_kernels.triton_kernels.tiles import bypass_tile
from neuroada_kernels.triton_kernels.tuning import pick, problem


@triton.jit
def bypass_fwd_kernel(
    x_t,
    index,
    delta,
    onto,
    bias,
    y,
    tokens,
    d_in,
    d_out,
    stride_x_t,
    stride_onto,
    stride_y,
    k: tl.constexpr,
    HAS_ONTO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """``y[t, j] = onto[t, j] + bias[j] + sum_s delta[j, s] x_t[index[j, s], t]``, rounded once.

    x_t [d_in, padded tokens], index and delta [d_out, k], onto and y [tokens, d_out], bias [d_out].
    The tile is summed as [BN, BT], where gathers are coalesced, and transposed for coalesced
    stores.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = tl.trans(bypass_tile(x_t, index, delta, j, t, d_in, d_out, stride_x_t, k, ACC))
    inside = (t < tokens)[:, None] & (j < d_out)[None, :]  # [BT, BN]
    row = t.to(tl.int64)[:, None]
    if HAS_ONTO:
        out += tl.load(onto + row * stride_onto + j[None, :], mask=inside, other=0).to(ACC)
    if HAS_BIAS:
        out += tl.load(bias + j, mask=j < d_out, other=0).to(ACC)[None, :]
    tl.store(y + row * stride_y + j[None, :], out.to(y.dtype.element_ty), mask=inside)


def bypass_fwd(
    x_t: Tensor,
    index: Tensor,
    delta: Tensor,
    y: Tensor,
    *,
    onto: Tensor | None = None,
    bias: Tensor | None = None,
    config: BypassConfig | None = None,
) -> None:
    """Write ``y [tokens, d_out]``, rows of unit stride, from ``x_t`` of :func:`transpose`.

    ``onto`` and ``bias`` may be of any float dtype: the sum is taken in the accumulator's.
    """
    tokens, d_out = y.shape
    if config is None:
        config = pick(
            "bypass_fwd",
            problem(tokens, x_t.shape[0], index, y, delta, onto, bias),
            bypass_configs(tokens, y.dtype),
            # Timed on a separate tensor: onto may be y.
            lambda c: bypass_fwd(
                x_t, index, delta, torch.empty_like(y), onto=onto, bias=bias, config=c
            ),
            y.device,
        )
    grid = (triton.cdiv(tokens, config.block_t), triton.cdiv(d_out, config.block_n))
    bypass_fwd_kernel[grid](
        x_t,
        index,
        delta,
        onto,
        bias,
        y,
        tokens,
        x_t.shape[0],
        d_out,
        x_t.stride(0),
        0 if onto is None else onto.stride(0),
        y.stride(0),
        k=index.shape[1],
        HAS_ONTO=onto is not None,
        HAS_BIAS=bias is not None,
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        ACC=accumulator(y.dtype),
        num_warps=config.num_warps,
    )
