"""A linear whose weight holds ``W + delta`` already: torch's own GEMM, and delta's gradient.

y            = F.linear(x, W, b)
dx           as of F.linear
ddelta[j, s] = sum_t dy[t, j] x[t, index[j, s]]

``kept`` holds the columns of x that are saved instead of x, as in ``neuroada::linear``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroada_kernels import _registry
from neuroada_kernels.ops._library import (
    as_matrix,
    delta_gradient,
    is_plain_eager,
    plain_apply,
    refuse_double_backward,
    saved_of,
)


def resident_linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    kept: Tensor | None = None,
    kept_index: Tensor | None = None,
    *,
    plain: bool | None = None,
) -> Tensor:
    """``F.linear(x, weight, bias)`` whose backward also computes the gradient of ``delta``.

    Shapes: ``x [..., d_in]``, ``weight [d_out, d_in]``, ``index`` and ``delta`` ``[d_out, k]``,
    ``bias [d_out]``; ``kept [..., columns]``, ``kept_index [d_out, k]``. ``plain`` is
    ``is_plain_eager(x)``, if the caller has computed it already.
    """
    plain = is_plain_eager(x) if plain is None else plain
    if not plain and torch.compiler.is_compiling():
        return _TracedLinear.apply(x, weight, index, delta, bias, kept, kept_index)  # type: ignore[no-any-return,no-untyped-call]
    y = F.linear(x, weight, bias)
    if torch.is_grad_enabled() and delta.requires_grad:
        apply = _apply if plain else _DeltaGradient.apply
        y = apply(y, x, index, delta, kept, kept_index)
    return y


def _save(
    ctx: Any,
    x: Tensor,
    index: Tensor,
    delta: Tensor,
    kept: Tensor | None,
    kept_index: Tensor | None,
) -> None:
    """Save what ddelta needs of x; ``delta`` only for its version and dtype."""
    saved = x if ctx.needs_input_grad[3] else None
    if kept is not None or kept_index is not None:
        saved, kept_index = saved_of(x, kept, kept_index, ctx.needs_input_grad[3])
    ctx.d_in, ctx.compact = x.shape[-1], kept_index is not None
    ctx.save_for_backward(saved, index if kept_index is None else kept_index, delta)


def _grad_delta(ctx: Any, grad_output: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
    x, index, delta = saved
    mask = [False, True]
    grad_delta: Tensor
    if not is_plain_eager(grad_output) or torch.is_grad_enabled():
        # With grad mode on, a double backward may follow, which only the op can refuse.
        op = torch.ops.neuroada.bypass_backward.default
        kept_index = index if ctx.compact else None
        _, grad_delta = op(grad_output, x, index, delta, None, mask, kept_index, ctx.d_in)
        return grad_delta
    grad, matrix = as_matrix(grad_output), as_matrix(x)
    if ctx.compact:
        return delta_gradient(grad, matrix, index, delta, ctx.d_in)
    _, grad_delta = _registry.run("bypass_backward", grad, matrix, index, delta, None, mask)
    return grad_delta


class _Once(torch.autograd.Function):
    """The identity on dy, whose own backward raises.

    dx depends on ``delta`` through W, which holds it; autograd would miss that dependence.
    """

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, delta: Tensor) -> Tensor:
        return grad_output.view_as(grad_output)

    backward = staticmethod(refuse_double_backward)


class _DeltaGradient(torch.autograd.Function):
    """The identity on y; its backward returns dy unchanged and computes ddelta.

    If ``delta`` has changed since the forward, the version check of the saved tensor raises.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, *inputs: Any) -> Tensor:
        _save(ctx, *inputs)
        # No copy, and no view, since in-place writes into a view would raise.
        return y.data

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        need_y, _, _, need_delta = ctx.needs_input_grad[:4]
        differentiable = torch.is_grad_enabled()
        if not (need_delta or differentiable):
            return grad_output if need_y else None, None, None, None, None, None
        saved = ctx.saved_tensors  # unpacked once: checkpointing refuses a second time
        grad_delta = _grad_delta(ctx, grad_output, saved) if need_delta else None
        if differentiable:
            grad_output = _Once.apply(grad_output, saved[2])  # type: ignore[no-untyped-call]
        return grad_output if need_y else None, None, None, grad_delta, None, None


_apply = plain_apply(_DeltaGradient)


class _TracedLinear(torch.autograd.Function):
    """The whole linear for the compiler.

    Every compiled forward patches W and increments its version. The weight is stored as a plain
    attribute, without a version check, so that patching the same values in a later forward does
    not invalidate an earlier one. A changed delta is detected as in eager mode.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        index: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        kept: Tensor | None,
        kept_index: Tensor | None,
    ) -> Tensor:
        _save(ctx, x, index, delta, kept, kept_index)
        ctx.weight = weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, _, need_delta, need_bias = ctx.needs_input_grad[:5]
        grad_x = grad_bias = None
        if need_x:
            grad_x = grad_output @ ctx.weight.to(grad_output.dtype)
        if need_bias:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0).to(ctx.bias_dtype)
        grad_delta = _grad_delta(ctx, grad_output, ctx.saved_tensors) if need_delta else None
        return grad_x, None, None, grad_delta, grad_bias, None, None
