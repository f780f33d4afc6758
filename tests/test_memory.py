"""What a forward keeps, and what forward and backward allocate: nothing of W's size.

The profiler sees what goes through torch's allocator, not the kernels' own scratch (``malloc``) nor
the buffers of the BLAS; for these, the resident set of a process of its own is measured.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gradients import linear, linear_tensors
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels.testing import Case, Inputs, make_inputs

MIB = 1 << 20


def saved_tensors(forward: Callable[[], Tensor]) -> list[Tensor]:
    """What autograd keeps of one forward."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return saved


def storages(*tensors: Tensor) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def layer_of(dtype: torch.dtype, device: str) -> nk.NeuroAdaLinear:
    torch.manual_seed(0)
    return nk.NeuroAdaLinear(96, 64, k=4, dtype=dtype, device=device)


@pytest.mark.parametrize("leading", [(8,), (2, 4), ()], ids=str)
@pytest.mark.parametrize("x_requires_grad", [True, False], ids=["dx", ""])
def test_a_forward_keeps_x_and_references_alone(leading, x_requires_grad, dtype, backend, device):
    layer = layer_of(dtype, device)
    x = torch.randn(*leading, 96, device=device).to(dtype).requires_grad_(x_requires_grad)
    saved = saved_tensors(lambda: layer(x))
    held = (layer.weight, layer.index, layer.delta, layer.plan)
    assert storages(*saved) <= storages(x, *held)
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in saved) == 1


def test_the_bypass_keeps_x_and_references_alone(dtype, backend, device):
    layer = layer_of(dtype, device)
    x, y = (torch.randn(2, 4, n, device=device).to(dtype) for n in (96, 64))
    saved = saved_tensors(
        lambda: nk.functional.neuroada_bypass(y, x, layer.index, layer.delta, plan=layer.plan)
    )
    assert storages(*saved) <= storages(x, layer.index, layer.delta, layer.plan)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_x_in_sixteen_bits_and_no_weight(autocast, backend, device):
    layer = layer_of(torch.float32, device)
    layer.bias.requires_grad_()
    x = torch.randn(8, 96, device=device, requires_grad=True)
    outputs = []

    def forward() -> Tensor:
        with torch.autocast(device, dtype=autocast):
            outputs.append(layer(x))
        return outputs[-1]

    saved = saved_tensors(forward)
    held = storages(layer.weight, layer.index, layer.delta, layer.plan)
    own = [t for t in saved if not storages(t) <= held]
    assert [(t.dtype, t.shape) for t in own] == [(autocast, x.shape)]

    (y,) = outputs
    assert y.dtype == autocast
    y.float().square().sum().backward()
    for leaf in (x, layer.delta, layer.bias):
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()
    exact = layer_of(torch.float64, device)
    exact.load_state_dict(layer.state_dict())
    exact.delta = torch.nn.Parameter(layer.delta.double())
    wide = x.detach().double().requires_grad_()
    with nk.use_backend("eager"):  # not every backend has float64
        exact(wide).square().sum().backward()
    error = (layer.delta.grad - exact.delta.grad).norm() / exact.delta.grad.norm()
    assert error < 4 * torch.finfo(autocast).eps


def test_memory_is_free_once_the_graph_is_gone(backend, device):
    layer = layer_of(torch.float32, device)
    x = torch.randn(8, 96, device=device)
    y = layer(x)
    y.sum().backward()
    output = weakref.ref(y)
    del y
    assert output() is None


def allocations(run: Callable[[], object], tmp_path: Path) -> list[int]:
    """The bytes that ``run`` takes from torch's allocator, in order; freeing is negative."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    trace = tmp_path / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


def forward_and_backward(inputs: Inputs, plan: Tensor) -> Callable[[], None]:
    leaves = [tensor.clone().requires_grad_() for tensor in linear_tensors(inputs)]
    function = linear(inputs, plan)

    def run() -> None:
        torch.autograd.grad(function(*leaves), leaves, inputs.grad_output)

    return run


def frozen_step(inputs: Inputs) -> Callable[[], None]:
    x = inputs.x.clone().requires_grad_()

    def run() -> None:
        torch.autograd.grad(F.linear(x, inputs.weight, inputs.bias), x, inputs.grad_output)

    return run


def warm(run: Callable[[], None]) -> Callable[[], None]:
    run()
    return run


def test_the_profiler_sees_a_copy_of_the_weight(tmp_path):
    weight = torch.randn(1024, 1024)
    assert max(allocations(lambda: weight + 1, tmp_path)) == 4 * MIB
    assert max(allocations(lambda: weight.sum(), tmp_path)) < 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_nothing_of_the_weights_size_is_allocated(bias, dtype, backend, device, tmp_path):
    if device != "cpu":
        pytest.skip("the profiler's record of a GPU's allocator is another one")
    case = Case(tokens=8, d_in=1024, d_out=1024, k=8, bias=bias)
    inputs = make_inputs(case, dtype)
    run = forward_and_backward(inputs, nk.make_plan(inputs.index, case.d_in))
    small = inputs.weight.nbytes // 8  # a block of the eager backend: 8 tokens of x, transposed
    ours, frozen = (allocations(warm(f), tmp_path) for f in (run, frozen_step(inputs)))
    # With AMX, oneDNN lays W out anew for its tiles during a product, the frozen linear's too;
    # our own product in tiles does not.
    large = [size for size in ours if size > small]
    assert large in ([], [size for size in frozen if size > small])
    assert max(itertools.accumulate(ours)) <= 2 * small + max(large, default=0)


def test_float16_widens_the_weight_in_blocks(backend, device, tmp_path):
    """Where the processor does not multiply float16, at most 8 MiB of W are float32 at a time."""
    if device != "cpu":
        pytest.skip("a GPU multiplies float16")
    case = Case(tokens=8, d_in=2048, d_out=4096, k=1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.d_out, case.d_in, generator=generator).half()
    inputs = Inputs(
        x=torch.randn(8, case.d_in, generator=generator).half(),
        weight=weight,
        index=torch.zeros(case.d_out, 1, dtype=torch.int32),
        delta=torch.zeros(case.d_out, 1),
        bias=None,
        grad_output=torch.randn(8, case.d_out, generator=generator).half(),
    )
    assert weight.nbytes == 16 * MIB
    run = forward_and_backward(inputs, nk.make_plan(inputs.index, case.d_in))
    assert max(allocations(run, tmp_path)) <= 8 * MIB


SCRATCH = """
import sys, torch
import torch.nn.functional as F
import neuroada_kernels as nk

torch.set_num_threads(2)
dtype, bias = getattr(torch, sys.argv[1]), sys.argv[2] == "bias"


def peak():  # ru_maxrss would start at the parent's, which exec hands down
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def step(d, call):
    x = torch.randn(8, d, dtype=dtype, requires_grad=True)
    call(x).sum().backward()


def layer_of(d):
    linear = torch.nn.Linear(d, d, bias=bias, dtype=dtype)
    index = torch.arange(8, dtype=torch.int32).repeat(d, 1)
    return nk.NeuroAdaLinear.from_linear(linear, index=index)


small, large = layer_of(64), layer_of(4096)
step(64, small)  # loads what is loaded on first use
step(4096, lambda x: F.linear(x, large.weight, large.bias))  # what the dense product takes
before = peak()
step(4096, large)
ours = peak() - before
step(4096, lambda x: F.linear(x, large.weight + 0))
print(ours, peak() - before, large.weight.nbytes, large.delta.numel())
"""


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", ["", "bias"])
def test_scratch_beyond_the_dense_product_is_small(bias, dtype_name, backend, device):
    """16 MiB and 64 bytes a bypass and thread: what torch's allocator does not see is in this."""
    if device != "cpu":
        pytest.skip("host memory says nothing of a GPU")
    run = subprocess.run(
        [sys.executable, "-c", SCRATCH, dtype_name, bias],
        env=os.environ | {"NEUROADA_BACKEND": backend},
        capture_output=True,
        text=True,
        check=True,
    )
    ours, copied, weight, bypasses = (int(word) for word in run.stdout.split())
    budget = 16 * MIB + 64 * bypasses * 2
    assert budget < weight <= copied + budget  # a copy of the weight would be seen
    assert ours <= budget
