"""The formulas themselves, against sums written out and against the dense matrix they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuroada_kernels import reference
from neuroada_kernels.testing import CASES, Inputs, make_inputs, rms_error, tolerance

RAGGED = CASES[-1]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def dense(inputs: Inputs) -> Tensor:
    """The bypass as a matrix ``[d_out, d_in]``."""
    matrix = torch.zeros_like(inputs.weight, dtype=torch.float64)
    for j, row in enumerate(inputs.index.tolist()):
        for s, column in enumerate(row):
            if column >= 0:
                matrix[j, column] += inputs.delta[j, s]
    return matrix


def test_the_sums_written_out():
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    index = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)
    delta = torch.tensor([[10.0, 100.0], [1000.0, 7.0]])
    bias = torch.tensor([0.5, -0.5])
    bypass = torch.tensor([[130.0, 2000.0], [460.0, 5000.0]])
    assert reference.bypass(x, index, delta).equal(bypass)
    y = reference.neuroada_linear(x, weight, index, delta, bias)
    assert y.equal(bypass + torch.tensor([[1.5, 4.5], [4.5, 10.5]]))
    assert reference.neuroada_bypass(x[:, :2], x, index, delta).equal(bypass + x[:, :2])
    merged = torch.tensor([[101.0, 0.0, 10.0], [0.0, 1001.0, 1.0]])
    assert reference.merged_weight(weight, index, delta).equal(merged)


@every_case
def test_the_bypass_is_a_sparse_matrix_beside_the_weight(case):
    inputs = make_inputs(case, torch.float64)
    y = reference.neuroada_linear(inputs.x, inputs.weight, inputs.index, inputs.delta, inputs.bias)
    expected = F.linear(inputs.x, inputs.weight + dense(inputs), inputs.bias)
    torch.testing.assert_close(y, expected)


@every_case
def test_merging_adds_the_matrix_and_rounds_once(case, dtype):
    inputs = make_inputs(case, dtype)
    merged = reference.merged_weight(inputs.weight, inputs.index, inputs.delta)
    assert merged.dtype == dtype
    if dtype == torch.float64:
        assert merged.equal(inputs.weight + dense(inputs))
    else:
        sum_in_float32 = inputs.weight.float() + dense(inputs).float()
        assert merged.equal(sum_in_float32.to(dtype))


def test_sixteen_bits_are_summed_in_float32_and_rounded_once():
    dtype = torch.bfloat16
    inputs = make_inputs(RAGGED, dtype)
    bypass = reference.bypass(inputs.x, inputs.index, inputs.delta)
    assert bypass.dtype == torch.float32
    exact = reference.bypass(inputs.x.double(), inputs.index, inputs.delta)
    assert rms_error(bypass, exact) <= tolerance(torch.float32, RAGGED.k)
    y = inputs.grad_output
    rounded = reference.neuroada_bypass(y, inputs.x, inputs.index, inputs.delta)
    assert rounded.equal((y.float() + bypass).to(dtype))


def test_derivatives_of_any_order():
    generator = torch.Generator().manual_seed(0)
    x, y, delta, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((3, 5), (3, 4), (4, 2), (4,))
    )
    weight = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    index = torch.tensor([[0, 3], [2, -1], [-1, -1], [4, 0]], dtype=torch.int32)

    def linear(x: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
        return reference.neuroada_linear(x, weight, index, delta, bias)

    def bypass(y: Tensor, x: Tensor, delta: Tensor) -> Tensor:
        return reference.neuroada_bypass(y, x, index, delta)

    for function, tensors in ((linear, (x, delta, bias)), (bypass, (y, x, delta))):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


def test_an_infinite_column_does_not_leak_through_empty_slots():
    x = torch.tensor([[float("inf"), 1.0]], requires_grad=True)
    index = torch.tensor([[1, -1], [-1, -1], [0, -1]], dtype=torch.int32)
    delta = torch.ones(3, 2, requires_grad=True)
    out = reference.bypass(x, index, delta)
    assert out.tolist() == [[1.0, 0.0, float("inf")]]
    out[:, :2].sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0]]
    assert delta.grad[:2].tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_autocast_does_not_round_the_product():
    inputs = make_inputs(RAGGED, torch.bfloat16)
    arguments = (inputs.x, inputs.weight, inputs.index, inputs.delta)
    expected = reference.neuroada_linear(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert reference.neuroada_linear(*arguments).equal(expected)
