"""Shared by the kernels: the bypass of a tile, in both directions, and a tile of a GEMM.

The bypass tiles are computed transposed, [neuron or column, token], from a transposed input:
each gathered row is contiguous along the tokens, so that a gather is a coalesced load of whole
cache lines, however the columns are scattered.
"""

import triton
import triton.language as tl


@triton.jit
def bypass_tile(
    x_t, index, delta, j, t, d_in, d_out, stride_x_t, k: tl.constexpr, ACC: tl.constexpr
):
    """``out[j, t] = sum_s delta[j, s] x_t[index[j, s], t]``  # [BN, BT], dtype ACC

    x_t [d_in, padded tokens], index and delta [d_out, k], j [BN] and t [BT] of the tile.
    """
    out = tl.zeros([j.shape[0], t.shape[0]], dtype=ACC)
    for s in range(k):
        column = tl.load(index + j * k + s, mask=j < d_out, other=-1)  # [BN]
        # A slot without a connection, or with one out of range, adds nothing and reads nothing.
        live = (column >= 0) & (column < d_in)
        value = tl.load(delta + j * k + s, mask=live, other=0).to(ACC)  # [BN]
        row = x_t + column.to(tl.int64) * stride_x_t
        chosen = tl.load(row[:, None] + t[None, :], mask=live[:, None], other=0)  # [BN, BT]
        out += value[:, None] * chosen.to(ACC)
    return out


@triton.jit
def transposed_bypass_tile(
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
    k: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
):
    """``out[c, t] = sum over (j, s) with index[j, s] = c of delta[j, s] grad_t[j, t]``  # [BC, BT]

    grad_t [d_out, padded tokens]; entry [live entries] lists ``j * k + s`` by column, those
    of column c from column_start[c] on; c [BC] and t [BT] of the tile, without columns from c_end
    on. A plan of another index may give a wrong sum, but no read is out of bounds.

    Hundreds of neurons may choose one column. So columns of at most most_light entries are summed
    in parallel, one entry of each per round, and each heavier one by itself, BLOCK_E entries in
    parallel. Either way the order is fixed by the index.
    """
    first = tl.load(column_start + c, mask=c < c_end, other=0)  # [BC]
    count = tl.load(column_start + c + 1, mask=c < c_end, other=0) - first
    heavy = count > most_light
    light_count = tl.where(heavy, 0, count)

    out = tl.zeros([c.shape[0], t.shape[0]], dtype=ACC)
    for r in range(tl.max(light_count)):
        out += _entry_products(
            grad_t,
            entry,
            delta,
            first + r,
            r < light_count,
            t,
            stride_grad_t,
            live_entries,
            entries,
            k,
            ACC,
        )

    column = -1
    for _ in range(tl.sum(heavy.to(tl.int32))):
        column = tl.min(tl.where(heavy & (c > column), c, 0x7FFFFFFF))
        last = min(tl.load(column_start + column + 1), live_entries)
        partial = tl.zeros([BLOCK_E, t.shape[0]], dtype=ACC)
        for start in range(max(tl.load(column_start + column), 0), last, BLOCK_E):
            position = start + tl.arange(0, BLOCK_E)
            partial += _entry_products(
                grad_t,
                entry,
                delta,
                position,
                position < last,
                t,
                stride_grad_t,
                live_entries,
                entries,
                k,
                ACC,
            )
        out = tl.where((c == column)[:, None], tl.sum(partial, axis=0)[None, :], out)
    return out


@triton.jit
def _entry_products(
    grad_t,
    entry,
    delta,
    position,
    live,
    t,
    stride_grad_t,
    live_entries,
    entries,
    k: tl.constexpr,
    ACC: tl.constexpr,
):
    """``delta[e] grad_t[e // k, t]`` for the entries e at these positions of the plan  # [., BT]"""
    live = live & (position >= 0) & (position < live_entries)
    e = tl.load(entry + position, mask=live, other=0)
    live = live & (e >= 0) & (e < entries)
    value = tl.load(delta + e, mask=live, other=0).to(ACC)
    row = grad_t + (e // k).to(tl.int64) * stride_grad_t
    chosen = tl.load(row[:, None] + t[None, :], mask=live[:, None], other=0)
    return value[:, None] * chosen.to(ACC)


@triton.jit
def add_product(
    out,
    a,
    b,
    row,
    column,
    rows,
    columns,
    depth,
    stride_a_row,
    stride_a_depth,
    stride_b_depth,
    stride_b_column,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[row, column] + sum_d a[row, d] b[d, column]``  # [BM, BN], float32

    Bounds are checked by masks, not by clamping positions: the compiler would not know that
    clamped positions are contiguous, and would load single values.
    """
    d = tl.arange(0, BLOCK_K)
    far = d.to(tl.int64)
    a_tile = a + row.to(tl.int64)[:, None] * stride_a_row + far[None, :] * stride_a_depth
    b_tile = b + far[:, None] * stride_b_depth + column.to(tl.int64)[None, :] * stride_b_column
    step = tl.full([], BLOCK_K, tl.int64)
    a_inside = (row < rows)[:, None]  # [BM, BK]
    b_inside = (column < columns)[None, :]  # [BK, BN]
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            a_values = tl.load(a_tile, mask=a_inside, other=0)
            b_values = tl.load(b_tile, mask=b_inside, other=0)
        else:
            inside = d < depth - start
            a_values = tl.load(a_tile, mask=a_inside & inside[None, :], other=0)
            b_values = tl.load(b_tile, mask=b_inside & inside[:, None], other=0)
        out = tl.dot(a_values, b_values, out, input_precision=PRECISION)
        a_tile += step * stride_a_depth
        b_tile += step * stride_b_depth
    return out


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile, GROUP_M rows at a time so that adjacent tiles share inputs."""
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % height, within // height
