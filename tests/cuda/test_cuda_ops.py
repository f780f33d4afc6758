"""The CUDA backend without a GPU: its kernels, torch bindings and Python code on the CPU."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from host_ops import C
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels import _extension
from neuroada_kernels.backends import _compiled, _dense, cuda
from neuroada_kernels.plan import (
    SPLITS,
    _in_order,
    chosen_columns,
    plan_parts,
    plan_size,
    renumber,
)
from neuroada_kernels.testing import CASES, Case, Inputs, make_inputs, rms_error, tolerance

#: A thread of a CTA is a fiber on the CPU: half a thousand tokens would take minutes.
SMALL = [case for case in CASES if case.tokens <= 65]
every_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)

every_16_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiled, "C", C)
    for variable in ("NEUROADA_CUDA_BULK", "NEUROADA_CUDA_TWO_TILES"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(params=["copied", "two_tiles", "loaded"])
def _staging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, blocks of tokens are bulk-copied into one tile or two, as on sm_90a, or loaded,
    as on other GPUs."""
    if request.param == "loaded":
        monkeypatch.setenv("NEUROADA_CUDA_BULK", "0")
    if request.param == "two_tiles":
        monkeypatch.setenv("NEUROADA_CUDA_TWO_TILES", "1")


every_staging = pytest.mark.usefixtures("_staging")


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


@every_staging
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


@every_staging
@every_case
@every_dtype
def test_all_is_added_to_the_product_in_float32_and_rounded_once(case, dtype, monkeypatch):
    monkeypatch.setattr(_dense, "_WIDE_TOKENS", 8)
    monkeypatch.setattr(_dense, "_WIDE_BYTES", 1)  # the smallest chunks
    i = make_inputs(case, dtype)
    truth = exact(i)
    y = cuda._linear_gemm_first(i.x, i.weight, i.index, i.delta, i.bias)
    grad_x, grad_delta = cuda._linear_backward_gemm_first(
        i.grad_output, i.x, i.weight, i.index, i.delta, None, [True, True]
    )
    assert rms_error(y, truth.linear) <= tolerance(dtype, case.d_in + case.k)
    assert rms_error(grad_x, truth.linear_grad_x) <= tolerance(dtype, case.d_out + case.k)
    assert rms_error(grad_delta, truth.grad_delta) <= tolerance(dtype, case.tokens, torch.float32)


@every_staging
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


@every_staging
@every_case
@every_dtype
def test_an_ordered_plan_has_the_same_connections(case, dtype):
    inputs = make_inputs(case, dtype)
    plan, d_in = nk.make_plan(inputs.index, case.d_in), case.d_in
    ordered = plan.clone()
    C.order_plan(plan, d_in, *inputs.index.shape, ordered)
    before, after = plan_parts(plan, d_in), plan_parts(ordered, d_in)
    assert after.column_start.equal(before.column_start)
    assert after.split.equal(before.split)
    columns = ordered[d_in + 1 + SPLITS + 1 + 4 : plan_size(d_in, 0)]
    assert columns[columns < d_in].sort().values.equal(torch.arange(d_in, dtype=torch.int32))
    for begin, end in pairwise(before.column_start.tolist()):
        assert after.entry[begin:end].sort().values.equal(before.entry[begin:end])
    dx = []
    for by in (plan, ordered):
        out = inputs.x.new_full((case.tokens, d_in), torch.nan)
        C.bypass_bwd_input(inputs.grad_output, by, inputs.delta.float(), None, out)
        dx.append(out)
    assert rms_error(dx[1], dx[0].double()) <= tolerance(dtype, case.d_out * case.k)


def test_make_plan_puts_a_plan_in_order_where_the_kernels_run(monkeypatch):
    inputs = make_inputs(BULK[0], torch.bfloat16)
    plan, d_in = nk.make_plan(inputs.index, BULK[0].d_in), BULK[0].d_in
    before, expected = plan.clone(), plan.clone()
    C.order_plan(plan, d_in, *inputs.index.shape, expected)
    monkeypatch.setattr(torch.ops, "neuroada_C", C)
    monkeypatch.setattr(_extension, "serves_by_default", lambda gpu: False)
    assert _in_order(plan, inputs.index, d_in) is plan
    monkeypatch.setattr(_extension, "serves_by_default", lambda gpu: True)
    ordered = _in_order(plan, inputs.index, d_in)
    assert ordered.equal(expected)
    assert not ordered.equal(plan)
    assert plan.equal(before)
    monkeypatch.setenv("NEUROADA_CUDA_ORDER", "0")
    assert _in_order(plan, inputs.index, d_in) is plan
    monkeypatch.setenv("NEUROADA_CUDA_ORDER", "no")
    with pytest.raises(ValueError, match="NEUROADA_CUDA_ORDER: 'no', expected 0 or 1"):
        _in_order(plan, inputs.index, d_in)


def test_an_order_is_not_written_into_the_plan_that_it_is_of():
    plan = torch.zeros(plan_size(6, 7), dtype=torch.int32)
    with pytest.raises(RuntimeError, match="out: overlaps with plan, expected a copy"):
        C.order_plan(plan, 6, 4, 2, plan)
    with pytest.raises(RuntimeError, match="d_in: -1, expected 0 to"):
        C.order_plan(plan, -1, 4, 2, plan.clone())
    with pytest.raises(RuntimeError, match="d_out: 65536 of k 65536, expected fewer"):
        C.order_plan(plan, 6, 1 << 16, 1 << 16, plan.clone())


#: Shared memory has room for one block of the whole x, or for two of its chosen columns.
WIDE = Case(tokens=40, d_in=8000, d_out=12, k=2, index="ragged")


@every_staging
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


BULK = [
    Case(tokens=17, d_in=64, d_out=48, k=8, bias=True),
    Case(tokens=65, d_in=72, d_out=264, k=3, index="ragged"),
    Case(tokens=40, d_in=128, d_out=32, k=20),
]


@pytest.mark.parametrize("case", BULK, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_blocks_that_the_hardware_copies_give_the_same_numbers(case, dtype, monkeypatch):
    i = make_inputs(case, dtype)

    def run() -> tuple[torch.Tensor, ...]:
        y = cuda._linear_gemm_first(i.x, i.weight, i.index, i.delta, i.bias)
        rest = (i.grad_output, i.x, i.index, i.delta, None, [True, True])
        return y, *_compiled.bypass_backward(*rest)

    y, grad_x, grad_delta = run()
    monkeypatch.setenv("NEUROADA_CUDA_BULK", "1")
    for asked, by_default in zip(run(), (y, grad_x, grad_delta), strict=True):
        assert asked.equal(by_default)
    monkeypatch.setenv("NEUROADA_CUDA_TWO_TILES", "1")
    for asked, by_default in zip(run(), (y, grad_x, grad_delta), strict=True):
        assert asked.equal(by_default)
    monkeypatch.setenv("NEUROADA_CUDA_BULK", "0")
    loaded = run()
    assert y.equal(loaded[0])
    # With 9 to 20 connections a lane holds all, and tokens are partitioned differently.
    assert grad_delta.equal(loaded[2]) or case.k == 20
    assert rms_error(grad_delta, exact(i).grad_delta) <= tolerance(
        dtype, case.tokens, torch.float32
    )
    # dx sums in another order; in float16, short sums may still be equal.
    assert not grad_x.equal(loaded[1]) or (dtype == torch.float16 and case.k < 20)
    assert rms_error(grad_x, exact(i).bypass_grad_x) <= tolerance(dtype, case.d_out * case.k)


@pytest.mark.parametrize("variable", ["NEUROADA_CUDA_BULK", "NEUROADA_CUDA_TWO_TILES"])
def test_what_is_said_of_bulk_copies_is_0_or_1(variable, monkeypatch):
    i = make_inputs(BULK[0], torch.bfloat16)
    for wrong in ("yes", "2", ""):
        monkeypatch.setenv(variable, wrong)
        with pytest.raises(RuntimeError, match=f"{variable}: '{wrong}', expected 0 or 1"):
            C.sddmm(i.grad_output, i.x, i.index)


#: Sizes along a row are multiples of 8; 384 threads per CTA.
ALIGNED = [
    Case(tokens=17, d_in=64, d_out=48, k=8, bias=True),
    Case(tokens=130, d_in=72, d_out=264, k=2, bias=True, index="one_column"),
]


@pytest.mark.parametrize("case", ALIGNED, ids=lambda case: case.name)
@every_16_bits
def test_patched_tiles_are_a_patched_weight(case, dtype):
    """The rounding of ``resident``: of the weight, and then once of the result."""
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


def test_a_patched_product_of_nothing_is_nothing():
    inputs = make_inputs(Case(tokens=0, d_in=64, d_out=48, k=8, bias=True), torch.bfloat16)
    rest = (inputs.weight, inputs.index, inputs.delta)
    assert _compiled.linear_patched(inputs.x, *rest, inputs.bias).shape == (0, 48)
    grad = inputs.grad_output
    both = _compiled.linear_backward_patched(grad, inputs.x, *rest, None, [True, True])
    assert both[0].shape == (0, 64)
    assert both[1].shape == inputs.delta.shape
    assert not both[1].any()


ONTO = [
    Case(tokens=1, d_in=64, d_out=48, k=8, bias=True),
    Case(tokens=17, d_in=72, d_out=48, k=2, bias=True, index="ragged"),
    Case(tokens=17, d_in=40, d_out=136, k=3),
]


@pytest.mark.parametrize("case", ONTO, ids=lambda case: case.name)
@every_16_bits
def test_a_product_onto_the_bypass_is_the_formula(case, dtype):
    """The bypass is rounded, then the whole sum once more."""
    inputs = make_inputs(case, dtype)
    truth, rest = exact(inputs), (inputs.index, inputs.delta)
    y = _compiled.linear_bypass_first(inputs.x, inputs.weight, *rest, inputs.bias)
    assert rms_error(y, truth.linear) <= 2 * tolerance(dtype, case.d_in + case.k)
    both = _compiled.linear_backward_bypass_first(
        inputs.grad_output, inputs.x, inputs.weight, *rest, None, [True, True]
    )
    assert rms_error(both[0], truth.linear_grad_x) <= 2 * tolerance(dtype, case.d_out + case.k)
    assert both[1].equal(C.sddmm(inputs.grad_output, inputs.x, inputs.index))


def share(moved: Tensor, expected: Tensor) -> float:
    """The fraction of the expected change that was made, by least squares."""
    return ((moved * expected).sum() / expected.square().sum()).item()


@every_16_bits
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "dx"])
def test_what_a_product_goes_onto_acts_however_small_it_is(forward, dtype):
    """One rounding: of the sum, not of the product first and then of the sum again."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*size, generator=generator).to(dtype) for size in ((4096, 64), (64, 64), (64,))
    )
    onto = (1e-2 * torch.randn(4096, 64, generator=generator)).to(dtype)
    product = x.double() @ (weight.double().t() if forward else weight.double())
    product += bias.double() if forward else 0
    still, moved = torch.zeros_like(onto), onto.clone()
    for y in (still, moved):
        if forward:
            C.product_onto_fwd(x, weight, bias, y)
        else:
            C.product_onto_bwd_input(x, weight, y)
    expected = onto.double()
    assert abs(share(moved.double() - still.double(), expected) - 1) < 0.03
    # A float32 sum close to the midpoint of two values may be rounded to the other one.
    once, twice = (product + expected).to(dtype), product.to(dtype) + onto
    assert (moved != once).double().mean() < 2e-3
    assert (twice != once).double().mean() > 2e-2, "two roundings would be seen"


def test_a_product_of_nothing_goes_onto_nothing():
    inputs = make_inputs(Case(tokens=0, d_in=64, d_out=48, k=8, bias=True), torch.bfloat16)
    rest = (inputs.weight, inputs.index, inputs.delta)
    assert _compiled.linear_bypass_first(inputs.x, *rest, inputs.bias).shape == (0, 48)
    grad = inputs.grad_output
    both = _compiled.linear_backward_bypass_first(grad, inputs.x, *rest, None, [True, True])
    assert both[0].shape == (0, 64)
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
    """The values of an index on a GPU cannot be checked without synchronising."""
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


@every_dtype
@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize("count", [0, 1, 130, 131])
def test_columns_are_copied_from_rows_of_any_stride(count, tokens, dtype):
    x = torch.randn(tokens, 270).to(dtype)[:, 3:]
    columns = torch.arange(2 * count, dtype=torch.int32)[::2].contiguous()
    assert C.columns(x, columns).equal(x[:, columns])


def test_a_column_that_x_lacks_is_zero():
    x = torch.randn(5, 24)
    columns = torch.tensor([3, 24, -1, 23, 2**31 - 1, -(2**31)], dtype=torch.int32)
    copied = C.columns(x, columns)
    assert copied[:, [0, 3]].equal(x[:, [3, 23]])
    assert not copied[:, [1, 2, 4, 5]].any()


@pytest.mark.parametrize("value", [-(2**31), -1, 0, 7, 79, 80, 2**31 - 1])
def test_whatever_a_plan_holds_nothing_outside_is_reached(value):
    grad, delta, out = torch.randn(9, 40), torch.randn(40, 2), torch.zeros(9, 24)
    guard = out.clone()
    plan = torch.full((plan_size(24, 80),), value, dtype=torch.int32)
    C.bypass_bwd_input(grad, plan, delta, None, out)
    assert guard.shape == out.shape
