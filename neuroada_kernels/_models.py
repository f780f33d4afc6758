"""Models as users pass them: their wrappers, and the NeuroAda layers inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from neuroada_kernels.nn._named import NamedLayer

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers of ``torch.compile``, ``DataParallel`` and DDP."""
    *_, inside = _with_wrappers(model)
    return inside


def _with_wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model's wrappers, the outermost first, and at last the model itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}, expected torch.nn.Module")
    inside: nn.Module | None = model
    while inside is not None:
        yield inside
        replicated = isinstance(inside, DataParallel | DistributedDataParallel)
        inside = inside._modules.get("module" if replicated else "_orig_mod")


def find_layers(model: nn.Module) -> dict[str, NamedLayer]:
    """The NeuroAda layers of a model by name, including stacks of experts; possibly none."""
    return {n: m for n, m in unwrapped(model).named_modules() if isinstance(m, NamedLayer)}


def layers_in(model: nn.Module) -> dict[str, NamedLayer]:
    """The NeuroAda layers of an adapted model by name, including stacks of experts.

    Raises
    ------
    ValueError
        If there is none.
    """
    layers = find_layers(model)
    if not layers:
        raise ValueError("model: has no NeuroAda layer inside, expected an adapted model")
    return layers


def check_not_replicated(model: nn.Module, why: str = "expected it adapted before") -> None:
    """Raise if DDP wraps the model already: it would not average the gradients of new deltas."""
    if any(isinstance(module, DistributedDataParallel) for module in _with_wrappers(model)):
        raise ValueError(
            "model: is in DistributedDataParallel, which would not average the new deltas' "
            f"gradients; {why}"
        )


#: The ids of the parameters whose gradients a DDP wrapper averages; it keeps them alive.
_in_ddp: WeakKeyDictionary[nn.Module, frozenset[int]] = WeakKeyDictionary()


def _averaged_by(wrapper: DistributedDataParallel) -> frozenset[int]:
    """Those that trained when it was made, of which its reducer knows."""
    if wrapper not in _in_ddp:
        buckets = wrapper.reducer._get_zeros_like_grad_buckets()
        _in_ddp[wrapper] = frozenset(id(p) for bucket in buckets for p in bucket.parameters())
    return _in_ddp[wrapper]


def check_averaged(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Raise if DDP wraps the model and does not average the gradients of these ``parameters``."""
    wanted = set(map(id, parameters))
    for wrapper in _with_wrappers(model):
        if isinstance(wrapper, DistributedDataParallel) and wanted - _averaged_by(wrapper):
            check_not_replicated(model, "expected them to train when it is wrapped")


def average_too(layers: Iterable[NamedLayer], others: Iterable[nn.Parameter] = ()) -> None:
    """Have ``replicate_trained`` average what trains by now, if it was called."""
    layers = list(layers)
    first = next((layer.averaging for layer in layers if layer.averaging is not None), None)
    if first is None:
        return
    for layer in layers:
        layer.averaging = layer.averaging or first
        for delta in layer.deltas:
            if delta.requires_grad:
                layer.averaging.include(delta)
    for parameter in others:
        first.include(parameter)


def outside_inference_mode(
    function: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """``function``, of a model, without the caller's inference mode, in which nothing can train.

    A model that was made in inference mode can be changed only there.
    """

    @functools.wraps(function)
    def run(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        model = args[0] if args else options.get("model")
        if not torch.is_inference_mode_enabled() or not isinstance(model, nn.Module):
            return function(*args, **options)
        if any(parameter.is_inference() for parameter in model.parameters()):
            return function(*args, **options)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **options)

    return run
