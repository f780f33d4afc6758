"""The public functions: values and gradients over the table of cases, and what they refuse."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from gradients import (
    bypass,
    differentiate,
    differentiate_in_float64,
    linear,
    linear_tensors,
    reference_bypass,
    reference_linear,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels.functional import neuroada_bypass, neuroada_linear
from neuroada_kernels.testing import CASES, Case, Inputs, make_inputs, rms_error, tolerance

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
CPU_BACKENDS = [n for n in ("cpu", "eager") if nk.available_backends()[n] is None]
SMALL = CASES[1]  # 17 tokens, 64 to 48, k 8, bias
RAGGED = CASES[-1]


def allowed_errors(inputs: Inputs) -> list[float]:
    """Of the linear's output, and of its gradients in x, delta and bias."""
    dtype, (d_out, d_in) = inputs.x.dtype, inputs.weight.shape
    tokens, k = inputs.x.numel() // d_in, inputs.index.shape[1]
    return [
        tolerance(dtype, d_in + k),
        tolerance(dtype, d_out + d_out * k),
        tolerance(dtype, tokens, inputs.delta.dtype),
        tolerance(dtype, tokens),
    ]


@every_case
@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no_plan"])
def test_linear_and_its_gradients_are_those_of_the_formula(case, dtype, planned, backend, device):
    inputs = make_inputs(case, dtype, device=device)
    plan = nk.make_plan(inputs.index, case.d_in) if planned else None
    tensors = linear_tensors(inputs)
    results = differentiate(linear(inputs, plan), tensors, inputs.grad_output)
    expected = differentiate_in_float64(reference_linear(inputs), tensors, inputs.grad_output)
    for result, truth, allowed in zip(results, expected, allowed_errors(inputs), strict=False):
        assert rms_error(result, truth) <= allowed
    assert results[0].dtype == dtype
    assert [gradient.dtype for gradient in results[1:]] == [tensor.dtype for tensor in tensors]
    assert all(result.is_contiguous() for result in results)


@every_case
def test_bypass_and_its_gradients_are_those_of_the_formula(case, dtype, backend, device):
    inputs = make_inputs(case, dtype, device=device)
    y = inputs.grad_output.flip(0)
    tensors = [y, inputs.x, inputs.delta]
    results = differentiate(bypass(inputs), tensors, inputs.grad_output)
    out, grad_y, grad_x, grad_delta = results
    truth = differentiate_in_float64(reference_bypass(inputs), tensors, inputs.grad_output)
    assert rms_error(out, truth[0]) <= tolerance(dtype, case.k + 1)
    assert grad_y.equal(inputs.grad_output)
    assert rms_error(grad_x, truth[2]) <= tolerance(dtype, case.d_out * case.k)
    assert rms_error(grad_delta, truth[3]) <= tolerance(dtype, case.tokens, grad_delta.dtype)
    assert out.dtype == dtype
    assert [gradient.dtype for gradient in results[1:]] == [tensor.dtype for tensor in tensors]
    assert all(result.is_contiguous() for result in results)


@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2)], ids=str)
def test_no_tokens_give_an_empty_output_and_zero_gradients(leading, dtype, backend, device):
    inputs = make_inputs(SMALL, dtype, device=device)
    x = inputs.x.new_empty(*leading, SMALL.d_in)
    grad_output = x.new_empty(*leading, SMALL.d_out)
    y, grad_x, grad_delta, grad_bias = differentiate(
        linear(inputs), [x, inputs.delta, inputs.bias], grad_output
    )
    assert y.shape == grad_output.shape
    assert grad_x.shape == x.shape
    assert grad_delta.equal(torch.zeros_like(inputs.delta))
    assert grad_bias.equal(torch.zeros_like(inputs.bias))


def test_slots_without_a_connection_get_no_gradient(dtype, backend, device):
    inputs = make_inputs(RAGGED, dtype, device=device)
    _, _, grad_delta = differentiate(linear(inputs), linear_tensors(inputs), inputs.grad_output)
    empty = inputs.index < 0
    assert empty.any()
    assert (grad_delta[empty] == 0).all()
    assert (grad_delta[~empty] != 0).all()


@pytest.mark.parametrize(
    "delta_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_delta_may_have_any_floating_dtype(delta_dtype, dtype, backend, device):
    inputs = make_inputs(SMALL, dtype, device=device)
    tensors = [inputs.x, inputs.delta.to(delta_dtype), inputs.bias]
    y, grad_x, grad_delta, _ = differentiate(linear(inputs), tensors, inputs.grad_output)
    truth = differentiate_in_float64(reference_linear(inputs), tensors, inputs.grad_output)
    assert grad_delta.dtype == delta_dtype
    assert rms_error(y, truth[0]) <= tolerance(dtype, SMALL.d_in + SMALL.k)
    assert rms_error(grad_x, truth[1]) <= tolerance(dtype, SMALL.d_out * (1 + SMALL.k))
    assert rms_error(grad_delta, truth[2]) <= tolerance(dtype, SMALL.tokens, delta_dtype)


@pytest.mark.parametrize("wanted", [("x",), ("delta",), ("bias",), ("x", "bias"), ()], ids=str)
def test_only_the_gradients_asked_for_are_made(wanted, backend, device):
    inputs = make_inputs(SMALL, torch.float32, device=device)
    tensors = {
        name: tensor.clone().requires_grad_(name in wanted)
        for name, tensor in (("x", inputs.x), ("delta", inputs.delta), ("bias", inputs.bias))
    }
    y = linear(inputs)(**tensors)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(inputs.grad_output)
    truth = differentiate_in_float64(
        reference_linear(inputs), linear_tensors(inputs), inputs.grad_output
    )
    for name, gradient in zip(tensors, truth[1:], strict=True):
        if name in wanted:
            assert rms_error(tensors[name].grad, gradient) < 1e-5
        else:
            assert tensors[name].grad is None


@st.composite
def linears(draw: st.DrawFn) -> tuple[Inputs, tuple[int, ...], str]:
    leading = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    d_in, d_out = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    case = Case(
        tokens=int(torch.Size(leading).numel()),
        d_in=d_in,
        d_out=d_out,
        k=draw(st.integers(1, min(d_in, 24))),
        bias=draw(st.booleans()),
        index=draw(
            st.sampled_from(
                ["magnitude", "random", "one_column", "half_the_neurons", "ragged"],
            )
        ),
    )
    dtype = draw(
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    )
    inputs = make_inputs(case, dtype, seed=draw(st.integers(0, 99)))
    layout = draw(st.sampled_from(["contiguous", "strided", "transposed", "expanded"]))
    return inputs, leading, layout


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor of the shape of ``values`` in another memory layout, with its values if it can."""
    if layout == "strided":
        return torch.stack([values, values], -1)[..., 0]
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and values.dim() > 1 and values.shape[0]:
        return values[:1].expand(values.shape)
    return values


ONE_OF_EACH = Inputs(
    x=torch.tensor([[0.6372]], dtype=torch.float16),
    weight=torch.tensor([[0.1028]], dtype=torch.float16),
    index=torch.tensor([[0]], dtype=torch.int32),
    delta=torch.tensor([[0.0965]]),
    bias=None,
    grad_output=torch.tensor([[0.3379]], dtype=torch.float16),
)


@settings(max_examples=100, deadline=None, derandomize="CI" in os.environ)
@given(linears())
@example((ONE_OF_EACH, (), "contiguous"))  # two roundings in one direction
def test_any_shape_and_layout_of_x_is_served(drawn):
    inputs, leading, layout = drawn
    x = laid_out(inputs.x.view(*leading, inputs.x.shape[1]), layout)
    grad_output = laid_out(inputs.grad_output.view(*leading, inputs.weight.shape[0]), layout)
    tensors = [x, *linear_tensors(inputs)[1:]]
    expected = differentiate_in_float64(reference_linear(inputs), tensors, grad_output)
    # Sums of few products may cancel, so errors are measured by the sums of absolute products.
    scales = differentiate_in_float64(
        reference_linear(replace(inputs, weight=inputs.weight.abs())),
        [tensor.abs() for tensor in tensors],
        grad_output.abs(),
    )
    # In 16 bits the bypass may be rounded before torch's product joins it, which y and x's
    # gradient show: up to half a unit of it, and in a result of one element no average helps.
    bypass_alone = replace(inputs, weight=torch.zeros_like(inputs.weight))
    sizes = differentiate_in_float64(
        reference_linear(bypass_alone), [tensor.abs() for tensor in tensors[:2]], grad_output.abs()
    )
    half = torch.finfo(x.dtype).eps / 2 if x.dtype.itemsize == 2 else 0.0
    extra = [half * float(sizes[0].norm()), half * float(sizes[1].norm()), 0.0, 0.0]
    for name in CPU_BACKENDS:
        with nk.use_backend(name):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            y = linear(inputs)(*leaves)
            results = (y.detach(), *torch.autograd.grad(y, leaves, grad_output))
        for result, truth, scale, allowed, more in zip(
            results, expected, scales, allowed_errors(inputs), extra, strict=False
        ):
            assert result.shape == truth.shape
            assert (result - truth).norm() <= allowed * scale.norm() + more


@pytest.mark.parametrize("leading", [(), (17,), (3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed", "expanded"])
def test_bypass_takes_any_shape_and_layout(leading, layout, backend, device):
    inputs = make_inputs(RAGGED, torch.float32, device=device)
    generator = torch.Generator().manual_seed(0)
    x = laid_out(torch.randn(*leading, RAGGED.d_in, generator=generator).to(device), layout)
    y = laid_out(torch.randn(*leading, RAGGED.d_out, generator=generator).to(device), layout)
    before = y.clone()
    out = neuroada_bypass(y, x, inputs.index, inputs.delta)
    expected = nk.reference.neuroada_bypass(y.double(), x.double(), inputs.index, inputs.delta)
    assert out.shape == y.shape
    assert rms_error(out, expected) <= tolerance(torch.float32, RAGGED.k + 1)
    assert y.equal(before)
    assert out.data_ptr() != y.data_ptr()


def some_arguments(device: str = "cpu", **changed: object) -> dict[str, object]:
    """Arguments that fit, x [5, 6] and weight [4, 6], but for the ones changed."""
    arguments = {
        "x": torch.randn(5, 6),
        "weight": torch.randn(4, 6),
        "index": torch.arange(3, dtype=torch.int32).expand(4, 3).contiguous(),
        "delta": torch.randn(4, 3),
        "bias": torch.randn(4),
    }
    return {name: tensor.to(device) for name, tensor in arguments.items()} | changed


def test_arguments_that_fit_are_taken(backend, device):
    assert neuroada_linear(**some_arguments(device)).shape == (5, 4)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.ones(5, 6, dtype=torch.int64), TypeError, r"x: dtype torch\.int64"),
        ("x", torch.ones(5, 6, dtype=torch.complex64), TypeError, r"x: dtype torch\.complex64"),
        ("x", torch.tensor(1.0), ValueError, "x: a scalar"),
        ("x", torch.ones(5, 7), ValueError, r"weight: shape \[4, 6\], .*\[4, 7\]"),
        ("x", torch.ones(5, 6, device="meta"), ValueError, r"index: on cpu, expected meta"),
        ("x", torch.ones(5, 6, dtype=torch.float64), TypeError, r"weight: dtype torch\.float32"),
        ("weight", torch.ones(4, 7), ValueError, r"weight: shape \[4, 7\], .*\[4, 6\]"),
        ("weight", torch.ones(5, 6), ValueError, r"weight: shape \[5, 6\], .*\[4, 6\]"),
        ("weight", torch.ones(24), ValueError, r"weight: shape \[24\]"),
        ("weight", torch.ones(4, 6).half(), TypeError, r"weight: dtype torch\.float16"),
        ("weight", torch.ones(4, 6, device="meta"), ValueError, "weight: on meta, expected cpu"),
        ("weight", torch.ones(4, 6).requires_grad_(), ValueError, "weight: requires grad"),
        ("index", torch.zeros(4, 3).long(), TypeError, r"index: dtype torch\.int64"),
        ("index", torch.zeros(4, 3), TypeError, r"index: dtype torch\.float32"),
        ("index", torch.zeros(12).int(), ValueError, r"index: shape \[12\]"),
        ("index", torch.zeros(4, 7).int(), ValueError, r"index: shape \[4, 7\].*1 to 6"),
        ("index", torch.zeros(4, 0).int(), ValueError, r"index: shape \[4, 0\]"),
        ("index", torch.zeros(5, 3).int(), ValueError, r"delta: shape \[4, 3\].*\[5, 3\]"),
        ("index", torch.zeros(4, 3, device="meta").int(), ValueError, "index: on meta"),
        ("delta", torch.ones(4, 2), ValueError, r"delta: shape \[4, 2\].*\[4, 3\]"),
        ("delta", torch.ones(12), ValueError, r"delta: shape \[12\]"),
        ("delta", torch.ones(4, 3).int(), TypeError, r"delta: dtype torch\.int32"),
        ("delta", torch.ones(4, 3, device="meta"), ValueError, "delta: on meta, expected cpu"),
        ("weight", None, TypeError, "weight: NoneType, expected a tensor"),
        ("plan", [1, 2], TypeError, "plan: list, expected a tensor"),
        ("bias", [0.0] * 4, TypeError, "bias: list, expected a tensor"),
        ("bias", torch.ones(6), ValueError, r"bias: shape \[6\], expected \[4\]"),
        ("bias", torch.ones(1, 4), ValueError, r"bias: shape \[1, 4\], expected \[4\]"),
        ("bias", torch.ones(4).half(), TypeError, r"bias: dtype torch\.float16"),
        ("bias", torch.ones(4, device="meta"), ValueError, "bias: on meta, expected cpu"),
    ],
)
def test_linear_refuses_a_wrong_argument_by_its_name(name, value, error, message, backend):
    with pytest.raises(error, match=f"^{message}"):
        neuroada_linear(**some_arguments(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("y", torch.ones(5, 3), ValueError, r"y: shape \[5, 3\], expected \[5, 4\]"),
        ("y", torch.ones(4), ValueError, r"y: shape \[4\], expected \[5, 4\]"),
        ("y", None, TypeError, "y: NoneType, expected a tensor"),
        ("y", torch.ones(5, 4).half(), TypeError, r"y: dtype torch\.float16"),
        ("y", torch.ones(5, 4, device="meta"), ValueError, "y: on meta, expected cpu"),
        ("x", torch.ones(5, 6).bool(), TypeError, r"x: dtype torch\.bool"),
        ("x", torch.ones(4, 6), ValueError, r"y: shape \[5, 4\], expected \[4, 4\]"),
        ("x", torch.ones(5, 2), ValueError, r"index: shape \[4, 3\].*1 to 2"),
        ("delta", torch.ones(4, 3).bool(), TypeError, r"delta: dtype torch\.bool"),
    ],
)
def test_bypass_refuses_a_wrong_argument_by_its_name(name, value, error, message, backend):
    arguments = some_arguments(y=torch.ones(5, 4)) | {name: value}
    del arguments["weight"], arguments["bias"]
    with pytest.raises(error, match=f"^{message}"):
        neuroada_bypass(**arguments)


def test_a_weight_that_requires_grad_is_fine_where_nothing_is_differentiated(backend, device):
    weight = torch.randn(4, 6, requires_grad=True, device=device)
    with torch.no_grad():
        assert not neuroada_linear(**some_arguments(device, weight=weight)).requires_grad


needs_cpu_backend = pytest.mark.skipif(
    nk.available_backends()["cpu"] is not None, reason="the C++ kernels are not built"
)


@needs_cpu_backend
@pytest.mark.parametrize("column", [6, 2**31 - 1, -2, -(2**31)])
def test_a_column_out_of_range_raises_before_anything_is_written(column):
    arguments = some_arguments()
    arguments["index"][2, 1] = column
    x, y = arguments["x"], torch.zeros(5, 4)
    message = f"index: column {column} is out of range for a weight with 6 inputs"
    with nk.use_backend("cpu"):
        with pytest.raises(RuntimeError, match=message):
            neuroada_linear(**arguments)
        with pytest.raises(RuntimeError, match=message):
            neuroada_bypass(y, x, arguments["index"], arguments["delta"])
        weight = arguments["weight"].clone()
        with pytest.raises(RuntimeError, match=message):
            torch.ops.neuroada.merge_(weight, arguments["index"], arguments["delta"])
    assert weight.equal(arguments["weight"])


@needs_cpu_backend
@pytest.mark.parametrize(
    "spoil",
    [
        lambda plan: plan[:-1],
        lambda plan: plan.clone().fill_(7),
        lambda plan: torch.cat([plan[:-1], plan.new_tensor([12])]),
        lambda plan: torch.cat([plan[:-1], plan.new_tensor([-1])]),
        lambda plan: plan.new_zeros(0),
        lambda plan: nk.make_plan(plan.new_zeros(4, 1), 5),
    ],
    ids=["short", "sevens", "entry_too_high", "entry_negative", "empty", "of_another"],
)
def test_a_plan_that_would_reach_outside_is_refused(spoil):
    arguments = some_arguments(x=torch.randn(5, 6, requires_grad=True))
    plan = nk.make_plan(arguments["index"], 6)
    with nk.use_backend("cpu"):
        y = neuroada_linear(**arguments, plan=spoil(plan))
        with pytest.raises(RuntimeError, match=r"plan: "):
            y.sum().backward()
