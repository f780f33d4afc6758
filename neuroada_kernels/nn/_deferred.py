"""Deferred selection of connections, until a weight on the meta device has values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroada_kernels._sharding import whole
from neuroada_kernels.plan import order_slots, order_slots_
from neuroada_kernels.selection import (
    Rows,
    check_arguments,
    drawn_count,
    method_for,
    select,
    select_rows,
)


@dataclass(frozen=True)
class Deferred:
    """The arguments of :func:`neuroada_kernels.select` except the weight; and the strategy."""

    k: int
    method: str
    scores: Tensor | None
    generator: torch.Generator | None
    neuron_fraction: float
    strategy: str = "bypass"

    @property
    def _how(self) -> tuple[int, str, Tensor | None, torch.Generator | None]:
        return self.k, self.method, self.scores, self.generator

    def index_for(self, weight: Tensor | Rows) -> Tensor:
        """The index, int32 ``[d_out, k]``; on the meta device if ``weight`` is.

        Raises
        ------
        TypeError, ValueError
            As ``select``; on the meta device only errors that do not depend on values.
        """
        share = self.neuron_fraction
        if not isinstance(weight, Tensor):
            return order_slots(select_rows(weight, *self._how, neuron_fraction=share))
        if not weight.is_meta:
            index = select(whole(weight.detach()), *self._how, neuron_fraction=share)
            return order_slots_(index) if index.is_cpu else order_slots(index)
        method = method_for(self.method, self.scores)
        check_arguments(weight.shape, self.k, method, self.scores, self.neuron_fraction)
        return torch.empty(weight.shape[0], self.k, dtype=torch.int32, device="meta")

    def connections(self, d_out: int) -> int:
        """The number of connections that will be chosen."""
        return drawn_count(d_out, self.neuron_fraction) * self.k
