"""Builds the compiled parts with CMake and ninja; see NEUROADA_BUILD below.

``NEUROADA_BUILD`` selects what to build: ``auto`` (the C++ kernels, and CUDA where nvcc is found),
``cpu``, ``cuda`` (fails without nvcc; PyPI's will do, see the Makefile's ``NVCC``) or ``none`` (a
pure-Python install). ``NEUROADA_CUTLASS`` names the folder ``include`` of CUTLASS, if that is not
PyPI's ``nvidia-cutlass`` in this environment; without CUTLASS its GEMM is left out.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "cpu", "cuda", "none")


def build_mode() -> str:
    mode = os.environ.get("NEUROADA_BUILD", "").lower() or "auto"
    if mode not in MODES:
        sys.exit(f"NEUROADA_BUILD: {mode!r}, expected one of {', '.join(MODES)}")
    return mode


def version() -> str:
    namespace: dict[str, str] = {}
    exec((ROOT / "neuroada_kernels" / "_version.py").read_text(), namespace)
    return namespace["__version__"]


class CMakeBuild(build_ext):
    """Runs CMake once and copies what it built to where setuptools expects each part."""

    def run(self) -> None:
        if self.extensions:
            self.cmake()
        super().run()

    def cmake(self) -> None:
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                sys.exit(f"{tool} is not found: pip install cmake ninja")
        mode = build_mode()
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "Python_EXECUTABLE": sys.executable,
            "NEUROADA_CUDA": {"auto": "AUTO", "cuda": "ON"}.get(mode, "OFF"),
            "NEUROADA_VERSION": version(),
            "NEUROADA_PYTHON": "ON",
            "NEUROADA_TESTS": "OFF",
        }
        settings = [f"-D{name}={value}" for name, value in options.items()]
        jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        build = self.cmake_build()
        # The cache may name files that are gone: pip's temporary ninja, a checkout that was moved.
        (Path(build) / "CMakeCache.txt").unlink(missing_ok=True)
        for step in (
            ["-G", "Ninja", "-S", str(ROOT), "-B", build, *settings],
            ["--build", build, "--parallel", jobs],
        ):
            if subprocess.run(["cmake", *step]).returncode:
                sys.exit(
                    "the compiled parts cannot be built, see above; NEUROADA_BUILD=none installs "
                    "the package without them"
                )

    def cmake_build(self) -> str:
        # Objects stay here for the next install, a wheel and the C++ tests. Two builds must not
        # run at once.
        return str(ROOT / "build" / "cmake")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(self.cmake_build()) / target.name, target)

    def get_ext_filename(self, fullname: str) -> str:
        # The op library does not use Python, so its name has no Python version.
        if fullname.rpartition(".")[2] == "libneuroada":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


class EditableWheel(editable_wheel):
    """Leaves no compiled parts of an earlier build in the source tree of a pure-Python install."""

    def run(self) -> None:
        if build_mode() == "none":
            for part in ("_C.*.so", "libneuroada.so"):
                for old in (ROOT / "neuroada_kernels").glob(part):
                    old.unlink()
        super().run()


def extensions() -> list[Extension]:
    if build_mode() == "none":
        return []
    if platform.system() != "Linux":
        sys.exit(f"the compiled parts are for Linux, not {platform.system()}: NEUROADA_BUILD=none")
    return [Extension(f"neuroada_kernels.{part}", sources=[]) for part in ("_C", "libneuroada")]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild, "editable_wheel": EditableWheel},
)
