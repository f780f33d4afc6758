"""Error tolerances, by dtype and by the length of the sum.

Errors are relative root mean squares against a float64 reference. A sum of n products in float32
with independent roundings has a relative error of about sqrt(n) ULP at worst; the rounding of the
output, at most half a ULP, has an RMS of about ULP / sqrt(12).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Spacing of the numbers just above 1.
_UNIT = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def tolerance(dtype: torch.dtype, reduction: int, output: torch.dtype | None = None) -> float:
    """The largest relative RMS error of a sum of ``reduction`` products of ``dtype`` inputs.

    Parameters
    ----------
    dtype : torch.dtype
        Dtype of the inputs; sums are in float32, or float64 for float64.
    reduction : int
        Number of products in a sum.
    output : torch.dtype, optional
        Dtype that the sum is rounded to; ``dtype`` if not given.
    """
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    rounding = _UNIT[output or dtype] / 2
    return rounding + _UNIT[accumulate] * math.sqrt(max(reduction, 1))


def rms_error(value: Tensor, reference: Tensor) -> float:
    """``||value - reference|| / ||reference||``; of two empty or all-zero tensors 0."""
    value, reference = value.detach().double(), reference.detach().double()
    error = float((value - reference).norm())
    norm = float(reference.norm())
    return error / norm if norm > 0 else error
