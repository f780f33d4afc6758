"""The dtypes of weights and inputs, and their names."""

from __future__ import annotations

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


NAMES = "float32, float64, bfloat16 or float16"


def accumulated_in(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype for ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """The name, as in ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
