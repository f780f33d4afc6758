"""The chosen entries of W, in plain torch, for backends without a kernel of their own.

Entries are copied as integers: a copy as a floating dtype may change the bits of a NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuroada_kernels._dtypes import accumulated_in

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])


def chosen_entries(weight: Tensor, index: Tensor) -> Tensor:
    """``W[j, index[j, s]]``, and zero in a slot without a connection."""
    entries = _bits(weight).gather(1, index.clamp(min=0).long()).masked_fill_(index < 0, 0)
    return entries.view(weight.dtype)


def assign_entries(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """``W[j, index[j, s]] = values[j, s]``, without waiting for an accelerator."""
    if index.numel() == 0:
        return
    weight, values = _bits(weight), _bits(values)
    column, empty = index.long(), index < 0
    if not index.is_cpu or bool(empty.any()):
        # A slot without a connection repeats another slot of its row; in a row without connections
        # all slots write back the value of column 0.
        last, slot = column.max(1, keepdim=True)  # [d_out, 1]
        repeated = torch.where(last < 0, weight[:, :1], values.gather(1, slot))
        column = torch.where(empty, last.clamp(min=0), column)
        values = torch.where(empty, repeated, values)
    weight.scatter_(1, column, values)


def patch_entries(weight: Tensor, index: Tensor, delta: Tensor, original: Tensor) -> None:
    """``W[j, index[j, s]] = original[j, s] + delta[j, s]``, rounded once."""
    dtype = accumulated_in(weight.dtype)
    assign_entries(weight, index, (original.to(dtype) + delta.to(dtype)).to(weight.dtype))
