"""Adapters as weighted sums of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from neuroada_kernels.combination import check_weights
from neuroada_kernels.integrations.peft.config import NeuroAdaPeftConfig
from neuroada_kernels.integrations.peft.layer import NeuroAdaPeftLayer


def add_weighted(
    configs: Mapping[str, NeuroAdaPeftConfig],
    layers: Mapping[str, NeuroAdaPeftLayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
) -> NeuroAdaPeftConfig:
    """Add the weighted sum of ``adapters`` to ``layers`` by its new name; returns its config."""
    if adapter_name in configs:
        raise ValueError(f"adapter_name: there is an adapter {adapter_name!r} already")
    check_weights(adapters, weights)
    for name in adapters:
        if name not in configs:
            raise ValueError(f"adapters: {name!r} does not exist")
        if configs[name].modules_to_save or configs[name].bias != "none":
            raise ValueError(f"adapters: {name!r} trained whole modules or biases as well")
    weighted = list(zip(adapters, weights, strict=True))
    chosen = {
        key: [(name, weight) for name, weight in weighted if name in layer.neuroada_delta]
        for key, layer in layers.items()
    }
    chosen = {key: pairs for key, pairs in chosen.items() if pairs}
    for key, pairs in chosen.items():
        names = [name for name, _ in pairs]
        indices = [layers[key].neuroada_index[name] for name in names]
        if not all(torch.equal(index, indices[0]) for index in indices):
            raise ValueError(
                f"adapters: {', '.join(names)} chose different connections in {key}, expected the "
                "same ones"
            )
    first = configs[adapters[0]]
    for key, pairs in chosen.items():
        layer = layers[key]
        delta = _weighted_sum([(layer.neuroada_delta[name], weight) for name, weight in pairs])
        layer.neuroada_delta[adapter_name] = nn.Parameter(delta, requires_grad=False)
        index = layer.neuroada_index[pairs[0][0]].clone()
        layer.neuroada_index.add(adapter_name, index, first.save_activations)
    sizes = {key: layers[key].neuroada_index[adapter_name].shape[1] for key in chosen}
    return dataclasses.replace(
        first,
        target_modules=sorted(chosen),
        exclude_modules=None,
        layers=None,
        k_pattern={key: k for key, k in sizes.items() if k != first.k},
    )


def _weighted_sum(deltas: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The sum in float32 or wider, rounded once to the dtype of the first delta."""
    dtype = deltas[0][0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = sum(weight * delta.detach().to(wide) for delta, weight in deltas)
    assert isinstance(total, Tensor)
    return total.to(dtype)
