"""Modules with accelerate's hooks, which may offload tensors until the module runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels.nn._weight import BaseWeight, is_of


class OffloadedWeight(BaseWeight):
    """A weight on the meta device whose values accelerate's hook holds.

    The values are read onto the device that the module computes on, and never written.
    """

    unmergeable = (
        "whose values accelerate keeps elsewhere, expected the adapter's file to be merged into "
        "the checkpoint (neuroada merge)"
    )

    def __init__(self, module: nn.Module) -> None:
        hook = offloading_hook(module)
        weight = module.get_parameter("weight")
        d_out, d_in = weight.shape
        device = torch.empty(0, device=hook.execution_device).device  # an int is a GPU index
        super().__init__(module, None, (d_out, d_in), weight.dtype, device)
        self._hook = hook
        self._values: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        if self._values is None:  # cached: a read from disk loads the whole weight
            self._values = self._hook.weights_map["weight"].detach()
        return self._values[rows].to(self.device, self.dtype)


def offloading_hook(module: nn.Module) -> Any:
    """The accelerate hook that loads the weight of a linear, or None if it is present."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_meta:
        return None
    return next((hook for hook in _hooks(module) if hook.offload), None)


def is_dispatched(module: nn.Module) -> bool:
    """Whether it is a linear for which accelerate moves x, and its weight if offloaded."""
    return bool(_hooks(module)) and type(module).forward is nn.Linear.forward


def check_present(layer: nn.Module) -> None:
    """Raise if accelerate has offloaded a layer's own tensors until it runs."""
    if _is_offloaded(layer):
        raise ValueError(
            "weight: accelerate keeps it elsewhere, and delta too, expected a model that is "
            "offloaded before it is adapted"
        )


def check_trains(layer: nn.Module) -> None:
    """Raise in a forward with gradients if accelerate replaces ``delta`` for each forward."""
    delta = layer._parameters["delta"]
    assert delta is not None
    if delta.requires_grad and torch.is_grad_enabled() and _is_offloaded(layer):
        raise RuntimeError(
            "delta: accelerate makes another one for each forward, whose gradient nobody gets; "
            "expected a model that is offloaded before it is adapted, or torch.no_grad()"
        )


def _is_offloaded(module: nn.Module) -> bool:
    return any(getattr(hook, "offload", False) for hook in _all_hooks(module))


def _hooks(module: nn.Module) -> list[Any]:
    """The accelerate hooks of a linear, if all of them only move tensors; otherwise none."""
    hooks = _all_hooks(module)
    known = isinstance(module, nn.Linear) and all(
        is_of(one, "accelerate", "AlignDevicesHook") for one in hooks
    )
    return hooks if known else []


def _all_hooks(module: nn.Module) -> list[Any]:
    """All hooks that accelerate calls around a forward, including user hooks."""
    hook: Any = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))
