"""The chosen entries of W, in plain torch."""

from __future__ import annotations

from torch import Tensor


def assign_entries(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """``W[j, index[j, s]] = values[j, s]``, for the backends that have no kernel of their own."""
    row, slot = (index >= 0).nonzero(as_tuple=True)
    weight[row, index[row, slot].long()] = values[row, slot]
