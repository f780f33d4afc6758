"""The training strategy of all layers of a model: see ``NeuroAdaLinear.strategy``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

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


class Reader(NamedTuple):
    """A module that holds a tensor in the storage of a weight, and the tensor's full name."""

    module: nn.Module
    name: str
    tensor: Tensor


def shared_weights(model: nn.Module, modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """The ``modules`` whose weight's storage other places of ``model`` hold, with their names."""
    return {
        module: f"weight is shared with {', '.join(reader.name for reader in readers)}"
        for module, readers in readers_of_weights(model, modules).items()
    }


def readers_of_weights(
    model: nn.Module, modules: Iterable[nn.Module]
) -> dict[nn.Module, list[Reader]]:
    """The other places of ``model`` that hold the storage of each module's weight, if any."""
    readers: dict[int, list[Reader]] = {}
    for prefix, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None and (address := _address(tensor)):
                    place = f"{prefix}.{name}" if prefix else name
                    readers.setdefault(address, []).append(Reader(module, place, tensor))
    shared = {}
    for module in modules:
        weight = module._parameters.get("weight")
        if weight is None:  # parametrized: refused separately, there is no weight to write
            continue
        others = [
            reader
            for reader in readers.get(_address(weight), [])
            if (reader.module, reader.name.rpartition(".")[2]) != (module, "weight")
        ]
        if others:
            shared[module] = others
    return shared


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have elements in the same range of it."""
    return all(
        one.data_ptr() < other.data_ptr() + other.element_size() * _span(other)
        for one, other in ((a, b), (b, a))
    )


def _span(tensor: Tensor) -> int:
    """Elements from its first to its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0


def _address(tensor: Tensor) -> int:
    """The address of its storage; 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass without a storage of its own
        return 0
