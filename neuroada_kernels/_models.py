"""Models as users pass them: their wrappers, and the NeuroAda layers inside."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from neuroada_kernels.nn._layer import BypassLayer


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers of ``torch.compile`` and DDP."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}, expected torch.nn.Module")
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def layers_in(model: nn.Module) -> dict[str, BypassLayer]:
    """The NeuroAda layers of an adapted model by name, including stacks of experts.

    Raises
    ------
    ValueError
        If there is none.
    """
    layers = {n: m for n, m in unwrapped(model).named_modules() if isinstance(m, BypassLayer)}
    if not layers:
        raise ValueError("model: has no NeuroAda layer inside, expected an adapted model")
    return layers


def check_not_replicated(model: nn.Module) -> None:
    """Raise if DDP wraps the model already: it would not average the gradients of new deltas."""
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model: is in DistributedDataParallel, which would not average the new deltas' "
            "gradients; expected it adapted before"
        )
