"""Several adapters of one layer, by name.

``index``, ``delta`` and ``plan`` of the layer are those of one adapter, so that its forward knows
of no other. The rest are parked beside it and change places with it.
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

#: The adapter of a layer that was given no other name.
DEFAULT = "default"
#: What stands for no adapter at all, as in PEFT.
BASE = "__base__"
#: What a layer saves of an adapter.
_SAVED = ("index", "delta", "original")


class ParkedAdapter(nn.Module):
    """Index, delta and plan of an adapter that its layer does not hold itself; or their place.

    Attributes
    ----------
    index : Tensor or None
        Buffer, int32, shape ``[out_features, k]``; None while the layer has it.
    delta : nn.Parameter or None
        Shape ``[out_features, k]``. It stays of its dtype when the model is cast.
    plan : Tensor or None
        Buffer, not saved: that of ``index``, once the layer has made one.
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
        self._facts: dict[str, Any] = {}  # what the layer knows of the plan

    def exchange(self, layer: NamedLayer) -> None:
        """Give the layer what is here, and take what it has."""
        for kind, names in (("_buffers", ("index", "plan")), ("_parameters", ("delta",))):
            here, there = getattr(self, kind), getattr(layer, kind)
            for name in names:
                if name in there:  # a layer without a plan has none to keep
                    here[name], there[name] = there[name], here[name]
        facts = {name: vars(layer).pop(name) for name in layer._plan_facts if name in vars(layer)}
        vars(layer).update(self._facts)
        self._facts = facts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(uncast(fn), recurse)  # type: ignore[no-untyped-call]
        self._facts = {}  # of another index and plan, or of memory that has no values now
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        """Load what is here, once it is found to be valid; the rest is the layer's to load."""
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
    """A layer that has adapters by name: one that it holds, others that it can take up.

    A layer with no other adapter than ``"default"`` has no children for them. Any other has the
    child ``adapters``, with an entry for each, and saves all of them under their names there.
    """

    adapters: nn.ModuleDict
    _adapter = DEFAULT  # the one whose index and delta the layer holds

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that the layer has, in the order in which they came."""
        return tuple(self.adapters) if self._is_named else (self._adapter,)

    @property
    def active_adapter(self) -> str | None:
        """The one that the forward goes through; None while the layer is its base."""
        return None if self._idle else self._adapter

    def holder_of(self, adapter: str) -> Any:
        """What has the ``index``, ``delta`` and ``plan`` of an adapter: the layer, or its place."""
        return self if adapter == self._adapter else self.adapters[adapter]

    def plan_of(self, adapter: str) -> Tensor | None:
        """The plan of an adapter, parked or not; None where its index was written since."""
        held = self.holder_of(adapter)
        facts = vars(self) if held is self else held._facts
        planned: Planned = facts.get("_planned", Planned())
        if not torch.compiler.is_compiling() and not planned.is_still(held.index):
            return None
        plan: Tensor = held.plan
        return plan

    @property
    def deltas(self) -> list[nn.Parameter]:
        """Those of all adapters."""
        return [self.holder_of(adapter).delta for adapter in self.adapter_names]

    def count_of(self, adapter: str) -> int:
        """Connections of an adapter."""
        if adapter == self._adapter:
            return self.connections
        return count_connections(self.holder_of(adapter).index, self.in_features)

    def choose_connections(self, choice: Deferred) -> Tensor:
        """The index of another adapter, while no adapter is active: by the weight of the base."""
        return choice.index_for(self._weight_to_choose_by())

    def park(self, adapter: str, index: Tensor, delta: Tensor) -> None:
        """Add an adapter, which is not active; index and delta are valid and the layer's own."""
        if not self._is_named:
            self._name_places()
        self.adapters[adapter] = ParkedAdapter(self.in_features, index, delta)

    def rename(self, adapter: str) -> None:
        """Call the only adapter so."""
        self._adapter = adapter
        self._forget_places()
        if adapter != DEFAULT:
            self._name_places()

    def seat(self, adapter: str | None) -> None:
        """Let the forward go through ``adapter``; without it, or for None, the layer is its base.

        Siblings have to settle afterwards.
        """
        if self.merged:
            raise RuntimeError("adapters: cannot change while merged, unmerge first")
        self._leave_resident()
        self._idle = adapter not in self.adapter_names
        if adapter is not None and not self._idle:
            self._take(adapter)
        self._resume()

    def step_aside(self, adapter: str) -> None:
        """Hold another adapter than this one, where there is any; this one is not active."""
        others = [name for name in self.adapter_names if name != adapter]
        if adapter == self._adapter and others:
            self._take(others[0])

    def remove(self, adapter: str) -> None:
        """Delete an adapter that is not active and not the only one."""
        self.step_aside(adapter)
        del self.adapters[adapter]
        if self.adapter_names == (DEFAULT,):
            self._forget_places()

    def split_rows(self, names: Sequence[str]) -> None:
        """Let each row of a batch go through the adapter of its name, where that is here."""
        held = self._adapter
        try:
            for adapter in self.adapter_names:
                if adapter in names:
                    self._take(adapter)  # so that it has a plan
        finally:
            self._take(held)
        self._rows = BatchRows.of(names, self.adapter_names, self.index.device)

    def join_rows(self) -> None:
        """End that."""
        self._rows = None

    def let_go(self) -> None:
        """Leave the weight to others: not resident, never to be unmerged, nobody's sibling."""
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
        """Hold ``adapter`` instead of the one that the layer holds, with a plan that is its own."""
        if adapter != self._adapter:
            for name in (self._adapter, adapter):  # to its place, and from its place
                place = self.adapters[name]
                assert isinstance(place, ParkedAdapter)
                place.exchange(self)
            self._adapter = adapter
            self._keep_columns(None)
        self._follow_index(self.index)  # which may have been written while it was parked

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
        """Load what the layer holds from under its name; parked adapters load themselves."""
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
