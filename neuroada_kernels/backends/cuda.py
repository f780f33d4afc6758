"""The CUDA C++ backend: the bypass by the kernels of ``csrc/cuda`` and the GEMM by torch, or on
sm_90a by CUTLASS, accumulating onto the bypass. Opt-in on sm_90a: a GEMM that patches tiles of W in
shared memory.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from neuroada_kernels import _extension
from neuroada_kernels._extension import cuda_archs, cutlass_version, runs_on
from neuroada_kernels._registry import Backend, register
from neuroada_kernels.backends import _compiled
from neuroada_kernels.backends._dense import bias_for_bypass, wide_parts, wide_product
from neuroada_kernels.plan import make_plan

_SIXTEEN_BITS = {torch.bfloat16, torch.float16}
_DTYPES = {torch.float32, *_SIXTEEN_BITS}


@functools.cache
def _unavailable() -> str | None:
    missing = _extension.library_error or _extension.module_error
    if missing is not None:
        return missing
    if not cuda_archs():
        return "built without CUDA: nvcc was not found, or NEUROADA_BUILD left it out"
    if torch.version.hip is not None:
        return "this torch is for ROCm, expected one for CUDA"
    if not torch.cuda.is_available():
        return "no GPU is visible"
    return None


@functools.cache
def _arch_reasons(gpu: int) -> tuple[str, ...]:
    capability = torch.cuda.get_device_capability(gpu)
    return _no_arch_for(capability, cuda_archs())


def _no_arch_for(capability: tuple[int, int], archs: tuple[str, ...]) -> tuple[str, ...]:
    if any(runs_on(arch, capability) for arch in archs):
        return ()
    built = ", ".join(f"sm_{arch}" for arch in archs)
    major, minor = capability
    return (f"no kernels for compute capability {major}.{minor}, built for {built}",)


def _untried(first: Tensor) -> str | None:
    return _untried_on(first.device.index, first.dtype) if first.is_cuda else None


@functools.cache
def _untried_on(gpu: int, dtype: torch.dtype) -> str | None:
    major, minor = torch.cuda.get_device_capability(gpu)
    if (major, minor) != _extension.TESTED_CAPABILITY:
        where = f"on compute capability {major}.{minor}"
    elif dtype == torch.float32:
        where = "in float32 since what failed there was changed"
    else:
        return None
    return (
        f"its tests have not run {where}: NEUROADA_BACKEND=cuda or use_backend('cuda') asks for it"
    )


def _linear(x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    run = _linear_gemm_first
    if _wants_patched() and not _not_patched(x, weight, bias):
        run = _compiled.linear_patched
    elif _wants_onto() and not _not_onto(x, weight, bias):
        run = _compiled.linear_bypass_first
    return run(x, weight, index, delta, bias)


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    if not output_mask[0]:
        run = _compiled.linear_backward
    elif _wants_patched() and not _not_patched(grad, weight):
        run = _compiled.linear_backward_patched
    elif _wants_onto() and not _not_onto(grad, weight):
        run = _compiled.linear_backward_bypass_first
    else:
        run = _linear_backward_gemm_first
    return run(grad, x, weight, index, delta, plan, output_mask)


def _linear_gemm_first(
    x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None
) -> Tensor:
    """The op ``linear``: a GEMM with float32 output, then a kernel adds the bypass and rounds once.

    The GEMM adds a float32 bias, as in ``F.linear``; the kernel adds a 16-bit bias, in float32.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    connections = index.contiguous(), _compiled.wide(delta, x)
    early, late = bias_for_bypass(None if bias is None else bias.contiguous())
    add_bypass = _compiled.C.bypass_fwd.default
    for part in wide_parts(*y.shape):  # unnamed products, so that only one is held
        rows = x[part]
        add_bypass(rows, *connections, late, wide_product(rows, weight.t(), early), y[part])
    return y


def _linear_backward_gemm_first(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor | None]:
    """The op ``linear_backward`` with dx, rounded as in :func:`_linear_gemm_first`."""
    only_delta = [False, output_mask[1]]
    _, grad_delta = _compiled.bypass_backward(grad, x, index, delta, plan, only_delta)
    d_in = weight.shape[1]
    grad_x = grad.new_empty(grad.shape[0], d_in)
    plan = make_plan(index, d_in, ordered=False) if plan is None else plan.contiguous()
    wide_delta = _compiled.wide(delta, grad)
    add_bypass = _compiled.C.bypass_bwd_input.default
    for part in wide_parts(*grad_x.shape):
        add_bypass(grad[part], plan, wide_delta, wide_product(grad[part], weight), grad_x[part])
    return grad_x, grad_delta


def _wants_patched() -> bool:
    """Whether ``NEUROADA_CUDA_PATCHED=1`` selects the GEMM whose tiles of W include the bypass.

    A kernel for sm_90a patches the tiles in shared memory, so its rounding is that of the strategy
    ``resident``. A call with unsupported dtypes, shapes or strides takes the default path.
    ``docs/kernels/cuda-product.md`` has the figures.
    """
    return _extension.env_flag("NEUROADA_CUDA_PATCHED") is True


def _wants_onto() -> bool:
    """Whether the CUTLASS GEMM may accumulate onto the bypass: unless ``NEUROADA_CUDA_ONTO=0``.

    The bypass is computed first, and the CUTLASS GEMM for sm_90a adds to it in float32 and rounds
    the sum once, as :func:`_linear_gemm_first` does, but without a float32 product in memory.
    Calls that it does not support take that path. The patched GEMM takes precedence if it is
    selected and supports the call.
    """
    return _extension.env_flag("NEUROADA_CUDA_ONTO") is not False


def _not_patched(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[str]:
    """Why the sm_90a kernels do not support a call: operands that TMA cannot read."""
    reasons = [*_not_sm90(inputs.device.index)]
    if inputs.dtype not in _SIXTEEN_BITS:
        reasons.append(f"dtype {inputs.dtype}, expected bfloat16 or float16")
    if bias is not None and bias.dtype != inputs.dtype:
        reasons.append(f"bias of dtype {bias.dtype}, expected {inputs.dtype}")
    for name, tensor in {"inputs": inputs, "weight": weight}.items():
        if tensor.stride(1) != 1:
            reasons.append(f"{name} with stride {tensor.stride(1)} along a row, expected 1")
        if tensor.numel() == 0 or tensor.shape[1] % 8 or tensor.stride(0) % 8:
            reasons.append(
                f"{name} of shape {list(tensor.shape)} with rows {tensor.stride(0)} apart, "
                "expected multiples of 8"
            )
        if tensor.stride(0) < tensor.shape[1]:
            reasons.append(f"{name} with rows that overlap, {tensor.stride(0)} apart")
        if tensor.data_ptr() % 16:
            reasons.append(f"{name} not 16-byte aligned")
    return reasons


def _not_onto(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[str]:
    """Why the CUTLASS GEMM does not support a call: its operands, or it was not built."""
    reasons = _not_patched(inputs, weight, bias)
    if not cutlass_version():
        reasons.append("built without CUTLASS")
    if weight.shape[0] % 8:
        reasons.append(f"weight of shape {list(weight.shape)}, expected multiples of 8")
    return reasons


@functools.cache
def _not_sm90(gpu: int) -> tuple[str, ...]:
    major, minor = torch.cuda.get_device_capability(gpu)
    if (major, minor) != (9, 0):
        return (f"compute capability {major}.{minor}, expected 9.0",)
    return () if "90a" in cuda_archs() else ("no kernels for sm_90a",)


def _unsupported(first: Tensor, *rest: object) -> list[str]:
    reasons: list[str] = []
    if first.is_cuda:
        reasons += _arch_reasons(first.device.index)
    else:
        reasons.append(f"tensors on {first.device.type}, expected a GPU")
    if first.dtype not in _DTYPES:
        reasons.append(f"dtype {first.dtype}, expected float32, bfloat16 or float16")
    return reasons


register(
    Backend(
        name="cuda",
        priority={"cuda": 2},
        unavailable=_unavailable,
        untried=_untried,
        implementations=_compiled.implementations(_linear, _linear_backward, _unsupported),
    )
)
