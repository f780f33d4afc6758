"""The CUDA C++ backend: the bypass by the kernels of ``csrc/cuda`` and the product by torch, or
both in one kernel for sm_90a.

Its kernels have run on no GPU yet, so it serves only by name.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from neuroada_kernels import _extension
from neuroada_kernels._registry import Backend, Implementation, register
from neuroada_kernels.backends import _compiled

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_DTYPES_OF_ONE_KERNEL = {torch.bfloat16, torch.float16}


@functools.cache
def _archs() -> tuple[str, ...]:
    """The architectures in the binary: ``("80", "89", "90a", "100")``."""
    if _extension.module is None:
        return ()
    return tuple(_extension.module.build_facts()["cuda_archs"].split())


@functools.cache
def _unavailable() -> str | None:
    missing = _extension.library_error or _extension.module_error
    if missing is not None:
        return missing
    if not _archs():
        return "built without CUDA: nvcc was not found, or NEUROADA_BUILD left it out"
    if torch.version.hip is not None:
        return "this torch is for ROCm, expected one for CUDA"
    if not torch.cuda.is_available():
        return "no GPU is visible"
    return None


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``sm_<arch>`` runs on a GPU of this compute capability.

    It does on the same major version from its own minor version on; code for an arch with a
    letter, on that one alone.
    """
    digits = arch.rstrip("abcdefghijklmnopqrstuvwxyz")
    major, minor = int(digits[:-1]), int(digits[-1])
    if arch != digits:
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


@functools.cache
def _arch_reasons(gpu: int) -> tuple[str, ...]:
    capability = torch.cuda.get_device_capability(gpu)
    return _no_arch_for(capability, _archs())


def _no_arch_for(capability: tuple[int, int], archs: tuple[str, ...]) -> tuple[str, ...]:
    if any(_runs_on(arch, capability) for arch in archs):
        return ()
    built = ", ".join(f"sm_{arch}" for arch in archs)
    major, minor = capability
    return (f"no kernels for compute capability {major}.{minor}, built for {built}",)


def _linear(x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    # Two kernels add a bias in 16 bits to what they have rounded already.
    bias16 = bias is not None and bias.dtype in _DTYPES_OF_ONE_KERNEL
    if not _prefer_one_kernel(bias16) or _not_in_one_kernel(x, weight, bias):
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
    one_kernel = output_mask[0] and _prefer_one_kernel() and not _not_in_one_kernel(grad, weight)
    run = _compiled.linear_backward_in_one if one_kernel else _compiled.linear_backward
    return run(grad, x, weight, index, delta, plan, output_mask)


def _prefer_one_kernel(bias16: bool = False) -> bool:
    """Whether product and bypass go in one kernel where it takes them.

    Predicted, not measured: it is slower but for saving a pass over y where torch's product would
    round y twice; ``docs/kernels.md`` has the figures. ``NEUROADA_CUDA_FUSED=0|1`` decides instead.
    """
    forced = os.environ.get("NEUROADA_CUDA_FUSED")
    if forced not in (None, "0", "1"):
        raise ValueError(f"NEUROADA_CUDA_FUSED: {forced!r}, expected 0 or 1")
    return bias16 if forced is None else forced == "1"


def _not_in_one_kernel(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[str]:
    """Why the kernels for sm_90a do not take a product: what their copies cannot read."""
    reasons = _one_kernel_arch_reasons(inputs.device.index)
    if inputs.dtype not in _DTYPES_OF_ONE_KERNEL:
        reasons.append(f"dtype {inputs.dtype}, expected bfloat16 or float16")
    if bias is not None and bias.dtype != inputs.dtype:
        reasons.append(f"bias of dtype {bias.dtype}, expected {inputs.dtype}")
    for name, tensor in (("inputs", inputs), ("weight", weight)):
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


def _one_kernel_arch_reasons(gpu: int) -> list[str]:
    major, minor = torch.cuda.get_device_capability(gpu)
    if (major, minor) != (9, 0):
        return [f"compute capability {major}.{minor}, expected 9.0"]
    return [] if "90a" in _archs() else ["no kernels for sm_90a"]


def _unsupported(first: Tensor, *rest: object) -> list[str]:
    reasons: list[str] = []
    if first.is_cuda:
        reasons += _arch_reasons(first.device.index)
    else:
        reasons.append(f"tensors on {first.device.type}, expected a GPU")
    if first.dtype not in _DTYPES:
        reasons.append(f"dtype {first.dtype}, expected float32, bfloat16 or float16")
    return reasons


def _merge_unsupported(weight: Tensor, *rest: object) -> list[str]:
    return _unsupported(weight) + _compiled.strided_row(weight)


register(
    Backend(
        name="cuda",
        priority={"cuda": 2},
        unavailable=_unavailable,
        experimental=True,
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
