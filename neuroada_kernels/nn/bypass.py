"""The layer that wraps a base with a forward of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels import functional, ops, reference
from neuroada_kernels._dtypes import FLOATING
from neuroada_kernels.nn._activations import check_save_activations
from neuroada_kernels.nn._bitsandbytes import keep_packing
from neuroada_kernels.nn._deferred import Deferred
from neuroada_kernels.nn._layer import BaseForm, BypassLayer
from neuroada_kernels.nn._named import NamedLayer
from neuroada_kernels.nn._offloaded import check_trains
from neuroada_kernels.nn._planned import PlannedLayer
from neuroada_kernels.nn._weight import BaseWeight
from neuroada_kernels.nn.foreign import MODULE, base_weight
from neuroada_kernels.plan import check_index_form
from neuroada_kernels.selection import row_blocks


@dataclass(frozen=True)
class Requantization:
    """The error of quantising ``W + delta`` again, where ``W'`` is what the base holds now.

    Attributes
    ----------
    largest : float
        The largest ``|W' - (W + delta)|``.
    of_weight : float
        The norm of ``W' - (W + delta)`` divided by the norm of ``W + delta``.
    of_update : float
        The same divided by the norm of ``delta``: at 1, the error is as large as the update.
    """

    largest: float
    of_weight: float
    of_update: float


class NeuroAdaBypass(NamedLayer, PlannedLayer):
    """A frozen base layer with k trainable bypass connections per neuron.

    ``y[t, j] = base(x)[t, j] + sum_s delta[j, s] x[t, index[j, s]]``, the sum taken in float32 and
    rounded once. The base computes its own gradient of x. Only ``delta`` trains.

    Parameters
    ----------
    base : nn.Module
        bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``, an ``nn.Linear`` that torchao has
        quantised or accelerate has offloaded, transformers' ``Conv1D``, or any module with
        ``in_features``, ``out_features`` and a forward from ``[..., in_features]`` to
        ``[..., out_features]``. Kept as it is, and frozen.
    k : int
        Connections per neuron, from 1 to ``in_features``.
    selection, scores, generator, neuron_fraction
        Passed to :func:`neuroada_kernels.select`, which reads the base's weight dequantised, a few
        rows at a time. A base without a readable weight supports ``"random"`` and ``"scores"``.
    delta_dtype : torch.dtype
        Dtype of ``delta``; casting the layer does not change it.
    strategy : str
        ``"bypass"``; ``"auto"`` has the same effect, and ``"resident"`` raises.
    save_activations : str
        What the bypass saves of x, as in :class:`NeuroAdaLinear`; what the base saves is its own.
    index : Tensor, optional
        int32, shape ``[out_features, k]``: the connections, instead of a selection.

    Attributes
    ----------
    base : nn.Module
        The wrapped layer.
    index, delta, original, strategy_reason
        As in :class:`NeuroAdaLinear`.

    Raises
    ------
    TypeError
        If ``base`` is no such module, or an argument has a wrong type.
    ValueError
        If the base is on the meta device or not quantised yet, or an argument is not as expected;
        ``base`` is unchanged then.
    """

    base: nn.Module
    _weight_name = "base.weight"

    def __init__(
        self,
        base: nn.Module,
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
    ) -> None:
        super().__init__()
        if isinstance(base, BypassLayer):
            raise TypeError(f"base: {type(base).__name__}, expected a layer without a bypass")
        weight = base_weight(base)
        self.out_features, self.in_features = weight.shape
        self._kind = weight.name
        if index is None:
            choice = Deferred(k, selection, scores, generator, neuron_fraction)
            index = choice.index_for(weight)
        else:
            check_index_form(index, self.in_features)
            index = index.to(weight.device, copy=True)
        self._check_connections(index, delta_dtype)
        self._set_strategy(strategy)
        check_save_activations(save_activations)
        self._hold_connections(index, delta_dtype)
        self._make_plan()
        self.save_activations = save_activations
        base.requires_grad_(False)
        keep_packing(base)
        self.base = base
        self.train(base.training)

    @property
    def weight(self) -> Any:
        """The base's attribute ``weight``, possibly quantised or transposed."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base's attribute ``bias``, or None."""
        return getattr(self.base, "bias", None)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """``y [..., out_features]`` of ``x [..., in_features]``; the base gets all arguments."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: {type(x).__name__}, expected a tensor")
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(f"x: shape {list(x.shape)}, expected [..., {self.in_features}]")
        if "_hf_hook" in self.__dict__:
            check_trains(self)
        if self._rows is not None:
            self._rows.check(x)
        y: Tensor = self.base(x, *args, **options)
        buffers = self._buffers
        if self._rows is None and (buffers["original"] is not None or self._disabled):
            return y
        index = buffers["index"]
        assert index is not None
        if not isinstance(y, Tensor) or y.dtype not in FLOATING:
            raise TypeError(f"base: gave {_form_of(y)}, expected a floating tensor")
        if self._rows is not None:
            return self._rows.map(self._add_of, y, x.to(y.dtype))
        if not torch.compiler.is_compiling():
            self._follow_index(index)
        kept = self._keep(x, y.dtype)
        plan = buffers["plan"]
        return functional.apply_bypass(y, x.to(y.dtype), index, self.delta, plan, kept)

    def _add_of(self, adapter: str | None, y: Tensor, x: Tensor) -> Tensor:
        if adapter is None:
            return y
        held = self.holder_of(adapter)
        return functional.apply_bypass(y, x, held.index, held.delta, self.plan_of(adapter))

    def merge_requantized(self) -> Requantization:
        """Dequantise W, add ``delta`` and quantise again with the base's own quantiser.

        Quantising rounds every value to a grid as coarse as before, and the grid changes if the
        largest value of a block has changed. The error is reported; :meth:`unmerge` cannot undo it.
        ``delta`` is zero afterwards, since the base includes it. Needs memory for all of W in
        float32.

        Returns
        -------
        Requantization

        Raises
        ------
        ValueError
            If the base has a plain weight (use :meth:`merge`), or one that cannot be quantised
            again.
        """
        return self._requantize()[0]

    @torch.no_grad()
    def _requantize(self) -> tuple[Requantization, Callable[[], None]]:
        """:meth:`merge_requantized`, and a function that undoes it if nothing else has changed."""
        self._check_active()
        self._check_whole()
        self._check_index(self.index)
        weight = base_weight(self.base)
        if weight.matrix is not None:
            raise ValueError(f"base: {weight.name} has a plain weight, expected merge()")
        dense = torch.cat([weight.rows(rows).float() for rows in row_blocks(weight.shape)])
        ops.merge_(dense, self.index, self.delta)
        delta = self.delta.clone()
        before = weight.exchange(weight.quantise(dense))

        def undo() -> None:
            with torch.no_grad():
                base_weight(self.base).exchange(before)
                self.delta.copy_(delta)

        try:
            update = delta.double().masked_fill(self.index < 0, 0).norm()
            report = _compare(weight, dense, float(update))
            self.delta.zero_()
        except BaseException:
            undo()
            raise
        return report, undo

    def check_mergeable(self) -> None:
        super().check_mergeable()
        weight = base_weight(self.base)
        if weight.matrix is None:
            raise ValueError(f"base: {weight.name}, {weight.unmergeable}")
        if weight.kind == MODULE and not self._adds_in_weight(weight.matrix):
            raise ValueError(
                f"base: {type(self.base).__name__} does not compute x W^T + f(x) by its weight W, "
                "expected that, or merging would change what the layer computes"
            )

    @torch.no_grad()
    def _adds_in_weight(self, matrix: Tensor) -> bool:
        """Whether a large delta, merged for a moment, moves the base's output as the bypass does.

        True without a test if the base cannot be called with x alone.
        """
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(4, matrix.shape[1], generator=generator, device="cpu")
        x = draw.to(matrix.device, matrix.dtype)
        before = _output(self.base, x)
        bypass = reference.bypass(x, self.index, torch.ones_like(self.delta)).float()
        if before is None or not bypass.any():
            return True
        # A bypass as large as the output, far above rounding errors of 16 bits.
        scale = float(before.norm() / bypass.norm()) or 1.0
        original = ops.merge_(matrix, self.index, torch.full_like(self.delta, scale))
        try:
            after = _output(self.base, x)
        finally:
            ops.unmerge_(matrix, self.index, original)
        if after is None or after.shape != bypass.shape:
            return True
        error = (after - before - scale * bypass).norm()
        return bool(error <= 2**-4 * (before.norm() + scale * bypass.norm()))

    def base_entries(self, index: Tensor) -> Tensor:
        return base_weight(self.base).entries(index)

    def base_form(self) -> BaseForm:
        weight = base_weight(self.base)
        return BaseForm(weight.kind, weight.dtype, weight.device)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, k={self.k}, "
            f"kind={self._kind!r}{self._state_repr()}"
        )

    def _weight_to_choose_by(self) -> BaseWeight:
        return base_weight(self.base)

    def _why_not_resident(self) -> str | None:
        return f"the base is a {self._kind}, whose forward is its own"

    def _merge_into_weight(self) -> Tensor:
        return ops.merge_(self._matrix(), self.index, self.delta)

    def _restore_weight(self, index: Tensor, original: Tensor) -> None:
        ops.unmerge_(self._matrix(), index, original)

    def _matrix(self) -> Tensor:
        matrix = base_weight(self.base).matrix
        assert matrix is not None, "merged into a base without a plain weight"
        return matrix

    def _held(self, name: str) -> Tensor | None:
        if name != self._weight_name:
            return super()._held(name)
        return self.base._parameters["weight"] if self._is_plain() else None

    def _is_plain(self) -> bool:
        return base_weight(self.base).matrix is not None

    def _check_incoming(self, incoming: dict[str, Tensor]) -> None:
        if "original" in incoming and not self._is_plain():
            raise ValueError(f"original: of a merged layer, but the base is a {self._kind}")
        super()._check_incoming(incoming)


@torch.no_grad()
def _output(base: nn.Module, x: Tensor) -> Tensor | None:
    """``base.forward(x)`` in float32, as in evaluation; None if it does not take x alone.

    ``training`` is set instead of calling ``eval()``, which some layers override to merge.
    """
    modes = [(module, module.training) for module in base.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with reference.without_autocast(x.device.type):
            y: Tensor = base.forward(x).float()
        return y
    except Exception:
        return None
    finally:
        for module, training in modes:
            module.training = training


def _form_of(value: object) -> str:
    return f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _compare(weight: BaseWeight, expected: Tensor, update: float) -> Requantization:
    """The error of ``weight`` against ``expected [d_out, d_in]``; ``update`` is delta's norm."""
    largest = squares = 0.0
    for rows in row_blocks(weight.shape):
        error = (weight.rows(rows).double() - expected[rows].double()).abs()
        largest = max(largest, float(error.max()))
        squares += float(error.square().sum())
    norm = squares**0.5
    total = float(expected.double().norm())
    return Requantization(largest, _ratio(norm, total), _ratio(norm, update))


def _ratio(error: float, of: float) -> float:
    return error / of if of else (float("inf") if error else 0.0)
