"""Merging all bypasses of a model into its weights, all or none."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack

from torch import nn

from neuroada_kernels._models import layers_in
from neuroada_kernels.nn._layer import BypassLayer
from neuroada_kernels.nn.bypass import NeuroAdaBypass, Requantization
from neuroada_kernels.nn.foreign import base_weight
from neuroada_kernels.strategies import overlap, readers_of_weights


def merge(model: nn.Module) -> None:
    """Merge every NeuroAda layer of ``model`` into its weight; see ``NeuroAdaLinear.merge``.

    If another module reads that weight, as with tied embeddings, its output changes too, and a
    warning is issued.

    Raises
    ------
    RuntimeError, ValueError
        If the model has no NeuroAda layer, or one that cannot be merged, with its name: it has no
        connections yet, its adapter is disabled or differs between rows, its base is quantised (see
        :func:`merge_requantized`), or its base has a forward of its own that does not compute
        ``x W^T + f(x)``. No layer is merged then that was not before.
    """
    layers = [(name, layer) for name, layer in _active(model) if not layer.merged]
    for name, layer in layers:
        _check(name, layer)
    _warn_of_readers(model, layers)
    with ExitStack() as undo:
        for _, layer in layers:
            undo.callback(layer.unmerge)
            layer.merge()
        undo.pop_all()


def unmerge(model: nn.Module) -> None:
    """Undo :func:`merge`, bit for bit.

    Raises
    ------
    ValueError
        If the model has no NeuroAda layer.
    """
    # In reverse order of merging, for weights that two layers share.
    with ExitStack() as undo:
        for layer in reversed(layers_in(model).values()):
            undo.callback(layer.merged_again())
            layer.unmerge()
        undo.pop_all()


def merge_requantized(model: nn.Module) -> dict[str, Requantization]:
    """Merge every layer of ``model``; quantised bases are quantised again.

    The error of requantising is reported and cannot be undone, see
    ``NeuroAdaBypass.merge_requantized``; plain weights are merged as by :func:`merge`.

    Returns
    -------
    dict
        For each layer with a quantised base: name to error.

    Raises
    ------
    RuntimeError, ValueError
        If the model has no NeuroAda layer, or one without connections yet, or with a base that
        cannot be quantised again, with its name. The model is unchanged then; for this, the
        weights before and after are both in memory until the last layer is done.
    """
    quantised = {
        name: layer
        for name, layer in _active(model)
        if isinstance(layer, NeuroAdaBypass) and base_weight(layer.base).matrix is None
    }
    exact = [(n, layer) for n, layer in _active(model) if n not in quantised and not layer.merged]
    for name, layer in exact:
        _check(name, layer)
    _warn_of_readers(model, exact)
    reports = {}
    with ExitStack() as undo:
        for name, layer in quantised.items():
            try:
                reports[name], back = layer._requantize()
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
            undo.callback(back)
        for _, layer in exact:
            undo.callback(layer.unmerge)
            layer.merge()
        undo.pop_all()
    return reports


def _check(name: str, layer: BypassLayer) -> None:
    try:
        layer.check_mergeable()
    except (RuntimeError, TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _warn_of_readers(model: nn.Module, layers: Sequence[tuple[str, BypassLayer]]) -> None:
    """Warn if merging ``layers`` changes the output of other modules of ``model``."""
    holders = {
        name: layer.base if isinstance(layer, NeuroAdaBypass) else layer for name, layer in layers
    }
    readers = readers_of_weights(model, holders.values())
    for name, layer in layers:
        own = set(layer.modules())
        weight = holders[name]._parameters.get("weight")
        places = [
            reader.name
            for reader in readers.get(holders[name], [])
            if reader.module not in own and weight is not None and overlap(reader.tensor, weight)
        ]
        if places:
            warnings.warn(
                f"{name}: its weight is shared with {', '.join(places)}, which changes by merging",
                stacklevel=3,
            )


def _active(model: nn.Module) -> Sequence[tuple[str, BypassLayer]]:
    """The layers in which the active adapter has connections."""
    active = [(name, layer) for name, layer in layers_in(model).items() if not layer._disabled]
    if not active:
        raise RuntimeError("model: its adapter is disabled, expected an active one to merge")
    return active
