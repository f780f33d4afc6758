"""The training strategy of all layers of a model: see ``NeuroAdaLinear.strategy``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from neuroada_kernels._models import layers_in
from neuroada_kernels.nn._strategy import check_known, refusal


def set_strategy(model: nn.Module, strategy: str) -> dict[str, str]:
    """Set the strategy of every NeuroAda layer of ``model``.

    Parameters
    ----------
    model : nn.Module
        With layers from :func:`neuroada_kernels.adapt`.
    strategy : str
        ``"bypass"``, ``"resident"`` or ``"auto"``.

    Returns
    -------
    dict
        For each layer for which ``"auto"`` chose ``"bypass"``: name to reason.

    Raises
    ------
    ValueError
        If ``"resident"`` is refused for a layer, with its name and the reason; no layer changes
        then.
    """
    check_known(strategy)
    layers = layers_in(model)
    shared = shared_weights(model, layers.values())
    for name, layer in layers.items():
        # A weight on the meta device is checked when it has values.
        reason = shared.get(layer) or (None if layer.deferred else layer._why_not_resident())
        if strategy == "resident" and reason is not None:
            raise ValueError(f"{name}: {refusal(reason)}")
    for layer in layers.values():
        layer._set_strategy(strategy, shared.get(layer))
    reasons = {name: layer.strategy_reason for name, layer in layers.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


@contextlib.contextmanager
def resident(model: nn.Module, strategy: str = "resident") -> Iterator[None]:
    """Within the block the layers are ``"resident"``; leaving it, also by an error, restores W.

    Parameters
    ----------
    model : nn.Module
        With layers from :func:`neuroada_kernels.adapt`. After the block all are ``"bypass"``.
    strategy : str
        ``"auto"`` leaves out the layers for which ``"resident"`` is refused.

    Raises
    ------
    ValueError
        As :func:`set_strategy`.
    """
    set_strategy(model, strategy)
    try:
        yield
    finally:
        set_strategy(model, "bypass")


def shared_weights(model: nn.Module, modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """The ``modules`` whose weight other places of ``model`` read, with those places as text."""
    readers: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None and (address := _address(tensor)):
                    place = f"{prefix}.{name}" if prefix else name
                    readers.setdefault(address, []).append((module, place))
    shared = {}
    for module in modules:
        weight = module._parameters.get("weight")
        if weight is None:  # parametrized: refused separately, there is no weight to write
            continue
        own = (module, "weight")
        others = [
            place
            for other, place in readers.get(_address(weight), [])
            if (other, place.rpartition(".")[2]) != own
        ]
        if others:
            shared[module] = f"weight is shared with {', '.join(others)}"
    return shared


def _address(tensor: Tensor) -> int:
    """The address of its storage; 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass without a storage of its own
        return 0
