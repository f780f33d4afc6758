"""The dtypes of weights and inputs, and their names."""

from __future__ import annotations

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    """As in ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
