"""Deferred selection of connections, until a weight on the meta device has values."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels._sharding import whole
from neuroada_kernels.plan import count_connections, order_slots, order_slots_
from neuroada_kernels.selection import (
    Rows,
    check_arguments,
    drawn_count,
    method_for,
    select,
    select_rows,
)

CHOSEN = ("index", "delta")  # what a layer has only once its connections are chosen
_UNCHOSEN = -2  # fills an index before that; no column


@dataclass(frozen=True)
class Deferred:
    """The arguments of :func:`neuroada_kernels.select` except the weight; and the strategy."""

    k: int
    method: str
    scores: Tensor | None
    generator: torch.Generator | None
    neuron_fraction: float
    strategy: str = "bypass"

    def __post_init__(self) -> None:
        if isinstance(self.k, Integral) and not isinstance(self.k, bool):
            object.__setattr__(self, "k", int(self.k))  # NumPy's may overflow

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


class DeferringLayer(nn.Module):
    """The part of a layer that chooses its connections once the weight has values."""

    index: Tensor
    delta: nn.Parameter
    in_features: int
    out_features: int
    strategy_reason: str | None = None
    _deferred: Deferred | None = None  # while index and delta wait for the weight's values

    @property
    def connections(self) -> int:
        """The number of connections that the layer has, or will have."""
        if self._deferred is not None:
            return self._deferred.connections(self.out_features)
        return count_connections(self.index, self.in_features)

    def select_connections(self, reason: str | None = None) -> bool:
        """Make the deferred selection; returns False if the weight still has no values."""
        return True

    @property
    def deferred(self) -> bool:
        """Whether the connections are still to be chosen."""
        return self._deferred is not None

    def drop_deferral(self) -> None:
        """Cancel the deferred selection, since index and delta were loaded.

        The strategy stays ``"bypass"``, with the reason in ``strategy_reason``: only
        :func:`neuroada_kernels.set_strategy` can tell which other modules read the weight.
        """
        if self._deferred is None:  # write no attribute, which would cause recompilation
            return
        if self._deferred.strategy != "bypass":
            self.strategy_reason = "its connections were loaded; set_strategy takes it up"
        self._deferred = None

    def _defer(self, choice: Deferred) -> None:
        """Defer the choice if the index has no values."""
        if self.index.is_meta:
            self._deferred = choice

    def check_selected(self) -> None:
        """Raise if the connections are not chosen yet."""
        if self._deferred is not None:
            raise RuntimeError(
                "index: not chosen yet, since weight was on the meta device; "
                "neuroada_kernels.select_connections(model) chooses once it has values"
            )

    def _mark_unchosen(self) -> None:
        """Give the index of a layer that still waits for its weight a value that is no choice.

        ``to_empty`` leaves arbitrary values, which a state dict of the model would pass on.
        """
        if self._deferred is not None and not self.index.is_meta:
            with torch.no_grad():
                self.index.fill_(_UNCHOSEN)
                self.delta.zero_()

    def _without_unchosen(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """``state_dict`` without the index and delta of a layer that had not chosen them.

        Torch's ``set_model_state_dict`` completes a base's state with the model's own.
        """
        index = state_dict.get(prefix + "index")
        if self._deferred is None or index is None:
            return state_dict
        if not index.is_meta and not bool((index == _UNCHOSEN).all()):
            return state_dict
        return {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in CHOSEN}
