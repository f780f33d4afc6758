"""The weight inside a module whose forward is not ours, as a layer reads and writes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuroada_kernels.selection import row_blocks


class BaseWeight:
    """The weight ``W [d_out, d_in]`` in a module, however the module keeps it.

    Attributes
    ----------
    module : nn.Module
        Whose weight it is.
    kind : str or None
        What it is, in words that an adapter's file keeps; None for the values of a plain linear.
    shape : tuple of int
        ``(d_out, d_in)``.
    dtype, device
        Of what :meth:`rows` returns.
    matrix : Tensor or None
        W itself, to be read and written, where it is plain numbers.
    """

    matrix: Tensor | None = None
    #: Why nothing is merged where there is no ``matrix``, and what to do instead.
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
        """What it is, for people."""
        return self.kind or "linear with accelerate's hooks"

    def rows(self, rows: slice) -> Tensor:
        """``W[rows]``, dequantised."""
        raise NotImplementedError

    def entries(self, index: Tensor) -> Tensor:
        """``W[j, index[j, s]]``, ``[d_out, k]``; of an empty slot any."""
        columns = index.to(self.device).clamp(min=0).long()
        found = torch.empty(columns.shape, dtype=self.dtype, device=self.device)
        for rows in row_blocks(self.shape):
            found[rows] = self.rows(rows).gather(1, columns[rows])
        return found

    def quantise(self, weight: Tensor) -> object:
        """``weight``, float32 ``[d_out, d_in]``, in the form in which the module keeps it.

        Raises
        ------
        ValueError
            If there is no way back from numbers to that form.
        """
        raise ValueError(f"base: {self.name}, which cannot be quantised again from here")

    def exchange(self, quantised: object) -> object:
        """Put what :meth:`quantise` gave into the module; what was there before."""
        raise NotImplementedError


def entries_of(matrix: Tensor, index: Tensor) -> Tensor:
    """``W[j, index[j, s]]``, ``[d_out, k]``, of plain numbers; of an empty slot any."""
    return matrix.gather(1, index.to(matrix.device).clamp(min=0).long())


def is_of(value: object, library: str, name: str | None = None) -> bool:
    """Whether a type of ``value`` is of that library, and called ``name``."""
    return any(
        kind.__module__.partition(".")[0] == library and name in (None, kind.__name__)
        for kind in type(value).__mro__
    )
