"""Hooks and attributes when a layer replaces a module, or a module replaces a layer."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn.foreign import has_hooks

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def check_hooks(name: str, module: nn.Module) -> None:
    """Raise if a module that is to be replaced has hooks.

    Hooks are not transferred, since they may depend on this very module: those of torch's weight
    norm compute its weight, and one that reads ``delta`` finds none in a plain linear.
    """
    if parametrize.is_parametrized(module):
        raise ValueError(
            f"{name}: has parametrizations, which its replacement would lose; remove them first"
        )
    if has_hooks(module) or any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        raise ValueError(f"{name}: has hooks, which its replacement would lose; remove them first")


def hand_on_attributes(module: nn.Module, new: nn.Module) -> None:
    """Copy user-set attributes from a linear to the layer that replaces it, or back."""
    if isinstance(module, BypassLinear) or isinstance(new, BypassLinear):
        others = _unknown_attributes(module)
        vars(new).update({n: value for n, value in others.items() if not hasattr(new, n)})


def _unknown_attributes(module: nn.Module) -> dict[str, Any]:
    """The instance attributes that no class in the MRO has or declares."""
    known: set[str] = set()
    for kind in type(module).__mro__:
        known |= vars(kind).keys() | inspect.get_annotations(kind).keys()
    return {name: value for name, value in vars(module).items() if name not in known}
