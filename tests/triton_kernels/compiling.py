"""Compiles the kernels of launches for a GPU that is not present, and reads the result."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """A kernel as it was specialised for one launch."""

    name: str
    ptx: str
    registers: int
    stack: int  # bytes per thread, for register spills
    shared: int  # bytes

    @property
    def resources(self) -> dict[str, int]:
        return {"registers": self.registers, "stack": self.stack, "shared": self.shared}


class _AbsentGpu:
    """The driver calls that the JIT makes before it compiles; the arch is the device's number."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Compiled]]:
    """Within the block, a launch only compiles, for ``sm_<arch>``; yields what was compiled."""
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, **options: object) -> object:
        options["warmup"] = True
        kernel = run(self, *args, grid=grid, **options)
        compiled.append(_read(self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_AbsentGpu(arch))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = None


def _read(name: str, kernel: object) -> Compiled:
    """From the cubin; cuobjdump prints ``REG:32 STACK:0 SHARED:0 LOCAL:0 ...``."""
    cubin = kernel.asm["cubin"]
    path = Path(kernel.metadata_group[f"{kernel.metadata.name}.cubin"])
    assert path.read_bytes() == cubin
    said = subprocess.run(
        [_BIN / "cuobjdump", "--dump-resource-usage", path],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    usage = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", said)}
    return Compiled(
        name=name,
        ptx=kernel.asm["ptx"],
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
    )
