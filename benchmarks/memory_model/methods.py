"""The methods: how each adapts a real model, and its linear in the analytical model.

PEFT's come from PEFT, in the model's dtype (``autocast_adapter_dtype=False``, the smaller choice).
Methods without a package are our own stand-ins: materialised, masked-dense, full, frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels.benchmarks.baselines import MaterialisedLinear
from neuroada_kernels.benchmarks.memory_model import linears
from neuroada_kernels.testing import Inputs


@dataclass(frozen=True)
class Method:
    """``adapt(model, names)`` adapts the linears of these names in a frozen model."""

    build: linears.Build
    adapt: Callable[[nn.Module, list[str]], nn.Module]
    everything_trains: bool = False  # embeddings, norms and head too
    needs: str | None = None  # a package


def method(name: str, k: int) -> Method:
    """A row of :func:`table`."""
    return table(k)[name]


def table(k: int) -> dict[str, Method]:
    """The methods by name, selections with k entries per neuron."""
    return {
        "frozen": Method(linears.Linear, lambda model, names: model),
        **{
            name: _neuroada(k, save, strategy)
            for name, save, strategy in (
                ("neuroada", "auto", "bypass"),  # the defaults
                ("neuroada-full", "full", "bypass"),
                ("neuroada-compact", "compact", "bypass"),
                ("neuroada-resident", "auto", "resident"),
            )
        },
        "materialised": Method(
            partial(linears.Materialised, k=k), lambda model, names: _materialise(model, names, k)
        ),
        "masked-dense": Method(linears.MaskedDense, lambda model, names: _mask(model, names, k)),
        **{
            f"lora-r{r}": _peft(partial(linears.Lora, rank=r), "LoraConfig", _lora(r))
            for r in (8, 16, 64)
        },
        "dora-r16": _peft(
            partial(linears.Dora, rank=16), "LoraConfig", {**_lora(16), "use_dora": True}
        ),
        "ia3": _peft(linears.IA3, "IA3Config", {}),
        "shira-r16": _peft(partial(linears.Shira, rank=16), "ShiraConfig", {"r": 16}),
        "full": Method(linears.Full, lambda model, names: model.requires_grad_(True), True),
    }


def _neuroada(k: int, save: str, strategy: str) -> Method:
    def adapt(model: nn.Module, names: list[str]) -> nn.Module:
        nk.adapt(model, k, names, save_activations=save, strategy=strategy)
        return model

    build = partial(linears.NeuroAda, k=k, save=save, resident=strategy == "resident")
    return Method(build, adapt)


def _peft(build: linears.Build, config: str, options: dict[str, Any]) -> Method:
    def adapt(model: nn.Module, names: list[str]) -> nn.Module:
        import peft

        chosen = dict(options)
        chosen["target_modules"] = names
        if config == "IA3Config":
            scaled = [name for name in names if name in linears.IA3.scaled]
            last = [name for name in scaled if name in linears.IA3.before]
            chosen |= {"target_modules": scaled, "feedforward_modules": last}
        made = getattr(peft, config)(**chosen)
        adapted: nn.Module = peft.get_peft_model(model, made, autocast_adapter_dtype=False)
        return adapted

    return Method(build, adapt, needs="peft")


def _lora(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0}


def _named(model: nn.Module, names: list[str]) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [
        (parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and _ends(f"{path}.{name}", names)
    ]


def _ends(path: str, names: list[str]) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def _materialise(model: nn.Module, names: list[str], k: int) -> nn.Module:
    for parent, name, linear in _named(model, names):
        weight = linear.weight.detach()
        index, bias = nk.select(weight, k), linear.bias
        nothing = weight.new_empty(0)
        delta = torch.zeros(index.shape)
        inputs = Inputs(nothing, weight, index, delta, bias, nothing)
        setattr(parent, name, MaterialisedLinear(inputs))
    return model


def _mask(model: nn.Module, names: list[str], k: int) -> nn.Module:
    """Weights train, and a hook zeroes their masked gradients; the mask has a byte per entry."""
    for _, _, linear in _named(model, names):
        weight = linear.weight.requires_grad_()
        mask = torch.ones(weight.shape, dtype=torch.bool)
        mask.scatter_(1, nk.select(weight.detach(), k).long(), False)
        linear.register_buffer("mask", mask)
        weight.register_hook(partial(_masked, mask))
    return model


def _masked(mask: Tensor, gradient: Tensor) -> Tensor:
    # Not a multiplication, for which the CPU would copy the mask in the gradient's dtype.
    return gradient.masked_fill(mask, 0)
