"""The CUDA C++ backend: the bypass by the kernels of ``csrc/cuda``, the product by torch.

Its kernels have run on no GPU yet, so it serves only by name.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from neuroada_kernels import _extension
from neuroada_kernels._registry import Backend, Implementation, register
from neuroada_kernels.backends import _compiled

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


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
            "linear": Implementation(_compiled.linear, _unsupported),
            "linear_backward": Implementation(_compiled.linear_backward, _unsupported),
            "bypass_add": Implementation(_compiled.bypass_add, _unsupported),
            "bypass_backward": Implementation(_compiled.bypass_backward, _unsupported),
            "merge_": Implementation(_compiled.merge, _merge_unsupported),
            "unmerge_": Implementation(_compiled.restore, _merge_unsupported),
            "gather": Implementation(_compiled.gather, _merge_unsupported),
            "patch_": Implementation(_compiled.patch, _merge_unsupported),
        },
    )
)
