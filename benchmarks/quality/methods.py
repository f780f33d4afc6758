"""Adapts a model by each method, and counts what trains."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels.benchmarks.baselines import MaterialisedLinear
from neuroada_kernels.benchmarks.quality.variants import Variant
from neuroada_kernels.gradient import Loss, each_gradient
from neuroada_kernels.model import replace
from neuroada_kernels.testing import Inputs

#: Allowed relative difference from NeuroAda's budget: LoRA's rank is an integer.
BUDGET_TOLERANCE = 0.02
#: Methods that are PEFT's own.
OF_PEFT = ("lora", "shira")


def why_not(variant: Variant) -> str | None:
    """Why a variant cannot be run here, or None."""
    if variant.method in OF_PEFT and find_spec("peft") is None:
        return "peft is missing: install the extra 'peft'"
    return None


@dataclass(frozen=True)
class Given:
    """What a method may use: a seed for what is random, and data with a loss for gradients."""

    seed: int
    data: Sequence[Any]
    loss: Loss


def adapt(model: nn.Module, variant: Variant, given: Given) -> int:
    """Adapt every linear of ``model`` in place; returns the number of trained parameters.

    PEFT draws from torch's global generator.
    """
    model.requires_grad_(False)
    return METHODS[variant.method](model, variant, given)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that are adapted, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def rank(d_out: int, d_in: int, k: int) -> int:
    """The rank whose number of parameters is closest to ``k`` per neuron, at least 1."""
    return max(1, round(k * d_out / (d_in + d_out)))


def _neuroada(model: nn.Module, variant: Variant, given: Given) -> int:
    config = nk.NeuroAdaConfig(
        k=variant.k,
        selection=variant.selection,
        neuron_fraction=variant.neuron_fraction,
        delta_dtype=variant.delta_dtype,
        seed=given.seed,
    )
    gradients: dict[str, Any] = {}
    if variant.selection == "gradient":
        gradients = {"data": given.data, "loss": given.loss}
    return nk.adapt(model, config, progress=False, **gradients).trainable


def _masked(model: nn.Module, variant: Variant, given: Given) -> int:
    """Mask-based selective tuning: the dense gradient, masked to what NeuroAda selects."""
    found = 0
    for linear in linears(model).values():
        index = nk.select(linear.weight, variant.k, variant.selection)
        mask = torch.zeros_like(linear.weight).scatter_(1, index.long(), 1)
        found += _train_masked(linear, mask)
    return found


def _masked_layer(model: nn.Module, variant: Variant, given: Given) -> int:
    """The same with as many entries per layer, but those with the layer's largest gradients."""
    every = linears(model)
    masks = {}
    for name, gradient in each_gradient(model, every, given.data, given.loss):
        entries = gradient.flatten().topk(variant.k * len(gradient)).indices
        masks[name] = torch.zeros(gradient.numel()).scatter_(0, entries, 1).view_as(gradient)
    return sum(_train_masked(every[name], mask) for name, mask in masks.items())


def _train_masked(linear: nn.Linear, mask: Tensor) -> int:
    linear.weight.requires_grad_()
    linear.weight.register_hook(lambda gradient: gradient * mask)
    return int(mask.sum())


def _lora(model: nn.Module, variant: Variant, given: Given) -> int:
    from peft import LoraConfig, inject_adapter_in_model

    ranks = _ranks(model, variant.k)
    exact = {f"^{re.escape(name)}$": r for name, r in ranks.items()}
    config = LoraConfig(
        target_modules=list(ranks),
        rank_pattern=exact,
        # The usual scaling of 2, whatever the rank.
        alpha_pattern={name: 2 * r for name, r in exact.items()},
    )
    inject_adapter_in_model(config, model)
    return _training(model)


def _shira(model: nn.Module, variant: Variant, given: Given) -> int:
    """ShiraConfig has one rank for all modules, so modules are adapted rank by rank."""
    from peft import ShiraConfig, inject_adapter_in_model

    of_rank: dict[int, list[str]] = defaultdict(list)
    for name, r in _ranks(model, variant.k).items():
        of_rank[r].append(name)
    for r, names in of_rank.items():
        vars(model).pop("peft_config", None)  # it would warn of a second adapter
        config = ShiraConfig(r=r, target_modules=names, random_seed=given.seed)
        inject_adapter_in_model(config, model)
    return _training(model)


def _ranks(model: nn.Module, k: int) -> dict[str, int]:
    return {name: rank(m.out_features, m.in_features, k) for name, m in linears(model).items()}


def _authors(model: nn.Module, variant: Variant, given: Given) -> int:
    """``W + delta`` in W's dtype, built in every forward, as the method's authors do."""
    replace(model, dict(_materialised(model, variant.k)))
    return _training(model)


def _materialised(model: nn.Module, k: int) -> Iterator[tuple[nn.Module, nn.Module]]:
    nothing = torch.empty(0)
    for linear in linears(model).values():
        index = nk.select(linear.weight, k)
        delta = torch.zeros(index.shape)
        bias = None if linear.bias is None else linear.bias.detach()
        inputs = Inputs(nothing, linear.weight.detach(), index, delta, bias, nothing)
        yield linear, MaterialisedLinear(inputs)


def _full(model: nn.Module, variant: Variant, given: Given) -> int:
    """Every parameter of the model, embeddings and norms too."""
    model.requires_grad_(True)
    return _training(model)


def _frozen(model: nn.Module, variant: Variant, given: Given) -> int:
    return 0


def _training(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


METHODS: dict[str, Callable[[nn.Module, Variant, Given], int]] = {
    "neuroada": _neuroada,
    "masked": _masked,
    "masked-layer": _masked_layer,
    "lora": _lora,
    "shira": _shira,
    "authors": _authors,
    "full": _full,
    "frozen": _frozen,
}
