"""Activates the adapters of a model: one, none, or one for each row of a batch.

The layers hold the adapters; the model itself only holds their configs. Functions and arguments
have PEFT's names, where PEFT has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from neuroada_kernels._models import (
    average_too,
    check_averaged,
    find_layers,
    layers_in,
    unwrapped,
)
from neuroada_kernels._sharding import is_managed_by_fsdp, is_sharded, reshard
from neuroada_kernels.config import NeuroAdaConfig
from neuroada_kernels.model import keep_config
from neuroada_kernels.model_merge import unmerge
from neuroada_kernels.nn._named import BASE, NamedLayer
from neuroada_kernels.nn._offloaded import check_present
from neuroada_kernels.nn.experts import StackedLinear
from neuroada_kernels.targets import errors_name


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters of ``model``, ``"default"`` being the one that :func:`adapt` made.

    Raises
    ------
    ValueError
        If the model has no NeuroAda layer.
    """
    return names_in(layers_in(model))


def active_adapter(model: nn.Module) -> str | None:
    """The active adapter of ``model``; None while it is disabled.

    Raises
    ------
    ValueError
        If the model has no NeuroAda layer.
    """
    return active_in(layers_in(model))


def set_adapter(model: nn.Module, adapter_name: str, *, inference_mode: bool = False) -> None:
    """Activate an adapter of ``model``, which trains from now on, and deactivate all others.

    Layers without it compute what the base does. Parameter objects stay the same, so that an
    optimizer stays valid. A resident layer restores W, bit for bit, and patches it with the new
    adapter.

    Parameters
    ----------
    model : nn.Module
        An adapted model.
    adapter_name : str
        One of :func:`adapter_names`.
    inference_mode : bool
        Leave its deltas frozen.

    Raises
    ------
    TypeError
        If ``adapter_name`` is no name. :func:`add_weighted_adapter` combines several adapters.
    ValueError
        If there is no such adapter, or no NeuroAda layer; if the model is sharded over processes,
        or in DDP since before the adapter trained; or if an index was written in place and is not
        valid.
    RuntimeError
        If a layer is merged. Nothing changes then.
    """
    layers = layers_in(model)
    check_name(layers, adapter_name)
    check_unmerged(layers)
    deltas = [] if inference_mode else _deltas_of(layers, [adapter_name])
    check_averaged(model, deltas)
    model = unwrapped(model)
    check_whole(model)
    with contextlib.ExitStack() as undo:
        for name, layer in layers.items():
            undo.callback(layer.activate, layer.active_adapter)
            with errors_name(name):
                layer.activate(adapter_name)
        undo.pop_all()
    for layer in layers.values():
        for delta in layer.deltas:
            delta.requires_grad_(False)
    for delta in deltas:
        delta.requires_grad_()
    average_too(layers.values())
    settle(layers.values())
    if adapter_name in (configs := configs_of(model)):
        keep_config(model, configs[adapter_name])


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` computes what its base does; then its state is restored.

    Nothing is merged or copied, and no parameter changes; weights of resident layers are restored,
    bit for bit, and patched again afterwards. An adapter that is activated or merged within the
    block is so only until its end. Within :func:`rows_of` all rows go through the base alone. The
    state is restored after an error too.

    Raises
    ------
    ValueError
        If the model has no NeuroAda layer.
    RuntimeError
        If a layer is merged.
    """
    model = unwrapped(model)
    layers = layers_in(model)
    check_unmerged(layers)
    before = {layer: (layer.active_adapter, layer._rows) for layer in layers.values()}
    flags = {d: d.requires_grad for layer in layers.values() for d in layer.deltas}
    active, config = active_in(layers), getattr(model, "neuroada_config", None)
    try:
        for layer in layers.values():
            layer.activate(None)
            layer.join_rows()
        yield
    finally:
        after = find_layers(model)  # layers may have been added or removed
        if after:
            unmerge(model)
        for layer in after.values():
            adapter, layer._rows = before.get(layer, (active, None))
            layer.activate(adapter)
            for name in layer.adapter_names:
                delta = layer.holder_of(name).delta
                new = delta.requires_grad and name == active
                delta.requires_grad_(flags.get(delta, new))
        settle(after.values())
        if after:
            keep_config(model, config)


@contextlib.contextmanager
def rows_of(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within the block each row of a batch goes through an adapter of its own.

    Row i of a layer's input, in dimension 0, goes through ``adapter_names[i]``, whichever adapter
    is active. The result is that of a batch of this adapter's rows alone, except for rounding if
    the base's forward is not ``nn.Linear``'s. Gradients reach the deltas that require them, see
    :func:`set_requires_grad`. Where activations are recomputed, as by ``torch.utils.checkpoint``,
    the backward has to be within the block too.

    Parameters
    ----------
    model : nn.Module
        An adapted model, all of whose layers see the rows of a batch in dimension 0.
    adapter_names : sequence of str
        One name for each row, of :func:`adapter_names`, or ``"__base__"`` for none.

    Raises
    ------
    TypeError
        If ``adapter_names`` is no sequence of names.
    ValueError
        If there is no such adapter; if a layer is resident, since a weight can hold one adapter
        only; if the model has stacked experts, whose inputs are tokens and not rows, or is sharded
        over processes; if an index was written in place and is not valid. A layer's forward raises
        this, before computing anything, if its input has another number of rows.
    RuntimeError
        If a layer is merged, or within another such block.
    """
    layers = layers_in(model)
    check_unmerged(layers)
    check_outside_rows(layers)
    check_whole(unwrapped(model))
    names = _names(adapter_names)
    for name in names:
        if name != BASE:
            check_name(layers, name, "adapter_names")
    for name, layer in layers.items():
        if layer.strategy == "resident":
            raise ValueError(
                f"{name}: is resident, so that its weight holds one adapter for all rows, expected "
                "'bypass', see set_strategy"
            )
        if isinstance(layer, StackedLinear):
            raise ValueError(f"{name}: is a stack of experts, which sees tokens instead of rows")
    try:
        for name, layer in layers.items():
            with errors_name(name):
                layer.split_rows(names)
        yield
    finally:
        for layer in layers.values():
            layer.join_rows()
        settle(layers.values())


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Make the deltas of adapters trainable or frozen, whichever adapter is active.

    A later :func:`set_adapter` overrides this. To train several in one batch, see :func:`rows_of`.

    Raises
    ------
    TypeError, ValueError
        If ``adapter_names`` are no names of adapters, the model has no NeuroAda layer, or DDP
        wraps it and would not average the gradients.
    """
    reshard(unwrapped(model))
    layers = layers_in(model)
    names = _names([adapter_names] if isinstance(adapter_names, str) else adapter_names)
    for name in names:
        check_name(layers, name, "adapter_names")
    deltas = _deltas_of(layers, names)
    check_averaged(model, deltas if requires_grad else ())
    for delta in deltas:
        delta.requires_grad_(requires_grad)
    average_too(layers.values())


def _deltas_of(
    layers: Mapping[str, NamedLayer], adapter_names: Collection[str]
) -> list[nn.Parameter]:
    return [
        layer.holder_of(name).delta
        for layer in layers.values()
        for name in layer.adapter_names
        if name in adapter_names
    ]


def active_in(layers: Mapping[str, NamedLayer]) -> str | None:
    """The active adapter of these layers; None if they have none."""
    active = (layer.active_adapter for layer in layers.values())
    return next((name for name in active if name is not None), None)


def configs_of(model: nn.Module) -> dict[str, NeuroAdaConfig | None]:
    """Adapter to its config; empty if the model never had more than one adapter."""
    configs: dict[str, NeuroAdaConfig | None] = vars(model).get("neuroada_configs", {})
    return configs


def siblings_of(model: nn.Module) -> Sequence[Sequence[str]] | None:
    """The groups of siblings that the model was adapted with; None for the default ones."""
    configs = (getattr(model, "neuroada_config", None), *configs_of(model).values())
    found = (config.siblings for config in configs if config is not None)
    return next((siblings for siblings in found if siblings is not None), None)


def keep_config_of(model: nn.Module, adapter: str, config: NeuroAdaConfig | None) -> None:
    """Store the config of an adapter on the model, so that copies of the model have it."""
    if "neuroada_configs" not in vars(model):  # then there was one other adapter at most
        own = getattr(model, "neuroada_config", None)
        vars(model)["neuroada_configs"] = dict.fromkeys(adapter_names(model), own)
    configs_of(model)[adapter] = config


def check_new_name(names: Collection[str], adapter_name: object) -> None:
    """Raise unless ``adapter_name`` is a valid name for another adapter."""
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name: {type(adapter_name).__name__}, expected a name")
    if adapter_name in names:
        raise ValueError(f"adapter_name: {adapter_name!r} is there already, expected a new name")
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name: {adapter_name!r}, expected a name without dots")
    if adapter_name == BASE or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(f"adapter_name: {adapter_name!r} means something else, expected another")


def check_unmerged(layers: Mapping[str, NamedLayer], what: str = "unmerge first") -> None:
    """Raise where a layer is merged, so that its weight is not the base's."""
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{name}: is merged, {what}")


def check_outside_rows(layers: Mapping[str, NamedLayer]) -> None:
    """Raise within :func:`rows_of`."""
    for name, layer in layers.items():
        if layer._rows is not None:
            raise RuntimeError(f"{name}: rows of a batch take different adapters, leave that first")


def check_bias(model: nn.Module, *more: NeuroAdaConfig) -> None:
    """Raise if a config trains biases of the base, which all adapters share."""
    known = (getattr(model, "neuroada_config", None), *configs_of(model).values(), *more)
    if any(config is not None and config.bias == "all" for config in known):
        raise ValueError("bias: 'all' in a config, expected 'none': adapters share the base's")


def check_whole(model: nn.Module) -> None:
    """Raise if the model is sharded over processes, or offloaded by accelerate."""
    for name, layer in model.named_modules():
        if isinstance(layer, NamedLayer):
            with errors_name(name):
                check_present(layer)
    if any(map(is_sharded, model.parameters())) or any(map(is_managed_by_fsdp, model.modules())):
        raise ValueError(
            "model: is sharded over processes, expected a whole one: its adapters stay as they are"
        )


def names_in(layers: Mapping[str, NamedLayer]) -> tuple[str, ...]:
    """The adapters that these layers have."""
    return tuple(dict.fromkeys(n for layer in layers.values() for n in layer.adapter_names))


def _names(adapter_names: object) -> tuple[str, ...]:
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        kind = type(adapter_names).__name__
        raise TypeError(f"adapter_names: {kind}, expected a sequence of names")
    if not adapter_names:
        raise ValueError("adapter_names: is empty, expected at least one name")
    return tuple(adapter_names)


def check_name(
    layers: Mapping[str, NamedLayer], name: object, argument: str = "adapter_name"
) -> None:
    """Raise unless ``name``, which was given as ``argument``, is the name of an adapter."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: {name!r}, expected one name")
    known = names_in(layers)
    if name not in known:
        raise ValueError(f"{argument}: {name!r}, expected one of {list(known)}")


def settle(layers: Iterable[NamedLayer]) -> None:
    """Decide anew what layers that read the same x keep of it."""
    for siblings in {id(layer._siblings): layer._siblings for layer in layers}.values():
        siblings.settle()
