"""Finds and loads the two compiled parts, and records the error if one fails to load.

``neuroada_kernels._C`` is a pybind11 module (build facts, CPU features, index planner);
``libneuroada`` holds the ops of namespace ``neuroada_C``, on torch's stable ABI. Without them the
package falls back to plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).parent
_PURE = "not beside the package: a pure-Python install (NEUROADA_BUILD=none), or never built"


def _describe(error: BaseException) -> str:
    """The error followed by its ``__cause__``, in which torch puts the actual reason."""
    words = f"{type(error).__name__}: {error}"
    return words if error.__cause__ is None else f"{words} ({_describe(error.__cause__)})"


def _is_disabled() -> bool:
    """Any value but 0 or the empty string disables the extension; unknown values do not raise."""
    return os.environ.get("NEUROADA_DISABLE_EXTENSION", "0") not in ("", "0")


def _load_module() -> tuple[ModuleType | None, str | None]:
    if _is_disabled():
        return None, "NEUROADA_DISABLE_EXTENSION is set"
    found = {path.name for path in _PACKAGE.glob("_C.*")}
    if not found:
        return None, _PURE
    if found.isdisjoint(f"_C{suffix}" for suffix in EXTENSION_SUFFIXES):
        return (
            None,
            f"{min(found)} is for another Python or machine, expected _C{EXTENSION_SUFFIXES[0]}",
        )
    try:
        return importlib.import_module("neuroada_kernels._C"), None
    except Exception as error:
        return None, _describe(error)


def _load_library() -> str | None:
    if _is_disabled():
        return "NEUROADA_DISABLE_EXTENSION is set"
    path = _PACKAGE / "libneuroada.so"
    if not path.exists():
        return _PURE
    try:
        torch.ops.load_library(str(path))
        return None
    except Exception as error:
        return _describe(error)


@functools.cache
def cuda_archs() -> tuple[str, ...]:
    """The architectures that the CUDA kernels are built for: ``("80", "89", "90a", "100")``."""
    return () if module is None else tuple(module.build_facts()["cuda_archs"].split())


@functools.cache
def cutlass_version() -> str:
    """The version of CUTLASS that the CUDA GEMM is built with; empty if built without."""
    return "" if module is None else str(module.build_facts()["cutlass"])


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``sm_<arch>`` runs on a GPU of this compute capability.

    It does on the same major version with the same or a newer minor version; code for an arch
    with a letter (``90a``) runs on exactly that capability.
    """
    digits = arch.rstrip("abcdefghijklmnopqrstuvwxyz")
    major, minor = int(digits[:-1]), int(digits[-1])
    if arch != digits:
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


#: The compute capability on which the tests of the CUDA kernels have run.
TESTED_CAPABILITY = (9, 0)


@functools.cache
def serves_gpu(gpu: int) -> bool:
    """Whether the CUDA kernels run on the GPU with this device index."""
    if library_error is not None or torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(gpu)
    return any(runs_on(arch, capability) for arch in cuda_archs())


@functools.cache
def serves_by_default(gpu: int) -> bool:
    """Whether :func:`serves_gpu`, and the tests have run on this compute capability."""
    return torch.cuda.get_device_capability(gpu) == TESTED_CAPABILITY and serves_gpu(gpu)


def env_flag(name: str) -> bool | None:
    """The environment variable ``name``, 0 or 1, as a bool; None where it is not set.

    Raises
    ------
    ValueError
        If it has another value.
    """
    said = os.environ.get(name)
    if said not in (None, "0", "1"):
        raise ValueError(f"{name}: {said!r}, expected 0 or 1")
    return None if said is None else said == "1"


#: The pybind11 module, or None.
module: ModuleType | None
#: Why the module is missing, or None.
module_error: str | None
module, module_error = _load_module()

#: Why the op library is missing, or None.
library_error: str | None = _load_library()
