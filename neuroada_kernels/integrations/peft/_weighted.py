"""Adapters as weighted sums of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from neuroada_kernels.integrations.peft.config import NeuroAdaPeftConfig
from neuroada_kernels.integrations.peft.layer import NeuroAdaPeftLayer


def add_weighted(
    configs: Mapping[str, NeuroAdaPeftConfig],
    layers: Mapping[str, NeuroAdaPeftLayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
) -> NeuroAdaPeftConfig:
    """Put the weighted sum of ``adapters`` into ``layers`` as ``adapter_name``; its config."""
    if adapter_name in configs:
        raise ValueError(f"adapter_name: there is an adapter {adapter_name!r} already")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"weights: {len(weights)} for {len(adapters)} adapters, expected as many")
    for name in adapters:
        if name not in configs:
            raise ValueError(f"adapters: {name!r} does not exist")
        if configs[name].modules_to_save or configs[name].bias != "none":
            raise ValueError(f"adapters: {name!r} trained whole modules or biases as well")
    chosen = {
        key: [name for name in adapters if name in layer.neuroada_delta]
        for key, layer in layers.items()
    }
    chosen = {key: names for key, names in chosen.items() if names}
    for key, names in chosen.items():
        indices = [layers[key].neuroada_index[name] for name in names]
        if not all(torch.equal(index, indices[0]) for index in indices):
            raise ValueError(
                f"adapters: {', '.join(names)} chose different connections in {key}, expected the "
                "same ones"
            )
    first = configs[adapters[0]]
    weight_of = dict(zip(adapters, weights, strict=True))
    for key, names in chosen.items():
        layer = layers[key]
        delta = _weighted_sum({n: layer.neuroada_delta[n] for n in names}, weight_of)
        layer.neuroada_delta[adapter_name] = nn.Parameter(delta, requires_grad=False)
        index = layer.neuroada_index[names[0]].clone()
        layer.neuroada_index.add(adapter_name, index, first.save_activations)
    sizes = {key: layers[key].neuroada_index[adapter_name].shape[1] for key in chosen}
    return dataclasses.replace(
        first,
        target_modules=sorted(chosen),
        exclude_modules=None,
        layers=None,
        k_pattern={key: k for key, k in sizes.items() if k != first.k},
    )


def _weighted_sum(deltas: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """In float32 at least, rounded once to the dtype of the first."""
    dtype = next(iter(deltas.values())).dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = sum(weights[name] * delta.detach().to(wide) for name, delta in deltas.items())
    assert isinstance(total, Tensor)
    return total.to(dtype)
