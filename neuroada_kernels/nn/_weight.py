"""Access to the weight inside a module with a forward of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuroada_kernels.selection import row_blocks


class BaseWeight:
    """The weight ``W [d_out, d_in]`` of a module, in any storage format.

    Attributes
    ----------
    module : nn.Module
        The module that holds the weight.
    kind : str or None
        The kind of weight, stored in adapter files; None for the weight of a plain linear.
    shape : tuple of int
        ``(d_out, d_in)``.
    dtype, device
        Dtype and device of the result of :meth:`rows`.
    matrix : Tensor or None
        W itself, readable and writable, if its elements are plain numbers.
    """

    matrix: Tensor | None = None
    #: Error text for merging without a ``matrix``: the reason, and what to do instead.
    unmergeable = (
        "into which nothing can be merged exactly, expected merge_requantized(), which says how "
        "large the error is"
    )

    def __init__(
        self,
        module: nn.Module,
        kind: str | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if device.type == "meta":
            raise ValueError("base: its weight is on the meta device, expected values")
        self.module, self.kind, self.shape = module, kind, shape
        self.dtype, self.device = dtype, device

    @property
    def name(self) -> str:
        """The kind of weight for messages."""
        return self.kind or "linear with accelerate's hooks"

    def rows(self, rows: slice) -> Tensor:
        """``W[rows]``, dequantised."""
        raise NotImplementedError

    def entries(self, index: Tensor) -> Tensor:
        """``W[j, index[j, s]]``, ``[d_out, k]``; any value for an empty slot."""
        columns = index.to(self.device).clamp(min=0).long()
        found = torch.empty(columns.shape, dtype=self.dtype, device=self.device)
        for rows in row_blocks(self.shape):
            found[rows] = self.rows(rows).gather(1, columns[rows])
        return found

    def quantise(self, weight: Tensor) -> object:
        """``weight``, float32 ``[d_out, d_in]``, in the format of the module.

        Raises
        ------
        ValueError
            If the format cannot be produced from floating values.
        """
        raise ValueError(f"base: {self.name}, which cannot be quantised again from here")

    def exchange(self, quantised: object) -> object:
        """Store the result of :meth:`quantise` in the module; returns what was there before."""
        raise NotImplementedError


def entries_of(matrix: Tensor, index: Tensor) -> Tensor:
    """``W[j, index[j, s]]``, ``[d_out, k]``, of a plain matrix; any value for an empty slot."""
    return matrix.gather(1, index.to(matrix.device).clamp(min=0).long())


def is_of(value: object, library: str, name: str | None = None) -> bool:
    """Whether a class of ``value`` is defined in ``library``, and named ``name`` if given."""
    return any(
        kind.__module__.partition(".")[0] == library and name in (None, kind.__name__)
        for kind in type(value).__mro__
    )
