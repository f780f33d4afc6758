"""The C++ backend for the CPU: GEMM and bypass fused in one kernel of ``csrc/cpu``, or unfused, the
bypass by a kernel and the GEMM by torch, where that is known to be faster."""

from __future__ import annotations

import functools
import math
import os

import torch
from torch import Tensor

from neuroada_kernels import _extension
from neuroada_kernels._dtypes import FLOATING, NAMES
from neuroada_kernels._registry import Backend, register
from neuroada_kernels.backends import _compiled
from neuroada_kernels.backends._dense import has_onednn_gemm


def _linear(x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    fewest, most = _fused_tokens(x.dtype)
    # The fused kernel needs unit stride along the rows of W.
    fused = fewest <= x.shape[0] <= most and weight.stride(1) == 1
    if not fused or (bias is not None and bias.dtype != x.dtype):
        return _compiled.linear(x, weight, index, delta, bias)
    return _compiled.linear_fused(x, weight, index, delta, bias)


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    fewest, most = _fused_tokens(grad.dtype)
    run = _compiled.linear_backward
    if output_mask[0] and fewest <= grad.shape[0] <= most and weight.stride(1) == 1:
        run = _compiled.linear_backward_fused
    return run(grad, x, weight, index, delta, plan, output_mask)


_ALWAYS, _NEVER = (0.0, math.inf), (math.inf, math.inf)


@functools.cache
def _fused_tokens(dtype: torch.dtype) -> tuple[float, float]:
    """The first and last number of tokens for which fused is faster than unfused.

    From measurements, see ``docs/kernels.md``. ``NEUROADA_CPU_FUSED=0|1`` overrides them.
    """
    forced = _extension.env_flag("NEUROADA_CPU_FUSED")
    if forced is not None:
        return _ALWAYS if forced else _NEVER
    isa = "generic" if _extension.module is None else _extension.module.cpu_isa()
    if isa == "generic" or dtype == torch.float64:
        return _NEVER
    if dtype == torch.float32:
        return 2, 32 if _has_fast_mkl() else math.inf
    if not has_onednn_gemm(dtype):
        return _ALWAYS
    if dtype == torch.bfloat16 and isa == "amx_bf16":
        return _ALWAYS
    if dtype == torch.float16 or _has_amx():
        return _NEVER  # oneDNN's native float16 or AMX GEMM is faster than our vector kernels
    return 9 if isa == "avx512_bf16" else 4, math.inf


def _has_fast_mkl() -> bool:
    """Whether torch's float32 GEMM is MKL's on an Intel processor, for which MKL is tuned."""
    intel = _extension.module is not None and _extension.module.cpu_vendor() == "intel"
    return intel and torch.backends.mkl.is_available()


def _has_amx() -> bool:
    """Whether torch's GEMM uses AMX tiles, which ``ONEDNN_MAX_CPU_ISA`` may disable."""
    held_to = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).lower()
    if held_to not in ("", "all", "default") and "amx" not in held_to:
        return False
    ask = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(ask())


def _unsupported(first: Tensor, *rest: object) -> list[str]:
    if first.is_cpu and first.dtype in FLOATING:
        return []
    reasons = []
    if not first.is_cpu:
        reasons.append(f"tensors on {first.device.type}, expected CPU")
    if first.dtype not in FLOATING:
        reasons.append(f"dtype {first.dtype}, expected {NAMES}")
    return reasons


register(
    Backend(
        name="cpu",
        priority={"cpu": 2},
        unavailable=lambda: _extension.library_error,
        implementations=_compiled.implementations(
            _linear, _linear_backward, _unsupported, always=frozenset(FLOATING)
        ),
    )
)
