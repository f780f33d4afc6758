"""Tensors that a layer owns: of fixed shape, and not recomputed in every forward.

Torch's parametrizations, spectral and weight norm, and pruning move a parameter to another name
and replace it by a computed attribute. ``nn.DataParallel`` does so for each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Suffixes that prune and the old weight_norm append to the name of a parameter that they move.
_PUT_AWAY = ("_orig", "_v")


def wrong_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> ValueError:
    """The error for a tensor of another shape than the layer's."""
    return ValueError(f"{name}: shape {list(tensor.shape)}, expected {list(expected)}")


def savable(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy if it was made under ``inference_mode``: autograd saves no such one."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class OwnTensors(nn.Module):
    """The part of a layer that protects the tensors its kernels read and write from removal.

    These are ``index`` and ``delta``, and ``weight`` while it holds the bypass.
    """

    _is_replica = False  # torch sets it in the copies that nn.DataParallel makes for a call

    def _put_into_replica(self, name: str, value: object) -> bool:
        """Store ``value`` if this is a DataParallel replica; returns whether it did.

        Torch sets a replica's parameters as plain attributes; the layer reads its own dicts.
        """
        if not self._is_replica or not isinstance(value, Tensor):
            return False
        held: dict[str, Any] = self._buffers if name in self._buffers else self._parameters
        held[name] = value
        vars(self).pop("_seen", None)  # a resident layer's record of its own tensors
        return True

    def _why_own(self, name: str) -> str | None:
        if name in ("index", "delta"):
            return "the layer's own, which its kernels read"
        holding = (self._buffers.get(kept) for kept in ("original", "base_values"))
        if name == "weight" and any(kept is not None for kept in holding):
            return "one without the bypass: unmerge(), or set the strategy 'bypass', before"
        return None

    def _check_stays(self, name: str) -> None:
        """Raise if ``name`` is to be removed or computed, before anything has changed."""
        reason = self._why_own(name)
        if reason is not None:
            raise ValueError(
                f"{name}: would be deleted, or computed by a parametrization, a norm, pruning, "
                f"FSDP1 or DDP over a device_mesh; expected {reason}"
            )

    def __delattr__(self, name: str) -> None:
        self._check_stays(name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        held = next((name.removesuffix(end) for end in _PUT_AWAY if name.endswith(end)), "")
        taken = held not in self._parameters and held not in self._buffers
        if param is not None and taken and self._why_own(held):
            # The old weight_norm has already deleted the parameter from the dict, and registers its
            # memory under this name. Restore it as a new Parameter, unknown to existing optimizers.
            self._parameters.pop(f"{held}_g", None)
            self._parameters[held] = nn.Parameter(param.detach(), held == "delta")
            vars(self).pop("_seen", None)  # the record of the old one
        self._check_stays(held)
        super().register_parameter(name, param)
