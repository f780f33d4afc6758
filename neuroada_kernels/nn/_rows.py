"""Which rows of a batch go through which adapter of a layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchRows:
    """The rows of dimension 0, in groups of those that take the same adapter.

    Attributes
    ----------
    adapters : tuple of str or None
        The adapter of each group; None for the base alone.
    counts : tuple of int
        Rows of each group.
    order : Tensor or None
        int64, ``[rows]``: the rows, group by group; None where they stand so already.
    places : Tensor or None
        int64, ``[rows]``: where among these each row is.
    """

    adapters: tuple[str | None, ...]
    counts: tuple[int, ...]
    order: Tensor | None
    places: Tensor | None

    @classmethod
    def of(cls, names: Sequence[str], known: Collection[str], device: torch.device) -> BatchRows:
        """The rows that ``names`` are for, in a layer that has the adapters ``known``.

        Those of two names that are both unknown here stay apart: a product over more rows may round
        otherwise, and no row is to depend on which others there are.
        """
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(name, []).append(row)
        adapters = tuple(name if name in known else None for name in groups)
        counts = tuple(map(len, groups.values()))
        order = [row for rows in groups.values() for row in rows]
        if order == sorted(order):
            return cls(adapters, counts, None, None)
        sorted_rows = torch.tensor(order, device=device)
        return cls(adapters, counts, sorted_rows, sorted_rows.argsort())

    def check(self, x: Tensor) -> None:
        """Raise unless ``x`` has these rows."""
        total = sum(self.counts)
        if x.dim() < 2 or len(x) != total:
            raise ValueError(
                f"adapter_names: {total} for x of shape {list(x.shape)}, expected one a row"
            )

    def map(self, forward: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``forward(adapter, *rows)`` of each group's rows of ``tensors``, as one, row by row."""
        if self.order is not None:
            tensors = tuple(tensor.index_select(0, self.order) for tensor in tensors)
        parts = zip(self.adapters, *(tensor.split(self.counts) for tensor in tensors), strict=True)
        y = torch.cat([forward(*part) for part in parts])
        return y if self.places is None else y.index_select(0, self.places)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a layer, deep or pickled, is not in the block that this is for."""
        return type(None), ()
