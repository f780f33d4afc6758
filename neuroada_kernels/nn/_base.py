"""What both layers are: a frozen linear's tensors, an index, a delta, and the merged state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuroada_kernels._sharding import is_sharded, local, split_as, whole
from neuroada_kernels.nn._deferred import Deferred
from neuroada_kernels.nn._strategy import check_known, check_strategy, refusal, why_not_resident
from neuroada_kernels.plan import check_index, check_index_form, count_connections
from neuroada_kernels.selection import check_weight

_Self = TypeVar("_Self", bound="BypassLinear")


class BypassLinear(nn.Module):
    """A frozen linear with k trainable bypass connections a neuron.

    ``y[t, j] = sum_c x[t, c] W[j, c] + b[j] + sum_s delta[j, s] x[t, index[j, s]]``
    (Zhang et al., NeuroAda, EMNLP 2025). Only ``delta`` trains, and the bias after
    ``layer.bias.requires_grad_()``.

    Parameters
    ----------
    in_features, out_features : int
        As in ``nn.Linear``.
    k : int
        Connections a neuron, from 1 to ``in_features``.
    bias : bool
        As in ``nn.Linear``.
    selection : str
        The method of :func:`neuroada_kernels.select`: ``"magnitude"``, ``"smallest"``,
        ``"random"`` or ``"scores"``.
    scores, generator, neuron_fraction
        Passed to :func:`neuroada_kernels.select`.
    delta_dtype : torch.dtype
        Dtype of ``delta``. It stays when the layer is cast by ``.to(dtype)`` or ``.half()``.
    strategy : str
        ``"bypass"`` adds the bypass beside the product and never writes ``weight``.
        ``"resident"`` keeps ``round(W + delta)`` in it, see :attr:`strategy`. ``"auto"`` is
        ``"resident"`` where that is allowed.
    device, dtype
        As in ``nn.Linear``.

    Attributes
    ----------
    weight : nn.Parameter
        Shape ``[out_features, in_features]``, frozen.
    bias : nn.Parameter or None
        Shape ``[out_features]``, frozen.
    index : Tensor
        Buffer, int32, shape ``[out_features, k]``: distinct columns within a row, -1 in a slot
        without a connection. What the layer selected is in the order of
        :func:`neuroada_kernels.order_slots`, what it was given stays in its own. Checked when it is
        set or loaded. One that is written in place is noticed by the next forward that is not
        compiled.
    delta : nn.Parameter
        Shape ``[out_features, k]``, zeros at first.
    original : Tensor or None
        Buffer, shape ``[out_features, k]``: while merged, the values that ``weight`` had.
    strategy_reason : str or None
        Why ``strategy="auto"`` came to ``"bypass"``, or one that was asked for on the meta device.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    index: Tensor
    delta: nn.Parameter
    original: Tensor | None
    merged_index: Tensor | None
    strategy_reason: str | None = None
    _strategy = "bypass"
    _loading = False  # a state dict that was checked as a whole
    _deferred: Deferred | None = None  # while index and delta wait for the weight's values

    def __init__(
        self,
        in_features: int,
        out_features: int,
        k: int = 1,
        bias: bool = True,
        *,
        selection: str = "magnitude",
        scores: Tensor | None = None,
        generator: torch.Generator | None = None,
        neuron_fraction: float = 1.0,
        delta_dtype: torch.dtype = torch.float32,
        strategy: str = "bypass",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        choice = Deferred(k, selection, scores, generator, neuron_fraction)
        index = choice.index_for(linear.weight)
        check_strategy(strategy, linear.weight)
        self._adopt(linear, index, delta_dtype)
        self._defer(choice)
        self.strategy = strategy

    @classmethod
    def from_linear(
        cls: type[_Self],
        linear: nn.Linear,
        k: int = 1,
        *,
        selection: str = "magnitude",
        scores: Tensor | None = None,
        generator: torch.Generator | None = None,
        neuron_fraction: float = 1.0,
        delta_dtype: torch.dtype = torch.float32,
        strategy: str = "bypass",
        index: Tensor | None = None,
    ) -> _Self:
        """The layer over the very tensors of ``linear``: shared, never copied, and frozen.

        Parameters
        ----------
        linear : nn.Linear
            Its weight and bias stop requiring grad; nothing else of it changes.
        k, selection, scores, generator, neuron_fraction, delta_dtype, strategy
            As in the constructor. While ``"resident"``, ``linear`` computes with ``W + delta``
            as well.
        index : Tensor, optional
            int32, shape ``[out_features, k]``: the connections, instead of selecting them.

        Raises
        ------
        TypeError, ValueError
            If ``linear`` is no ``nn.Linear`` with a floating weight of its own, if its weight may
            not be resident, or an argument is not as expected; then ``linear`` is unchanged.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: {type(linear).__name__}, expected torch.nn.Linear")
        if parametrize.is_parametrized(linear):
            raise ValueError("linear: has parametrizations, expected a weight of its own")
        check_weight(linear.weight, values=index is not None)
        check_strategy(strategy, linear.weight)
        choice = Deferred(k, selection, scores, generator, neuron_fraction)
        if index is None:
            index = choice.index_for(linear.weight)
        else:
            check_index_form(index, linear.weight.shape[1])
            index = index.to(linear.weight.device, copy=True)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(linear, index, delta_dtype)
        layer._defer(choice)
        layer.strategy = strategy
        return layer

    def _adopt(self, linear: nn.Linear, index: Tensor, delta_dtype: torch.dtype) -> None:
        if not (isinstance(delta_dtype, torch.dtype) and delta_dtype.is_floating_point):
            raise TypeError(f"delta_dtype: {delta_dtype}, expected a floating torch.dtype")
        self.out_features, self.in_features = linear.weight.shape
        if not index.is_meta:
            self._check_index(index)
        for name in ("weight", "bias"):
            parameter = linear._parameters[name]
            if parameter is not None:
                parameter.requires_grad_(False)
            self.register_parameter(name, parameter)
        self.register_buffer("index", index.contiguous())
        self.delta = nn.Parameter(torch.zeros(index.shape, dtype=delta_dtype, device=index.device))
        self.register_buffer("original", None)
        # Where W was changed, merged or resident, whatever is written into index meanwhile.
        self.register_buffer("merged_index", None, persistent=False)
        self.train(linear.training)

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
        """Choose what waited for the weight's values; False where it still has none.

        A layer over a weight on the meta device has no connections until then. Where it has
        them, nothing changes. ``reason`` is one against the strategy ``"resident"``.
        """
        deferred = self._deferred
        if deferred is None:
            return True
        if self.weight.is_meta:
            return False
        index = deferred.index_for(self.weight)
        self._deferred = None
        with torch.no_grad():
            if self.delta.is_meta:
                delta = torch.empty_like(self.delta, device=index.device)
                self.delta = nn.Parameter(delta, self.delta.requires_grad)
            self.delta.zero_()
        self.index = index
        self._set_strategy(deferred.strategy, reason)
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
        if self._deferred is not None and self._deferred.strategy != "bypass":
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
        """
        if not self.merged:
            if is_sharded(self.weight):
                raise ValueError(
                    "weight: is sharded over processes, expected a whole one to merge into: save "
                    "the adapter, and merge it into the base model"
                )
            self.check_selected()
            self._check_index(self.index)
            self._leave_resident()
            with torch.no_grad():
                self.merged_index = self.index.clone()
                self.original = self._fold()

    def unmerge(self) -> None:
        """Write the kept values back: ``weight`` is what it was before merging, bit for bit."""
        if self.original is not None and self.merged_index is not None:
            with torch.no_grad():
                self._unfold(self.merged_index, self.original)
            self.original = self.merged_index = None

    def forward(self, x: Tensor) -> Tensor:
        """``y [..., out_features]`` of ``x [..., in_features]``."""
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(f"x: shape {list(x.shape)}, expected [..., {self.in_features}]")
        if self._deferred is not None and not self.weight.is_meta:
            self.check_selected()
        # Module.__getattr__ costs half a microsecond a look, which adds up at one token.
        if self._buffers["original"] is not None:
            return F.linear(x, self.weight, self.bias)
        return self._bypass_forward(x)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, k={self.k}, "
            f"bias={self.bias is not None}, delta_dtype={str(self.delta.dtype).split('.')[-1]}"
            + (", merged" if self.merged else "")
            + (f", strategy={self._strategy}" if self._strategy != "bypass" else "")
            + (f", strategy=bypass since {self.strategy_reason}" if self.strategy_reason else "")
        )

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

    def _bypass_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def base_entries(self, index: Tensor) -> Tensor:
        """``W[j, index[j, s]]`` without the bypass of a resident layer; of an empty slot any.

        While merged, ``original`` holds those of the layer's own index.
        """
        weight = whole(self.weight.detach())
        return weight.gather(1, index.to(weight.device).clamp(min=0).long())

    def whole_connections(self) -> tuple[Tensor, Tensor]:
        """``index`` and ``delta`` of the layer, gathered from the processes that hold its parts."""
        return self.index, whole(self.delta.detach())

    def part_of_connections(self, index: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Of another ``index`` and ``delta`` for the whole layer, what this process holds."""
        device = self.weight.device
        delta = (
            split_as(delta, self.delta) if is_sharded(self.delta) else delta.to(device, copy=True)
        )
        return index.to(device, copy=True), delta

    def _why_not_resident(self) -> str | None:
        return why_not_resident(self.weight)

    def _enter_resident(self) -> None:
        """Write ``W + delta`` into the weight, where the layer does so while it trains."""

    def _leave_resident(self) -> None:
        """Restore W."""

    def _fold(self) -> Tensor:
        raise NotImplementedError

    def _unfold(self, index: Tensor, original: Tensor) -> None:
        raise NotImplementedError

    def _check_index(self, index: Tensor) -> None:
        check_index_form(index, self.in_features)
        delta = self._parameters.get("delta")
        k = index.shape[1] if delta is None else local(delta).shape[1]
        if index.shape != (self.out_features, k):
            expected = f"[{self.out_features}, {'k' if delta is None else k}]"
            raise ValueError(f"index: shape {list(index.shape)}, expected {expected}")
        check_index(index, self.in_features)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "index" and "index" in self.__dict__.get("_buffers", ()):
            self._check_index(value)
            if self.merged and not self._loading:
                raise RuntimeError("index: cannot change while merged, unmerge first")
            value = value.contiguous()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move everything, but cast neither ``delta``, whose dtype is chosen, nor an index."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        keeper = nn.Module()
        keeper.register_parameter("delta", self._parameters.pop("delta"))
        kept = [name for name in ("index", "merged_index", "plan") if name in self._buffers]
        for name in kept:
            keeper.register_buffer(name, self._buffers.pop(name))
        try:
            keeper._apply(move)
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["delta"] = keeper._parameters["delta"]
            for name in kept:
                self._buffers[name] = keeper._buffers[name]
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
        incoming = {
            name: state_dict[prefix + name]
            for name in ("weight", "bias", "index", "delta", "original")
            if prefix + name in state_dict
        }
        try:
            self._check_incoming(incoming)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        if "original" in incoming:
            if self.original is None:
                self.original = torch.zeros_like(self.delta, dtype=self.weight.dtype)
        elif "weight" in incoming:
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

    def _check_incoming(self, incoming: dict[str, Tensor]) -> None:
        """Raise where loading these would leave the layer with a wrong index or a wrong W."""
        for name, tensor in incoming.items():
            held = self.index if name == "original" else getattr(self, name)
            if held is not None and tensor.shape != held.shape:
                raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {list(held.shape)}")
        if "index" in incoming:
            self._check_index(incoming["index"])
        if "original" in incoming:
            missing = {"weight", "index", "delta"} - incoming.keys()
            if missing:
                names = ", ".join(sorted(missing))
                raise ValueError(f"original: without {names}, expected all of a merged layer")
        elif self.merged and "weight" not in incoming:
            for name in ("index", "delta"):
                if name in incoming:
                    raise ValueError(f"{name}: cannot change while merged, unmerge first")
