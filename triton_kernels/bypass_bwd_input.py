"""The bypass of the input gradient, written into dx or added to a given one.

It is the transposed sparse product, from entries sorted by column.
"""

import triton
import triton.language as tl
from torch import Tensor

from neuroada_kernels.triton_kernels.configs import (
    TransposedConfig,
    accumulator,
    transposed_configs,
)
from neuroada_kernels.triton_kernels.tiles import transposed_bypass_tile
from neuroada_kernels.triton_kernels.tuning import pick, problem


@triton.jit(do_not_specialize=["most_light"])
def bypass_bwd_input_kernel(
    grad_t,
    column_start,
    split,
    entry,
    delta,
    onto,
    grad_x,
    tokens,
    d_in,
    live_entries,
    entries,
    most_light,
    splits_per_program,
    stride_grad_t,
    stride_onto,
    stride_grad_x,
    k: tl.constexpr,
    HAS_ONTO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
):
    """``dx[t, c] = onto[t, c] + sum over (j, s) with index[j, s] = c of delta[j, s] dy_t[j, t]``,
    rounded once.

    grad_t [d_out, padded tokens], column_start [d_in + 1], split [splits + 1], entry [live],
    delta [d_out, k], onto and grad_x [tokens, d_in]. The planner splits the columns into
    parts of about equal entries plus columns; a program processes a block of tokens and a few
    adjacent parts.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_split = split + tl.program_id(1) * splits_per_program
    c_end = min(tl.load(first_split + splits_per_program), d_in)
    row = t.to(tl.int64)[:, None]
    for start in range(max(tl.load(first_split), 0), c_end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        out = tl.trans(
            transposed_bypass_tile(
                grad_t,
                column_start,
                entry,
                delta,
                c,
                c_end,
                t,
                stride_grad_t,
                live_entries,
                entries,
                most_light,
                k,
                BLOCK_E,
                ACC,
            )
        )
        inside = (t < tokens)[:, None] & (c < c_end)[None, :]  # [BT, BC]
        if HAS_ONTO:
            out += tl.load(onto + row * stride_onto + c[None, :], mask=inside, other=0).to(ACC)
        place = grad_x + row * stride_grad_x + c[None, :]
        tl.store(place, out.to(grad_x.dtype.element_ty), mask=inside)


def bypass_bwd_input(
    grad_t: Tensor,
    column_start: Tensor,
    split: Tensor,
    entry: Tensor,
    delta: Tensor,
    grad_x: Tensor,
    *,
    onto: Tensor | None = None,
    config: TransposedConfig | None = None,
) -> None:
    """Write ``grad_x [tokens, d_in]``, rows of unit stride; ``grad_t`` of :func:`transpose`.

    ``onto`` may be of any float dtype: the sum is taken in the accumulator's.
    """
    tokens, d_in = grad_x.shape
    if config is None:
        config = pick(
            "bypass_bwd_input",
            problem(tokens, d_in, delta, grad_x, delta, onto),
            transposed_configs(tokens, grad_x.dtype),
            lambda c: bypass_bwd_input(
                grad_t, column_start, split, entry, delta, grad_x, onto=onto, config=c
            ),
            grad_x.device,
        )
    splits = split.shape[0] - 1
    splits_per_program = config.splits_per_program(splits, d_in)
    grid = (triton.cdiv(tokens, config.block_t), splits // splits_per_program)
    bypass_bwd_input_kernel[grid](
        grad_t,
        column_start,
        split,
        entry,
        delta,
        onto,
        grad_x,
        tokens,
        d_in,
        entry.numel(),
        delta.numel(),
        config.most_light(entry.numel(), d_in),
        splits_per_program,
        grad_t.stride(0),
        0 if onto is None else onto.stride(0),
        grad_x.stride(0),
        k=delta.shape[1],
        HAS_ONTO=onto is not None,
        BLOCK_T=config.block_t,
        BLOCK_C=config.block_c,
        BLOCK_E=config.block_e,
        ACC=accumulator(grad_x.dtype),
        num_warps=config.num_warps,
    )
