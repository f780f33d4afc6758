"""What ran, and on what: the facts that are needed to judge and repeat a result."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from neuroada_kernels._extension import cutlass_version
from neuroada_kernels._version import __version__

#: Variables that change which kernels run, or how these round: the package's own, and those of
#: PyTorch, oneDNN, MKL and CUDA, whose GEMMs all other methods use.
VARIABLES = (
    "NEUROADA_BACKEND",
    "NEUROADA_CPU_ISA",
    "NEUROADA_CPU_FUSED",
    "NEUROADA_CUDA_PATCHED",
    "NEUROADA_CUDA_ONTO",
    "NEUROADA_CUDA_BULK",
    "NEUROADA_CUDA_TWO_TILES",
    "NEUROADA_CUDA_ORDER",
    "NEUROADA_TRITON_FUSED",
    "NEUROADA_AUTOTUNE",
    "NEUROADA_DISABLE_EXTENSION",
    "TRITON_INTERPRET",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
_OPENMP = re.compile(r"/(lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*)$")


def environment(device: str = "cpu") -> dict[str, Any]:
    """What ran, and on what.

    ``commit`` is NEUROADA_COMMIT, or else the checkout's, or None outside of one. ``environment``
    is present only if one of :data:`VARIABLES` is set, and maps those that are to their values.
    """
    commit, changed = _commit(Path(__file__).resolve().parent)
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {
        "package": __version__,
        "commit": commit,
        "uncommitted_changes": changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "openmp": _openmp_runtimes(),
        **({"environment": variables} if variables else {}),
        **(_gpu() if device == "cuda" else {}),
    }


def _gpu() -> dict[str, Any]:
    """The GPU, its driver, and versions of GPU libraries."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cutlass": cutlass_version() or None,
        "triton": _version("triton"),
        "peft": _version("peft"),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.splitlines()[0].strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of the checkout that tracks this package, and whether files differ from it.

    NEUROADA_COMMIT takes precedence: on a GPU machine a checkout may lack its .git, or have that of
    another commit.
    """
    if commit := os.environ.get("NEUROADA_COMMIT"):
        return commit, None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Fails for an environment inside another checkout, which ignores it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes in this process; there should be one, torch's."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({found[1] for line in lines if (found := _OPENMP.search(line))})
