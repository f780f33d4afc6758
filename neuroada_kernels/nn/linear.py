"""The drop-in layer, backed by the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroada_kernels import functional, ops
from neuroada_kernels._tracing import unrecorded
from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._named import NamedLayer
from neuroada_kernels.nn._planned import PlannedLayer
from neuroada_kernels.nn._resident import ResidentLinear


class NeuroAdaLinear(NamedLayer, PlannedLayer, ResidentLinear):
    __doc__ = BypassLinear.__doc__

    def _adopt(self, linear: nn.Linear, index: Tensor, delta_dtype: torch.dtype) -> None:
        super()._adopt(linear, index, delta_dtype)
        self._make_plan()

    def _bypass_forward(self, x: Tensor) -> Tensor:
        buffers, parameters = self._buffers, self._parameters
        index = buffers["index"]
        assert index is not None
        plain = ops.is_plain_eager(x)
        compiling = not plain and torch.compiler.is_compiling()
        if not compiling:
            if not self._planned.is_still(index):
                self._follow_index(index)
            if self._strategy == "resident" and buffers["base_values"] is None:
                with self._siblings.lock, unrecorded():
                    self._resume()
        self._check_shapes()
        if buffers["base_values"] is not None:
            return self._resident_forward(x, plain)
        weight, delta = parameters.get("weight"), parameters["delta"]
        assert delta is not None
        keeps = compiling or buffers["columns"] is not None
        return functional.apply_linear(
            x,
            self.weight if weight is None else weight,
            index,
            delta,
            parameters["bias"] if "bias" in parameters else self.bias,  # noqa: SIM401 - dear
            buffers["plan"],
            self._keep(x, plain=plain) if keeps else None,
            plain=plain,
        )

    def _forward_of(self, adapter: str | None, x: Tensor) -> Tensor:
        if adapter is None:
            return F.linear(x, self.weight, self.bias)
        held, plan = self.holder_of(adapter), self.plan_of(adapter)
        return functional.apply_linear(x, self.weight, held.index, held.delta, self.bias, plan)

    def _merge_into_weight(self) -> Tensor:
        return ops.merge_(self.weight, self.index, self.delta)

    def _restore_weight(self, index: Tensor, original: Tensor) -> None:
        ops.unmerge_(self.weight, index, original)
