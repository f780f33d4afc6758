"""The drop-in layer, backed by the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels import functional, ops
from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._resident import ResidentLinear
from neuroada_kernels.plan import make_plan


class NeuroAdaLinear(ResidentLinear):
    __doc__ = BypassLinear.__doc__

    plan: Tensor  # of the index, for the backward; see neuroada_kernels.plan
    _planned: tuple[int, ...] | None  # the index that the plan is of; None if not known

    def _adopt(self, linear: nn.Linear, index: Tensor, delta_dtype: torch.dtype) -> None:
        super()._adopt(linear, index, delta_dtype)
        self._make_plan()

    def _make_plan(self) -> None:
        if self.index.is_meta:
            plan, self._planned = self.index.new_empty(0), None
        else:
            plan, self._planned = make_plan(self.index, self.in_features), _identity(self.index)
        self.register_buffer("plan", plan, persistent=False)

    def _plan_if_changed(self, index: Tensor) -> None:
        if _identity(index) != self._planned:
            self._replan()

    def _replan(self) -> None:
        """Check and plan an index that was replaced, written in place, copied or moved."""
        if not self.index.is_meta:
            self._leave_resident()
            self._check_index(self.index)
            self._make_plan()

    def _bypass_forward(self, x: Tensor) -> Tensor:
        buffers, parameters = self._buffers, self._parameters
        index = buffers["index"]
        assert index is not None
        if not torch.compiler.is_compiling():
            self._plan_if_changed(index)
            if self._strategy == "resident" and buffers["base_values"] is None:
                self._resume()
        if buffers["base_values"] is not None:
            return self._resident_forward(x)
        return functional.apply_linear(
            x, self.weight, index, self.delta, parameters["bias"], buffers["plan"]
        )

    def _fold(self) -> Tensor:
        return ops.merge_(self.weight, self.index, self.delta)

    def _unfold(self, index: Tensor, original: Tensor) -> None:
        ops.unmerge_(self.weight, index, original)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._planned = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._planned = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Now, since a compiled forward cannot.
        if prefix + "index" in state_dict and _identity(self.index) != self._planned:
            self._replan()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "index" and "plan" in self._buffers:
            self._make_plan()


def _identity(tensor: Tensor) -> tuple[int, ...]:
    """Which tensor it is, and how often it was written in place; inference tensors do not count."""
    if tensor.is_meta:
        return (id(tensor),)
    return id(tensor), tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
