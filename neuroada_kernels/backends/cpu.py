"""The C++ backend for the CPU: product and bypass in one kernel of ``csrc/cpu``, or the bypass by a
kernel of its own and the product by torch where that is known to be faster."""

from __future__ import annotations

import functools
import math
import os

import torch
from torch import Tensor

from neuroada_kernels import _extension
from neuroada_kernels._registry import Backend, Implementation, register
from neuroada_kernels.backends import _compiled
from neuroada_kernels.backends._dense import has_product

_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


def _linear(x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    if not _one_kernel(x, weight) or (bias is not None and bias.dtype != x.dtype):
        return _compiled.linear(x, weight, index, delta, bias)
    return _compiled.linear_in_one(x, weight, index, delta, bias)


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    if not output_mask[0] or not _one_kernel(grad, weight):
        return _compiled.linear_backward(grad, x, weight, index, delta, plan, output_mask)
    return _compiled.linear_backward_in_one(grad, x, weight, index, delta, plan, output_mask)


def _one_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether product and bypass go in one kernel, which reads W along its rows."""
    return x.shape[0] >= _fewest_tokens(x.dtype) and weight.stride(1) == 1


@functools.cache
def _fewest_tokens(dtype: torch.dtype) -> float:
    """From how many tokens on one kernel is faster than torch's product onto a bypass.

    As measured; ``docs/kernels.md`` has the figures. ``NEUROADA_CPU_FUSED=0|1`` decides instead.
    """
    forced = os.environ.get("NEUROADA_CPU_FUSED")
    if forced not in (None, "0", "1"):
        raise ValueError(f"NEUROADA_CPU_FUSED: {forced!r}, expected 0 or 1")
    if forced is not None:
        return 0 if forced == "1" else math.inf
    isa = "generic" if _extension.module is None else _extension.module.cpu_isa()
    if isa == "generic" or dtype == torch.float64:
        return math.inf
    if dtype == torch.float32:
        return 2
    if not has_product(dtype):
        return 0
    if dtype == torch.float16 or _has_amx():
        return math.inf  # its own units multiply faster than any vector
    return 9 if isa == "avx512_bf16" else 4


def _has_amx() -> bool:
    ask = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(ask())


def _unsupported(first: Tensor, *rest: object) -> list[str]:
    reasons = []
    if not first.is_cpu:
        reasons.append(f"tensors on {first.device.type}, expected CPU")
    if first.dtype not in _DTYPES:
        reasons.append(f"dtype {first.dtype}, expected float32, float64, bfloat16 or float16")
    return reasons


def _merge_unsupported(weight: Tensor, *rest: object) -> list[str]:
    return _unsupported(weight) + _compiled.strided_row(weight)


register(
    Backend(
        name="cpu",
        priority={"cpu": 2},
        unavailable=lambda: _extension.library_error,
        implementations={
            "linear": Implementation(_linear, _unsupported),
            "linear_backward": Implementation(_linear_backward, _unsupported),
            "bypass_add": Implementation(_compiled.bypass_add, _unsupported),
            "bypass_backward": Implementation(_compiled.bypass_backward, _unsupported),
            "sddmm": Implementation(_compiled.sddmm, _unsupported),
            "merge_": Implementation(_compiled.merge, _merge_unsupported),
            "unmerge_": Implementation(_compiled.restore, _merge_unsupported),
            "gather": Implementation(_compiled.gather, _merge_unsupported),
            "patch_": Implementation(_compiled.patch, _merge_unsupported),
        },
    )
)
