"""The axes that tests run over: every backend that can run here, and every dtype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import neuroada_kernels as nk
from neuroada_kernels import _registry
from neuroada_kernels.testing import CASES, make_inputs

AVAILABLE = [name for name, reason in nk.available_backends().items() if reason is None]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each available backend, named while the test runs; skipped where it lacks the dtype."""
    with nk.use_backend(request.param):
        if "dtype" in request.fixturenames:
            inputs = make_inputs(
                CASES[0], request.getfixturevalue("dtype"), device=_device(request.param)
            )
            try:
                _registry.resolve("linear", inputs.x, inputs.weight, inputs.index, inputs.delta)
            except nk.BackendError as reasons:
                pytest.skip(str(reasons))
        yield request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the tensors of a test lie that runs on ``backend``."""
    return _device(backend)


def _device(backend: str) -> str:
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"
