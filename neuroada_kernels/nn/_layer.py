"""The base class of every layer: its index and delta, checked, moved and loaded; merging."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from neuroada_kernels._dtypes import FLOATING, NAMES, name_of
from neuroada_kernels._sharding import is_managed_by_fsdp, is_sharded, local, split_as, whole
from neuroada_kernels.nn._activations import ActivationSaver
from neuroada_kernels.nn._deferred import CHOSEN, DeferringLayer
from neuroada_kernels.nn._offloaded import check_present
from neuroada_kernels.nn._own import OwnTensors, savable
from neuroada_kernels.nn._rows import BatchRows
from neuroada_kernels.nn._strategy import check_known, refusal
from neuroada_kernels.plan import check_index, check_index_form
from neuroada_kernels.selection import Rows


class BaseForm(NamedTuple):
    """The kind of base, None for a plain linear; dtype and device of its weight's entries."""

    kind: str | None
    dtype: torch.dtype
    device: torch.device


class Averaging(Protocol):
    """Averages the gradients of trained parameters over processes."""

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Average the gradient of ``new`` from now on instead of that of ``old``."""

    def include(self, parameter: nn.Parameter) -> None:
        """Average the gradient of ``parameter`` too."""


def uncast(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn``, from ``Module.to``, without its cast, since the user chooses an adapter's dtypes."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


class BypassLayer(ActivationSaver, OwnTensors, DeferringLayer):
    """k bypass connections per neuron beside a frozen weight, of the layer or of its base."""

    in_features: int
    out_features: int
    index: Tensor
    delta: nn.Parameter
    original: Tensor | None
    merged_index: Tensor | None
    _strategy = "bypass"
    _loading = False  # loading a state dict that was checked as a whole
    _weight_name = "weight"  # its key in a state dict
    _disabled = False  # no active adapter: the layer computes its base alone
    _rows: BatchRows | None = None  # while the rows of a batch use different adapters
    _plan_facts: tuple[str, ...] = ()  # attributes that belong to the plan of an index
    averaging: Averaging | None = None  # that of replicate_trained

    def _check_connections(self, index: Tensor, delta_dtype: torch.dtype) -> None:
        """Raise unless these are valid for :meth:`_hold_connections`."""
        if delta_dtype not in FLOATING:
            raise TypeError(f"delta_dtype: {delta_dtype}, expected {NAMES}")
        if not index.is_meta:
            self._check_index(index)

    def _hold_connections(self, index: Tensor, delta_dtype: torch.dtype) -> None:
        self.register_buffer("index", savable(index.contiguous()))
        zeros = torch.zeros(index.shape, dtype=delta_dtype, device=index.device)
        self.delta = nn.Parameter(savable(zeros))
        self.register_buffer("original", None)
        # The index by which W was changed, merged or resident, in case index is written meanwhile.
        self.register_buffer("merged_index", None, persistent=False)
        # Instance attributes from the start, so that setting them later causes no recompilation.
        self._disabled, self._rows = False, None
        self._start_saving()

    @property
    def k(self) -> int:
        """Connections per neuron."""
        return self.index.shape[1]

    @property
    def merged(self) -> bool:
        """Whether ``delta`` is merged into ``weight``, so that the layer is a plain linear."""
        return self.original is not None

    @property
    def strategy(self) -> str:
        """``"bypass"`` or ``"resident"``; setting ``"auto"`` decides between them.

        While ``"resident"``, the storage of ``weight`` holds ``round(W + delta)``, as in
        mixed-precision training with ``delta`` as float32 master weights. Setting ``"bypass"``
        restores W, bit for bit.

        Raises
        ------
        ValueError
            On setting ``"resident"`` if it is refused, with the reason; nothing changes then.
        """
        return self._strategy

    @strategy.setter
    def strategy(self, strategy: str) -> None:
        self._set_strategy(strategy)

    def _set_strategy(self, strategy: str, reason: str | None = None) -> None:
        """Set the strategy; ``reason`` is why the caller refuses ``"resident"``, or None."""
        check_known(strategy)
        if self._deferred is not None:
            self._deferred = dataclasses.replace(self._deferred, strategy=strategy)
            return
        if strategy != "bypass" and reason is None:
            reason = self._why_not_resident()
        if strategy == "resident" and reason is not None:
            raise ValueError(refusal(reason))
        self.strategy_reason = reason if strategy == "auto" else None
        if strategy == "bypass" or reason is not None:
            self._leave_resident()
            self._strategy = "bypass"
        else:
            self._strategy = "resident"
            self._enter_resident()

    def merge(self) -> None:
        """Add ``delta`` to the chosen entries of ``weight``; their old values are kept.

        Modules that share the weight see the change. Merging twice changes nothing.

        Raises
        ------
        RuntimeError, ValueError
            If there are no connections yet, no adapter is active, or the base has no weight that
            can be written; nothing is changed then.
        """
        if not self.merged:
            self.check_mergeable()
            self._leave_resident()
            with torch.no_grad():
                index = self.index.clone()
                original = self._merge_into_weight()
            # An inference tensor could not be loaded into later.
            with torch.inference_mode(False):
                self.original, self.merged_index = (
                    t.clone() if t.is_inference() else t for t in (original, index)
                )

    def check_mergeable(self) -> None:
        """Raise if :meth:`merge` would."""
        self._check_active()
        self._check_whole()
        self.check_selected()
        self._check_index(self.index)

    def _check_active(self) -> None:
        """Raise if the forward does not use a single active adapter."""
        if self._disabled or self._rows is not None:
            what = "not active" if self._disabled else "another one for each row"
            raise RuntimeError(f"adapter: is {what}, expected an active one to merge")

    def _check_whole(self) -> None:
        """Raise if the weight is offloaded or sharded, even if currently all-gathered."""
        check_present(self)
        if any(map(is_managed_by_fsdp, self.modules())) or any(map(is_sharded, self.parameters())):
            raise ValueError(
                "weight: is sharded over processes, expected a whole one to merge into: save "
                "the adapter, and merge it into the base model"
            )

    def unmerge(self) -> None:
        """Write the kept values back: ``weight`` is as before merging, bit for bit."""
        if self.original is not None and self.merged_index is not None:
            with torch.no_grad():
                self._restore_weight(self.merged_index, self.original)
            self.original = self.merged_index = None

    def merged_again(self) -> Callable[[], None]:
        """A function that undoes :meth:`unmerge`, even if ``delta`` has changed since merging."""
        original, index = self.original, self.merged_index
        if original is None or index is None:
            return lambda: None
        merged = self.base_entries(index)

        def back() -> None:
            if self.original is None:
                with torch.no_grad():
                    self._restore_weight(index, merged)
                self.original, self.merged_index = original, index

        return back

    def base_entries(self, index: Tensor) -> Tensor:
        """``W[j, index[j, s]]`` without the bypass of a resident layer; any value in an empty slot.

        While merged, the unmerged values at the layer's own index are in ``original``.
        """
        raise NotImplementedError

    @property
    def whole_shape(self) -> tuple[int, int]:
        """``[d_out, d_in]`` of the weight, over the shards of all ranks."""
        return self.out_features, self.in_features

    def whole_connections(self) -> tuple[Tensor, Tensor]:
        """``index`` and ``delta`` of the layer, all-gathered if they are sharded."""
        return self.index, whole(self.delta.detach())

    def part_of_connections(self, index: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of another full ``index`` and ``delta``, sharded and placed as the layer's are."""
        if is_sharded(self.delta):
            return index.to(self.index.device, copy=True), split_as(delta, self.delta)
        device = self.base_form().device
        return index.to(device, copy=True), delta.to(device, copy=True)

    def base_form(self) -> BaseForm:
        """The form of the layer's base weight."""
        raise NotImplementedError

    def _state_repr(self) -> str:
        return (
            f", delta_dtype={name_of(self.delta.dtype)}"
            + (", merged" if self.merged else "")
            + (f", strategy={self._strategy}" if self._strategy != "bypass" else "")
            + (f", strategy=bypass since {self.strategy_reason}" if self.strategy_reason else "")
            + self._saving_repr()
        )

    def _why_not_resident(self) -> str | None:
        raise NotImplementedError

    def _weight_to_choose_by(self) -> Tensor | Rows:
        """W ``[d_out, d_in]``, or a reader of its rows; called while it holds no bypass."""
        raise NotImplementedError

    def _follow_index(self, index: Tensor) -> None:
        """Called if ``index``, the layer's own, may have changed; does nothing by default."""

    def _enter_resident(self) -> None:
        """Write ``W + delta`` into the weight, in layers that support ``"resident"``."""

    def _leave_resident(self) -> None:
        """Restore W."""

    def _resume(self) -> None:
        """Write ``W + delta`` again after W was restored temporarily."""

    def _merge_into_weight(self) -> Tensor:
        raise NotImplementedError

    def _restore_weight(self, index: Tensor, original: Tensor) -> None:
        raise NotImplementedError

    def _check_index(self, index: Tensor) -> None:
        check_index_form(index, self.in_features)
        delta = self._parameters.get("delta")
        # Outside a forward ZeRO-3 leaves delta with shape [0], so that k is 0 and no index fits.
        k = index.shape[1] if delta is None else local(delta).shape[-1]
        if index.shape != (self.out_features, k):
            expected = f"[{self.out_features}, {'k' if delta is None else k}]"
            raise ValueError(f"index: shape {list(index.shape)}, expected {expected}")
        check_index(index, self.in_features)

    def _check_index_device(self, index: Tensor) -> None:
        """Raise if ``delta`` is on another device, unless it is sharded or on the meta device."""
        delta = self._parameters["delta"]
        assert delta is not None
        if index.device != delta.device and not (delta.is_meta or is_sharded(delta)):
            raise ValueError(f"index: on {index.device}, expected {delta.device}, as delta")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "index" and "index" in self.__dict__.get("_buffers", ()):
            self._check_index(value)
            if not self._loading:
                self._check_index_device(value)
            if self.merged and not self._loading:
                raise RuntimeError("index: cannot change while merged, unmerge first")
            value = savable(value.contiguous())
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move everything, but cast neither ``delta``, whose dtype the user chose, nor an index."""
        keeper, order = nn.Module(), list(self._buffers)
        delta = self._parameters.pop("delta")
        keeper.register_parameter("delta", delta)
        names = ("index", "merged_index", "plan", "columns", "kept_index")
        kept = [name for name in names if name in self._buffers]
        for name in kept:
            keeper.register_buffer(name, self._buffers.pop(name))
        try:
            keeper._apply(uncast(fn))
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["delta"] = keeper._parameters["delta"]
            self._follow_delta(delta)
            self._buffers.update(keeper._buffers)
            for name in order:  # AveragedModel pairs buffers with a copy's by order
                self._buffers[name] = self._buffers.pop(name)
            self._share_columns()
            self._mark_unchosen()
        return self

    def _follow_delta(self, old: nn.Parameter | None) -> None:
        """Have the gradient of a parameter that replaces ``old`` averaged as that one's was."""
        new = self._parameters.get("delta")
        if self.averaging is not None and old is not None and new is not None and new is not old:
            self.averaging.replace(old, new)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        old = self._parameters.get("delta")
        super().register_parameter(name, param)
        self._follow_delta(old)

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
        """Check everything first, then load, with the merged state as it was saved."""
        given = state_dict
        state_dict = self._without_unchosen(given, prefix)
        names = (self._weight_name, "bias", "index", "delta", "original")
        incoming = {n: state_dict[prefix + n] for n in names if prefix + n in state_dict}
        try:
            self._check_incoming(incoming)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        if "original" in incoming:
            if self.original is None:
                self.original = torch.zeros_like(self.delta, dtype=self.base_form().dtype)
        elif self._weight_name in incoming:
            self.original = self.merged_index = None
        self._loading = True
        try:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        finally:
            del self._loading
        if state_dict is not given:
            missing_keys[:] = [k for k in missing_keys if k.removeprefix(prefix) not in CHOSEN]
        if {"index", "delta"} <= incoming.keys() and not self.index.is_meta:
            self.drop_deferral()
        if "original" in incoming:
            self.merged_index = self.index.clone()

    def _held(self, name: str) -> Tensor | None:
        """The layer's tensor for this name of a state dict; None if its shape is unknown."""
        held: Tensor | None = getattr(self, name)
        return held

    def _check_incoming(self, incoming: dict[str, Tensor]) -> None:
        """Raise if loading these would leave the layer with a wrong index or a wrong W."""
        for name, tensor in incoming.items():
            held = self.index if name == "original" else self._held(name)
            if held is not None and tensor.shape != held.shape:
                raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {list(held.shape)}")
        if "index" in incoming:
            self._check_index(incoming["index"])
        if "original" in incoming:
            missing = {self._weight_name, "index", "delta"} - incoming.keys()
            if missing:
                names = ", ".join(sorted(missing))
                raise ValueError(f"original: without {names}, expected all of a merged layer")
        elif self.merged and self._weight_name not in incoming:
            for name in ("index", "delta"):
                if name in incoming:
                    raise ValueError(f"{name}: cannot change while merged, unmerge first")
