"""The axes that tests run over: every backend that can run here, and every dtype."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator

import pytest
import torch

import neuroada_kernels as nk
from neuroada_kernels import _registry
from neuroada_kernels.testing import CASES, make_inputs

#: If set, the one backend that tests run on; what it does not support then fails.
REQUIRED = os.environ.get("NEUROADA_REQUIRE")
AVAILABLE = (
    [REQUIRED]
    if REQUIRED
    else [name for name, reason in nk.available_backends().items() if reason is None]
)
#: Dtypes that a backend leaves to others on purpose, also if it is required.
LEFT_OUT = {"cuda": {torch.float64}}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        # NumPy computes there, and warns of results that are not finite; a GPU does not.
        for words in ("invalid value", "overflow", "divide by zero"):
            config.addinivalue_line("filterwarnings", f"ignore:{words} encountered:RuntimeWarning")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Disable garbage collection under Triton's interpreter, which runs one kernel at a time: a
    resident layer that is collected within a kernel restores its weight by another kernel."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return (yield)
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "backend" in getattr(item, "fixturenames", ()):
            item.add_marker("on_backend")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each available backend, named while the test runs; skipped where it lacks the dtype."""
    with nk.use_backend(request.param):
        if "dtype" in request.fixturenames:
            _skip_unless_served(request.param, request.getfixturevalue("dtype"))
        yield request.param


@pytest.fixture
def float64(backend: str) -> None:
    """For tests that compute in float64 for every dtype: skipped if the backend does not."""
    _skip_unless_served(backend, torch.float64)


def _skip_unless_served(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(CASES[0], dtype, device=_device(backend))
    try:
        _registry.serving("linear", inputs.x, inputs.weight, inputs.index, inputs.delta)
    except nk.BackendError as reasons:
        if REQUIRED and dtype not in LEFT_OUT.get(REQUIRED, ()):
            raise
        pytest.skip(str(reasons))


@pytest.fixture
def device(backend: str) -> str:
    """The device of the tensors of a test on ``backend``."""
    return _device(backend)


def _device(backend: str) -> str:
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"
