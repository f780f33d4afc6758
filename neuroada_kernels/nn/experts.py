"""Mixtures of experts with stacked weights: bypasses for every neuron of every expert."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroada_kernels import functional, ops
from neuroada_kernels._dtypes import FLOATING
from neuroada_kernels._sharding import whole
from neuroada_kernels.nn._deferred import Deferred
from neuroada_kernels.nn._layer import BaseForm
from neuroada_kernels.nn._named import NamedLayer
from neuroada_kernels.nn._offloaded import check_trains
from neuroada_kernels.nn._planned import PlannedLayer
from neuroada_kernels.nn._weight import entries_of
from neuroada_kernels.plan import check_index_form, is_plan_of, make_plan

#: The stacked weights of a module of experts, ``[experts, 2 d_ff, d]`` and ``[experts, d, d_ff]``.
STACKS = ("gate_up_proj", "down_proj")
#: The kind of base in adapter files.
STACKED = "stacked experts"


class StackedLinear(NamedLayer, PlannedLayer):
    """Weights ``[experts, d_out, d_in]`` with k bypass connections per neuron of each expert.

    Everything but the forward treats them as one matrix ``[experts * d_out, d_in]``.

    Attributes
    ----------
    weight : nn.Parameter
        Shape ``[experts, d_out, d_in]``, shared and frozen.
    index, delta, original, strategy_reason
        As in :class:`NeuroAdaLinear`, of shape ``[experts * d_out, k]``.
    """

    weight: nn.Parameter
    _plan_sizes: tuple[int, ...] = ()
    _plan_facts = (*PlannedLayer._plan_facts, "_plan_sizes")

    def __init__(self, weight: nn.Parameter, index: Tensor, delta_dtype: torch.dtype) -> None:
        super().__init__()
        self.experts, self.d_out, self.in_features = weight.shape
        self.out_features = self.experts * self.d_out
        self._check_connections(index, delta_dtype)
        self.register_parameter("weight", weight)
        self._hold_connections(index, delta_dtype)
        self._make_plan()

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """``y [tokens, d_out]`` of ``x [tokens, d_in]``, sorted by expert, ``counts[e]`` each."""
        if "_hf_hook" in self.__dict__:
            check_trains(self)
        plain = self._buffers["original"] is not None or self._disabled
        if not plain and not torch.compiler.is_compiling():
            self._follow_index(self.index)
        parts = zip(
            x.split(list(counts)),
            self.weight,
            self.index.split(self.d_out),
            self.delta.split(self.d_out),
            self.plan.split(self._plan_sizes),
            strict=True,
        )
        outputs = [
            F.linear(part, weight)
            if plain
            else functional.apply_linear(part, weight, index, delta, None, plan)
            for part, weight, index, delta, plan in parts
            if len(part) or not len(x)  # no tokens: run all, so that y has a gradient
        ]
        return torch.cat(outputs)

    def _plan_of(self, index: Tensor) -> Tensor:
        """One plan per expert, concatenated."""
        plans = [make_plan(part, self.in_features) for part in index.split(self.d_out)]
        self._plan_sizes = tuple(map(len, plans))
        return torch.cat(plans)

    def _has_plan_of(self, index: Tensor) -> bool:
        plans, parts = self.plan.split(self._plan_sizes), index.split(self.d_out)
        return all(map(is_plan_of, plans, parts, [self.in_features] * len(parts)))

    def _is_planned(self) -> bool:
        return False  # no saved columns: every expert reads another x and saves it in full

    def base_entries(self, index: Tensor) -> Tensor:
        matrix = whole(self.weight.detach()).view(self.out_features, self.in_features)
        return entries_of(matrix, index)

    def base_form(self) -> BaseForm:
        return BaseForm(STACKED, self.weight.dtype, self.weight.device)

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.d_out}, "
            f"k={self.k}{self._state_repr()}"
        )

    def _weight_to_choose_by(self) -> Tensor:
        return self._matrix()

    def _why_not_resident(self) -> str | None:
        return "the weight is a stack of experts"

    def _merge_into_weight(self) -> Tensor:
        return ops.merge_(self._matrix(), self.index, self.delta)

    def _restore_weight(self, index: Tensor, original: Tensor) -> None:
        ops.unmerge_(self._matrix(), index, original)

    def _matrix(self) -> Tensor:
        return self.weight.detach().view(self.out_features, self.in_features)


class NeuroAdaExperts(nn.Module):
    """Gated experts as stacked by transformers, with k bypass connections per neuron.

    ``down(gated(gate_up(x)))``, both with their bypass, of every expert that a token is routed to,
    weighted and summed. The tokens are sorted by expert, and each group is computed by the kernels
    of :class:`NeuroAdaLinear`.

    Parameters
    ----------
    experts : nn.Module
        As in transformers 5: ``gate_up_proj [experts, 2 d_ff, d]``, ``down_proj [experts, d,
        d_ff]`` and ``_apply_gate``, called with hidden states ``[tokens, d]``, and each token's
        experts and weights ``[tokens, top_k]``. Its tensors are shared and frozen; nothing else
        in it changes.
    k : int
        Connections per neuron.
    selection : str
        ``"magnitude"``, ``"smallest"`` or ``"random"``.
    generator, neuron_fraction, delta_dtype
        As in :class:`NeuroAdaLinear`.
    index : mapping of str to Tensor, optional
        By stack, int32 ``[experts * d_out, k]``, instead of a selection.

    Attributes
    ----------
    gate_up_proj, down_proj : StackedLinear
        The stacks with their bypasses.
    base : nn.Module
        A shallow copy of ``experts`` without the stacked weights.

    Raises
    ------
    TypeError, ValueError
        If ``experts`` is no such module, is on the meta device, or an argument is not as expected.
    """

    def __init__(
        self,
        experts: nn.Module,
        k: int = 1,
        *,
        selection: str = "magnitude",
        generator: torch.Generator | None = None,
        neuron_fraction: float = 1.0,
        delta_dtype: torch.dtype = torch.float32,
        index: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        reason = why_not_experts(experts)
        if reason is not None:
            raise TypeError(f"experts: {type(experts).__name__} {reason}")
        if selection not in ("magnitude", "smallest", "random"):
            raise ValueError(
                f"selection: {selection!r}, expected 'magnitude', 'smallest' or 'random'"
            )
        choice = Deferred(k, selection, None, generator, neuron_fraction)
        stacks = {}
        for name in STACKS:
            weight = experts._parameters[name]
            assert weight is not None
            matrix = weight.detach().view(-1, weight.shape[-1])
            if index is None:
                chosen = choice.index_for(matrix)
            else:
                check_index_form(index[name], weight.shape[-1])
                chosen = index[name].to(weight.device, copy=True)
            stacks[name] = StackedLinear(weight, chosen, delta_dtype)
        self.base = copy.copy(experts)
        others = {n: p for n, p in experts._parameters.items() if n not in STACKS}
        self.base._parameters = others
        self.gate_up_proj, self.down_proj = (stacks[name] for name in STACKS)
        experts.requires_grad_(False)
        self.train(experts.training)

    @property
    def stacks(self) -> dict[str, StackedLinear]:
        """The stacks, by the names of their weights in ``experts``."""
        return {"gate_up_proj": self.gate_up_proj, "down_proj": self.down_proj}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, d]`` of ``[tokens, d]``; expert ids beyond the last expert are skipped."""
        top_k = top_k_index.shape[-1]
        ids = top_k_index.reshape(-1)
        experts = self.gate_up_proj.experts
        counts = torch.bincount(ids, minlength=experts)[:experts].tolist()
        order = ids.argsort(stable=True)[: sum(counts)]
        gate: Any = self.base._apply_gate
        h = gate(self.gate_up_proj(hidden_states[order // top_k], counts))
        y = self.down_proj(h, counts) * top_k_weights.reshape(-1)[order, None]
        # Sum each token's top_k results in a fixed order, independent of the experts.
        each = y.new_zeros(len(ids), y.shape[-1]).index_copy(0, order, y)
        summed: Tensor = each.view(*top_k_index.shape, each.shape[-1]).sum(-2)
        return summed.to(hidden_states.dtype)


def is_experts(module: nn.Module) -> bool:
    """Whether it has the stacks of gated experts, supported or not."""
    return all(name in module._parameters for name in STACKS)


#: Attributes of transformers' experts for features that :class:`NeuroAdaExperts` lacks.
_UNSUPPORTED = {
    "is_transposed": "stacks of [experts, d_in, d_out]",
    "has_bias": "biases",
    "has_post_expert_norm": "a norm after each expert",
    "_is_expert_parallel": "experts in other processes",
}


def why_not_experts(module: nn.Module) -> str | None:
    """Why :class:`NeuroAdaExperts` does not support a module, or None."""
    if not (isinstance(module, nn.Module) and is_experts(module)):
        return f"has no {' and '.join(STACKS)}"
    if not callable(getattr(module, "_apply_gate", None)):  # without it the forward may differ
        return "has no _apply_gate, as experts of transformers have since version 5"
    for name, what in _UNSUPPORTED.items():
        if getattr(module, name, False):
            return f"has {what} ({name}), which is not supported"
    up, down = (module._parameters[name] for name in STACKS)
    assert up is not None
    assert down is not None
    for name, weight in zip(STACKS, (up, down), strict=True):
        if type(weight) is not nn.Parameter or weight.dtype not in FLOATING:
            return f"has a {type(weight).__name__} of {weight.dtype} as {name}, expected numbers"
        if weight.is_meta:
            return f"has {name} on the meta device, expected values"
        if not weight.is_contiguous():
            return f"has a {name} that is not contiguous"
    if up.dim() != 3 or down.shape != (up.shape[0], up.shape[2], up.shape[1] // 2):
        return (
            f"has weights {list(up.shape)} and {list(down.shape)}, expected [experts, 2 d_ff, d] "
            "and [experts, d, d_ff]"
        )
    return None
