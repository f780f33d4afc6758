"""The strategy ``resident``: while active, the storage of W holds ``round(W + delta)``.

``base_values`` keeps the unpatched values of W at the chosen entries. It is set exactly while W is
patched. Patching and restoring both assign values computed from ``base_values``, so both are
idempotent.

Before a compiled forward or the replay of a CUDA graph no Python code can check whether ``delta``
has changed, so there W is patched in every forward. An exported program, which runs without the
layer, writes no weight.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes

from neuroada_kernels import functional, ops, reference
from neuroada_kernels._sharding import is_managed_by_fsdp
from neuroada_kernels._tracing import is_exported
from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._own import wrong_shape
from neuroada_kernels.nn._strategy import refusal, why_not_resident
from neuroada_kernels.ops._library import PLAIN_TYPES, why_not_served

#: The layers that are or were resident, including copies.
_layers: weakref.WeakSet[ResidentLinear] = weakref.WeakSet()
_FUNCTIONALIZE = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)


def _below_functionalization() -> AbstractContextManager[object]:
    """Excludes Functionalize, which export and AOTAutograd enable; it rejects ops that write."""
    return torch._C._ExcludeDispatchKeyGuard(_FUNCTIONALIZE)


@functools.cache
def _follow_optimizers() -> None:
    """Increment the version of every delta after an optimiser step, which may not do so itself.

    Torch's fused optimisers do not, nor do optimisers that write through ``.data`` or a pointer.
    """
    register_optimizer_step_post_hook(_raise_versions)


def _raise_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in list(_layers):
        if layer.base_values is not None and id(layer.delta) in stepped:
            torch.autograd.graph.increment_version(layer.delta)


def _is_captured(weight: Tensor) -> bool:
    """Whether a CUDA graph records writes to ``weight`` now, to replay them with other deltas."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


class _Seen:
    """The identity, address and version of a tensor when it was last checked.

    The storage is kept alive, so that memory assigned through ``.data`` later cannot reuse its
    address and match.
    """

    __slots__ = ("address", "memory", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.address, self.memory = tensor.data_ptr(), tensor.untyped_storage()
        self.version = None if tensor.is_inference() else tensor._version

    def is_still(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and not tensor.is_inference()  # those have no version
            and self.version == tensor._version
            and self.address == tensor.data_ptr()
        )


class ResidentLinear(BypassLinear):
    """A layer that can keep ``round(W + delta)`` in its weight.

    Attributes
    ----------
    base_values : Tensor or None
        Non-persistent buffer, shape ``[out_features, k]``: while resident, the values of ``weight``
        without the bypass.
    """

    base_values: Tensor | None
    _seen: tuple[_Seen, _Seen] | None = None  # delta and weight when W was last patched
    _owner: int | None = None  # id of the layer that restores W in __del__; not a shallow copy
    _in_graph = False  # a CUDA graph may change delta without raising its version

    def _adopt(self, linear: nn.Linear, index: Tensor, delta_dtype: torch.dtype) -> None:
        super()._adopt(linear, index, delta_dtype)
        self.register_buffer("base_values", None, persistent=False)

    def _why_not_resident(self) -> str | None:
        reason = super()._why_not_resident()
        if reason is not None:
            return reason
        if self._rows is not None:
            return "the rows of a batch take different adapters"
        if is_managed_by_fsdp(self):  # a forward may have left the weight all-gathered
            return "weight is sharded by fully_shard"
        address = self.weight.data_ptr()
        for other in list(_layers):
            held = other.base_values is not None and other.weight.data_ptr() == address
            if held and other._buffers is not self._buffers:  # not a shallow copy
                return "another adapter is resident in this weight"
        return why_not_served("patch_", self.weight)

    def _enter_resident(self) -> None:
        if self.base_values is not None or self.merged or self._disabled:
            return
        self._check_index(self.index)
        self._owner = id(self)
        _follow_optimizers()
        _layers.add(self)
        with torch.inference_mode(False), torch.no_grad():
            self.merged_index = self.index.clone()
            # Saved before anything is written, so that an interrupt loses nothing.
            self.base_values = ops.gather(self.weight, self.merged_index)
        self._seen = None
        self._patch(self.weight, self.delta)

    def _leave_resident(self) -> None:
        if self.base_values is None or self.merged_index is None:
            return
        self._check_shape(self.weight)
        with torch.no_grad():
            ops.unmerge_(self.weight, self.merged_index, self.base_values)
        self.base_values = self.merged_index = self._seen = None

    def _check_shape(self, weight: Tensor) -> None:
        """Raise if ``weight`` has not the shape to write the kept values into."""
        expected = (self.out_features, self.in_features)
        if weight.shape != expected:
            raise wrong_shape("weight", weight, expected)

    def _resume(self) -> None:
        """Patch W again after a temporary restore: by merging, loading or moving."""
        if self._strategy != "resident" or self.weight.is_meta or functional.is_transformed():
            return
        reason = self._why_not_resident()
        if reason is None:
            return self._enter_resident()
        warnings.warn(f"{refusal(reason)}; it is 'bypass' from now on", stacklevel=4)
        self._strategy, self.strategy_reason = "bypass", reason

    def _resident_forward(self, x: Tensor, plain: bool) -> Tensor:
        # Module.__getattr__ would cost more than the checks.
        buffers, parameters = self._buffers, self._parameters
        index, weight, delta = buffers["index"], parameters["weight"], parameters["delta"]
        assert index is not None
        assert weight is not None
        assert delta is not None
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 - dear
        if not plain and functional.is_transformed():
            return F.linear(x, reference.merged_weight(self._traceable_base(), index, delta), bias)
        if type(weight) not in PLAIN_TYPES or (not plain and is_exported()):
            return self._exported_forward(x)
        if not plain and torch.compiler.is_compiling():
            self._write(weight, delta)
        else:
            seen = self._seen
            if not self._is_patched(weight, delta):
                # Another thread may have patched W meanwhile. Patching replaces `_seen`: if it is
                # unchanged, the check above still holds.
                with self._siblings.lock:
                    if self._seen is seen or not self._is_patched(weight, delta):
                        self._patch(weight, delta)
        kept = None if plain and buffers["columns"] is None else self._keep(x, plain=plain)
        return functional.apply_resident(x, weight, index, delta, bias, kept, plain=plain)

    def _exported_forward(self, x: Tensor) -> Tensor:
        """A linear by ``round(W + delta)``, whichever delta the weight was patched with last.

        The bypass adds the difference to the patched weight, zero if ``delta`` has not changed
        since; its gradient is the gradient of ``delta``.
        """
        index, base_values, plan = self.merged_index, self.base_values, self._buffers["plan"]
        assert index is not None
        assert base_values is not None
        weight, delta = self.weight, self.delta
        dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
        wanted = (base_values.to(dtype) + delta.detach()).to(weight.dtype)
        # Straight-through gradient: it reaches delta unchanged, past the rounding.
        lacking = wanted.to(dtype) - ops.gather(weight, index) + (delta - delta.detach())
        return functional.apply_linear(x, weight, index, lacking, self.bias, plan, self._keep(x))

    def _is_patched(self, weight: Tensor, delta: Tensor) -> bool:
        seen = self._seen
        if seen is None or self._in_graph or _is_captured(weight):
            return False
        return seen[0].is_still(delta) and seen[1].is_still(weight)

    def _write(self, weight: Tensor, delta: Tensor) -> None:
        buffers = self._buffers
        index, base_values = buffers["merged_index"], buffers["base_values"]
        assert index is not None
        assert base_values is not None
        ops.patch_(weight, index, delta, base_values)

    def _patch(self, weight: Tensor, delta: Tensor) -> None:
        """Write ``W + delta``; pending backwards that saved W then raise by its version.

        If ``delta`` has not changed, the written values are the same, and the version stays.
        """
        seen = self._seen
        changed = seen is None or not seen[0].is_still(delta)
        if seen is not None and not seen[1].is_still(weight):
            self._check_weight(weight, seen[1], changed)
        if _is_captured(weight):
            self._in_graph = True
        self._write(weight if changed else weight.data, delta)
        # Bypasses Module.__setattr__ and its overrides, which would cost nine calls per step.
        self.__dict__["_seen"] = _Seen(delta), _Seen(weight)

    def _check_weight(self, weight: Tensor, seen: _Seen, delta_changed: bool) -> None:
        """Raise if other code wrote the patched entries, or replaced the weight."""
        if seen.tensor() is not weight:
            raise RuntimeError(
                "weight: is another one than that which holds W + delta, expected strategy "
                "'bypass' where the weight is replaced"
            )
        if delta_changed:
            return  # the values that the old delta gave are unknown
        assert self.merged_index is not None
        held = ops.gather(weight, self.merged_index)
        expected = self._patched_values()
        if not bool((held.eq(expected) | (held.isnan() & expected.isnan())).all()):
            raise RuntimeError(
                "weight: chosen entries were written while they hold W + delta, expected strategy "
                "'bypass' where the weight is written"
            )

    def _patched_values(self) -> Tensor:
        """``round(base_values + delta)``, zero in a slot without a connection."""
        assert self.base_values is not None
        assert self.merged_index is not None
        every = torch.arange(self.k, dtype=torch.int32, device=self.index.device)
        slots = torch.where(self.merged_index >= 0, every, -1)
        return reference.merged_weight(self.base_values, slots, self.delta.detach())

    def base_entries(self, index: Tensor) -> Tensor:
        entries = super().base_entries(index)
        if self.base_values is None or self.merged_index is None:
            return entries
        index = index.to(self.weight.device)
        for s in range(self.k):  # replace patched entries, one slot at a time
            same = index == self.merged_index[:, s : s + 1]
            entries = torch.where(same, self.base_values[:, s : s + 1], entries)
        return entries

    def _without_bypass(self) -> Tensor:
        """A copy of W without the bypass."""
        assert self.base_values is not None
        assert self.merged_index is not None
        with torch.no_grad():
            weight = self.weight.detach().clone()
            ops.unmerge_(weight, self.merged_index, self.base_values)
        return weight

    def _traceable_base(self) -> Tensor:
        """The same by torch ops, for its transforms; empty slots write into an extra column."""
        index, base = self.merged_index, self.base_values
        assert index is not None
        assert base is not None
        weight = self.weight.detach()
        column = torch.where(index < 0, weight.shape[1], index).long()
        return F.pad(weight, (0, 1)).scatter(1, column, base)[:, :-1]

    def __setattr__(self, name: str, value: Any) -> None:
        if self._put_into_replica(name, value):
            return
        buffers = self.__dict__.get("_buffers", {})
        if name not in ("index", "weight") or buffers.get("base_values") is None:
            super().__setattr__(name, value)
            return
        if name == "index":
            self._check_index(value)
            if not self._loading:
                self._check_index_device(value)
        elif isinstance(value, Tensor):
            self._check_shape(value)
            if (reason := why_not_resident(value)) is not None:
                raise ValueError(f"{refusal(reason)}; set 'bypass' before the weight is replaced")
        self._leave_resident()
        super().__setattr__(name, value)
        self._resume()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._seen = None  # it would keep the old storage alive
        super()._apply(fn, recurse)
        if self.weight.is_meta:  # there is nothing left to restore
            self.base_values = None
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Save W without the bypass: a copy, or with ``keep_vars`` the restored W itself."""
        if keep_vars:
            self._leave_resident()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base_values is not None:
            destination[prefix + "weight"] = self._without_bypass()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict:
            self._leave_resident()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.base_values is None:
            self._resume()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        is_shallow = any(other._buffers is self._buffers for other in list(_layers))
        self._owner = None if is_shallow else id(self)
        _layers.add(self)

    def __del__(self) -> None:
        """Restore W for modules that share it, even in the middle of a compilation."""
        if self.__dict__.get("_owner") == id(self) and not sys.is_finalizing():
            # A weight that was replaced by one of another shape has nothing to restore.
            suppressed = contextlib.suppress(ValueError)
            with _disable_current_modes(), _below_functionalization(), suppressed:
                self._leave_resident()
