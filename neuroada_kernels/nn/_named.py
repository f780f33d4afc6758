"""Several named adapters of one layer.

``index``, ``delta`` and ``plan`` of the layer are those of one adapter, so that its forward
handles only that one. The others are parked in child modules and swapped in when needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels.nn._deferred import Deferred
from neuroada_kernels.nn._layer import BypassLayer, uncast
from neuroada_kernels.nn._rows import BatchRows
from neuroada_kernels.plan import Planned, check_index, count_connections

#: The name of an adapter that was given no other name.
DEFAULT = "default"
#: The name for no adapter at all, as in PEFT.
BASE = "__base__"
#: The tensors of an adapter in a state dict.
_SAVED = ("index", "delta", "original")


class ParkedAdapter(nn.Module):
    """Index, delta and plan of a parked adapter; empty while the layer holds them.

    Attributes
    ----------
    index : Tensor or None
        Buffer, int32, shape ``[out_features, k]``; None while the layer holds it.
    delta : nn.Parameter or None
        Shape ``[out_features, k]``. Its dtype does not change when the model is cast.
    plan : Tensor or None
        Non-persistent buffer: the plan of ``index``, once the layer has made one.
    """

    index: Tensor | None
    delta: nn.Parameter | None
    plan: Tensor | None

    def __init__(
        self, in_features: int, index: Tensor | None = None, delta: Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.register_buffer("index", index)
        self.register_buffer("plan", None, persistent=False)
        frozen = None if delta is None else nn.Parameter(delta, requires_grad=False)
        self.register_parameter("delta", frozen)
        self._facts: dict[str, Any] = {}  # the layer's attributes about the plan

    def exchange(self, layer: NamedLayer) -> None:
        """Swap index, plan and delta with the layer."""
        for kind, names in (("_buffers", ("index", "plan")), ("_parameters", ("delta",))):
            here, there = getattr(self, kind), getattr(layer, kind)
            for name in names:
                if name in there:  # a layer may have no plan
                    here[name], there[name] = there[name], here[name]
        facts = {name: vars(layer).pop(name) for name in layer._plan_facts if name in vars(layer)}
        vars(layer).update(self._facts)
        self._facts = facts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(uncast(fn), recurse)  # type: ignore[no-untyped-call]
        self._facts = {}  # no longer valid after a move
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        """Check and load what is parked here; what the layer holds is loaded by the layer."""
        if self.index is None or self.delta is None:
            others = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in _SAVED}
            super()._load_from_state_dict(others, prefix, *args, **options)
            return
        errors: list[str] = args[-1]
        index = state_dict.get(prefix + "index", self.index)
        delta = state_dict.get(prefix + "delta", self.delta)
        try:
            check_index(index, self.in_features)
            if not index.shape == delta.shape == self.delta.shape:
                shapes = f"{list(index.shape)} and {list(delta.shape)}"
                raise ValueError(
                    f"index, delta: shapes {shapes}, expected {list(self.delta.shape)}"
                )
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix.rstrip('.')}: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **options)


class NamedLayer(BypassLayer):
    """A layer with named adapters: it holds one, the others are parked.

    A layer whose only adapter is ``"default"`` has no child modules for adapters. Any other layer
    has the child ``adapters`` with an entry per adapter, and saves all of them under their names.
    """

    adapters: nn.ModuleDict
    _adapter = DEFAULT  # the one whose index and delta the layer holds

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of the layer's adapters, in the order of addition."""
        return tuple(self.adapters) if self._is_named else (self._adapter,)

    @property
    def active_adapter(self) -> str | None:
        """The adapter that the forward uses; None while the layer computes its base alone."""
        return None if self._disabled else self._adapter

    def holder_of(self, adapter: str) -> Any:
        """The holder of an adapter's ``index``, ``delta`` and ``plan``: the layer or a child."""
        return self if adapter == self._adapter else self.adapters[adapter]

    def plan_of(self, adapter: str) -> Tensor | None:
        """The plan of an adapter, parked or not; None if its index was written since."""
        held = self.holder_of(adapter)
        facts = vars(self) if held is self else held._facts
        planned: Planned = facts.get("_planned", Planned())
        if not torch.compiler.is_compiling() and not planned.is_still(held.index):
            return None
        plan: Tensor = held.plan
        return plan

    @property
    def deltas(self) -> list[nn.Parameter]:
        """The deltas of all adapters."""
        return [self.holder_of(adapter).delta for adapter in self.adapter_names]

    def count_of(self, adapter: str) -> int:
        """The number of connections of an adapter."""
        if adapter == self._adapter:
            return self.connections
        return count_connections(self.holder_of(adapter).index, self.in_features)

    def choose_connections(self, choice: Deferred) -> Tensor:
        """The index of a new adapter, chosen by the base's weight; no adapter may be active."""
        return choice.index_for(self._weight_to_choose_by())

    def park(self, adapter: str, index: Tensor, delta: Tensor) -> None:
        """Add an inactive adapter; index and delta are valid and owned by the layer from now on."""
        if not self._is_named:
            self._name_places()
        self.adapters[adapter] = ParkedAdapter(self.in_features, index, delta)

    def rename(self, adapter: str) -> None:
        """Rename the only adapter."""
        self._adapter = adapter
        self._forget_places()
        if adapter != DEFAULT:
            self._name_places()

    def activate(self, adapter: str | None) -> None:
        """Activate ``adapter``; for None, or a name that is not here, the layer is its base.

        The caller has to settle the siblings afterwards.
        """
        if self.merged:
            raise RuntimeError("adapters: cannot change while merged, unmerge first")
        self._leave_resident()
        self._disabled = adapter not in self.adapter_names
        if adapter is not None and not self._disabled:
            self._take(adapter)
        self._resume()

    def swap_out(self, adapter: str) -> None:
        """Swap in another adapter, if there is one, in place of ``adapter``, which is inactive."""
        others = [name for name in self.adapter_names if name != adapter]
        if adapter == self._adapter and others:
            self._take(others[0])

    def remove(self, adapter: str) -> None:
        """Delete an adapter that is neither active nor the only one."""
        self.swap_out(adapter)
        del self.adapters[adapter]
        if self.adapter_names == (DEFAULT,):
            self._forget_places()

    def split_rows(self, names: Sequence[str]) -> None:
        """Use a named adapter per row of a batch; a name that is not here stands for the base."""
        held = self._adapter
        try:
            for adapter in self.adapter_names:
                if adapter in names:
                    self._take(adapter)  # makes its plan
        finally:
            self._take(held)
        self._rows = BatchRows.of(names, self.adapter_names, self.index.device)

    def join_rows(self) -> None:
        """End the effect of :meth:`split_rows`."""
        self._rows = None

    def release_weight(self) -> None:
        """Release the weight: leave ``"resident"``, forget a merge, and leave the siblings."""
        self._leave_resident()
        self.original = self.merged_index = None
        self._strategy = "bypass"
        self._siblings.layers.discard(self)

    @property
    def _is_named(self) -> bool:
        return "adapters" in self._modules

    def _name_places(self) -> None:
        self.adapters = nn.ModuleDict({self._adapter: ParkedAdapter(self.in_features)})

    def _forget_places(self) -> None:
        self._modules.pop("adapters", None)

    def _take(self, adapter: str) -> None:
        """Swap in ``adapter`` for the one that the layer holds, and plan its index if needed."""
        if adapter != self._adapter:
            for name in (self._adapter, adapter):  # park one, then take the other
                place = self.adapters[name]
                assert isinstance(place, ParkedAdapter)
                place.exchange(self)
            self._adapter = adapter
            self._keep_columns(None)
        self._follow_index(self.index)  # it may have been written while parked

    def _state_repr(self) -> str:
        if not self._is_named:
            return super()._state_repr()
        names = ", ".join(self.adapter_names)
        return f"{super()._state_repr()}, adapters=[{names}], active={self.active_adapter}"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_named:
            for name in _SAVED:
                if prefix + name in destination:
                    value = destination.pop(prefix + name)
                    destination[f"{prefix}adapters.{self._adapter}.{name}"] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the held adapter from under its name; parked adapters load themselves."""
        missing: list[str] = []
        rest = (local_metadata, strict, missing, unexpected_keys, error_msgs)
        if not self._is_named:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            missing_keys += missing
            return
        here = {prefix + name: f"{prefix}adapters.{self._adapter}.{name}" for name in _SAVED}
        originals = {f"{prefix}adapters.{name}.original": name for name in self.adapter_names}
        merged = [name for key, name in originals.items() if key in state_dict]
        if merged not in ([], [self._adapter]):
            words = f"merged by {merged[0]!r}, expected {self._adapter!r}, the active one"
            error_msgs.append(f"{prefix}adapters: {words}")
            return
        unexpected_keys += [key for key in here if strict and key in state_dict]
        renamed = {key: value for key, value in state_dict.items() if key not in here}
        for plain, named in here.items():
            if named in renamed:
                renamed[plain] = renamed[named]
        super()._load_from_state_dict(renamed, prefix, *rest)
        missing_keys += [here.get(key, key) for key in missing]
