"""x transposed into a workspace, from which the bypass kernels gather whole lines of tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroada_kernels.triton_kernels.configs import transpose_config


@triton.jit
def transpose_kernel(
    x,
    x_t,
    tokens,
    d,
    stride_t,
    stride_c,
    stride_x_t,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``x_t[c, t] = x[t, c]``, zero for the padding, t >= tokens.

    x [tokens, d] of any strides, x_t [d, padded tokens].
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (t < tokens)[:, None] & (c < d)[None, :]
    source = x + t.to(tl.int64)[:, None] * stride_t + c.to(tl.int64)[None, :] * stride_c
    tile = tl.load(source, mask=inside, other=0)  # [BT, BC]
    target = x_t + c.to(tl.int64)[:, None] * stride_x_t + t[None, :]
    tl.store(target, tl.trans(tile), mask=(c < d)[:, None])


def transpose(x: Tensor) -> Tensor:
    """``x [tokens, d]`` transposed, a new ``[d, padded]``, padded with zeros to whole blocks."""
    tokens, d = x.shape
    config = transpose_config(tokens)
    x_t = torch.empty(
        d, triton.cdiv(tokens, config.block_t) * config.block_t, dtype=x.dtype, device=x.device
    )
    grid = (triton.cdiv(tokens, config.block_t), triton.cdiv(d, config.block_c))
    transpose_kernel[grid](
        x,
        x_t,
        tokens,
        d,
        *x.stride(),
        x_t.stride(0),
        BLOCK_T=config.block_t,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
    return x_t
