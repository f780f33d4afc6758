"""Models as users pass them: their wrappers, and the NeuroAda layers inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def check_trains_in_ddp(model: nn.Module, deltas: Iterable[nn.Parameter]) -> None:
    """Raise if DDP wraps the model and one of ``deltas``, which are to train, was frozen.

    DDP averages the gradients of the parameters that trained when it was made.
    """
    if not all(delta.requires_grad for delta in deltas):
        check_not_replicated(model, "expected them to train when it is wrapped")
