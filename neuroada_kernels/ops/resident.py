"""A linear whose weight holds ``W + delta`` already: torch's own product, and delta's gradient.

y            = F.linear(x, W, b)
dx           as of F.linear
ddelta[j, s] = sum_t dy[t, j] x[t, index[j, s]]

``kept`` are the columns of x that are saved in its stead, as in ``neuroada::linear``.
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
    """``F.linear(x, weight, bias)``, which passes ``delta`` its gradient.

    Shapes: ``x [..., d_in]``, ``weight [d_out, d_in]``, ``index`` and ``delta`` ``[d_out, k]``,
    ``bias [d_out]``; ``kept [..., columns]``, ``kept_index [d_out, k]``. ``plain`` is
    ``is_plain_eager(x)``, from whoever knows it already.
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
    """Keep what ddelta needs of x; ``delta`` for its version and dtype alone."""
    saved = x if ctx.needs_input_grad[3] else None
    if kept is not None or kept_index is not None:
        saved, kept_index = saved_of(x, kept, kept_index, ctx.needs_input_grad[3])
    ctx.d_in, ctx.compact = x.shape[-1], kept_index is not None
    ctx.save_for_backward(saved, index if kept_index is None else kept_index, delta)


def _grad_delta(ctx: Any, grad_output: Tensor) -> Tensor:
    x, index, delta = ctx.saved_tensors
    mask = [False, True]
    grad_delta: Tensor
    if not is_plain_eager(grad_output) or torch.is_grad_enabled():
        # With grad mode on, somebody may differentiate again: only the op can refuse that.
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
    """The identity of dy, which nobody may differentiate.

    By way of W, which holds it, dx depends on ``delta``; autograd would leave that out.
    """

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, delta: Tensor) -> Tensor:
        return grad_output.view_as(grad_output)

    backward = staticmethod(refuse_double_backward)


class _DeltaGradient(torch.autograd.Function):
    """The identity of y, whose gradient passes through and gives delta's on its way.

    A ``delta`` that has changed since is another function's: its gradient is refused.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, *inputs: Any) -> Tensor:
        _save(ctx, *inputs)
        # No copy, and no view either, into which nobody could write in place.
        return y.data

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        need_y, _, _, need_delta = ctx.needs_input_grad[:4]
        grad_delta = _grad_delta(ctx, grad_output) if need_delta else None
        if torch.is_grad_enabled():
            grad_output = _Once.apply(grad_output, ctx.saved_tensors[2])  # type: ignore[no-untyped-call]
        return grad_output if need_y else None, None, None, grad_delta, None, None


_apply = plain_apply(_DeltaGradient)


class _TracedLinear(torch.autograd.Function):
    """All of it for a compiler.

    There every forward patches W, and raises its version. The weight is kept as a plain attribute,
    whose version nobody asks for: a forward that has patched the same values again does not spoil
    the one before. A delta that has changed is noticed as in eager mode.
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
        grad_delta = _grad_delta(ctx, grad_output) if need_delta else None
        return grad_x, None, None, grad_delta, grad_bias, None, None
