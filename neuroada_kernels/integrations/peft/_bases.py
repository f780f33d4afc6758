"""The base module that a layer wraps: whether it is a plain linear, its sizes, its weight."""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neuroada_kernels.nn.foreign import has_hooks, has_own_forward


def is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is exactly ``F.linear`` with its weight and bias."""
    return (
        isinstance(module, nn.Linear)
        and not has_own_forward(module)  # e.g. accelerate's, which loads offloaded weights
        and type(weight := module._parameters.get("weight")) is nn.Parameter
        and weight.is_floating_point()
        and not weight.requires_grad
        and not has_hooks(module)
    )


def features_of(base: nn.Module) -> tuple[int, int]:
    """``d_in`` and ``d_out`` of a module that maps ``[..., d_in]`` to ``[..., d_out]``.

    Raises
    ------
    TypeError
        If ``base`` is no such module.
    """
    found: tuple[Any, Any] = (None, None)
    if not isinstance(base, nn.Embedding | nn.MultiheadAttention | nn.modules.conv._ConvNd):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # unsupported type: checked below
            found = _get_in_out_features(base)
    if not all(isinstance(size, int) for size in found):
        raise TypeError(
            f"Target module {type(base).__name__} is not supported: expected torch.nn.Linear, "
            "Conv1D of transformers, or a module with in_features and out_features"
        )
    return found


def float_weight(base: nn.Module) -> Tensor:
    """W ``[d_out, d_in]`` of a base that is not quantised, as a view of its storage."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise TypeError(f"base_layer: {type(base).__name__} has no floating weight [d_out, d_in]")
    if weight.is_meta:
        raise ValueError("base_layer: its weight is on the meta device, expected values")
    weight = weight.detach()
    return weight.t() if isinstance(base, Conv1D) else weight
