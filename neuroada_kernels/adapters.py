"""Adapters on disk: trained parameters, with a fingerprint of the weights they were trained on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from neuroada_kernels._dtypes import name_of
from neuroada_kernels._models import (
    average_too,
    check_averaged,
    check_not_replicated,
    find_layers,
    layers_in,
    outside_inference_mode,
    unwrapped,
)
from neuroada_kernels._sharding import (
    is_managed_by_fsdp,
    is_sharded,
    mesh_of,
    on_first_rank,
    reshard,
    split_as,
    whole,
)
from neuroada_kernels.adapter_base import Base
from neuroada_kernels.adapter_file import AdaptedModule, Adapter, read_adapter, write_adapter
from neuroada_kernels.adapter_match import (
    check_bases,
    find_modules,
    find_parameters,
    new_experts,
    parameters_of,
    some,
)
from neuroada_kernels.adding import insert_adapter
from neuroada_kernels.config import NeuroAdaConfig
from neuroada_kernels.freezing import deltas_of, grad_flags_kept_on_error
from neuroada_kernels.model import (
    AdaptSummary,
    keep_config,
    layer_over,
    parts_of,
)
from neuroada_kernels.named import (
    active_in,
    check_bias,
    check_name,
    check_new_name,
    check_whole,
    configs_of,
    keep_config_of,
    names_in,
    siblings_of,
)
from neuroada_kernels.nn._layer import BypassLayer
from neuroada_kernels.nn._named import DEFAULT, NamedLayer
from neuroada_kernels.nn.experts import NeuroAdaExperts
from neuroada_kernels.nn.linear import NeuroAdaLinear
from neuroada_kernels.plan import check_index
from neuroada_kernels.targets import errors_name, plain_name


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    config: NeuroAdaConfig | None = None,
) -> None:
    """Save an adapter of ``model``: its deltas, and every other parameter that trains.

    The file is safetensors, a few bytes per connection, and holds nothing of the base model but
    a fingerprint of each adapted weight. It is written beside ``path`` and renamed, so that an
    interrupted save leaves the old file intact.

    If the model is sharded, by ``fully_shard`` or the styles of
    :mod:`neuroada_kernels.distributed`, every process that has a shard has to call this: the shards
    are all-gathered, and the first of these processes writes the file.

    Parameters
    ----------
    model : nn.Module
        An adapted model, merged or not; one inside ``torch.compile`` or
        ``DistributedDataParallel`` is unwrapped first.
    path : str or path
        The file, by convention ``*.safetensors``.
    adapter_name : str, optional
        Which adapter, by default the active one.
    config : NeuroAdaConfig, optional
        How the model was adapted, to be stored in the file; by default the config given to
        :func:`adapt` or :func:`add_adapter`.

    Raises
    ------
    ValueError
        If the model has no NeuroAda layer, no such adapter, or another adapter merged; if no
        adapter is named and none is active; if ``path`` is a folder; if connections are not chosen
        yet, or an index was written in place and is not valid; or if merged layers share a weight,
        so that the base's values are unknown.
    RuntimeError
        In the other processes, if the first could not write.
    """
    model = unwrapped(model)
    reshard(model)
    adapter_name = _name_to_save(layers_in(model), adapter_name)
    layers, parameters = _trained(model, adapter_name)
    _check_bases_known(layers)
    for name, layer in layers.items():
        try:
            layer.check_selected()
            check_index(layer.holder_of(adapter_name).index, layer.in_features)
            if layer.merged and layer.active_adapter != adapter_name:
                raise ValueError(f"is merged with {layer.active_adapter!r}, unmerge first")
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    if config is None:
        config = configs_of(model).get(adapter_name, getattr(model, "neuroada_config", None))
    modules = {name: _adapted_module(layer, adapter_name) for name, layer in layers.items()}
    as_json = None if config is None else config.to_dict()
    adapter = Adapter(modules, parameters, as_json)
    mesh = mesh_of(model)
    if mesh is None:
        write_adapter(adapter, path)
    else:
        on_first_rank(lambda: write_adapter(adapter, path), mesh)


@outside_inference_mode
def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    allow_mismatch: bool = False,
) -> AdaptSummary:
    """Load a file of :func:`save_adapter` into an adapted model, or into a base, which it adapts.

    Everything is checked first; if an error is raised, ``model`` is unchanged. A layer keeps its
    ``delta`` parameter, so that an optimizer stays valid, unless ``k`` or the dtype differ: it is
    another parameter then, which a warning says. A model without NeuroAda layers is adapted and
    frozen, except for what the adapter trained.

    Under a new ``adapter_name`` the file is added to an adapted model as by :func:`add_adapter`:
    inactive, frozen, and beside the existing adapters.

    In a sharded model that is already adapted, every process reads the file and loads its shard.
    FSDP does not let its parameters be replaced, so there ``k`` and ``delta_dtype`` have to be the
    file's.

    Parameters
    ----------
    model : nn.Module
        The base model, with the weights that the adapter was trained on, or an adapted one.
    path : str or path
        The file.
    adapter_name : str, optional
        A new name, or that of the active adapter, which is replaced; by default the latter.
    allow_mismatch : bool
        Load also if weights have other values or another dtype. Shapes must match.

    Returns
    -------
    AdaptSummary

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    TypeError
        If a module of the file is not a linear in the model.
    ValueError
        If the file is damaged or no adapter; if a weight is not the one that the adapter was
        trained on; if the model lacks a module or a parameter, has adapted layers that the file
        lacks, is merged, or cannot be adapted; if an inactive adapter has that name; or if
        the model has other adapters, and the file has parameters that all adapters share or biases
        of the base train.
    """
    whole_model, model = model, unwrapped(model)
    reshard(model)
    adapter = read_adapter(path)
    config = None if adapter.config is None else NeuroAdaConfig.from_dict(adapter.config)
    adapter_name, active = _name_to_load(model, adapter, adapter_name)
    fresh = not any(isinstance(module, NamedLayer) for module in model.modules())
    experts = new_experts(model, adapter)
    targets = find_modules(model, adapter, experts, adapter_name)
    parameters = find_parameters(model, adapter)
    if experts or not _keeps_parameters(adapter, targets, adapter_name):
        check_not_replicated(whole_model)
    check_averaged(whole_model, parameters.values())
    check_bases(adapter, targets, parameters, allow_mismatch=allow_mismatch)
    new: dict[nn.Module, NamedLayer | NeuroAdaExperts] = dict(experts)
    replaced = {part for layer in new.values() for part in parts_of(layer)}
    added: dict[NamedLayer, tuple[Tensor, Tensor]] = {}
    renewed = []
    with grad_flags_kept_on_error(model), torch.no_grad(), ExitStack() as undo:
        for name, module in targets.items():
            entry = adapter.modules[name]
            with errors_name(name):
                if not isinstance(module, NamedLayer):
                    new[module] = _adapted(module, entry, config)
                elif module in replaced or adapter_name in module.adapter_names:
                    known = module.delta
                    _exchange(module, entry, undo)
                    if module.delta is not known and not (known.is_meta or module in replaced):
                        renewed.append(name)
                else:
                    check_index(entry.index, module.in_features)
                    added[module] = module.part_of_connections(entry.index, entry.delta)
        if fresh:
            model.requires_grad_(False)
        for name, parameter in parameters.items():
            undo.callback(parameter.copy_, parameter.clone())
            parameter.copy_(split_as(adapter.parameters[name], parameter))
            parameter.requires_grad_()
        undo.pop_all()
    siblings = siblings_of(model)
    if active and config is not None:
        siblings = config.siblings
    insert_adapter(model, adapter_name, new, added, active=active, siblings=siblings)
    average_too(find_layers(model).values(), parameters.values())
    if active:
        keep_config(model, config)
    if not active or configs_of(model):
        keep_config_of(model, adapter_name, config)
    if renewed:
        warnings.warn(
            f"delta: new parameters in {some(renewed)}, of another k or dtype; an optimizer that "
            "was made before does not train them",
            stacklevel=3,  # outside_inference_mode is in between
        )
    return AdaptSummary.of(model, tuple(targets), adapter_name)


def _name_to_save(layers: Mapping[str, NamedLayer], adapter_name: str | None) -> str:
    """The name that was given, or the active adapter's."""
    name = active_in(layers) if adapter_name is None else adapter_name
    if name is None:
        raise ValueError("adapter_name: is missing, while no adapter is active")
    check_name(layers, name)
    return name


def _name_to_load(model: nn.Module, adapter: Adapter, adapter_name: str | None) -> tuple[str, bool]:
    """The name of the adapter in the model, and whether it is active afterwards."""
    if not any(isinstance(module, NamedLayer) for module in model.modules()):
        name = DEFAULT if adapter_name is None else adapter_name
        check_new_name((), name)
        return name, True
    layers = layers_in(model)
    known, active = names_in(layers), active_in(layers)
    name = _name_to_save(layers, None) if adapter_name is None else adapter_name
    if name not in known:
        check_new_name(known, name)
        check_whole(model)
        check_bias(model)
    elif name != active:
        raise ValueError(f"adapter_name: {name!r} is there already, expected a new or active one")
    if adapter.parameters and {*known} != {name}:
        raise ValueError(
            f"path: has values of {some(sorted(adapter.parameters))}, which other adapters share"
        )
    return name, name == active


def _trained(
    model: nn.Module, adapter_name: str
) -> tuple[dict[str, NamedLayer], dict[str, Tensor]]:
    """Layers of an adapter, and trained parameters other than deltas, by their plain names."""
    layers = {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, NamedLayer) and adapter_name in module.adapter_names
    }
    deltas = deltas_of(model)
    parameters = {
        name: whole(parameter.detach())
        for name, parameter in parameters_of(model, once=True).items()
        if parameter.requires_grad and id(parameter) not in deltas
    }
    return layers, parameters


def _keeps_parameters(
    adapter: Adapter, targets: Mapping[str, nn.Module], adapter_name: str
) -> bool:
    """Whether every module has a delta of the form that the file's has."""
    for name, module in targets.items():
        if not isinstance(module, NamedLayer) or adapter_name not in module.adapter_names:
            return False
        held, new = module.holder_of(adapter_name).delta, adapter.modules[name].delta
        if held.shape != new.shape or held.dtype != new.dtype:
            return False
    return True


def _adapted(module: nn.Module, entry: AdaptedModule, config: NeuroAdaConfig | None) -> NamedLayer:
    layer = layer_over(
        module,
        entry.index.shape[1],
        NeuroAdaLinear,
        index=entry.index,
        delta_dtype=entry.delta.dtype,
        save_activations="auto" if config is None else config.save_activations,
    )
    assert isinstance(layer, NamedLayer)
    layer.delta.copy_(entry.delta)
    return layer


def _exchange(layer: BypassLayer, entry: AdaptedModule, undo: ExitStack) -> None:
    """Replace the index and delta of ``layer``; ``undo`` restores the old ones."""
    index, delta = layer.index, layer.delta
    new_index, new_delta = layer.part_of_connections(entry.index, entry.delta)
    # Callbacks run in reverse: delta is restored before the index, which is checked against it.
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
    elif is_managed_by_fsdp(layer) and is_sharded(delta):
        raise ValueError(
            f"delta: {list(new_delta.shape)} of {name_of(new_delta.dtype)}, expected "
            f"{list(delta.shape)} of {name_of(delta.dtype)}, which FSDP holds"
        )
    else:
        # Not the same parameter with other data: the state of an optimizer that has made steps
        # would have the old form, and torch's fused kernels write beyond it.
        undo.callback(setattr, layer, "delta", delta)
        layer.delta = nn.Parameter(new_delta, delta.requires_grad)
    layer.index = new_index
    layer.drop_deferral()


def _put_index(layer: BypassLayer, index: Tensor) -> None:
    if index.is_meta:  # not chosen yet, so nothing to check
        layer._buffers["index"] = index
    else:
        layer.index = index


def _check_bases_known(layers: Mapping[str, BypassLayer]) -> None:
    """Raise if a layer is merged into a weight that another layer reads."""
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(id(getattr(layer, "weight", layer)), name)
        if other != name and (layer.merged or layers[other].merged):
            raise ValueError(f"{name}: is merged and shares its weight with {other}, unmerge first")


def _adapted_module(layer: NamedLayer, adapter_name: str) -> AdaptedModule:
    """The file's entry of a layer; the fingerprint is of its weight before merging."""
    held = layer.holder_of(adapter_name)
    if held is layer:
        index, delta = layer.whole_connections()
    else:
        index, delta = held.index, whole(held.delta.detach())
    base = Base.of(layer).fingerprint(index, layer.original)
    return AdaptedModule(index.cpu(), delta.cpu(), base)
