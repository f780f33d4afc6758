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

#: One backend that tests must run on, whatever else there is; what it cannot do then fails.
REQUIRED = os.environ.get("NEUROADA_REQUIRE")
AVAILABLE = (
    [REQUIRED]
    if REQUIRED
    else [name for name, reason in nk.available_backends().items() if reason is None]
)
#: What a backend leaves to others on purpose, also where it is required.
LEFT_OUT = {"cuda": {torch.float64}}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        # NumPy computes there, and says so where a result is not finite; a GPU does not.
        for words in ("invalid value", "overflow", "divide by zero"):
            config.addinivalue_line("filterwarnings", f"ignore:{words} encountered:RuntimeWarning")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Under Triton's interpreter, which runs one kernel at a time, no layer is collected in the
    middle of a kernel: a resident one gives its weight back then, by a kernel of its own."""
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
    """For what computes in float64 whatever the axis: skipped where the backend does not."""
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
    """Where the tensors of a test lie that runs on ``backend``."""
    return _device(backend)


def _device(backend: str) -> str:
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"
