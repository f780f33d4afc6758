"""The CUDA backend where there is no GPU: its kernels, its torch glue and its Python on the CPU.

``make test-python`` builds the library; ``host_cuda.h`` says how device code runs there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels.backends import _compiled
from neuroada_kernels.plan import chosen_columns, renumber
from neuroada_kernels.testing import CASES, Case, Inputs, make_inputs, rms_error, tolerance

NAMED = os.environ.get("NEUROADA_HOST_CUDA_LIBRARY")
LIBRARY = Path(
    NAMED or Path(__file__).parents[2] / "build/host_cuda/tests/cuda/libneuroada_host_cuda.so"
)
if not NAMED and not LIBRARY.exists():
    pytest.skip(f"{LIBRARY.name} is not built: make test-python", allow_module_level=True)

torch.ops.load_library(str(LIBRARY))
C = torch.ops.neuroada_host_cuda

#: A thread of a CTA is a thread of the CPU: half a thousand tokens would take minutes.
SMALL = [case for case in CASES if case.tokens <= 65]
every_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


@pytest.fixture(autouse=True)
def _on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiled, "C", C)


def exact(inputs: Inputs) -> SimpleNamespace:
    """The formulas in float64."""
    x, delta = (t.double().requires_grad_() for t in (inputs.x, inputs.delta))
    weight, grad = inputs.weight.double(), inputs.grad_output.double()
    bypass = nk.reference.bypass(x, inputs.index, delta)
    grad_x, grad_delta = torch.autograd.grad(bypass, (x, delta), grad)
    bias = 0 if inputs.bias is None else inputs.bias.double()
    return SimpleNamespace(
        bypass=bypass.detach(),
        linear=(x @ weight.t() + bias + bypass).detach(),
        bypass_grad_x=grad_x,
        linear_grad_x=grad @ weight + grad_x,
        grad_delta=grad_delta,
    )


@every_case
@every_dtype
def test_forward_is_the_formula(case, dtype):
    inputs = make_inputs(case, dtype)
    truth = exact(inputs)
    y = _compiled.linear(inputs.x, inputs.weight, inputs.index, inputs.delta, inputs.bias)
    # A 16-bit product is rounded where torch's CPU kernels round it.
    assert rms_error(y, truth.linear) <= 2 * tolerance(dtype, case.d_in + case.k)
    onto = inputs.grad_output
    y = _compiled.bypass_add(inputs.x, onto, inputs.index, inputs.delta)
    assert rms_error(y, truth.bypass + onto.double()) <= tolerance(dtype, case.k + 1)


@every_case
@every_dtype
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "unplanned"])
def test_backward_is_the_formula(case, dtype, planned):
    inputs = make_inputs(case, dtype)
    truth, grad = exact(inputs), inputs.grad_output
    plan = nk.make_plan(inputs.index, case.d_in) if planned else None
    rest = (inputs.index, inputs.delta, plan, [True, True])
    grad_x, grad_delta = _compiled.bypass_backward(grad, inputs.x, *rest)
    terms = case.d_out * case.k
    assert rms_error(grad_x, truth.bypass_grad_x) <= tolerance(dtype, terms)
    assert rms_error(grad_delta, truth.grad_delta) <= tolerance(dtype, case.tokens, torch.float32)
    grad_x, again = _compiled.linear_backward(grad, inputs.x, inputs.weight, *rest)
    assert rms_error(grad_x, truth.linear_grad_x) <= 2 * tolerance(dtype, terms + case.d_out)
    assert again.equal(grad_delta)


#: All of x leaves shared memory room for one group of tokens, its chosen columns for two.
WIDE = Case(tokens=40, d_in=8000, d_out=12, k=2, index="ragged")


@pytest.mark.parametrize("case", [SMALL[0], WIDE], ids=lambda case: case.name)
@every_dtype
def test_columns_of_x_alone_have_the_gradient_of_all_of_it_to_the_bit(case, dtype):
    inputs = make_inputs(case, dtype)
    columns = chosen_columns([inputs.index], case.d_in)
    x, index = inputs.x[:, columns], renumber(inputs.index, columns)
    whole = C.sddmm(inputs.grad_output, inputs.x, inputs.index)
    grad_delta = _compiled.sddmm(inputs.grad_output, x, index, inputs.delta, case.d_in)
    assert grad_delta.equal(whole)
    with pytest.raises(RuntimeError, match="d_in: 3, expected at least the"):
        C.sddmm(inputs.grad_output, x, index, 3)


#: Sizes along a row are multiples of 8; 384 threads a CTA.
ALIGNED = [
    Case(tokens=17, d_in=64, d_out=48, k=8, bias=True),
    Case(tokens=130, d_in=72, d_out=264, k=2, bias=True, index="one_column"),
]


@pytest.mark.parametrize("case", ALIGNED, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_kernel_for_product_and_bypass_rounds_once(case, dtype):
    inputs = make_inputs(case, dtype)
    truth, grad = exact(inputs), inputs.grad_output
    y = _compiled.linear_in_one(inputs.x, inputs.weight, inputs.index, inputs.delta, inputs.bias)
    assert rms_error(y, truth.linear) <= tolerance(dtype, case.d_in + case.k + 1)
    rest = (inputs.x, inputs.weight, inputs.index, inputs.delta, None, [True, True])
    grad_x, grad_delta = _compiled.linear_backward_in_one(grad, *rest)
    assert rms_error(grad_x, truth.linear_grad_x) <= tolerance(dtype, case.d_out * (1 + case.k))
    assert grad_delta.equal(C.sddmm(grad, inputs.x, inputs.index))


@pytest.mark.parametrize("case", ALIGNED, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_pass_gives_both_gradients(case, dtype):
    inputs = make_inputs(case, dtype)
    truth, grad = exact(inputs), inputs.grad_output
    rest = (inputs.x, inputs.weight, inputs.index, inputs.delta, None)
    grad_x, grad_delta = _compiled.linear_backward_in_one_pass(grad, *rest)
    assert rms_error(grad_x, truth.linear_grad_x) <= tolerance(dtype, case.d_out * (1 + case.k))
    assert rms_error(grad_delta, truth.grad_delta) <= tolerance(dtype, case.tokens, torch.float32)
    assert grad_delta.dtype == inputs.delta.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_patched_tiles_are_a_patched_weight(dtype):
    """The rounding of ``resident``: that of the weight, and then once that of the result."""
    case = ALIGNED[0]
    inputs = make_inputs(case, dtype)
    weight, grad = inputs.weight.clone(), inputs.grad_output
    _compiled.merge(weight, inputs.index, inputs.delta)
    rest = (inputs.index, inputs.delta)
    y = _compiled.linear_patched(inputs.x, inputs.weight, *rest, inputs.bias)
    exact_y = inputs.x.double() @ weight.double().t() + inputs.bias.double()
    assert rms_error(y, exact_y) <= tolerance(dtype, case.d_in + 1)
    both = _compiled.linear_backward_patched(
        grad, inputs.x, inputs.weight, *rest, None, [True, True]
    )
    assert rms_error(both[0], grad.double() @ weight.double()) <= tolerance(dtype, case.d_out)
    assert both[1].equal(C.sddmm(grad, inputs.x, inputs.index))


def test_one_kernel_of_nothing_is_nothing():
    inputs = make_inputs(Case(tokens=0, d_in=64, d_out=48, k=8, bias=True), torch.bfloat16)
    rest = (inputs.weight, inputs.index, inputs.delta)
    assert _compiled.linear_in_one(inputs.x, *rest, inputs.bias).shape == (0, 48)
    grad = inputs.grad_output
    both = _compiled.linear_backward_in_one(grad, inputs.x, *rest, None, [True, True])
    assert both[0].shape == (0, 64)
    assert not both[1].any()
    both = _compiled.linear_backward_in_one_pass(grad, inputs.x, *rest, None)
    assert both[0].shape == (0, 64)
    assert both[1].shape == inputs.delta.shape
    assert not both[1].any()


def test_gradients_that_nobody_wants_are_not_computed():
    inputs = make_inputs(SMALL[0], torch.float32)
    args = (inputs.grad_output, inputs.x, inputs.index, inputs.delta, None)
    assert _compiled.bypass_backward(*args, [False, False]) == (None, None)
    assert _compiled.bypass_backward(*args, [True, False])[1] is None
    assert _compiled.bypass_backward(*args, [False, True])[0] is None


@every_dtype
def test_merging_and_restoring(dtype):
    inputs = make_inputs(Case(tokens=1, d_in=37, d_out=50, k=3, index="ragged"), dtype)
    weight = inputs.weight.clone()
    expected = weight.clone()
    original = _compiled.merge(weight, inputs.index, inputs.delta)
    row, slot = (inputs.index >= 0).nonzero(as_tuple=True)
    column = inputs.index[row, slot].long()
    expected[row, column] = (expected[row, column].float() + inputs.delta[row, slot]).to(dtype)
    assert weight.equal(expected)
    assert original[row, slot].equal(inputs.weight[row, column])
    assert not original[inputs.index < 0].any()
    _compiled.restore(weight, inputs.index, original)
    assert weight.equal(inputs.weight)


@every_dtype
def test_patching_assigns(dtype):
    inputs = make_inputs(Case(tokens=1, d_in=37, d_out=50, k=3), dtype)
    merged = inputs.weight.clone()
    _compiled.merge(merged, inputs.index, inputs.delta)
    weight = inputs.weight.clone()
    original = C.gather(weight, inputs.index)
    assert weight.equal(inputs.weight)
    for _ in range(2):
        C.patch(weight, inputs.index, inputs.delta, original)
        assert weight.equal(merged)
    C.restore(weight, inputs.index, original)
    assert weight.equal(inputs.weight)


@pytest.mark.parametrize("column", [24, 2**31 - 1, -2, -(2**31)])
def test_a_column_out_of_range_is_a_slot_without_a_connection(column):
    """The values of an index on a GPU cannot be checked without waiting for it."""
    inputs = make_inputs(Case(tokens=5, d_in=24, d_out=40, k=2), torch.float32)
    inputs.index[3, 1] = -1
    without = _compiled.bypass_add(inputs.x, inputs.grad_output, inputs.index, inputs.delta)
    inputs.index[3, 1] = column
    y = _compiled.bypass_add(inputs.x, inputs.grad_output, inputs.index, inputs.delta)
    assert y.equal(without)
    assert C.sddmm(inputs.grad_output, inputs.x, inputs.index)[3, 1] == 0
    weight = inputs.weight.clone()
    original = C.merge(weight, inputs.index, inputs.delta)
    C.restore(weight, inputs.index, original)
    assert weight.equal(inputs.weight)


@pytest.mark.parametrize("value", [-(2**31), -1, 0, 7, 79, 80, 2**31 - 1])
def test_whatever_a_plan_holds_nothing_outside_is_reached(value):
    grad, delta, out = torch.randn(9, 40), torch.randn(40, 2), torch.zeros(9, 24)
    guard = out.clone()
    plan = torch.full((24 + 1 + 64 + 1 + 80,), value, dtype=torch.int32)
    C.bypass_bwd_input(grad, plan, delta, out)
    assert guard.shape == out.shape
    sixteen = torch.randn(49, 40, dtype=torch.bfloat16)
    x, weight = torch.zeros(9, 24, dtype=torch.bfloat16), sixteen[9:, :24].contiguous()
    C.linear_bwd_input(sixteen[:9], weight, plan, delta)
    index = torch.full((40, 2), value, dtype=torch.int32)
    assert not C.linear_bwd(sixteen[:9], x, weight, index, plan, delta)[1].any()


def arguments() -> dict[str, Tensor]:
    return {
        "x": torch.randn(5, 6),
        "index": torch.tensor([[0, 1], [2, 3], [4, 5], [1, -1]], dtype=torch.int32),
        "delta": torch.randn(4, 2),
        "bias": torch.randn(4),
        "base": torch.randn(5, 4),
        "out": torch.full((5, 4), 7.0),
        "grad": torch.randn(5, 4),
        "plan": torch.zeros(6 + 1 + 64 + 1 + 7, dtype=torch.int32),
        "grad_x": torch.full((5, 6), 7.0),
        "weight": torch.full((4, 6), 7.0),
        "original": torch.full((4, 2), 7.0),
        **sixteen_bits(),
    }


def sixteen_bits() -> dict[str, Tensor]:
    """Arguments of the kernels with a product in them; the names say so where others have them."""
    dtype = torch.bfloat16
    return {
        "x16": torch.randn(5, 8, dtype=dtype),
        "weight16": torch.randn(4, 8, dtype=dtype),
        "bias16": torch.randn(4, dtype=dtype),
        "grad16": torch.randn(5, 8, dtype=dtype),
        "weight_back16": torch.randn(8, 8, dtype=dtype),
        "plan16": torch.zeros(8 + 1 + 64 + 1 + 7, dtype=torch.int32),
        "delta_back": torch.randn(8, 2),
        "index_back": torch.tensor([[0, 1], [2, 7], [4, 5], [1, -1]] * 2, dtype=torch.int32),
    }


CALLS: dict[str, Callable[..., object]] = {
    "bypass_fwd": lambda a: C.bypass_fwd(
        *(a[n] for n in ("x", "index", "delta", "bias", "base", "out"))
    ),
    "bypass_bwd_input": lambda a: C.bypass_bwd_input(
        *(a[n] for n in ("grad", "plan", "delta", "grad_x"))
    ),
    "sddmm": lambda a: C.sddmm(a["grad"], a["x"], a["index"]),
    "linear_fwd": lambda a: C.linear_fwd(
        *(a[n] for n in ("x16", "weight16", "index", "delta", "bias16"))
    ),
    "linear_bwd_input": lambda a: C.linear_bwd_input(
        *(a[n] for n in ("grad16", "weight_back16", "plan16", "delta_back"))
    ),
    "linear_bwd": lambda a: C.linear_bwd(
        *(a[n] for n in ("grad16", "x16", "weight_back16", "index_back", "plan16", "delta_back"))
    ),
    "linear_patched_fwd": lambda a: C.linear_patched_fwd(
        *(a[n] for n in ("x16", "weight16", "index", "delta", "bias16"))
    ),
    "linear_patched_bwd_input": lambda a: C.linear_patched_bwd_input(
        *(a[n] for n in ("grad16", "weight_back16", "index_back", "delta_back"))
    ),
    "merge": lambda a: C.merge(a["weight"], a["index"], a["delta"]),
    "gather": lambda a: C.gather(a["weight"], a["index"]),
    "patch": lambda a: C.patch(*(a[n] for n in ("weight", "index", "delta", "original"))),
    "restore": lambda a: C.restore(*(a[n] for n in ("weight", "index", "original"))),
}


def odd(tensor: Tensor) -> Tensor:
    """The same values in rows that are one element further apart."""
    return torch.cat([tensor, tensor[:, :1]], 1)[:, : tensor.shape[1]]


#: (op, argument, what it is instead, what the error says)
WRONG = [
    ("bypass_fwd", "x", lambda t: t[0], "x: shape [6], expected a matrix"),
    ("bypass_fwd", "x", lambda t: t.double(), "x: dtype float64, expected float32"),
    ("bypass_fwd", "x", lambda t: t.int(), "x: dtype is not float32"),
    ("bypass_fwd", "x", lambda t: t.t().contiguous().t(), "x: stride 5 along a row"),
    ("bypass_fwd", "index", lambda t: t.long(), "index: dtype is not the expected int32"),
    ("bypass_fwd", "index", lambda t: t[:, :1], "index: not contiguous"),
    ("bypass_fwd", "delta", lambda t: t[:3], "delta: shape [3, 2], expected [4, 2]"),
    ("bypass_fwd", "delta", lambda t: t.half(), "delta: dtype is not the expected float32"),
    ("bypass_fwd", "delta", lambda t: t.t().contiguous().t(), "delta: stride 4 along a row"),
    ("bypass_fwd", "bias", lambda t: t[:3], "bias: shape [3], expected [4]"),
    ("bypass_fwd", "bias", lambda t: t.half(), "bias: dtype differs"),
    ("bypass_fwd", "bias", lambda t: t.repeat(2)[::2], "bias: not contiguous"),
    ("bypass_fwd", "base", lambda t: t[:4], "base: shape [4, 4], expected [5, 4]"),
    ("bypass_fwd", "base", lambda t: t.half(), "base: dtype differs"),
    ("bypass_fwd", "out", lambda t: t[:, :3], "out: shape [5, 3], expected [5, 4]"),
    ("bypass_fwd", "out", lambda t: t.half(), "out: dtype differs"),
    ("bypass_bwd_input", "grad", lambda t: t[:, :3], "grad: shape [5, 3], expected [-1, 4]"),
    ("bypass_bwd_input", "grad", lambda t: t.double(), "grad: dtype float64"),
    ("bypass_bwd_input", "plan", lambda t: t[:71], "plan: shape [71], expected at least [72]"),
    ("bypass_bwd_input", "plan", lambda t: t.long(), "plan: dtype is not the expected int32"),
    ("bypass_bwd_input", "plan", lambda t: t.repeat(2)[::2], "plan: not contiguous"),
    ("bypass_bwd_input", "plan", lambda t: t.repeat(2), "plan: 86 connections, expected at most"),
    ("bypass_bwd_input", "grad_x", lambda t: t[:4], "out: shape [4, 6], expected [5, -1]"),
    ("bypass_bwd_input", "grad_x", lambda t: t.half(), "out: dtype differs"),
    ("sddmm", "grad", lambda t: t[:4], "grad: shape [4, 4], expected [5, 4]"),
    ("sddmm", "x", lambda t: t.half(), "x: dtype differs"),
    ("sddmm", "index", lambda t: t.short(), "index: dtype is not the expected int32"),
    ("linear_fwd", "x16", lambda t: t.float(), "x: dtype float32, expected bfloat16 or float16"),
    ("linear_fwd", "x16", lambda t: t[:, :4], "weight: shape [4, 8], expected [-1, 4]"),
    ("linear_fwd", "x16", lambda t: t.repeat(1, 2)[:, 4:12], "linear_fwd: x: not 16-byte aligned"),
    ("linear_fwd", "x16", lambda t: odd(t), "linear_fwd: x: stride 9, expected a multiple of 8"),
    (
        "linear_fwd",
        "x16",
        lambda t: t[:1].expand(5, -1),
        "linear_fwd: x: stride 0, expected no less",
    ),
    ("linear_fwd", "weight16", lambda t: odd(t), "linear_fwd: weight: stride 9, expected"),
    ("linear_fwd", "weight16", lambda t: t.half(), "weight: dtype differs from that of x"),
    ("linear_fwd", "weight16", lambda t: t[:3], "index: shape [4, 2], expected [3, -1]"),
    ("linear_fwd", "bias16", lambda t: t[:3], "bias: shape [3], expected [4]"),
    ("linear_fwd", "bias16", lambda t: t.float(), "bias: dtype differs"),
    ("linear_fwd", "delta", lambda t: t[:3], "delta: shape [3, 2], expected [4, 2]"),
    ("linear_bwd_input", "grad16", lambda t: t[:, :4], "weight: shape [8, 8], expected [4, -1]"),
    ("linear_bwd_input", "grad16", lambda t: odd(t), "linear_bwd_input: grad: stride 9"),
    ("linear_bwd_input", "weight_back16", lambda t: t[:, :4], "weight: 4 columns, expected a mul"),
    ("linear_bwd_input", "weight_back16", lambda t: t.half(), "weight: dtype differs"),
    ("linear_bwd_input", "plan16", lambda t: t[:73], "plan: shape [73], expected at least [74]"),
    ("linear_bwd_input", "plan16", lambda t: t.repeat(2), "plan: 88 connections, expected at most"),
    ("linear_bwd", "x16", lambda t: t[:4], "x: shape [4, 8], expected [5, 8]"),
    ("linear_bwd", "x16", lambda t: t.half(), "x: dtype differs from that of grad"),
    ("linear_bwd", "x16", lambda t: odd(t), "linear_bwd: x: stride 9, expected a multiple of 8"),
    ("linear_bwd", "grad16", lambda t: t.float(), "grad: dtype float32, expected bfloat16"),
    ("linear_bwd", "index_back", lambda t: t[:7], "index: shape [7, 2], expected [8, -1]"),
    ("linear_bwd", "delta_back", lambda t: t[:, :1], "delta: shape [8, 1], expected [8, 2]"),
    ("linear_bwd", "plan16", lambda t: t.repeat(2), "plan: 88 connections, expected at most"),
    ("linear_patched_fwd", "x16", lambda t: t.float(), "x: dtype float32, expected bfloat16"),
    ("linear_patched_fwd", "index", lambda t: t[:3], "index: shape [3, 2], expected [4, -1]"),
    ("linear_patched_fwd", "delta", lambda t: t[:3], "delta: shape [3, 2], expected [4, 2]"),
    ("linear_patched_fwd", "bias16", lambda t: t[:3], "bias: shape [3], expected [4]"),
    ("linear_patched_bwd_input", "grad16", lambda t: t[:, :4], "weight: shape [8, 8], expected [4"),
    (
        "linear_patched_bwd_input",
        "grad16",
        lambda t: odd(t),
        "_bwd_input: grad: stride 9, expected",
    ),
    ("merge", "weight", lambda t: t.double(), "weight: dtype float64"),
    ("merge", "weight", lambda t: t.t().contiguous().t(), "weight: stride 4 along a row"),
    ("merge", "delta", lambda t: t.double(), "delta: dtype is not the expected float32"),
    ("gather", "index", lambda t: t[0], "index: shape [2], expected a matrix"),
    ("gather", "index", lambda t: t[:3], "index: shape [3, 2], expected [4, -1]"),
    ("patch", "original", lambda t: t.half(), "original: dtype differs"),
    ("patch", "original", lambda t: t[:, :1], "original: shape [4, 1], expected [4, 2]"),
    ("restore", "original", lambda t: t.repeat(1, 2)[:, ::2], "original: stride 2"),
]


@pytest.mark.parametrize(
    ("op", "name", "spoil", "message"), WRONG, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_wrong_argument_is_named_and_nothing_is_written(op, name, spoil, message):
    given = arguments()
    given[name] = spoil(given[name])
    with pytest.raises(RuntimeError) as raised:
        CALLS[op](given)
    assert message in str(raised.value)
    for written in ("out", "grad_x", "weight", "original"):
        assert (given[written] == 7).all()


@pytest.mark.parametrize("op", ["linear_fwd", "linear_bwd_input", "linear_bwd"])
def test_a_product_over_nothing_is_refused(op):
    """Its chunks are cut by what a token takes, which is nothing here."""
    given = arguments()
    if op == "linear_fwd":
        given |= {"x16": given["x16"][:, :0], "weight16": given["weight16"][:, :0]}
        given["index"] = torch.full_like(given["index"], -1)
    else:
        given |= {"grad16": given["grad16"][:, :0], "weight_back16": given["weight_back16"][:0]}
        given["delta_back"], given["index_back"] = given["delta_back"][:0], given["index_back"][:0]
        given["plan16"] = nk.make_plan(
            torch.empty(0, given["delta_back"].shape[1], dtype=torch.int32),
            given["weight_back16"].shape[1],
        )
    with pytest.raises(RuntimeError, match=f"{op}: .*: (0 columns|no rows)"):
        CALLS[op](given)


@pytest.mark.parametrize("op", CALLS)
def test_right_arguments_are_served(op):
    CALLS[op](arguments())


@pytest.mark.parametrize("op", CALLS)
def test_a_freed_storage_is_refused(op):
    given = arguments()
    name = {
        "bypass_fwd": "x",
        "bypass_bwd_input": "grad",
        "sddmm": "grad",
        "linear_fwd": "weight16",
        "linear_bwd_input": "weight_back16",
        "linear_bwd": "weight_back16",
        "linear_patched_fwd": "weight16",
        "linear_patched_bwd_input": "weight_back16",
    }.get(op, "weight")
    given[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name.partition('_')[0].removesuffix('16')}: its"):
        CALLS[op](given)
