"""Adapters on disk: what was trained, saved beside a fingerprint of what it was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from neuroada_kernels._dtypes import name_of
from neuroada_kernels._sharding import (
    is_managed_by_fsdp,
    is_sharded,
    on_first_rank,
    reshard,
    split_as,
    whole,
)
from neuroada_kernels.adapter_base import Base
from neuroada_kernels.adapter_file import (
    AdaptedModule,
    Adapter,
    read_adapter,
    write_adapter,
)
from neuroada_kernels.config import NeuroAdaConfig
from neuroada_kernels.model import (
    AdaptSummary,
    errors_name,
    grad_flags_kept_on_error,
    keep_config,
    layer_over,
    replace,
)
from neuroada_kernels.nn._layer import BypassLayer
from neuroada_kernels.nn.bypass import NeuroAdaBypass
from neuroada_kernels.nn.experts import STACKS, NeuroAdaExperts, is_experts
from neuroada_kernels.nn.foreign import missing_library
from neuroada_kernels.nn.linear import NeuroAdaLinear
from neuroada_kernels.plan import check_index
from neuroada_kernels.siblings import link_siblings
from neuroada_kernels.targets import check_target


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, config: NeuroAdaConfig | None = None
) -> None:
    """Save what was trained of ``model``: every delta, and every other parameter that trains.

    The file is safetensors, a few bytes a connection, and holds nothing of the base model but
    a fingerprint of each adapted weight. It is written beside ``path`` and renamed, so that an
    interrupted save leaves the old file whole.

    Where the model is sharded, by ``fully_shard`` or the styles of
    :mod:`neuroada_kernels.distributed`, every process has to call this: the parts are gathered, and
    the first process writes the one file.

    Parameters
    ----------
    model : nn.Module
        An adapted model, merged or not; one inside ``torch.compile`` or
        ``DistributedDataParallel`` is saved as itself.
    path : str or path
        The file, by custom ``*.safetensors``.
    config : NeuroAdaConfig, optional
        How the model was adapted, to go into the file; by default what :func:`adapt` was given.

    Raises
    ------
    ValueError
        If the model has no NeuroAda layer, if ``path`` is a folder, if connections are not chosen
        yet, if an index was written in place and is not valid, or if merged layers share a
        weight, so that the base is not known.
    RuntimeError
        In the other processes, where the first one could not write.
    """
    model = _unwrapped(model)
    reshard(model)
    layers, parameters = _trained(model)
    if not layers:
        raise ValueError("model: has no NeuroAda layer, expected an adapted model")
    _check_bases_known(layers)
    for name, layer in layers.items():
        try:
            layer.check_selected()
            check_index(layer.index, layer.in_features)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    if config is None:
        config = getattr(model, "neuroada_config", None)
    modules = {name: _adapted_module(layer) for name, layer in layers.items()}
    as_json = None if config is None else config.to_dict()
    adapter = Adapter(modules, parameters, as_json)
    if any(is_sharded(parameter) for parameter in model.parameters()):
        on_first_rank(lambda: write_adapter(adapter, path))
    else:
        write_adapter(adapter, path)


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, allow_mismatch: bool = False
) -> AdaptSummary:
    """Load what :func:`save_adapter` saved, into an adapted model or one that is adapted by it.

    Everything is checked first, and where an error is raised ``model`` is as it was. A layer
    keeps its ``delta``, so that an optimizer goes on with it, unless ``k`` or ``delta_dtype``
    differ. A model without layers is adapted, frozen, and trains what was trained.

    Into a sharded model that is adapted already, every process loads its part of the file; each
    has to be able to read it. FSDP keeps the parameters that it has, so there ``k`` and
    ``delta_dtype`` have to be the file's.

    Parameters
    ----------
    model : nn.Module
        The base model, with the weights that the adapter was trained on, or an adapted one.
    path : str or path
        The file.
    allow_mismatch : bool
        Load also where weights have other values or another dtype. Shapes must fit.

    Returns
    -------
    AdaptSummary

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    TypeError
        If a module of the file is no linear in the model.
    ValueError
        If the file is damaged or no adapter; if a weight is not the one that the adapter was
        trained on; if the model lacks a module or a parameter, has adapted layers that the file
        does not know, is merged, or cannot be adapted.
    """
    model = _unwrapped(model)
    reshard(model)
    adapter = read_adapter(path)
    config = None if adapter.config is None else NeuroAdaConfig.from_dict(adapter.config)
    experts = _experts(model, adapter)
    targets = _find(model, adapter, experts)
    parameters = _find_parameters(model, adapter)
    differing = {n: _differences(n, targets[n], entry) for n, entry in adapter.modules.items()}
    differing |= {
        name: _parameter_differences(parameters[name], tensor)
        for name, tensor in adapter.parameters.items()
    }
    _refuse_mismatch(differing, allow_mismatch)
    fresh = not any(isinstance(module, BypassLayer) for module in model.modules())
    new: dict[nn.Module, nn.Module] = dict(experts)
    with grad_flags_kept_on_error(model), torch.no_grad(), ExitStack() as undo:
        for name, module in targets.items():
            entry = adapter.modules[name]
            if isinstance(module, BypassLayer):
                with errors_name(name):
                    _exchange(module, entry, undo)
            else:
                new[module] = _adapted(name, module, entry, config)
        if fresh:
            model.requires_grad_(False)
        for name, parameter in parameters.items():
            undo.callback(parameter.copy_, parameter.clone())
            parameter.copy_(split_as(adapter.parameters[name], parameter))
            parameter.requires_grad_()
        undo.pop_all()
    replace(model, new)
    if new:
        link_siblings(model, None if config is None else config.siblings)
    keep_config(model, config)
    return AdaptSummary.of(model, tuple(targets))


def _trained(model: nn.Module) -> tuple[dict[str, BypassLayer], dict[str, Tensor]]:
    """Layers, and parameters other than deltas that train, by the names that they go by."""
    layers = {
        _plain(name): module
        for name, module in model.named_modules()
        if isinstance(module, BypassLayer)
    }
    deltas = {id(layer.delta) for layer in layers.values()}
    parameters = {
        name: whole(parameter.detach())
        for name, parameter in _parameters(model, once=True).items()
        if parameter.requires_grad and id(parameter) not in deltas
    }
    return layers, parameters


def _parameters(model: nn.Module, *, once: bool) -> dict[str, nn.Parameter]:
    """By the names that they have in the model that was adapted, where no layer is wrapped.

    One that has several names comes under each, or ``once``.
    """
    wrappers = (NeuroAdaBypass, NeuroAdaExperts)
    named = model.named_modules(remove_duplicate=False)
    wrapped = {f"{name}.base.": f"{name}." for name, m in named if isinstance(m, wrappers)}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=once):
        for inside, outside in wrapped.items():
            if name.startswith(inside):
                name = outside + name.removeprefix(inside)
        found[_plain(name)] = parameter
    return found


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where ``torch.compile`` or DDP has put something round it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}, expected torch.nn.Module")
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _plain(name: str) -> str:
    """A name without the parts that compiling single modules puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _experts(model: nn.Module, adapter: Adapter) -> dict[nn.Module, NeuroAdaExperts]:
    """What takes the place of experts whose stacks the file has; it chooses nothing itself."""
    found = {}
    for name, module in model.named_modules():
        known = [f"{_plain(name)}.{stack}" in adapter.modules for stack in STACKS]
        if any(known) and is_experts(module):
            if not all(known):
                raise ValueError(
                    f"{name}: the adapter has one of {', '.join(STACKS)}, expected both"
                )
            with errors_name(name):
                index = {
                    stack: torch.zeros(module.get_parameter(stack)[:, :, 0].numel(), 1).int()
                    for stack in STACKS
                }
                flags = [(p, p.requires_grad) for p in module.parameters()]
                found[module] = NeuroAdaExperts(module, index=index)
                for parameter, flag in flags:  # nothing is certain yet
                    parameter.requires_grad_(flag)
    return found


def _find(
    model: nn.Module, adapter: Adapter, experts: Mapping[nn.Module, NeuroAdaExperts]
) -> dict[str, nn.Module]:
    """The module of every name in the file, found to be one that can take its part."""
    named = dict(model.named_modules(remove_duplicate=False))
    for name, module in list(named.items()):
        if module in experts:
            named |= {f"{name}.{stack}": part for stack, part in experts[module].stacks.items()}
    real = {_plain(name): name for name in named}
    missing = sorted(adapter.modules.keys() - real.keys())
    if missing:
        raise ValueError(f"model: has no {_some(missing)}, which the adapter is for")
    targets = {}
    for name in (name for name in real if name in adapter.modules):
        module = named[real[name]]
        if not isinstance(module, BypassLayer):
            if not name:
                raise ValueError("model: a single layer, expected a NeuroAda layer")
            check_target(real[name], module, named, by_name=True)
        elif module.merged:
            raise ValueError(f"{name}: is merged, unmerge first")
        targets[name] = module
    known = {id(module) for module in targets.values()}
    if len(known) < len(targets):
        raise ValueError("model: has one module where the adapter has two")
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BypassLayer) and id(module) not in known
    ]
    if others:
        raise ValueError(f"model: {_some(others)} adapted, which the adapter does not know")
    return targets


def _find_parameters(model: nn.Module, adapter: Adapter) -> dict[str, nn.Parameter]:
    found = _parameters(model, once=False)
    missing = sorted(adapter.parameters.keys() - found.keys())
    if missing:
        raise ValueError(f"model: has no {_some(missing)}, which the adapter has values of")
    return {name: found[name] for name in adapter.parameters}


def _differences(name: str, module: nn.Module, entry: AdaptedModule) -> list[str]:
    with errors_name(name):
        base = Base.of(module)
    if base.shape != entry.base.shape:
        return [f"shape {list(base.shape)}, expected {list(entry.base.shape)}"]
    differences = entry.base.differences(base.fingerprint(entry.index))
    if base.kind != entry.base.kind and (missing := missing_library(entry.base.kind or "")):
        differences.append(missing)
    return differences


def _parameter_differences(parameter: Tensor, saved: Tensor) -> list[str]:
    return [
        f"{name} {actual}, expected {expected}"
        for name, actual, expected in (
            ("shape", list(parameter.shape), list(saved.shape)),
            ("dtype", name_of(parameter.dtype), name_of(saved.dtype)),
        )
        if actual != expected
    ]


def _refuse_mismatch(differing: Mapping[str, list[str]], allow_mismatch: bool) -> None:
    wrong = {name: what for name, what in differing.items() if what}
    fatal = {name: what for name, what in wrong.items() if what[0].startswith("shape")}
    shown = fatal if allow_mismatch else wrong
    if shown:
        words = [f"{name}: {', '.join(what)}" for name, what in shown.items()]
        hint = "" if fatal else "; allow_mismatch=True loads it all the same"
        raise ValueError(f"model: not what the adapter is for: {_some(words, '; ')}{hint}")


def _adapted(
    name: str, module: nn.Module, entry: AdaptedModule, config: NeuroAdaConfig | None
) -> BypassLayer:
    with errors_name(name):
        layer = layer_over(
            module,
            entry.index.shape[1],
            NeuroAdaLinear,
            index=entry.index,
            delta_dtype=entry.delta.dtype,
            save_activations="auto" if config is None else config.save_activations,
        )
    assert isinstance(layer, BypassLayer)
    layer.delta.copy_(entry.delta)
    return layer


def _exchange(layer: BypassLayer, entry: AdaptedModule, undo: ExitStack) -> None:
    """Give ``layer`` another index and delta; ``undo`` gives the old ones back."""
    index, delta = layer.index, layer.delta
    new_index, new_delta = layer.part_of_connections(entry.index, entry.delta)
    # The last callback is the first to run: the index is checked against delta.
    undo.callback(setattr, layer, "_deferred", layer._deferred)
    undo.callback(setattr, layer, "strategy_reason", layer.strategy_reason)
    undo.callback(_put_index, layer, index)
    if (delta.shape, delta.dtype, delta.device) == (
        new_delta.shape,
        new_delta.dtype,
        new_delta.device,
    ):
        undo.callback(delta.copy_, delta.clone())
        delta.copy_(new_delta)
    elif is_managed_by_fsdp(layer):
        raise ValueError(
            f"delta: {list(new_delta.shape)} of {name_of(new_delta.dtype)}, expected "
            f"{list(delta.shape)} of {name_of(delta.dtype)}, which FSDP holds"
        )
    else:
        undo.callback(setattr, layer, "delta", delta)
        layer.delta = nn.Parameter(new_delta, delta.requires_grad)
    layer.index = new_index
    layer.drop_deferral()


def _put_index(layer: BypassLayer, index: Tensor) -> None:
    if index.is_meta:  # one that is still to be chosen, which has nothing to check
        layer._buffers["index"] = index
    else:
        layer.index = index


def _check_bases_known(layers: Mapping[str, BypassLayer]) -> None:
    """Refuse where one layer is merged into a weight that another one reads."""
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(id(getattr(layer, "weight", layer)), name)
        if other != name and (layer.merged or layers[other].merged):
            raise ValueError(f"{name}: is merged and shares its weight with {other}, unmerge first")


def _adapted_module(layer: BypassLayer) -> AdaptedModule:
    """What the file has of a layer, of its weight as it is, or while merged as it was."""
    index, delta = layer.whole_connections()
    base = Base.of(layer).fingerprint(index, layer.original)
    return AdaptedModule(index.cpu(), delta.detach().cpu(), base)


def _some(words: list[str], separator: str = ", ") -> str:
    """The first few of them, and how many there are besides."""
    more = len(words) - 3
    return separator.join(words[:3]) + (f" and {more} more" if more > 0 else "")
