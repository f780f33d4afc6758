"""The sampled gradient: only the k entries of each row of ``dy^T x`` that its neuron chose."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroada_kernels.triton_kernels.configs import (
    SddmmConfig,
    accumulator,
    gpu_of,
    sddmm_configs,
    sddmm_parts,
)
from neuroada_kernels.triton_kernels.tuning import pick, problem


@triton.jit
def sddmm_kernel(
    x_t,
    grad_t,
    index,
    partial,
    padded,
    d_in,
    entries,
    tokens_per_part,
    stride_x_t,
    stride_grad_t,
    k: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
):
    """``partial[p, e] += sum over the tokens of part p of dy_t[e // k, t] x_t[index[e], t]``

    x_t [d_in, padded], grad_t [d_out, padded], index [d_out, k] as entries e, partial [parts,
    d_out k]. Only one program adds to each element, in the order of the calls, so that the
    sums are the same in every run. The k entries of a neuron are adjacent and read its dy once.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(1)
    column = tl.load(index + e, mask=e < entries, other=-1)
    live = (column >= 0) & (column < d_in)
    x_row = x_t + column.to(tl.int64) * stride_x_t
    grad_row = grad_t + (e // k).to(tl.int64) * stride_grad_t
    total = tl.zeros([BLOCK_E, BLOCK_T], dtype=ACC)
    first = part * tokens_per_part
    for start in range(first, min(first + tokens_per_part, padded), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        x_values = tl.load(x_row[:, None] + t[None, :], mask=live[:, None], other=0)
        grad_values = tl.load(grad_row[:, None] + t[None, :], mask=live[:, None], other=0)
        total += grad_values.to(ACC) * x_values.to(ACC)
    place = partial + part.to(tl.int64) * entries + e
    before = tl.load(place, mask=e < entries, other=0)
    tl.store(place, before + tl.sum(total, axis=1), mask=e < entries)


def sddmm_partial(index: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``[parts, d_out * k]`` for the sums of :func:`sddmm` over inputs of ``dtype``."""
    parts = sddmm_parts(index.numel(), tokens, gpu_of(index.device))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.zeros(parts, index.numel(), dtype=wide, device=index.device)


def sddmm(
    x_t: Tensor,
    grad_t: Tensor,
    index: Tensor,
    partial: Tensor,
    config: SddmmConfig | None = None,
) -> None:
    """Add to ``partial [parts, d_out * k]``, float32 or float64, whose sum over parts is ddelta.

    ``x_t`` and ``grad_t`` are results of :func:`transpose`, with the same padding.
    """
    parts, entries = partial.shape
    padded = x_t.shape[1]
    if config is None:
        config = pick(
            "sddmm",
            problem(padded, x_t.shape[0], index, x_t, partial),
            sddmm_configs(padded, x_t.dtype),
            # Timed on a separate tensor: the kernel accumulates.
            lambda c: sddmm(x_t, grad_t, index, torch.zeros_like(partial), c),
            x_t.device,
        )
    tokens_per_part = triton.cdiv(triton.cdiv(padded, parts), config.block_t) * config.block_t
    sddmm_kernel[(triton.cdiv(entries, config.block_e), parts)](
        x_t,
        grad_t,
        index,
        partial,
        padded,
        x_t.shape[0],
        entries,
        tokens_per_part,
        x_t.stride(0),
        grad_t.stride(0),
        k=index.shape[1],
        BLOCK_E=config.block_e,
        BLOCK_T=config.block_t,
        ACC=accumulator(partial.dtype),
        num_warps=config.num_warps,
    )
