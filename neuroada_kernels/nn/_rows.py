"""The assignment of the rows of a batch to the adapters of a layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchRows:
    """The rows of dimension 0, grouped by adapter.

    Attributes
    ----------
    adapters : tuple of str or None
        The adapter of each group; None for the base alone.
    counts : tuple of int
        Number of rows of each group.
    order : Tensor or None
        int64, ``[rows]``: the rows, group by group; None if they are in this order already.
    places : Tensor or None
        int64, ``[rows]``: the inverse of ``order``; None if ``order`` is.
    """

    adapters: tuple[str | None, ...]
    counts: tuple[int, ...]
    order: Tensor | None
    places: Tensor | None

    @classmethod
    def of(cls, names: Sequence[str], known: Collection[str], device: torch.device) -> BatchRows:
        """Group the rows by ``names``, one per row, in a layer that has the adapters ``known``.

        Rows of different unknown names form separate groups: a GEMM over more rows may round
        differently, and no row may depend on which other names are in the batch.
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
        """Raise unless dimension 0 of ``x`` has this number of rows."""
        total = sum(self.counts)
        if x.dim() < 2 or len(x) != total:
            raise ValueError(
                f"adapter_names: {total} for x of shape {list(x.shape)}, expected one a row of "
                "dimension 0"
            )

    def map(self, forward: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``forward(adapter, *rows)`` per group of rows of ``tensors``, in the original order."""
        if self.order is not None:
            tensors = tuple(tensor.index_select(0, self.order) for tensor in tensors)
        parts = zip(self.adapters, *(tensor.split(self.counts) for tensor in tensors), strict=True)
        y = torch.cat([forward(*part) for part in parts])
        return y if self.places is None else y.index_select(0, self.places)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copies and pickles become None: a copied layer is outside the block that set the rows."""
        return type(None), ()
