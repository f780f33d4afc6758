"""The C++ backend for the CPU: the bypass by the kernels of ``csrc/cpu``, the product by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from neuroada_kernels import _extension
from neuroada_kernels._registry import Backend, Implementation, register
from neuroada_kernels.backends import _compiled
from neuroada_kernels.backends._entries import assign_entries

_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


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
            "linear": Implementation(_compiled.linear, _unsupported),
            "linear_backward": Implementation(_compiled.linear_backward, _unsupported),
            "bypass_add": Implementation(_compiled.bypass_add, _unsupported),
            "bypass_backward": Implementation(_compiled.bypass_backward, _unsupported),
            "merge_": Implementation(_compiled.merge, _merge_unsupported),
            "unmerge_": Implementation(assign_entries, _unsupported),
        },
    )
)
