"""The base class of both linears: a layer that holds the frozen weight and bias itself."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuroada_kernels._sharding import whole
from neuroada_kernels.nn._activations import check_save_activations
from neuroada_kernels.nn._deferred import Deferred
from neuroada_kernels.nn._layer import BaseForm, BypassLayer
from neuroada_kernels.nn._offloaded import check_trains
from neuroada_kernels.nn._own import wrong_shape
from neuroada_kernels.nn._strategy import check_strategy, why_not_resident
from neuroada_kernels.nn._weight import entries_of
from neuroada_kernels.nn.foreign import has_hooks, has_own_forward, is_library
from neuroada_kernels.plan import check_index_form
from neuroada_kernels.selection import check_weight

_Self = TypeVar("_Self", bound="BypassLinear")


class BypassLinear(BypassLayer):
    """A frozen linear with k trainable bypass connections per neuron.

    ``y[t, j] = sum_c x[t, c] W[j, c] + b[j] + sum_s delta[j, s] x[t, index[j, s]]``
    (Zhang et al., NeuroAda, EMNLP 2025). Only ``delta`` trains, and the bias after
    ``layer.bias.requires_grad_()``.

    Parameters
    ----------
    in_features, out_features : int
        As in ``nn.Linear``.
    k : int
        Connections per neuron, from 1 to ``in_features``.
    bias : bool
        As in ``nn.Linear``.
    selection : str
        The method of :func:`neuroada_kernels.select`: ``"magnitude"``, ``"smallest"``,
        ``"random"`` or ``"scores"``.
    scores, generator, neuron_fraction
        Passed to :func:`neuroada_kernels.select`.
    delta_dtype : torch.dtype
        Dtype of ``delta``; ``.to(dtype)`` and ``.half()`` do not change it.
    strategy : str
        ``"bypass"`` adds the bypass to the GEMM's result and never writes ``weight``.
        ``"resident"`` keeps ``round(W + delta)`` in ``weight``, see :attr:`strategy`. ``"auto"`` is
        ``"resident"`` where that is allowed, otherwise ``"bypass"``.
    save_activations : str
        What is saved of x for the backward, see :attr:`save_activations`: ``"auto"``, ``"full"`` or
        ``"compact"``.
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
        without a connection. A selected index is in the order of
        :func:`neuroada_kernels.order_slots`; a given one keeps its order. Checked when it is set or
        loaded. In-place writes are detected by the next forward that is not compiled, unless
        through ``index.data``.
    delta : nn.Parameter
        Shape ``[out_features, k]``, zeros at first.
    original : Tensor or None
        Buffer, shape ``[out_features, k]``: while merged, the values that ``weight`` had.
    strategy_reason : str or None
        Why ``"auto"``, or a strategy that was requested on the meta device, became ``"bypass"``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

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
        save_activations: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        choice = Deferred(k, selection, scores, generator, neuron_fraction)
        index = choice.index_for(linear.weight)
        check_strategy(strategy, linear.weight)
        check_save_activations(save_activations)
        self._adopt(linear, index, delta_dtype)
        self._defer(choice)
        self.save_activations = save_activations
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
        save_activations: str = "auto",
        index: Tensor | None = None,
    ) -> _Self:
        """A layer that shares the tensors of ``linear``, without copies, and freezes them.

        Parameters
        ----------
        linear : nn.Linear
            Its weight and bias stop requiring grad; nothing else of it changes.
        k, selection, scores, generator, neuron_fraction, delta_dtype, strategy, save_activations
            As in the constructor. While ``"resident"``, ``linear`` also computes with
            ``W + delta``.
        index : Tensor, optional
            int32, shape ``[out_features, k]``: the connections, instead of a selection.

        Raises
        ------
        TypeError, ValueError
            If ``linear`` is no ``nn.Linear`` with a floating weight of its own and the forward of
            ``nn.Linear``, without hooks, if its weight may not be resident although that is
            requested, or if an argument is not as expected; ``linear`` is unchanged then.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: {type(linear).__name__}, expected torch.nn.Linear")
        if is_library(linear):
            kind = type(linear._parameters["weight"]).__name__
            raise TypeError(f"linear: has a {kind}, expected plain numbers; see NeuroAdaBypass")
        if has_own_forward(linear):
            kind = type(linear).__name__
            raise TypeError(f"linear: {kind} has a forward of its own; see NeuroAdaBypass")
        if parametrize.is_parametrized(linear):
            raise ValueError("linear: has parametrizations, expected a weight of its own")
        for name in ("weight", "bias"):
            if name not in linear._parameters:
                raise ValueError(f"linear: its {name} is no parameter, expected one of its own")
        if has_hooks(linear):
            raise ValueError("linear: has hooks, which the layer would lose; remove them first")
        check_weight(linear.weight, values=index is not None)
        check_strategy(strategy, linear.weight)
        check_save_activations(save_activations)
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
        layer.save_activations = save_activations
        layer.strategy = strategy
        return layer

    def _adopt(self, linear: nn.Linear, index: Tensor, delta_dtype: torch.dtype) -> None:
        self.out_features, self.in_features = linear.weight.shape
        self._check_connections(index, delta_dtype)
        for name in ("weight", "bias"):
            parameter = linear._parameters[name]
            if parameter is not None:
                parameter.requires_grad_(False)
            self.register_parameter(name, parameter)
        self._hold_connections(index, delta_dtype)
        self.train(linear.training)

    def select_connections(self, reason: str | None = None) -> bool:
        """Make the deferred selection; returns False if the weight still has no values.

        A layer over a weight on the meta device has no connections until then. If the layer has
        its connections already, nothing changes. ``reason`` is why ``"resident"`` is refused.
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

    def forward(self, x: Tensor) -> Tensor:
        """``y [..., out_features]`` of ``x [..., in_features]``."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: {type(x).__name__}, expected a tensor")
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(f"x: shape {list(x.shape)}, expected [..., {self.in_features}]")
        if self._deferred is not None and not self.weight.is_meta:
            self.check_selected()
        if "_hf_hook" in self.__dict__:
            check_trains(self)
        if self._rows is not None:
            self._rows.check(x)
            return self._rows.map(self._forward_of, x)
        # Module.__getattr__ costs half a microsecond per lookup, which adds up at one token.
        if self._buffers["original"] is not None or self._disabled:
            return F.linear(x, self.weight, self.bias)
        return self._bypass_forward(x)

    def check_mergeable(self) -> None:
        super().check_mergeable()
        if (reason := self._why_not_written()) is not None:
            raise ValueError(f"{reason}, expected a parameter to merge into")

    def _why_not_written(self) -> str | None:
        if "weight" in self._parameters:
            return None
        return "weight: is computed, by a parametrization, a norm or pruning"

    def _check_shapes(self) -> None:
        """Raise if a tensor of the layer was replaced by one of another shape."""
        parameters, rows = self._parameters, self.out_features
        weight, bias = parameters.get("weight"), parameters.get("bias")
        delta, index = parameters["delta"], self._buffers["index"]
        assert delta is not None
        assert index is not None
        if weight is not None and weight.shape != (rows, self.in_features):
            raise wrong_shape("weight", weight, (rows, self.in_features))
        if bias is not None and bias.shape != (rows,):
            raise wrong_shape("bias", bias, (rows,))
        if delta.shape != index.shape:
            raise wrong_shape("delta", delta, index.shape)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, k={self.k}, "
            f"bias={self.bias is not None}{self._state_repr()}"
        )

    def _bypass_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _forward_of(self, adapter: str | None, x: Tensor) -> Tensor:
        """``y`` with an adapter that may be parked; ``adapter`` None computes the base alone."""
        raise NotImplementedError

    def _weight_to_choose_by(self) -> Tensor:
        return self.weight

    def base_entries(self, index: Tensor) -> Tensor:
        return entries_of(whole(self.weight.detach()), index)

    def base_form(self) -> BaseForm:
        return BaseForm(None, self.weight.dtype, self.weight.device)

    def _why_not_resident(self) -> str | None:
        return self._why_not_written() or why_not_resident(self.weight)
