"""Who serves a call: the automatic choice, a backend by name, and the reasons where none does."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from neuroada_kernels import (
    BackendError,
    NeuroAdaLinear,
    _registry,
    available_backends,
    use_backend,
)
from neuroada_kernels._registry import Backend, Implementation, register

OPS = ("linear", "linear_backward", "bypass_add", "bypass_backward", "merge_")
REASONS = ["the moon is full", "tokens: 3, expected 4"]


@pytest.fixture(autouse=True)
def _automatic_choice():
    """Whatever ``NEUROADA_BACKEND`` says outside, and with the registry as it was afterwards."""
    backends = dict(_registry._backends)
    with use_backend(None):
        yield
    _registry._backends.clear()
    _registry._backends.update(backends)
    _registry._order.clear()


@pytest.fixture
def layer() -> NeuroAdaLinear:
    torch.manual_seed(0)
    return NeuroAdaLinear(8, 6, 2)


def serving(op: str = "linear") -> str:
    """The name of the backend that would serve a float32 call on the CPU."""
    return _registry.serving(op, torch.zeros(3, 8), *[None] * 6).name


def fake(run=None, reasons=(), **options) -> Backend:
    """A backend that would be asked first, and declines for ``reasons``."""
    options = {"name": "fake", "priority": {"cpu": 9}, **options}
    implementation = Implementation(run or (lambda *args: None), lambda *args: list(reasons))
    backend = Backend(implementations={"linear": implementation}, **options)
    register(backend)
    return backend


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: v for name, v in os.environ.items() if name != "NEUROADA_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_compiled_kernels_serve_the_cpu_where_they_are_built():
    expected = "cpu" if available_backends()["cpu"] is None else "eager"
    assert {serving(op) for op in OPS} == {expected}


def test_use_backend_nests_and_restores():
    automatic = serving()
    with use_backend("eager"):
        assert serving() == "eager"
        with use_backend(None):
            assert serving() == automatic
            with use_backend("eager"):
                assert serving() == "eager"
            assert serving() == automatic
        assert serving() == "eager"
    assert serving() == automatic


def test_use_backend_restores_after_an_exception():
    automatic = serving()
    with pytest.raises(ZeroDivisionError), use_backend("eager"):
        raise ZeroDivisionError
    assert serving() == automatic
    with use_backend("eager"):
        with pytest.raises(ValueError, match="unknown"), use_backend("nonsense"):
            pass
        assert serving() == "eager"


def test_blocks_of_threads_that_overlap_leave_nothing_behind():
    first, second = use_backend("eager"), use_backend(None)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _registry._named is None
    third = use_backend("eager")
    third.__enter__()
    second.__exit__(None, None, None)
    assert _registry._named == "eager"
    third.__exit__(None, None, None)
    assert _registry._named is None


def test_threads_open_and_close_blocks_at_once():
    def work():
        for _ in range(200):
            with use_backend("eager"):
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work) for _ in range(8)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert _registry._named is None
    assert len(_registry._blocks) == 1  # the one of these tests


def test_unknown_name_lists_the_known_ones():
    names = ", ".join(repr(name) for name in sorted(available_backends()))
    with pytest.raises(ValueError, match=rf"'nonsense' is unknown, .*\[{names}\]"):
        use_backend("nonsense").__enter__()


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_named_backend_computes_the_same(layer, name):
    if available_backends()[name] is not None:
        pytest.skip(available_backends()[name])
    with torch.no_grad():
        layer.delta.normal_()
    x = torch.randn(5, 8, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    expected = [y, x.grad.clone(), layer.delta.grad.clone()]
    x.grad = layer.delta.grad = None
    with use_backend(name):
        y = layer(x)
        y.sum().backward()
    for actual, value in zip([y, x.grad, layer.delta.grad], expected, strict=True):
        torch.testing.assert_close(actual, value)


def test_automatic_choice_asks_the_highest_priority_first(layer):
    calls = []

    def run(x, weight, index, delta, bias):
        calls.append(x.shape)
        return x.new_full((x.shape[0], weight.shape[0]), 7.0)

    fake(run)
    assert (layer(torch.randn(5, 8)) == 7).all()
    assert calls == [(5, 8)]
    with use_backend("eager"):
        assert not (layer(torch.randn(5, 8)) == 7).all()
    assert len(calls) == 1


def test_automatic_choice_falls_back_on_declined_calls(layer):
    x = torch.randn(5, 8)
    expected = layer(x)
    fake(reasons=REASONS)
    assert torch.equal(layer(x), expected)


def test_automatic_choice_falls_back_on_ops_that_are_missing(layer):
    fake()
    x = torch.randn(5, 8)
    with use_backend("eager"):
        y = layer(x)
    y.sum().backward()  # outside the block: the automatic choice, and fake has no backward
    assert layer.delta.grad.abs().sum() > 0


def test_backend_without_a_priority_here_serves_by_name_alone(layer):
    fake(lambda x, *rest: x.new_full((x.shape[0], 6), 7.0), priority={"cuda": 9})
    x = torch.randn(5, 8)
    assert not (layer(x) == 7).any()
    with use_backend("fake"):
        assert (layer(x) == 7).all()


def test_named_backend_that_declines_raises_with_all_its_reasons(layer):
    fake(reasons=REASONS)
    with use_backend("fake"), pytest.raises(BackendError) as raised:
        layer(torch.randn(5, 8))
    assert "neuroada::linear" in str(raised.value)
    assert f"fake: {', '.join(REASONS)}" in str(raised.value)
    assert "eager" not in str(raised.value)


def test_named_backend_without_the_op_says_so(layer):
    fake(lambda x, *rest: x.new_zeros(x.shape[0], 6))
    with use_backend("fake"):
        y = layer(torch.randn(5, 8))
        with pytest.raises(BackendError, match="fake: has no linear_backward"):
            y.sum().backward()


def test_an_experimental_backend_serves_only_when_named():
    expected = serving()
    fake(experimental=True, run=test_an_experimental_backend_serves_only_when_named)
    assert serving() == expected
    assert "fake" in _registry.experimental_backends()
    with use_backend("fake"):
        assert serving() == "fake"


def test_where_a_backend_is_untried_it_serves_only_when_named():
    expected = serving()
    fake(untried=lambda first: f"not tried on {first.device.type}")
    assert serving() == expected
    with use_backend("fake"):
        assert serving() == "fake"


def test_unavailable_backend_tells_why(layer):
    fake(unavailable=lambda: "no such processor")
    assert available_backends()["fake"] == "no such processor"
    assert available_backends()["eager"] is None
    x = torch.randn(5, 8)
    assert layer(x).shape == (5, 6), "the automatic choice passes it over"
    with pytest.raises(BackendError, match="'fake' cannot run here: no such processor"):
        use_backend("fake").__enter__()
    assert layer(x).shape == (5, 6)


def test_all_decline_lists_the_reasons_of_each():
    for name in list(_registry._backends):
        del _registry._backends[name]
    fake(reasons=REASONS[:1])
    fake(reasons=REASONS[1:], name="other", priority={"cpu": 1})
    expected = f"fake: {REASONS[0]}; other: {REASONS[1]}"
    with pytest.raises(BackendError, match=expected):
        _registry.serving("linear", torch.zeros(3, 8))


@pytest.mark.parametrize("why", ["declines", "untried"])
def test_the_second_in_order_serves_where_the_first_does_not(layer, why):
    """Also once the order is known."""
    declining = {"reasons": REASONS} if why == "declines" else {"untried": lambda first: "untried"}
    fake(lambda *args: pytest.fail("it does not serve"), **declining)
    for _ in range(2):
        assert layer(torch.randn(5, 8)).shape == (5, 6)


def test_what_is_always_served_has_no_reason_against_it():
    asked = 0
    for backend in _registry._backends.values():
        for implementation in backend.implementations.values():
            for dtype in implementation.always:
                for device in backend.priority:
                    assert (
                        implementation.unsupported(torch.zeros(2, 2, dtype=dtype, device=device))
                        == []
                    )
                    asked += 1
    assert asked > 0


def test_registering_again_replaces(layer):
    fake(reasons=REASONS)
    layer(torch.randn(5, 8))
    fake(lambda x, *rest: x.new_full((x.shape[0], 6), 7.0))
    assert (layer(torch.randn(5, 8)) == 7).all()


REPORT = """
import torch
import neuroada_kernels as nk
from neuroada_kernels import _registry
layer = nk.NeuroAdaLinear(8, 6, 2)
layer(torch.randn(3, 8)).sum().backward()
print(_registry.serving("linear", torch.zeros(3, 8), *[None] * 4).name)
with nk.use_backend(None):
    print(_registry.serving("linear", torch.zeros(3, 8), *[None] * 4).name)
"""


def test_environment_names_the_backend():
    done = run_python(REPORT, NEUROADA_BACKEND="eager")
    assert done.returncode == 0, done.stderr
    named, automatic = done.stdout.split()
    assert named == "eager"
    assert automatic == serving()


def test_environment_with_an_unknown_name_raises_at_the_first_call():
    done = run_python(REPORT, NEUROADA_BACKEND="nonsense")
    assert done.returncode == 1
    assert "ValueError: backend: 'nonsense' is unknown, expected one of" in done.stderr


def test_environment_with_an_unavailable_backend_raises_with_its_reason():
    done = run_python(REPORT, NEUROADA_BACKEND="cpu", NEUROADA_DISABLE_EXTENSION="1")
    assert done.returncode == 1
    assert (
        "BackendError: backend 'cpu' cannot run here: NEUROADA_DISABLE_EXTENSION is set"
        in done.stderr
    )
