"""Removes adapters: one of several, or all of them with their layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from neuroada_kernels._models import layers_in, unwrapped
from neuroada_kernels.model import parts_of, replace
from neuroada_kernels.model_merge import merge as merge_layers
from neuroada_kernels.named import (
    check_name,
    check_outside_rows,
    check_unmerged,
    check_whole,
    configs_of,
)
from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._named import NamedLayer
from neuroada_kernels.nn.bypass import NeuroAdaBypass
from neuroada_kernels.nn.experts import NeuroAdaExperts, StackedLinear
from neuroada_kernels.replacing import check_hooks
from neuroada_kernels.targets import errors_name


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Delete an inactive adapter; a layer without another one becomes a plain module again.

    Raises
    ------
    TypeError, ValueError
        If there is no such adapter, if it is active, if a layer to be removed has hooks, or if the
        model is sharded over processes.
    RuntimeError
        If a layer is merged, or within :func:`neuroada_kernels.disable_adapter` or
        :func:`neuroada_kernels.rows_of`. The model is unchanged then.
    """
    model = unwrapped(model)
    layers = layers_in(model)
    check_name(layers, adapter_name)
    check_unmerged(layers)
    check_outside_rows(layers)
    check_whole(model)
    active = {layer.active_adapter for layer in layers.values()}
    if active == {None}:
        raise RuntimeError("model: is its base for now, leave disable_adapter first")
    if adapter_name in active:
        raise ValueError(f"adapter_name: {adapter_name!r} is active, activate another one first")
    outer = _outer_layers(model)
    alone = {name: layer for name, layer in outer.items() if _has_only(layer, adapter_name)}
    _check_hooks(alone)
    for name, layer in layers.items():
        with errors_name(name):
            layer.swap_out(adapter_name)
    for layer in layers.values():
        if adapter_name in layer.adapter_names and layer.adapter_names != (adapter_name,):
            layer.remove(adapter_name)
    replace(model, {layer: _bare(layer) for layer in alone.values()})
    configs_of(model).pop(adapter_name, None)


def unload(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Restore every module that :func:`neuroada_kernels.adapt` replaced; drops all adapters.

    A former ``nn.Linear`` is one again, with the same tensors that the layer had and with its
    custom attributes. A wrapped base, quantised or ``Conv1D``, takes its former place. Then
    ``save_pretrained`` writes an ordinary checkpoint. Whether parameters of the base require grad
    does not change.

    Parameters
    ----------
    model : nn.Module
        An adapted model; changed in place.
    merge : bool
        Merge the active adapter first, as by :func:`neuroada_kernels.merge`; otherwise the
        weights are those of the base, bit for bit.

    Returns
    -------
    nn.Module
        The model, without ``torch.compile`` or ``DistributedDataParallel`` around it; for a single
        layer, the module that replaces it.

    Raises
    ------
    RuntimeError
        If the model is merged and ``merge`` is False; if ``merge`` is True and no adapter is
        active; or within :func:`neuroada_kernels.rows_of`.
    ValueError
        If the model has no NeuroAda layer, is sharded over processes, was offloaded by accelerate
        after it was adapted, or has a base that nothing can be merged into; if a layer has hooks.
        The model is unchanged then.
    """
    model = unwrapped(model)
    layers = layers_in(model)
    check_whole(model)
    check_outside_rows(layers)
    outer = _outer_layers(model)
    _check_hooks(outer)
    if merge:
        merge_layers(model)
    else:
        check_unmerged(layers, "unmerge first, or unload(merge=True) keeps what is merged")
    bare: dict[nn.Module, nn.Module] = {layer: _bare(layer) for layer in outer.values()}
    replace(model, bare)
    for name in ("neuroada_config", "neuroada_configs"):
        vars(model).pop(name, None)
    return bare.get(model, model)


def _outer_layers(model: nn.Module) -> dict[str, NamedLayer | NeuroAdaExperts]:
    """The layers that replaced a module, by their first names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NamedLayer | NeuroAdaExperts)
        and not isinstance(module, StackedLinear)
    }


def _has_only(layer: NamedLayer | NeuroAdaExperts, adapter: str) -> bool:
    # All parts of experts have the same adapters.
    return any(part.adapter_names == (adapter,) for part in parts_of(layer))


def _check_hooks(layers: Mapping[str, NamedLayer | NeuroAdaExperts]) -> None:
    """Raise if a layer has hooks, or a ``forward`` set on the instance."""
    for name, layer in layers.items():
        for module in {layer, *parts_of(layer)}:
            check_hooks(name, module)
            if "forward" in vars(module):
                raise ValueError(
                    f"{name}: has a forward of its own, which its replacement would lose; remove "
                    "accelerate's hooks, or whatever put it there, first"
                )


def _bare(layer: NamedLayer | NeuroAdaExperts) -> nn.Module:
    """The module that ``layer`` replaced; the layer gives the weight up to it."""
    for part in parts_of(layer):
        part.release_weight()
    if isinstance(layer, NeuroAdaExperts):
        module = layer.base
        weights = {name: stack.weight for name, stack in layer.stacks.items()}
        module._parameters = {**weights, **module._parameters}
    elif isinstance(layer, NeuroAdaBypass):
        module = layer.base
    else:
        assert isinstance(layer, BypassLinear)
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        module = nn.Linear(*sizes, device="meta")
        module.weight, module.bias = layer.weight, layer.bias  # type: ignore[assignment]
    return module.train(layer.training)
