"""The method's formulas in plain PyTorch, for reading and for comparison; not optimized.

Zhang et al., "NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient Fine-Tuning",
EMNLP 2025 (arXiv 2510.18940). Everything here is differentiable by autograd, to any order.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from neuroada_kernels._dtypes import accumulated_in


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A block that computes in the operands' dtypes, whatever surrounds it."""
    has_autocast = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()


def bypass(x: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """``out[..., j] = sum_s delta[j, s] x[..., index[j, s]]``, in float32 (float64 for float64).

    Parameters
    ----------
    x : Tensor
        Shape ``[..., d_in]``.
    index : Tensor
        Shape ``[d_out, k]``; -1 marks a slot without a connection.
    delta : Tensor
        Shape ``[d_out, k]``.
    """
    dtype = accumulated_in(x.dtype)
    empty = index < 0
    gathered = x.to(dtype)[..., index.clamp(min=0).long()]  # [..., d_out, k]
    # Both factors are masked, so that neither the product nor a gradient computes 0 * inf.
    return (gathered.masked_fill(empty, 0) * delta.to(dtype).masked_fill(empty, 0)).sum(-1)


def neuroada_linear(
    x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``y[t, j] = sum_c x[t, c] W[j, c] + b[j] + sum_s delta[j, s] x[t, index[j, s]]``.

    Computed in float32 (float64 for float64) and rounded once, to the dtype of ``x``.

    Parameters
    ----------
    x : Tensor
        Shape ``[..., d_in]``.
    weight : Tensor
        Shape ``[d_out, d_in]``.
    index, delta : Tensor
        Shape ``[d_out, k]``.
    bias : Tensor, optional
        Shape ``[d_out]``.

    Returns
    -------
    Tensor
        Shape ``[..., d_out]``, dtype of ``x``.
    """
    dtype = accumulated_in(x.dtype)
    with without_autocast(x.device.type):  # which would round the GEMM to 16 bits
        y = x.to(dtype) @ weight.to(dtype).t() + bypass(x, index, delta)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


def neuroada_bypass(y: Tensor, x: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """``y[t, j] + sum_s delta[j, s] x[t, index[j, s]]``, rounded once, to the dtype of ``y``."""
    dtype = accumulated_in(y.dtype)
    return (y.to(dtype) + bypass(x, index, delta)).to(y.dtype)


def merged_weight(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """A copy of ``weight`` with ``W[j, index[j, s]] += delta[j, s]``, rounded once."""
    dtype = accumulated_in(weight.dtype)
    update = torch.where(index >= 0, delta.to(dtype), torch.zeros_like(delta, dtype=dtype))
    dense = torch.zeros_like(weight, dtype=dtype).scatter_add(1, index.clamp(min=0).long(), update)
    return (weight.to(dtype) + dense).to(weight.dtype)
