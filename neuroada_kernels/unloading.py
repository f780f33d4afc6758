"""Adapters that go: one of several, or all of them and the layers too."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from neuroada_kernels._models import unwrapped
from neuroada_kernels.model import parts_of, replace
from neuroada_kernels.model_merge import merge as merge_layers
from neuroada_kernels.named import (
    check_name,
    check_outside_rows,
    check_unmerged,
    check_whole,
    configs_of,
    named_layers,
)
from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._named import NamedLayer
from neuroada_kernels.nn.bypass import NeuroAdaBypass
from neuroada_kernels.nn.experts import NeuroAdaExperts, StackedLinear
from neuroada_kernels.replacing import check_hooks
from neuroada_kernels.targets import errors_name


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter that is not active; a layer that had no other one is a plain module again.

    Raises
    ------
    TypeError, ValueError
        If there is no such adapter, if it is active, if a layer that would go has hooks, or if the
        model is sharded over processes.
    RuntimeError
        If a layer is merged; within :func:`neuroada_kernels.disable_adapter` or
        :func:`neuroada_kernels.rows_of`. The model is unchanged then.
    """
    model = unwrapped(model)
    layers = named_layers(model)
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
            layer.step_aside(adapter_name)
    for layer in layers.values():
        if adapter_name in layer.adapter_names and layer.adapter_names != (adapter_name,):
            layer.remove(adapter_name)
    replace(model, {layer: _bare(layer) for layer in alone.values()})
    configs_of(model).pop(adapter_name, None)


def unload(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Put every module back that :func:`neuroada_kernels.adapt` replaced; all adapters are gone.

    What was an ``nn.Linear`` is one again, with the very tensors that the layer had, and with
    attributes that somebody has given it; what a layer was put round, a quantised base or
    ``Conv1D``, stands in its own place. So ``save_pretrained`` writes an ordinary checkpoint.
    Parameters of the base require grad as they do now.

    Parameters
    ----------
    model : nn.Module
        An adapted model; changed in place.
    merge : bool
        Merge the active adapter first, as by :func:`neuroada_kernels.merge`; without, the weights
        are those of the base, bit for bit.

    Returns
    -------
    nn.Module
        The model; where it is a single layer, the module that takes its place. One inside
        ``torch.compile`` or ``DistributedDataParallel`` comes without these.

    Raises
    ------
    RuntimeError
        If the model is merged already, without ``merge=True``; if with it no adapter is active; or
        within :func:`neuroada_kernels.rows_of`.
    ValueError
        If the model has no NeuroAda layer, is sharded over processes, was offloaded by accelerate
        after it was adapted, or has a base that nothing can be merged into; if a layer has hooks.
        The model is unchanged then.
    """
    model = unwrapped(model)
    layers = named_layers(model)
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
    """What stands where a module was, by the first of its names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NamedLayer | NeuroAdaExperts)
        and not isinstance(module, StackedLinear)
    }


def _has_only(layer: NamedLayer | NeuroAdaExperts, adapter: str) -> bool:
    return any(part.adapter_names == (adapter,) for part in parts_of(layer))  # then all of experts


def _check_hooks(layers: Mapping[str, NamedLayer | NeuroAdaExperts]) -> None:
    """Raise where somebody has put hooks on a layer, or its forward into others."""
    for name, layer in layers.items():
        for module in {layer, *parts_of(layer)}:
            check_hooks(name, module)
            if "forward" in vars(module):
                raise ValueError(
                    f"{name}: has a forward of its own, which its replacement would lose; remove "
                    "accelerate's hooks, or whatever put it there, first"
                )


def _bare(layer: NamedLayer | NeuroAdaExperts) -> nn.Module:
    """The module that ``layer`` stands for, which has the weight to itself from now on."""
    for part in parts_of(layer):
        part.let_go()
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
