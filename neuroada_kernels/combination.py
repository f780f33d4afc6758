"""Weighted sums of adapters: per neuron the union of their connections, and summed deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from neuroada_kernels.plan import order_slots


class Weighted(NamedTuple):
    """An adapter of a layer, and its weight in a sum."""

    columns: Tensor  # its index, [d_out, k]
    delta: Tensor  # [d_out, k]
    weight: float


def weighted_sum(adapters: Sequence[Weighted]) -> tuple[Tensor, Tensor]:
    """The index and delta ``[d_out, K]`` of ``sum_i weight_i * delta_i``, connection by connection.

    K is the largest number of connections in the union of any neuron, at least 1; rows with fewer
    have slots of -1. Products and sums are float64, rounded once to the widest dtype of the deltas.
    """
    dtype = adapters[0].delta.dtype
    for adapter in adapters:
        dtype = torch.promote_types(dtype, adapter.delta.dtype)
    columns = torch.cat([adapter.columns for adapter in adapters], 1)
    values = torch.cat([a.delta.detach().double() * a.weight for a in adapters], 1)
    columns, order = columns.sort(dim=1, stable=True)
    values = values.gather(1, order).masked_fill(columns < 0, 0)
    first = columns >= 0  # of equal columns, which are adjacent after the sort
    first[:, 1:] &= columns[:, 1:] != columns[:, :-1]
    counts = first.sum(1)
    k = max(1, int(counts.max()))
    # Rows fill from their end, as -1 sorts first; empty slots go to place 0, which is dropped.
    place = (first.cumsum(1) + (k - counts)[:, None]).masked_fill(columns < 0, 0)
    index = columns.new_full((len(columns), k + 1), -1).scatter_(1, place, columns)[:, 1:]
    delta = values.new_zeros(len(values), k + 1).scatter_add_(1, place, values)[:, 1:]
    ordered = order_slots(index.contiguous())
    rank = ordered.argsort(dim=1, stable=True).argsort(dim=1)
    return ordered, delta.gather(1, rank).to(dtype)


def check_weights(adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Raise unless there is one finite weight for each adapter."""
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise TypeError(f"adapters: {adapters!r}, expected names of adapters")
    if not isinstance(weights, Sequence):
        raise TypeError(f"weights: {type(weights).__name__}, expected a sequence of numbers")
    if len(weights) != len(adapters):
        raise ValueError(f"weights: {weights!r}, expected {len(adapters)}, one for each adapter")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(f"weights: {weight!r}, expected a number")
        if not math.isfinite(weight):
            raise ValueError(f"weights: {weight}, expected a finite number")
