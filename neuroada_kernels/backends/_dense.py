"""The GEMM, added onto a y that holds the bypass already.

The bypass is computed first, so that y is rounded once when the GEMM accumulates onto it: only the
small bypass is rounded early, and an update far below one ULP of y still takes effect.

NVIDIA GPUs are an exception: in 16 bits cuBLAS rounds the product before it adds it to y, and such
an update would be lost. There the GEMM writes float32, and the other terms are added in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

#: Bytes of output that the GEMM with a 16-bit bias holds in addition to y.
_BLOCK_BYTES = 8 << 20
#: Bytes of float32 weight that the widening GEMM holds: an eighth of W's, within these bounds.
_WIDENED_BYTES = (256 << 10, 2 << 20)
#: Limit on the bytes of a float32 product on a GPU, unless ``_WIDE_TOKENS`` tokens exceed it.
_WIDE_BYTES = 56 << 20
#: Tokens per such product are a multiple of this, except for the last, to avoid partial tiles.
_WIDE_TOKENS = 256


def bias_for_bypass(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``(early, late)``: the bias is added to the bypass (early) or to the GEMM (late).

    In float32 and float64 adding it to the bypass is free. A 16-bit bias is added late: the bypass
    would be rounded to the bias's ULP, and a small update lost.
    """
    wide = bias is not None and bias.dtype in (torch.float32, torch.float64)
    return (bias, None) if wide else (None, bias)


def add_dense(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y + x @ weight + bias``; ``y`` is consumed.

    Rounded once, except for 16-bit dtypes on accelerators other than NVIDIA's.

    Parameters
    ----------
    y : Tensor
        Shape ``[tokens, n]``.
    x : Tensor
        Shape ``[tokens, m]``.
    weight : Tensor
        Shape ``[m, n]``, any strides.
    bias : Tensor, optional
        Shape ``[n]``.
    """
    if y.numel() == 0:
        return y
    if y.is_cuda and torch.version.hip is None and y.dtype.itemsize == 2:
        return _add_dense_wide(y, x, weight, bias)
    if y.dtype in (torch.float32, torch.float64) or not y.is_cpu:
        torch.addmm(y, x, weight, out=y)
        return y if bias is None else y.add_(bias)
    if not has_onednn_gemm(y.dtype):
        return _add_dense_widened(y, x, weight, bias)
    if bias is None:
        return torch.addmm(y, x, weight, out=y)
    return _add_dense_with_bias(y, x, weight, bias)


def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight``, or with ``bias`` added, in float32: not rounded to the operands' 16 bits.

    For terms that are added to the product before it is rounded: cuBLAS rounds a 16-bit product
    before it adds it to a y, and again after.

    Parameters
    ----------
    x : Tensor
        Shape ``[tokens, m]``, bfloat16, float16 or float32.
    weight : Tensor
        Shape ``[m, n]``, dtype of ``x``, any strides.
    bias : Tensor, optional
        Shape ``[n]``, float32, as ``x`` is: the same call as ``F.linear``'s, with the same error.
        cuBLAS may split the sum with a bias but not without one, which has the larger error.
    """
    if 0 in (*x.shape, weight.shape[1]):
        zeros = x.new_zeros(x.shape[0], weight.shape[1], dtype=torch.float32)
        return zeros if bias is None else zeros.add_(bias)
    with torch.autocast(x.device.type, enabled=False):
        if bias is not None:
            return torch.addmm(bias, x, weight)
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, weight, out_dtype=torch.float32)
        return torch.mm(x.float(), weight.float())


def wide_parts(tokens: int, width: int) -> Iterator[slice]:
    """Slices of tokens of even size whose float32 product ``[tokens, width]`` fits the scratch."""
    blocks = -(-tokens // _WIDE_TOKENS)
    most = max(1, _WIDE_BYTES // (4 * max(1, width) * _WIDE_TOKENS))
    parts = max(1, -(-blocks // most))
    step = max(1, -(-blocks // parts)) * _WIDE_TOKENS
    for first in range(0, tokens, step):
        yield slice(first, min(first + step, tokens))


@functools.cache
def has_onednn_gemm(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a GEMM of this 16-bit dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _add_dense_wide(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32, by slices of tokens, rounded once."""

    def total(part: slice) -> Tensor:
        sums = wide_product(x[part], weight).add_(y[part])
        return sums if bias is None else sums.add_(bias)

    for part in wide_parts(*y.shape):
        y[part] = total(part)
    return y


def _add_dense_with_bias(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GEMM, bias and bypass in oneDNN's float32 accumulator, by blocks of tokens."""
    bias = bias.contiguous()  # oneDNN's op ignores its stride
    tokens = max(1, _BLOCK_BYTES // max(1, y.shape[1] * y.element_size()))
    fused = torch.ops.mkldnn._linear_pointwise.binary
    if y.shape[0] <= tokens:
        return fused(x, y, weight.t(), bias, "add")  # type: ignore[no-any-return]
    for part, rows in zip(y.split(tokens), x.split(tokens), strict=True):
        part.copy_(fused(rows, part, weight.t(), bias, "add"))
    return y


def _add_dense_widened(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32, by blocks of output columns.

    If the processor does not support the dtype, torch's own GEMM takes a hundred times as long as
    widening the weight block by block.
    """
    smallest, largest = _WIDENED_BYTES
    block = max(smallest, min(largest, weight.nbytes // 8))
    columns = max(1, block // (4 * max(1, weight.shape[0] + y.shape[0])))
    wide_x = x.float()
    for first in range(0, y.shape[1], columns):
        part = slice(first, first + columns)
        with torch.autocast("cpu", enabled=False):
            total = torch.addmm(y[:, part].float(), wide_x, weight[:, part].float())
        if bias is not None:
            total += bias[part]
        y[:, part] = total
    return y
