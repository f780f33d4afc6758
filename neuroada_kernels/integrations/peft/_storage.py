"""What an adapted layer holds of each adapter: its delta, its index, and the plan of the index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from neuroada_kernels.nn._layer import uncast
from neuroada_kernels.plan import check_index, identity_of, make_plan


class DeltaDict(nn.ParameterDict):
    """``delta [d_out, k]`` by adapter; ``model.half()`` does not cast it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(uncast(fn), recurse)  # type: ignore[no-untyped-call]


class IndexDict(BufferDict):
    """``index [d_out, k]`` by adapter: persistent buffers, so that they are saved with delta.

    Each has its plan (see :mod:`neuroada_kernels.plan`), made when the index is set, loaded or
    moved, since a compiled forward cannot; an index that was written in place is noticed by the
    next forward that is not compiled.
    """

    def __init__(self, d_in: int) -> None:
        super().__init__(persistent=True)
        self._d_in = d_in
        self._plans: dict[str, Tensor] = {}
        self._planned: dict[str, tuple[int, ...]] = {}

    def plan(self, adapter: str) -> Tensor | None:
        """The plan of an adapter's index; None where that has no values."""
        if not torch.compiler.is_compiling():
            self._update(adapter)
        return self._plans.get(adapter)

    def _update(self, adapter: str) -> None:
        index = self[adapter]
        if index.is_meta:
            self._forget(adapter)
        elif identity_of(index) != self._planned.get(adapter):
            self._check(index)
            # Made in inference mode, it would be of no use to a later backward.
            with torch.inference_mode(False), torch.no_grad():
                self._plans[adapter] = make_plan(index, self._d_in)
            self._planned[adapter] = identity_of(index)

    def _check(self, index: Tensor) -> None:
        if not index.is_meta:
            check_index(index, self._d_in)

    def _forget(self, adapter: str) -> None:
        self._plans.pop(adapter, None)
        self._planned.pop(adapter, None)

    def __setitem__(self, adapter: str, index: Tensor) -> None:
        self._check(index)
        super().__setitem__(adapter, index)
        self._update(adapter)

    def __setattr__(self, name: str, value: Any) -> None:
        is_index = name in self.__dict__.get("_buffers", ())  # as loading with assign=True sets it
        if is_index:
            self._check(value)
        super().__setattr__(name, value)
        if is_index:
            self._update(name)

    def __delitem__(self, adapter: str) -> None:
        super().__delitem__(adapter)
        self._forget(adapter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(uncast(fn), recurse)
        for adapter in self:
            self._update(adapter)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load, once every index that comes in is found to be valid."""
        errors: list[str] = args[-1]
        incoming = [name for name in self if prefix + name in state_dict]
        for name in incoming:
            try:
                self._check(state_dict[prefix + name])
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix}{name}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in incoming:
            self._update(name)
