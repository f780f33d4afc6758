"""Repair of bfloat16 in Triton's interpreter, which truncates it and multiplies its bits.

A known issue (triton-lang/triton issue 11584); nothing here affects a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter


def repair_bfloat16() -> None:
    """Make this process's interpreter round to the nearest bfloat16, and widen before a dot."""
    if getattr(interpreter._convert_float, "rounds_bfloat16", False):
        return
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(values.astype("float32")).bfloat16().view(torch.uint16).numpy()
        if source == tl.bfloat16 and target == tl.float32:
            return values.astype("uint32") << 16
        return convert(values, source, target, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return dot(self, a, b, *rest)

    convert_float.rounds_bfloat16 = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
