"""Finds and loads the two compiled parts, and keeps the error of one that does not load.

``neuroada_kernels._C`` is a pybind11 module (build facts, CPU features, index planner);
``libneuroada`` holds the ops of namespace ``neuroada_C``, on torch's stable ABI. Without them the
package works all the same, on plain PyTorch.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).parent
_PURE = "not beside the package: a pure-Python install (NEUROADA_BUILD=none), or never built"


def _in_words(error: BaseException) -> str:
    """The error with what caused it, which torch keeps apart: there stands what is wrong."""
    words = f"{type(error).__name__}: {error}"
    return words if error.__cause__ is None else f"{words} ({_in_words(error.__cause__)})"


def _load_module() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("NEUROADA_DISABLE_EXTENSION"):
        return None, "NEUROADA_DISABLE_EXTENSION is set"
    if not list(_PACKAGE.glob("_C.*")):
        return None, _PURE
    try:
        return importlib.import_module("neuroada_kernels._C"), None
    except Exception as error:
        return None, _in_words(error)


def _load_library() -> str | None:
    if os.environ.get("NEUROADA_DISABLE_EXTENSION"):
        return "NEUROADA_DISABLE_EXTENSION is set"
    path = _PACKAGE / "libneuroada.so"
    if not path.exists():
        return _PURE
    try:
        torch.ops.load_library(str(path))
        return None
    except Exception as error:
        return _in_words(error)


#: The pybind11 module, or None.
module: ModuleType | None
#: Why the module is missing, in words, or None.
module_error: str | None
module, module_error = _load_module()

#: Why the op library is missing, in words, or None.
library_error: str | None = _load_library()
