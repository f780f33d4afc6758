"""The bypass merged into W, once or repeatedly, and unmerged: the chosen entries alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroada_kernels.triton_kernels.configs import MERGE_BLOCK, accumulator


@triton.jit
def _chosen(
    weight,
    index,
    entries,
    d_in,
    stride_row,
    stride_column,
    k: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program's entries e of the index, which are connections, and their addresses in W."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(index + e, mask=e < entries, other=-1)
    live = (column >= 0) & (column < d_in)
    place = weight + (e // k).to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
    return e, live, place


@triton.jit
def merge_kernel(
    weight,
    index,
    delta,
    original,
    entries,
    d_in,
    stride_row,
    stride_column,
    k: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``original[e] = W[j, index[e]]``, then ``W[j, index[e]] += delta[e]``, with ``j = e // k``.

    weight [d_out, d_in] of any strides; index, delta and original [d_out, k] as entries e. The
    original of an entry without a connection is 0.
    """
    e, live, place = _chosen(weight, index, entries, d_in, stride_row, stride_column, k, BLOCK)
    before = tl.load(place, mask=live, other=0)
    tl.store(original + e, before, mask=e < entries)
    after = before.to(ACC) + tl.load(delta + e, mask=live, other=0).to(ACC)
    tl.store(place, after.to(weight.dtype.element_ty), mask=live)


@triton.jit
def patch_kernel(
    weight,
    index,
    delta,
    original,
    entries,
    d_in,
    stride_row,
    stride_column,
    k: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``W[j, index[e]] = original[e] + delta[e]``, with ``j = e // k``; shapes as for merging."""
    e, live, place = _chosen(weight, index, entries, d_in, stride_row, stride_column, k, BLOCK)
    before = tl.load(original + e, mask=live, other=0)
    after = before.to(ACC) + tl.load(delta + e, mask=live, other=0).to(ACC)
    tl.store(place, after.to(weight.dtype.element_ty), mask=live)


@triton.jit
def unmerge_kernel(
    weight,
    index,
    original,
    entries,
    d_in,
    stride_row,
    stride_column,
    k: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``W[j, index[e]] = original[e]``, bit for bit, with ``j = e // k``; shapes as for merging."""
    e, live, place = _chosen(weight, index, entries, d_in, stride_row, stride_column, k, BLOCK)
    tl.store(place, tl.load(original + e, mask=live, other=0), mask=live)


def merge(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """Add ``delta [d_out, k]`` to ``weight`` in place; returns the old values, ``[d_out, k]``."""
    original = torch.empty(index.shape, dtype=weight.dtype, device=weight.device)
    merge_kernel[(triton.cdiv(index.numel(), MERGE_BLOCK),)](
        weight,
        index,
        delta,
        original,
        index.numel(),
        weight.shape[1],
        *weight.stride(),
        k=index.shape[1],
        BLOCK=MERGE_BLOCK,
        ACC=accumulator(weight.dtype),
    )
    return original


def patch(weight: Tensor, index: Tensor, delta: Tensor, original: Tensor) -> None:
    """Write ``original + delta``, each ``[d_out, k]``, into ``weight``, rounded once."""
    patch_kernel[(triton.cdiv(index.numel(), MERGE_BLOCK),)](
        weight,
        index,
        delta,
        original,
        index.numel(),
        weight.shape[1],
        *weight.stride(),
        k=index.shape[1],
        BLOCK=MERGE_BLOCK,
        ACC=accumulator(weight.dtype),
    )


def unmerge(weight: Tensor, index: Tensor, original: Tensor) -> None:
    """Write ``original [d_out, k]`` back into ``weight``."""
    unmerge_kernel[(triton.cdiv(index.numel(), MERGE_BLOCK),)](
        weight,
        index,
        original,
        index.numel(),
        weight.shape[1],
        *weight.stride(),
        k=index.shape[1],
        BLOCK=MERGE_BLOCK,
    )
