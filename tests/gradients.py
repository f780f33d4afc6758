"""The linear and the bypass of an ``Inputs`` for several tests, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels.testing import Inputs

Function = Callable[..., Tensor]


def differentiate(
    function: Function, tensors: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor, ...]:
    """``function(*tensors)``, and its gradient in each of them."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


def differentiate_in_float64(
    function: Function, tensors: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor, ...]:
    return differentiate(function, [t.double() for t in tensors], grad_output.double())


def linear_tensors(inputs: Inputs) -> list[Tensor]:
    """The tensors that the linear is differentiated by: x, delta, and the bias if any."""
    return [inputs.x, inputs.delta] + ([] if inputs.bias is None else [inputs.bias])


def linear(inputs: Inputs, plan: Tensor | None = None) -> Function:
    return lambda x, delta, bias=None: nk.functional.neuroada_linear(
        x, inputs.weight, inputs.index, delta, bias, plan=plan
    )


def reference_linear(inputs: Inputs) -> Function:
    """The formula over the same weight, in float64."""
    weight = inputs.weight.double()
    return lambda x, delta, bias=None: nk.reference.neuroada_linear(
        x, weight, inputs.index, delta, bias
    )


def bypass(inputs: Inputs, plan: Tensor | None = None) -> Function:
    return lambda y, x, delta: nk.functional.neuroada_bypass(y, x, inputs.index, delta, plan=plan)


def reference_bypass(inputs: Inputs) -> Function:
    return lambda y, x, delta: nk.reference.neuroada_bypass(y, x, inputs.index, delta)
