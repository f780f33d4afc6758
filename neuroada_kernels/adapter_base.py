"""The base weight of a module as an adapter file describes it, with its fingerprint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from neuroada_kernels._dtypes import name_of
from neuroada_kernels.adapter_file import EntryHash, Fingerprint
from neuroada_kernels.nn._layer import BypassLayer
from neuroada_kernels.nn._weight import entries_of
from neuroada_kernels.nn.foreign import base_weight
from neuroada_kernels.targets import is_foreign


@dataclass(frozen=True)
class Base:
    """What an adapter file says of a module's base weight, and how its entries are read."""

    kind: str | None
    shape: tuple[int, int]
    dtype: str
    entries: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> Base:
        """The base of a module that is adapted or can be, without any bypass."""
        if isinstance(module, BypassLayer):
            form = module.base_form()
            return cls(form.kind, module.whole_shape, name_of(form.dtype), module.base_entries)
        if is_foreign(module):
            found = base_weight(module)
            return cls(found.kind, found.shape, name_of(found.dtype), found.entries)
        weight = module.get_parameter("weight").detach()
        d_out, d_in = weight.shape
        entries = functools.partial(entries_of, weight)
        return cls(None, (d_out, d_in), name_of(weight.dtype), entries)

    def fingerprint(self, index: Tensor, values: Tensor | None = None) -> Fingerprint:
        """The fingerprint at ``index``; ``values``, if given, replace the weight's own entries."""
        values = self.entries(index) if values is None else values
        if values.is_meta:
            raise ValueError("model: has weights on the meta device, expected values")
        hashed = EntryHash()
        hashed.update(values.cpu(), index.cpu())
        return Fingerprint(self.shape, self.dtype, hashed.hexdigest(), self.kind)
