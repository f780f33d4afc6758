"""The same layer in a few lines of plain PyTorch, for reading and for comparison."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroada_kernels import functional, reference
from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._named import NamedLayer


class ReferenceNeuroAdaLinear(NamedLayer, BypassLinear):
    __doc__ = BypassLinear.__doc__
    # ``strategy="resident"`` has the same arithmetic here but not the same storage: every forward
    # builds round(W + delta) again, and W is not written.

    def _bypass_forward(self, x: Tensor) -> Tensor:
        self._check_shapes()
        if self.strategy == "resident":
            weight = reference.merged_weight(self.weight, self.index, self.delta)
            return F.linear(x, weight, self.bias)
        return self._forward_of(self._adapter, x)

    def _forward_of(self, adapter: str | None, x: Tensor) -> Tensor:
        if adapter is None:
            return F.linear(x, self.weight, self.bias)
        autocast, held = functional.autocast_dtype(x), self.holder_of(adapter)
        x = x if autocast is None else x.to(autocast)
        return reference.neuroada_linear(x, self.weight, held.index, held.delta, self.bias)

    def _merge_into_weight(self) -> Tensor:
        original = torch.zeros(self.index.shape, dtype=self.weight.dtype, device=self.index.device)
        row, slot = (self.index >= 0).nonzero(as_tuple=True)
        column = self.index[row, slot].long()
        merged = reference.merged_weight(self.weight, self.index, self.delta)
        original[row, slot] = self.weight[row, column]
        self.weight[row, column] = merged[row, column]
        return original

    def _restore_weight(self, index: Tensor, original: Tensor) -> None:
        row, slot = (index >= 0).nonzero(as_tuple=True)
        self.weight[row, index[row, slot].long()] = original[row, slot]
