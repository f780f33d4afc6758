"""The compiled CUDA ops without a GPU: their kernels and torch bindings, on the CPU.

``make test-python`` builds the library; ``host_cuda.h`` says how device code runs there. If it
is not built, tests that import this module are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

NAMED = os.environ.get("NEUROADA_HOST_CUDA_LIBRARY")
LIBRARY = Path(
    NAMED or Path(__file__).parents[2] / "build/host_cuda/tests/cuda/libneuroada_host_cuda.so"
)
if not NAMED and not LIBRARY.exists():
    pytest.skip(f"{LIBRARY.name} is not built: make test-python", allow_module_level=True)

torch.ops.load_library(str(LIBRARY))
C = torch.ops.neuroada_host_cuda
