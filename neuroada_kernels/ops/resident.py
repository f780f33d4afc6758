"""A linear whose weight holds ``W + delta`` already: torch's own product, and delta's gradient.

y            = F.linear(x, W, b)
dx           as of F.linear
ddelta[j, s] = sum_t dy[t, j] x[t, index[j, s]]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroada_kernels import _registry
from neuroada_kernels.ops._library import as_matrix, is_plain_eager


def resident_linear(
    x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None
) -> Tensor:
    """``F.linear(x, weight, bias)``, which passes ``delta`` its gradient.

    Shapes: ``x [..., d_in]``, ``weight [d_out, d_in]``, ``index`` and ``delta`` ``[d_out, k]``,
    ``bias [d_out]``.
    """
    if torch.compiler.is_compiling():
        return _TracedLinear.apply(x, weight, index, delta, bias)  # type: ignore[no-any-return,no-untyped-call]
    y = F.linear(x, weight, bias)
    if torch.is_grad_enabled() and delta.requires_grad:
        y = _DeltaGradient.apply(y, x, index, delta)  # type: ignore[no-untyped-call]
    return y


def _grad_delta(grad_output: Tensor, x: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    mask = [False, True]
    grad_delta: Tensor
    if is_plain_eager(grad_output) and not torch.is_grad_enabled():
        grad, matrix = as_matrix(grad_output), as_matrix(x)
        run = _registry.resolve("bypass_backward", grad, matrix, index, delta, None, mask)
        _, grad_delta = run(grad, matrix, index, delta, None, mask)
    else:
        # With grad mode on, somebody may differentiate again: only the op can refuse that.
        op = torch.ops.neuroada.bypass_backward.default
        _, grad_delta = op(grad_output, x, index, delta, None, mask)
    return grad_delta


class _DeltaGradient(torch.autograd.Function):
    """The identity of y, whose gradient passes through and gives delta's on its way.

    ``delta`` is saved for its version alone: changed since, it is another function's gradient.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, index: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(x, index, delta)
        # No copy, and no view either, into which nobody could write in place.
        return y.data

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        need_y, _, _, need_delta = ctx.needs_input_grad
        grad_delta = _grad_delta(grad_output, *ctx.saved_tensors) if need_delta else None
        return grad_output if need_y else None, None, None, grad_delta


class _TracedLinear(torch.autograd.Function):
    """All of it for a compiler.

    There every forward patches W, and raises its version. The weight is kept as a plain attribute,
    whose version nobody asks for: a forward that has patched the same values again does not spoil
    the one before. A delta that has changed is noticed as in eager mode.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, index, delta)
        ctx.weight = weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, _, need_delta, need_bias = ctx.needs_input_grad
        grad_x = grad_bias = None
        if need_x:
            grad_x = grad_output @ ctx.weight.to(grad_output.dtype)
        if need_bias:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0).to(ctx.bias_dtype)
        grad_delta = _grad_delta(grad_output, *ctx.saved_tensors) if need_delta else None
        return grad_x, None, None, grad_delta, grad_bias
