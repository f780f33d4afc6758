"""What is installed, how it was built, which backends can run here, and why the others cannot.

Run as ``python -m neuroada_kernels.info`` or ``neuroada info``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from neuroada_kernels import _extension
from neuroada_kernels._registry import available_backends, experimental_backends, untried
from neuroada_kernels._version import __version__
from neuroada_kernels.nn.foreign import missing_library

_EXPERIMENTAL = "; experimental, its tests have not run on a GPU: served only when named"


def facts() -> dict[str, Any]:
    """Everything that :func:`main` shows, as plain data."""
    module = _extension.module
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "op_library": _extension.library_error or "loaded",
        "extension": _extension.module_error or "loaded",
        "build": None if module is None else dict(module.build_facts()),
        "cpu_isa": _cpu_isa(),
        "cpu_features": None if module is None else list(module.cpu_features()),
        "backends": {name: _backend_state(name, why) for name, why in available_backends().items()},
        "other_bases": {
            name: _library_state(name) for name in ("bitsandbytes", "torchao", "transformers")
        },
        "environment": {n: v for n, v in sorted(os.environ.items()) if n.startswith("NEUROADA_")},
    }


def _backend_state(name: str, why_not: str | None) -> str:
    """Whether a backend can run here, and for what it serves only when named."""
    if name in experimental_backends():
        return (why_not or "available") + _EXPERIMENTAL
    if why_not is not None or not torch.cuda.is_available():
        return why_not or "available"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    reasons = {untried(name, torch.empty(0, dtype=dtype, device="cuda")) for dtype in dtypes}
    return "; ".join(["available", *sorted(reason for reason in reasons if reason is not None)])


def _cuda_build(build: dict[str, str]) -> str:
    if not build["cuda_archs"]:
        return "none, built without CUDA"
    cutlass = f"with CUTLASS {build['cutlass']}" if build["cutlass"] else "without CUTLASS"
    return f"{build['cuda_archs']}, by nvcc {build['nvcc']}, {cutlass}"


def _library_state(name: str) -> str:
    """The version of a library with layers of its own, or how to install it."""
    missing = missing_library(name)
    if missing is not None:
        return missing.removeprefix(f"{name} is ")
    try:
        return version(name)
    except PackageNotFoundError:
        return "of an unknown version"


def _cpu_isa() -> str | None:
    """The instruction set in use, or why there is none."""
    if _extension.module is None:
        return None
    try:
        return str(_extension.module.cpu_isa())
    except ValueError as error:
        return str(error)


def main(argv: list[str] | None = None) -> int:
    """Print the facts; returns 0 also if only plain PyTorch can serve."""
    parser = argparse.ArgumentParser(prog="neuroada info", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    known = facts()
    if parser.parse_args(argv).json:
        print(json.dumps(known, indent=2))
        return 0
    for line in _lines(known):
        print(line)
    return 0


def _lines(known: dict[str, Any]) -> list[str]:
    lines = [
        f"neuroada_kernels {known['version']} on Python {known['python']}, {known['platform']}",
        f"torch {known['torch']}, {known['threads']} threads, "
        f"GPU: {known['gpu'] or 'none visible'}",
        f"op library (libneuroada): {known['op_library']}",
        f"extension module (_C): {known['extension']}",
    ]
    if known["build"] is not None:
        build = known["build"]
        lines.append(
            f"  built by {build['compiler']}, {build['build_type']} ({build['flags']}), "
            f"against torch {build['torch']}"
        )
        lines.append(f"  instruction sets built: {build['instruction_sets']}")
        lines.append(f"  this processor runs: {' '.join(['generic', *known['cpu_features']])}")
        lines.append(f"  its kernels run with: {known['cpu_isa']}")
        lines.append(f"  CUDA architectures: {_cuda_build(build)}")
    lines.append("backends:")
    lines += [f"  {name}: {why}" for name, why in known["backends"].items()]
    lines.append("layers of other libraries, round which the bypass can go:")
    lines += [f"  {name}: {what}" for name, what in known["other_bases"].items()]
    if known["op_library"] != "loaded":
        lines.append("Calls are served by plain PyTorch: right, and slower.")
    if known["environment"]:
        lines.append("environment:")
        lines += [f"  {name}={value}" for name, value in known["environment"].items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
