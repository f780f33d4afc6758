"""What every layer is: an index and a delta, checked, moved and loaded; the merged state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuroada_kernels._dtypes import FLOATING, NAMES, name_of
from neuroada_kernels._sharding import is_managed_by_fsdp, is_sharded, local, split_as, whole
from neuroada_kernels.nn._activations import ActivationSaver
from neuroada_kernels.nn._deferred import Deferred
from neuroada_kernels.nn._offloaded import check_present
from neuroada_kernels.nn._own import OwnTensors
from neuroada_kernels.nn._rows import BatchRows
from neuroada_kernels.nn._strategy import check_known, refusal
from neuroada_kernels.plan import check_index, check_index_form, count_connections
from neuroada_kernels.selection import Rows


class BaseForm(NamedTuple):
    """The kind of base, None for a plain linear; dtype and device of the entries of its weight."""

    kind: str | None
    dtype: torch.dtype
    device: torch.device


def uncast(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn``, as ``Module.to`` has it, without the cast: an adapter's dtypes are chosen."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


class BypassLayer(ActivationSaver, OwnTensors):
    """k bypass connections a neuron beside a frozen weight, wherever that is."""

    in_features: int
    out_features: int
    index: Tensor
    delta: nn.Parameter
    original: Tensor | None
    merged_index: Tensor | None
    strategy_reason: str | None = None
    _strategy = "bypass"
    _loading = False  # a state dict that was checked as a whole
    _deferred: Deferred | None = None  # while index and delta wait for the weight's values
    _weight_name = "weight"  # in a state dict
    _idle = False  # the layer is its base: its adapter is not the active one, or disabled
    _rows: BatchRows | None = None  # while the rows of a batch take different adapters
    _plan_facts: tuple[str, ...] = ()  # attributes that belong to the plan of an index

    def _check_connections(self, index: Tensor, delta_dtype: torch.dtype) -> None:
        """Raise unless :meth:`_hold_connections` may have these."""
        if delta_dtype not in FLOATING:
            raise TypeError(f"delta_dtype: {delta_dtype}, expected {NAMES}")
        if not index.is_meta:
            self._check_index(index)

    def _hold_connections(self, index: Tensor, delta_dtype: torch.dtype) -> None:
        self.register_buffer("index", index.contiguous())
        self.delta = nn.Parameter(torch.zeros(index.shape, dtype=delta_dtype, device=index.device))
        self.register_buffer("original", None)
        # Where W was changed, merged or resident, whatever is written into index meanwhile.
        self.register_buffer("merged_index", None, persistent=False)
        # The layer's own from the start, so that setting them later compiles nothing again.
        self._idle, self._rows = False, None
        self._start_saving()

    @property
    def k(self) -> int:
        """Connections a neuron."""
        return self.index.shape[1]

    @property
    def connections(self) -> int:
        """How many the layer has, or will have."""
        if self._deferred is not None:
            return self._deferred.connections(self.out_features)
        return count_connections(self.index, self.in_features)

    def select_connections(self, reason: str | None = None) -> bool:
        """Choose what waited for the weight's values; False where it still has none."""
        return True

    @property
    def deferred(self) -> bool:
        """Whether the connections are still to be chosen."""
        return self._deferred is not None

    def drop_deferral(self) -> None:
        """Choose nothing any more, since index and delta were loaded.

        The strategy stays ``"bypass"``, and ``strategy_reason`` says why: who else reads the
        weight is not known here, but to :func:`neuroada_kernels.set_strategy`.
        """
        if self._deferred is None:  # nothing is written then, for which a model would compile again
            return
        if self._deferred.strategy != "bypass":
            self.strategy_reason = "its connections were loaded; set_strategy takes it up"
        self._deferred = None

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the bypass, so that the layer is a plain linear."""
        return self.original is not None

    @property
    def strategy(self) -> str:
        """``"bypass"`` or ``"resident"``; setting ``"auto"`` decides between them.

        While ``"resident"``, the storage of ``weight`` holds ``round(W + delta)``: the numbers of
        mixed-precision training with ``delta`` as float32 master. Setting ``"bypass"`` restores W,
        bit for bit.

        Raises
        ------
        ValueError
            On setting ``"resident"`` where it is refused, with the reason; nothing changes then.
        """
        return self._strategy

    @strategy.setter
    def strategy(self, strategy: str) -> None:
        self._set_strategy(strategy)

    def _set_strategy(self, strategy: str, reason: str | None = None) -> None:
        """Set the strategy; ``reason`` is one against ``"resident"`` that only the caller sees."""
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
        """Add ``delta`` into the chosen entries of ``weight``; the values they had are kept.

        Where another module shares the weight, it sees the change. Merging twice changes nothing.

        Raises
        ------
        RuntimeError, ValueError
            If there are no connections yet, or the base has no weight to write; then nothing is
            changed.
        """
        if not self.merged:
            self.check_mergeable()
            self._leave_resident()
            with torch.no_grad():
                index = self.index.clone()
                original = self._fold()
            # An inference tensor could not be loaded into later.
            with torch.inference_mode(False):
                self.original, self.merged_index = (
                    t.clone() if t.is_inference() else t for t in (original, index)
                )

    def check_mergeable(self) -> None:
        """Raise where :meth:`merge` would."""
        self._check_active()
        self._check_whole()
        self.check_selected()
        self._check_index(self.index)

    def _check_active(self) -> None:
        """Raise where the forward does not go through the layer's one adapter."""
        if self._idle or self._rows is not None:
            what = "not active" if self._idle else "another one for each row"
            raise RuntimeError(f"adapter: is {what}, expected an active one to merge")

    def _check_whole(self) -> None:
        """Raise where the weight is in parts, be it that a forward has left it whole for now."""
        check_present(self)
        if any(map(is_managed_by_fsdp, self.modules())) or any(map(is_sharded, self.parameters())):
            raise ValueError(
                "weight: is sharded over processes, expected a whole one to merge into: save "
                "the adapter, and merge it into the base model"
            )

    def unmerge(self) -> None:
        """Write the kept values back: ``weight`` is what it was before merging, bit for bit."""
        if self.original is not None and self.merged_index is not None:
            with torch.no_grad():
                self._unfold(self.merged_index, self.original)
            self.original = self.merged_index = None

    def merged_again(self) -> Callable[[], None]:
        """What undoes :meth:`unmerge`, whatever has happened to ``delta`` since merging."""
        original, index = self.original, self.merged_index
        if original is None or index is None:
            return lambda: None
        merged = self.base_entries(index)

        def back() -> None:
            if self.original is None:
                with torch.no_grad():
                    self._unfold(index, merged)
                self.original, self.merged_index = original, index

        return back

    def _defer(self, choice: Deferred) -> None:
        """Choose later, where the index has no values."""
        if self.index.is_meta:
            self._deferred = choice

    def check_selected(self) -> None:
        """Raise where the connections are still to be chosen."""
        if self._deferred is not None:
            raise RuntimeError(
                "index: not chosen yet, since weight was on the meta device; "
                "neuroada_kernels.select_connections(model) chooses once it has values"
            )

    def base_entries(self, index: Tensor) -> Tensor:
        """``W[j, index[j, s]]`` without the bypass of a resident layer; of an empty slot any.

        While merged, ``original`` holds those of the layer's own index.
        """
        raise NotImplementedError

    @property
    def whole_shape(self) -> tuple[int, int]:
        """``[d_out, d_in]`` of the weight, all processes' parts together."""
        return self.out_features, self.in_features

    def whole_connections(self) -> tuple[Tensor, Tensor]:
        """``index`` and ``delta`` of the layer, gathered from the processes that hold its parts."""
        return self.index, whole(self.delta.detach())

    def part_of_connections(self, index: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Of another ``index`` and ``delta`` for the whole layer, what this process holds."""
        if is_sharded(self.delta):
            return index.to(self.index.device, copy=True), split_as(delta, self.delta)
        device = self.base_form().device
        return index.to(device, copy=True), delta.to(device, copy=True)

    def base_form(self) -> BaseForm:
        """What the layer's weight is."""
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
        """W ``[d_out, d_in]``, or what reads its rows, once it holds no bypass."""
        raise NotImplementedError

    def _follow_index(self, index: Tensor) -> None:
        """Notice that ``index``, the layer's own, is another one than before."""

    def _enter_resident(self) -> None:
        """Write ``W + delta`` into the weight, where the layer does so while it trains."""

    def _leave_resident(self) -> None:
        """Restore W."""

    def _resume(self) -> None:
        """Write it again after what has restored W for a while."""

    def _fold(self) -> Tensor:
        raise NotImplementedError

    def _unfold(self, index: Tensor, original: Tensor) -> None:
        raise NotImplementedError

    def _check_index(self, index: Tensor) -> None:
        check_index_form(index, self.in_features)
        delta = self._parameters.get("delta")
        # ZeRO-3 leaves a delta without dimensions where no forward is: then nothing fits it.
        k = index.shape[1] if delta is None else local(delta).shape[-1]
        if index.shape != (self.out_features, k):
            expected = f"[{self.out_features}, {'k' if delta is None else k}]"
            raise ValueError(f"index: shape {list(index.shape)}, expected {expected}")
        check_index(index, self.in_features)

    def _check_index_device(self, index: Tensor) -> None:
        """Raise where ``delta`` is on another device, but for one that is elsewhere for now."""
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
            value = value.contiguous()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move everything, but cast neither ``delta``, whose dtype is chosen, nor an index."""
        keeper, order = nn.Module(), list(self._buffers)
        keeper.register_parameter("delta", self._parameters.pop("delta"))
        names = ("index", "merged_index", "plan", "columns", "kept_index")
        kept = [name for name in names if name in self._buffers]
        for name in kept:
            keeper.register_buffer(name, self._buffers.pop(name))
        try:
            keeper._apply(uncast(fn))
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["delta"] = keeper._parameters["delta"]
            self._buffers.update(keeper._buffers)
            for name in order:  # by which torch's AveragedModel pairs them with those of a copy
                self._buffers[name] = self._buffers.pop(name)
            self._share_columns()
        return self

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
        """Load, everything checked first and the merged state as it was saved."""
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
        if {"index", "delta"} <= incoming.keys() and not self.index.is_meta:
            self.drop_deferral()
        if "original" in incoming:
            self.merged_index = self.index.clone()

    def _held(self, name: str) -> Tensor | None:
        """The tensor of this name in a state dict, where the layer can tell its shape."""
        held: Tensor | None = getattr(self, name)
        return held

    def _check_incoming(self, incoming: dict[str, Tensor]) -> None:
        """Raise where loading these would leave the layer with a wrong index or a wrong W."""
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
