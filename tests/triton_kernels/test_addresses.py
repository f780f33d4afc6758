"""Which addresses the kernels touch: none outside their tensors, and any within, however far apart.

A kernel that reads beyond a matrix, and leaves out of its result what it read, is right by every
value. Here each tensor ends or begins at a page that nobody may touch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels.plan import PlanParts, plan_parts
from neuroada_kernels.testing import Case, Inputs, make_inputs

pytestmark = pytest.mark.on_backend
unavailable = nk.available_backends()["triton"]
if unavailable is not None:
    pytest.skip(unavailable, allow_module_level=True)

from neuroada_kernels.backends.triton import _kernels  # noqa: E402
from neuroada_kernels.triton_kernels import configs  # noqa: E402

kernels = _kernels()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Place = Callable[[Tensor], Tensor]


def at_a_fence(ends: bool) -> Place:
    """A copy that ends (or begins) where a page begins (or ends) that nobody may touch."""
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE

    def place(tensor: Tensor) -> Tensor:
        inside = -(-max(tensor.nbytes, 1) // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for fence in (address, address + page + inside):
            assert protect(fence, page, 0) == 0
        offset = page + (inside - tensor.nbytes if ends else 0)
        count = tensor.numel()
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=offset)
        return copy.view(tensor.shape).copy_(tensor)

    return place


def fenced(inputs: Inputs, place: Place) -> Inputs:
    tensors = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return Inputs(**{name: t if t is None else place(t) for name, t in tensors.items()})


def touch_everything(case: Case, dtype: torch.dtype, place: Place) -> None:
    """Every kernel once, every tensor of it fenced."""
    plain = make_inputs(case, dtype)
    inputs = fenced(plain, place)
    plan = nk.make_plan(plain.index, case.d_in)
    parts = PlanParts(*map(place, plan_parts(plan, case.d_in)))
    x_t, grad_t = (place(kernels.transpose(t)) for t in (inputs.x, inputs.grad_output))
    index, delta, weight = inputs.index, inputs.delta, inputs.weight
    y, grad_x = place(plain.grad_output), place(plain.x)
    kernels.bypass_fwd(x_t, index, delta, y, onto=inputs.grad_output, bias=inputs.bias)
    kernels.bypass_bwd_input(grad_t, *parts, delta, grad_x, onto=inputs.x)
    rows = kernels.sddmm_partial(plain.index, case.tokens, dtype).shape[1]
    for count in (1, 2, 3):
        kernels.sddmm(x_t, grad_t, index, place(torch.zeros(count, rows)))
    for config in configs.gemm_configs(case.tokens, dtype, configs.H200):
        kernels.linear_fwd(inputs.x, weight, x_t, index, delta, inputs.bias, y, config)
        rest = (parts.column_start, parts.entry, delta, grad_x, config)
        kernels.linear_bwd_input(inputs.grad_output, weight, grad_t, *rest)
    original = place(kernels.merge(weight, index, delta))
    kernels.patch(weight, index, delta, original)
    kernels.unmerge(weight, index, original)


def follow_plans_of_other_indices(place: Place) -> None:
    """Such a plan gives a wrong sum; what it must not do is to reach outside, or never to end."""
    case = Case(tokens=5, d_in=32, d_out=24, k=2)
    inputs = fenced(make_inputs(case, torch.float32), place)
    right = nk.make_plan(inputs.index, case.d_in)
    wider = nk.make_plan(torch.arange(60, dtype=torch.int32).view(30, 2), 60)
    plans = [wider, right[:-20], right.new_zeros(len(right))]
    plans += [right.new_full((len(right),), value) for value in (7, 48, -1, 2**31 - 1, -(2**31))]
    plans += [torch.cat([right[:-1], right.new_tensor([entry])]) for entry in (48, -1)]
    plans += [right.flip(0), right * 1000, -right, right - 100, right + 100]
    grad_t = place(kernels.transpose(inputs.grad_output))
    grad_x = place(torch.zeros_like(inputs.x))
    for plan in plans:
        parts = PlanParts(*map(place, plan_parts(plan, case.d_in)))
        kernels.bypass_bwd_input(grad_t, *parts, inputs.delta, grad_x)
        rest = (grad_t, parts.column_start, parts.entry, inputs.delta, grad_x)
        kernels.linear_bwd_input(inputs.grad_output, inputs.weight, *rest)


def main() -> None:
    for case in (
        Case(tokens=5, d_in=67, d_out=101, k=3, bias=True, index="ragged"),
        Case(tokens=200, d_in=70, d_out=9, k=2, bias=True, index="one_column"),
        Case(tokens=17, d_in=1, d_out=5, k=1),
    ):
        for ends in (True, False):
            touch_everything(case, torch.float32, at_a_fence(ends))
    for ends in (True, False):
        follow_plans_of_other_indices(at_a_fence(ends))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's memory has no such pages: see gpu_run.sh")
def test_nothing_outside_of_a_tensor_is_touched():
    """In a process of its own, which a wrong address ends."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr


def test_transpose_touches_nothing_outside_of_its_result(monkeypatch):
    """It makes the result itself: within a larger one, whose rest must stay."""
    empty, made = torch.empty, []

    def larger(*shape: int, **options: object) -> Tensor:
        made.append(torch.full((shape[0] + 200, shape[1]), 7.0, **options))
        return made[0][100:-100]

    x = torch.randn(17, 67, device=DEVICE)
    monkeypatch.setattr(torch, "empty", larger)
    x_t = kernels.transpose(x)
    monkeypatch.setattr(torch, "empty", empty)
    assert x_t[:, :17].equal(x.t())
    assert made[0][:100].eq(7).all()
    assert made[0][-100:].eq(7).all()


@pytest.mark.parametrize("end", [0, 1, 5, 20, 32])
def test_a_program_writes_the_columns_of_its_splits_alone(end):
    """One that wrote a neighbour's too would be right one after the other, and race on a GPU."""
    inputs = make_inputs(Case(tokens=17, d_in=32, d_out=24, k=2), torch.float32, device=DEVICE)
    parts = plan_parts(nk.make_plan(inputs.index, 32), 32)
    grad_t = kernels.transpose(inputs.grad_output)
    whole, some = (torch.full_like(inputs.x, float("nan")) for _ in range(2))
    kernels.bypass_bwd_input(grad_t, *parts, inputs.delta, whole)
    splits = parts.split.clamp(max=end)
    kernels.bypass_bwd_input(grad_t, parts.column_start, splits, parts.entry, inputs.delta, some)
    assert some[:, :end].equal(whole[:, :end])
    assert some[:, end:].isnan().all()


def far_apart(matrix: Tensor, dim: int = 0) -> Tensor:
    """A copy whose last row (or column) lies more than 2^31 elements from the first."""
    count = matrix.shape[dim] - 1
    stride = (2**31 + 2**20) // count
    # Memory that is asked for and never touched is not there.
    base = torch.empty(stride * count + 2**20, dtype=matrix.dtype, device=matrix.device)
    strides = (stride, 1) if dim == 0 else (1, stride)
    return base.as_strided(matrix.shape, strides).copy_(matrix)


def results_of(inputs: Inputs, move: dict[str, Place]) -> dict[str, Tensor]:
    """What every kernel makes, with the tensors that ``move`` names laid elsewhere."""

    def laid(name: str, tensor: Tensor) -> Tensor:
        return move.get(name, lambda t: t)(tensor)

    x, weight, grad = (laid(n, getattr(inputs, n)) for n in ("x", "weight", "grad_output"))
    index, delta = inputs.index, inputs.delta
    parts = plan_parts(nk.make_plan(index, x.shape[1]), x.shape[1])
    x_t, grad_t = laid("x_t", kernels.transpose(x)), laid("grad_t", kernels.transpose(grad))
    y, dx = laid("y", torch.zeros_like(inputs.grad_output)), laid("dx", torch.zeros_like(inputs.x))
    made: dict[str, Tensor] = {"x_t": x_t, "grad_t": grad_t}

    kernels.bypass_fwd(x_t, index, delta, y, onto=laid("onto", inputs.grad_output))
    made["bypass_fwd"] = y.clone()
    kernels.bypass_bwd_input(grad_t, *parts, delta, dx, onto=laid("onto_dx", inputs.x))
    made["bypass_bwd_input"] = dx.clone()
    made["sddmm"] = kernels.sddmm_partial(index, x.shape[0], x.dtype)
    kernels.sddmm(x_t, grad_t, index, made["sddmm"])
    kernels.linear_fwd(x, weight, x_t, index, delta, None, y)
    made["linear_fwd"] = y.clone()
    kernels.linear_bwd_input(grad, weight, grad_t, parts.column_start, parts.entry, delta, dx)
    made["linear_bwd_input"] = dx.clone()
    made["merge"] = kernels.merge(weight, index, delta)
    made["merged"] = weight.clone()
    kernels.patch(weight, index, -delta, made["merge"])
    made["patched"] = weight.clone()
    kernels.unmerge(weight, index, made["merge"])
    made["unmerged"] = weight.clone()
    return made


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        (name, 0)
        for name in ("x", "weight", "grad_output", "onto", "onto_dx", "x_t", "grad_t", "y", "dx")
    ]
    + [(name, 1) for name in ("x", "weight", "grad_output")],
)
def test_addresses_have_64_bits(name, dim):
    """Any of the matrices may have more than 2^31 elements from its first to its last."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 2**33:
        pytest.skip("less than 8 GiB are free")
    inputs = make_inputs(Case(tokens=20, d_in=40, d_out=24, k=2), torch.float16, device=DEVICE)
    near = results_of(inputs, {})
    far = results_of(inputs, {name: lambda t: far_apart(t, dim)})
    for kernel, result in far.items():
        # On a GPU other strides may make other code, which sums in another order.
        torch.testing.assert_close(
            result, near[kernel], rtol=1e-3, atol=1e-3, msg=lambda why, k=kernel: f"{k}: {why}"
        )


if __name__ == "__main__":
    main()
