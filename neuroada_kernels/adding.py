"""Further adapters of an adapted model: chosen by a config, or as a sum of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from neuroada_kernels._models import (
    check_not_replicated,
    layers_in,
    outside_inference_mode,
    unwrapped,
)
from neuroada_kernels.arguments import check_selection, config_of
from neuroada_kernels.choices import each_choice
from neuroada_kernels.combination import Weighted, check_weights, weighted_sum
from neuroada_kernels.config import ALL_LINEAR, NeuroAdaConfig
from neuroada_kernels.freezing import grad_flags_kept_on_error
from neuroada_kernels.gradient import SCORE_BYTES, Loss
from neuroada_kernels.model import (
    AdaptSummary,
    chosen_layer,
    once,
    parts_of,
    replace,
    with_stacks,
)
from neuroada_kernels.named import (
    adapter_names,
    check_bias,
    check_name,
    check_new_name,
    check_unmerged,
    check_whole,
    disable_adapter,
    keep_config_of,
    settle,
    siblings_of,
)
from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._named import NamedLayer
from neuroada_kernels.nn.experts import NeuroAdaExperts
from neuroada_kernels.nn.linear import NeuroAdaLinear
from neuroada_kernels.siblings import link_siblings
from neuroada_kernels.targets import errors_name, find_targets


@overload
def add_adapter(
    model: nn.Module,
    adapter_name: str,
    config: NeuroAdaConfig,
    *,
    scores: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    score_bytes: int = SCORE_BYTES,
    layer_type: type[BypassLinear] = NeuroAdaLinear,
    progress: bool | None = None,
) -> AdaptSummary: ...


@overload
def add_adapter(
    model: nn.Module,
    adapter_name: str,
    k: int = 1,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    *,
    scores: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    score_bytes: int = SCORE_BYTES,
    layer_type: type[BypassLinear] = NeuroAdaLinear,
    progress: bool | None = None,
    **options: Any,
) -> AdaptSummary: ...


@outside_inference_mode
def add_adapter(
    model: nn.Module,
    adapter_name: str,
    *arguments: Any,
    scores: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    score_bytes: int = SCORE_BYTES,
    layer_type: type[BypassLinear] = NeuroAdaLinear,
    progress: bool | None = None,
    **options: Any,
) -> AdaptSummary:
    """Add an adapter to an adapted model; :func:`neuroada_kernels.set_adapter` activates it.

    Its connections are chosen by the weights of the base, as in :func:`neuroada_kernels.adapt`, in
    modules that are adapted already and in others. Until it is activated, the model's output does
    not change and the adapter does not train.

    Parameters
    ----------
    model : nn.Module
        An adapted model; existing layers get another adapter, other target modules a layer.
    adapter_name : str
        A new name, without dots.
    config, k, target_modules, **options
        As in :func:`neuroada_kernels.adapt`, except what belongs to a layer and not to an adapter:
        ``strategy``, see :func:`neuroada_kernels.set_strategy`, and ``siblings``.
        ``save_activations`` applies to new layers.
    scores, generator, data, loss, score_bytes, layer_type, progress
        As in :func:`neuroada_kernels.adapt`. Gradients are those of the base.

    Returns
    -------
    AdaptSummary
        Of this adapter.

    Raises
    ------
    TypeError, ValueError
        As :func:`neuroada_kernels.adapt`; if the name is not new or has dots; if biases of the base
        train, with this adapter or with another; if the model is sharded over processes.
    RuntimeError
        If a layer is merged, or its connections are still to be chosen. The model is unchanged
        then.
    """
    check_not_replicated(model)
    model = unwrapped(model)
    existing = layers_in(model)
    check_new_name(adapter_names(model), adapter_name)
    config = config_of(arguments, options, scores, data, loss)
    check_addable(model, existing)
    _check_config(config)
    check_bias(model, config)
    targets = find_targets(model, config, adapted=True)
    check_selection(config, targets, scores)
    modules = once(targets)
    added: dict[NamedLayer, tuple[Tensor, Tensor]] = {}
    new: dict[nn.Module, NamedLayer | NeuroAdaExperts] = {}
    choices = each_choice(
        model,
        modules,
        config,
        scores=scores,
        generator=generator,
        data=data,
        loss=loss,
        score_bytes=score_bytes,
        progress=progress,
    )
    with grad_flags_kept_on_error(model), disable_adapter(model):
        for name, choice in choices:
            module = modules[name]
            with errors_name(name):
                if isinstance(module, NamedLayer | NeuroAdaExperts):
                    for part in parts_of(module):
                        index = part.choose_connections(choice)
                        added[part] = index, torch.zeros_like(index, dtype=config.torch_delta_dtype)
                    continue
                new[module] = chosen_layer(module, choice, config, layer_type)
                if any(part.deferred for part in parts_of(new[module])):
                    raise ValueError("weight: is on the meta device, expected values")
    insert_adapter(model, adapter_name, new, added, active=False, siblings=siblings_of(model))
    keep_config_of(model, adapter_name, config)
    return AdaptSummary.of(model, with_stacks(model, targets), adapter_name)


@outside_inference_mode
def add_weighted_adapter(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Add an adapter whose update of the weights is the weighted sum of other adapters' updates.

    Each neuron gets the union of its connections in these adapters: the new k of a layer is the
    largest union of any of its neurons, and unused slots are empty. Sums are rounded once. The new
    adapter is inactive and does not train until :func:`neuroada_kernels.set_adapter`.

    Parameters
    ----------
    model : nn.Module
        An adapted model.
    adapters : sequence of str
        Names of its adapters; a layer that has none of them does not get the new one.
    weights : sequence of float
        One weight per adapter, of any sign.
    adapter_name : str
        A new name, without dots.

    Raises
    ------
    TypeError, ValueError
        If a name or a weight is not as expected; if biases of the base train with an adapter; or
        if the model is sharded over processes.
    RuntimeError
        If a layer is merged. The model is unchanged then.
    """
    model = unwrapped(model)
    layers = layers_in(model)
    check_new_name(adapter_names(model), adapter_name)
    check_addable(model, layers)
    check_bias(model)
    check_weights(adapters, weights)
    for name in adapters:
        check_name(layers, name, "adapters")
    weight_of = list(zip(adapters, weights, strict=True))
    sums: dict[NamedLayer, tuple[Tensor, Tensor]] = {}
    for layer in layers.values():
        found = [(layer.holder_of(n), w) for n, w in weight_of if n in layer.adapter_names]
        if found:
            sums[layer] = weighted_sum([Weighted(h.index, h.delta, w) for h, w in found])
    insert_adapter(model, adapter_name, {}, sums, active=False, siblings=None)
    keep_config_of(model, adapter_name, None)


def insert_adapter(
    model: nn.Module,
    adapter: str,
    new: Mapping[nn.Module, NamedLayer | NeuroAdaExperts],
    added: Mapping[NamedLayer, tuple[Tensor, Tensor]],
    *,
    active: bool,
    siblings: Sequence[Sequence[str]] | None,
) -> None:
    """Replace modules by ``new`` layers, with this adapter alone, and add it to other layers.

    ``new`` maps a module to its replacement, ``added`` a layer to index and delta. The adapter
    trains if it is ``active``.
    """
    fresh = [part for layer in new.values() for part in parts_of(layer)]
    for part in fresh:
        part.rename(adapter)
    for part, (index, delta) in added.items():
        part.park(adapter, index, delta)
    for part in (*fresh, *added):
        part.holder_of(adapter).delta.requires_grad_(active)
    for part in added if active else fresh:
        part.activate(adapter if active else None)
    replace(model, new)
    if new:
        link_siblings(model, siblings)
    settle(added)


def check_addable(model: nn.Module, layers: Mapping[str, NamedLayer]) -> None:
    """Raise where adapters cannot be added."""
    check_unmerged(layers)
    check_whole(model)
    for name, layer in layers.items():
        if layer.deferred:
            raise RuntimeError(f"{name}: waits for select_connections, call that first")


def _check_config(config: NeuroAdaConfig) -> None:
    if config.strategy != "bypass":
        raise ValueError(
            f"strategy: {config.strategy!r}, expected 'bypass': it is the layers', whose adapters "
            "all train by it, and set_strategy sets it"
        )
    if config.siblings is not None:
        raise ValueError("siblings: are the layers', expected None; see set_save_activations")
