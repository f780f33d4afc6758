"""Models as users pass them: their wrappers, and the NeuroAda layers inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from neuroada_kernels.nn._named import NamedLayer


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


#: The ids of the parameters that trained when a DDP wrapper was first seen; it keeps them alive.
_in_ddp: WeakKeyDictionary[nn.Module, frozenset[int]] = WeakKeyDictionary()


def check_averaged(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Raise if DDP wraps the model and does not average the gradients of these ``parameters``.

    It averages those of the parameters that trained when it was made. So every function that
    changes what trains calls this before, with what is to train.
    """
    for wrapper in _with_wrappers(model):
        if isinstance(wrapper, DistributedDataParallel):
            if wrapper not in _in_ddp:
                trained = (id(p) for p in wrapper.parameters() if p.requires_grad)
                _in_ddp[wrapper] = frozenset(trained)
            if not _in_ddp[wrapper].issuperset(map(id, parameters)):
                check_not_replicated(model, "expected them to train when it is wrapped")


def average_too(layers: Iterable[NamedLayer], parameters: Iterable[nn.Parameter]) -> None:
    """Have ``replicate_trained`` average what trains from now on, if it was called."""
    layers = list(layers)
    averaging = next((layer.averaging for layer in layers if layer.averaging is not None), None)
    if averaging is None:
        return
    for layer in layers:
        layer.averaging = averaging
    for parameter in parameters:
        averaging.include(parameter)
