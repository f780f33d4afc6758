"""The same layer in a few lines of plain PyTorch, to read and to compare with."""

from __future__ import annotations

from torch import Tensor

from neuroada_kernels import functional, reference
from neuroada_kernels.nn._base import BypassLinear


class ReferenceNeuroAdaLinear(BypassLinear):
    __doc__ = BypassLinear.__doc__

    def _bypass_forward(self, x: Tensor) -> Tensor:
        autocast = functional.autocast_dtype(x)
        x = x if autocast is None else x.to(autocast)
        return reference.neuroada_linear(x, self.weight, self.index, self.delta, self.bias)

    def _fold(self) -> Tensor:
        connected = self.index >= 0
        columns = self.index.clamp(min=0).long()
        original = self.weight.gather(1, columns).masked_fill(~connected, 0)
        self.weight.copy_(reference.merged_weight(self.weight, self.index, self.delta))
        return original

    def _unfold(self, original: Tensor) -> None:
        row, slot = (self.index >= 0).nonzero(as_tuple=True)
        self.weight[row, self.index[row, slot].long()] = original[row, slot]
