"""First derivatives by finite differences, the refusal of second ones, and ``torch.func``."""

from __future__ import annotations

import pytest
import torch
from gradients import Function, differentiate, linear, reference_bypass, reference_linear
from torch import Tensor
from torch.autograd import forward_ad

import neuroada_kernels as nk
from neuroada_kernels.functional import neuroada_bypass, neuroada_linear
from neuroada_kernels.testing import Case, Inputs, make_inputs

pytestmark = pytest.mark.usefixtures("float64")
CASE = Case(tokens=6, d_in=7, d_out=5, k=3, bias=True, index="ragged")


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no_plan"])
def test_linear_by_finite_differences(planned, backend, device):
    inputs = make_inputs(CASE, torch.float64, device=device)
    plan = nk.make_plan(inputs.index, CASE.d_in) if planned else None
    tensors = leaves(inputs.x.view(2, 3, -1), inputs.delta, inputs.bias)
    assert torch.autograd.gradcheck(linear(inputs, plan), tensors)


def test_bypass_by_finite_differences(backend, device):
    inputs = make_inputs(CASE, torch.float64, device=device)
    y, x, delta = leaves(inputs.grad_output, inputs.x, inputs.delta)
    assert torch.autograd.gradcheck(
        lambda y, x, delta: neuroada_bypass(y, x, inputs.index, delta), (y, x, delta)
    )


def by_function(x: Tensor, y: Tensor, delta: Tensor, rest: dict[str, Tensor]) -> list[Tensor]:
    index, weight = rest["index"], rest["weight"]
    return [neuroada_linear(x, weight, index, delta), neuroada_bypass(y, x, index, delta)]


def by_op(x: Tensor, y: Tensor, delta: Tensor, rest: dict[str, Tensor]) -> list[Tensor]:
    index, weight = rest["index"], rest["weight"]
    return [
        torch.ops.neuroada.linear(x, weight, index, delta, None, None),
        torch.ops.neuroada.bypass_add(y, x, index, delta, None),
    ]


@pytest.mark.parametrize("call", [by_function, by_op], ids=["short_way", "op"])
@pytest.mark.parametrize("first", ["x", "delta"])
@pytest.mark.parametrize("second", ["x", "delta"])
def test_a_second_derivative_is_refused_in_words(call, first, second, backend, device):
    inputs = make_inputs(CASE, torch.float64, device=device)
    tensors = {
        name: tensor.clone().requires_grad_(name in (first, second))
        for name, tensor in (("x", inputs.x), ("delta", inputs.delta))
    }
    rest = {"index": inputs.index, "weight": inputs.weight}
    for y in call(**tensors, y=inputs.grad_output, rest=rest):
        (gradient,) = torch.autograd.grad(y.square().sum(), tensors[first], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            gradient.sum().backward()


def test_a_gradient_kept_with_create_graph_is_the_gradient(backend, device):
    inputs = make_inputs(CASE, torch.float64, device=device)
    plain = differentiate(linear(inputs), [inputs.x, inputs.delta], inputs.grad_output)
    x, delta = leaves(inputs.x, inputs.delta)
    y = linear(inputs)(x, delta)
    kept = torch.autograd.grad(y, (x, delta), inputs.grad_output, create_graph=True)
    assert all(k.detach().equal(p) for k, p in zip(kept, plain[1:], strict=True))


def test_a_weight_that_learns_to_require_grad_is_refused_in_the_backward(backend, device):
    inputs = make_inputs(CASE, torch.float64, device=device)
    weight = inputs.weight.clone().requires_grad_()
    y = torch.ops.neuroada.linear(inputs.x, weight, inputs.index, inputs.delta, None, None)
    with pytest.raises(RuntimeError, match="weight: requires grad"):
        y.sum().backward()


def with_formulas(inputs: Inputs) -> list[tuple[Function, Function]]:
    """Both functions of x and delta, each beside its formula."""
    y = inputs.grad_output
    return [
        (linear(inputs), reference_linear(inputs)),
        (
            lambda x, delta: neuroada_bypass(y, x, inputs.index, delta),
            lambda x, delta: reference_bypass(inputs)(y, x, delta),
        ),
    ]


# torch's own forward-mode rules are scripted, and say so on their first use.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "vmap", "hessian"])
def test_func_transforms_follow_the_formula(transform, backend, device):
    inputs = make_inputs(CASE, torch.float64, device=device)
    x, delta = inputs.x, inputs.delta
    for function, formula in with_formulas(inputs):
        results, expected = (transformed(transform, f)(x, delta) for f in (function, formula))
        torch.testing.assert_close(results, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("how", ["jvp", "dual_level"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_tangent_comes_through_in_forward_mode(how, grad, backend, device):
    inputs = make_inputs(CASE, torch.float64, device=device)
    x, delta = inputs.x, inputs.delta
    along = (torch.randn_like(x), torch.randn_like(delta))
    for function, formula in with_formulas(inputs):
        _, expected = torch.func.jvp(formula, (x, delta), along)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(tangent(how, function, (x, delta), along), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("how", ["jvp", "dual_level"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_an_op_itself_refuses_a_tangent(how, grad, backend, device):
    inputs = make_inputs(CASE, torch.float64, device=device)
    at, along = (inputs.x, inputs.delta), (inputs.x, inputs.delta)
    rest = {"index": inputs.index, "weight": inputs.weight}
    for number in (0, 1):

        def op(x: Tensor, delta: Tensor, number: int = number) -> Tensor:
            return by_op(x, inputs.grad_output, delta, rest)[number]

        with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match="forward mode"):
            tangent(how, op, at, along)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_backward_refuses_a_tangent_that_its_forward_did_not_see(backend, device):
    inputs = make_inputs(CASE, torch.float64, device=device)
    x, delta = leaves(inputs.x, inputs.delta)
    rest = {"index": inputs.index, "weight": inputs.weight}
    for y in by_function(x, inputs.grad_output, delta, rest):
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(inputs.grad_output, inputs.grad_output)
            with pytest.raises(NotImplementedError, match="forward mode"):
                torch.autograd.grad(y, (x, delta), grad)


def tangent(how: str, function, at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor | None:
    if how == "jvp":
        return torch.func.jvp(function, at, along)[1]
    with forward_ad.dual_level():
        result = function(*map(forward_ad.make_dual, at, along))
        return forward_ad.unpack_dual(result).tangent


def transformed(name: str, function):
    def loss(x: Tensor, delta: Tensor) -> Tensor:
        return function(x, delta).square().sum()

    if name == "grad":
        return torch.func.grad(loss, argnums=(0, 1))
    if name == "hessian":
        return torch.func.hessian(loss, argnums=1)
    if name == "vmap":
        return lambda x, delta: torch.func.vmap(lambda scale: function(x * scale, delta * scale))(
            torch.arange(3.0, dtype=x.dtype, device=x.device)
        )
    return getattr(torch.func, name)(function, argnums=(0, 1))


def test_a_gradient_for_each_token(backend, device):
    inputs = make_inputs(CASE, torch.float64, device=device)

    def loss(delta: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        return (neuroada_linear(x, inputs.weight, inputs.index, delta) * grad).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        inputs.delta, inputs.x, inputs.grad_output
    )
    _, _, summed = differentiate(linear(inputs), [inputs.x, inputs.delta], inputs.grad_output)
    assert each.shape == (CASE.tokens, *inputs.delta.shape)
    torch.testing.assert_close(each.sum(0), summed)


def test_an_x_that_has_outlived_its_transform_is_taken_as_it_is(backend, device):
    inputs = make_inputs(CASE, torch.float64, device=device)
    outlived: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        outlived.append(x)
        return x.sum()

    torch.func.grad(keep)(inputs.x)
    for function in (
        lambda x: neuroada_linear(x, inputs.weight, inputs.index, inputs.delta),
        lambda x: neuroada_bypass(x @ inputs.weight.t(), x, inputs.index, inputs.delta),
    ):
        torch.testing.assert_close(function(outlived[0]), function(inputs.x))
