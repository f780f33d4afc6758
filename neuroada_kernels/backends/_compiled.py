"""The ops by the compiled kernels of ``neuroada_C``, fused and unfused, the same for every device;
the unfused GEMM is torch's or CUTLASS's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neuroada_kernels._dtypes import FLOATING, accumulated_in
from neuroada_kernels._registry import Implementation
from neuroada_kernels.backends._dense import add_dense, bias_for_bypass
from neuroada_kernels.plan import make_plan

#: The compiled ops; torch's dispatcher selects the kernels by the tensors' device.
C = torch.ops.neuroada_C

#: The dtype in which the kernels sum, by the dtype of x; delta has to have it.
SUMMED_IN = {dtype: accumulated_in(dtype) for dtype in FLOATING}


def linear(x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """The op ``linear``, unfused: the bypass by a kernel, then the GEMM by torch onto it."""
    early, late = bias_for_bypass(None if bias is None else contiguous(bias))
    y = x.new_empty(x.shape[0], weight.shape[0])
    C.bypass_fwd.default(x, contiguous(index), wide(delta, x), early, None, y)
    return add_dense(y, x, weight.t(), late)


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The op ``linear_backward``, unfused as in :func:`linear`."""
    grad_x, grad_delta = bypass_backward(grad, x, index, delta, plan, output_mask)
    if grad_x is not None:
        grad_x = add_dense(grad_x, grad, weight)
    return grad_x, grad_delta


def linear_fused(
    x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None
) -> Tensor:
    """The op ``linear``, GEMM and bypass fused in one kernel; ``bias`` has the dtype of ``x``."""
    # contiguous() and wide() inlined: with cold caches each call would take microseconds.
    if not index.is_contiguous():
        index = index.contiguous()
    if delta.dtype != SUMMED_IN[x.dtype] or not delta.is_contiguous():
        delta = wide(delta, x)
    bias = None if bias is None else contiguous(bias)
    y: Tensor = C.linear_fwd.default(x, weight, index, delta, bias)
    return y


def linear_backward_fused(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor | None]:
    """The op ``linear_backward`` with dx, GEMM and bypass of dx fused in one kernel."""
    if plan is None:
        plan = make_plan(index, x.shape[1])
    wide_delta = delta
    if delta.dtype != SUMMED_IN[grad.dtype] or not delta.is_contiguous():
        wide_delta = wide(delta, grad)
    if not output_mask[1]:
        return C.linear_bwd_input.default(grad, weight, plan, wide_delta), None
    if not index.is_contiguous():
        index = index.contiguous()
    grad_x, grad_delta = C.linear_bwd.default(grad, x, weight, index, plan, wide_delta)
    return grad_x, grad_delta if delta is wide_delta else grad_delta.to(delta.dtype)


def linear_patched(
    x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None
) -> Tensor:
    """The op ``linear`` by ``round(weight + delta)``, rounded to the dtype of the weight."""
    bias = None if bias is None else contiguous(bias)
    y: Tensor = C.linear_patched_fwd.default(x, weight, contiguous(index), wide(delta, x), bias)
    return y


def linear_backward_patched(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor | None]:
    """The op ``linear_backward`` with dx, for :func:`linear_patched`."""
    _, grad_delta = bypass_backward(grad, x, index, delta, plan, [False, output_mask[1]])
    args = (grad, weight, contiguous(index), wide(delta, grad))
    return C.linear_patched_bwd_input.default(*args), grad_delta


def linear_bypass_first(
    x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None
) -> Tensor:
    """The op ``linear``: the bypass alone, rounded, then a GEMM that adds to it in float32.

    The GEMM adds the bias: added to the bypass, it would round the bypass to the bias's ULP.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    C.bypass_fwd.default(x, contiguous(index), wide(delta, x), None, None, y)
    C.product_onto_fwd.default(x, weight, None if bias is None else contiguous(bias), y)
    return y


def linear_backward_bypass_first(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The op ``linear_backward`` with dx, for :func:`linear_bypass_first`."""
    grad_x, grad_delta = bypass_backward(grad, x, index, delta, plan, output_mask)
    C.product_onto_bwd_input.default(grad, weight, grad_x)
    return grad_x, grad_delta


def bypass_add(x: Tensor, y: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """The op ``bypass_add``."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    C.bypass_fwd.default(x, contiguous(index), wide(delta, x), None, y, out)
    return out


def bypass_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The op ``bypass_backward``."""
    grad_x = grad_delta = None
    if output_mask[1]:
        grad_delta = sddmm(grad, x, index, delta, None)
    if output_mask[0]:
        plan = make_plan(index, x.shape[1], ordered=False) if plan is None else contiguous(plan)
        grad_x = grad.new_empty(x.shape)
        C.bypass_bwd_input.default(grad, plan, wide(delta, grad), None, grad_x)
    return grad_x, grad_delta


def sddmm(grad: Tensor, x: Tensor, index: Tensor, delta: Tensor, d_in: int | None) -> Tensor:
    """ddelta; if ``x`` holds only saved columns, bitwise the same as from the full x.

    ``d_in`` is the width of the full x; None if ``x`` is the full one.
    """
    if not index.is_contiguous():
        index = index.contiguous()
    grad_delta: Tensor = C.sddmm.default(grad, x, index, d_in)
    return grad_delta if grad_delta.dtype == delta.dtype else grad_delta.to(delta.dtype)


def merge(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """The op ``merge_``."""
    return C.merge.default(weight, contiguous(index), wide(delta, weight))  # type: ignore[no-any-return]


def restore(weight: Tensor, index: Tensor, original: Tensor) -> None:
    """The op ``unmerge_``."""
    C.restore.default(weight, contiguous(index), contiguous(original))


def gather(weight: Tensor, index: Tensor) -> Tensor:
    """The op ``gather``."""
    return C.gather.default(weight, contiguous(index))  # type: ignore[no-any-return]


def patch(weight: Tensor, index: Tensor, delta: Tensor, original: Tensor) -> None:
    """The op ``patch_``, which runs before the GEMM of every step: see :func:`contiguous`."""
    if not index.is_contiguous() or not original.is_contiguous():
        index, original = index.contiguous(), original.contiguous()
    if delta.dtype != SUMMED_IN[weight.dtype] or not delta.is_contiguous():
        delta = wide(delta, weight)
    C.patch.default(weight, index, delta, original)


def wide(delta: Tensor, x: Tensor) -> Tensor:
    """``delta`` in the dtype in which the kernels sum for ``x``, contiguous."""
    dtype = SUMMED_IN[x.dtype]
    return contiguous(delta if delta.dtype == dtype else delta.to(dtype))


def contiguous(tensor: Tensor) -> Tensor:
    """``tensor.contiguous()``, without the dispatcher call, microseconds, if it is contiguous.

    Code that runs between two GEMMs on the CPU inlines this.
    """
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def implementations(
    linear: Callable[..., Tensor],
    linear_backward: Callable[..., tuple[Tensor | None, Tensor | None]],
    unsupported: Callable[..., list[str]],
    always: frozenset[torch.dtype] = frozenset(),
) -> dict[str, Implementation]:
    """The ops of a backend by name; it provides the two that choose between fused and unfused."""

    def merge_unsupported(weight: Tensor, *rest: object) -> list[str]:
        reasons, stride = unsupported(weight), weight.stride(1)
        if stride == 1 or weight.shape[1] == 1:
            return reasons
        return [*reasons, f"weight with stride {stride} along a row, expected 1"]

    return {
        "linear": Implementation(linear, unsupported, always),
        "linear_backward": Implementation(linear_backward, unsupported, always),
        "bypass_add": Implementation(bypass_add, unsupported, always),
        "bypass_backward": Implementation(bypass_backward, unsupported, always),
        "sddmm": Implementation(sddmm, unsupported, always),
        "merge_": Implementation(merge, merge_unsupported),
        "unmerge_": Implementation(restore, merge_unsupported),
        "gather": Implementation(gather, merge_unsupported),
        "patch_": Implementation(patch, merge_unsupported),
    }
