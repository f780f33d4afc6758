"""The Triton backend: the kernels of ``triton_kernels``, on a GPU or in Triton's interpreter.

Tokens are processed in chunks whose transposed inputs fit into the workspace, so that each kernel
of a chunk finds the output of the previous one in the GPU's L2. Unfused, in 16 bits torch's GEMM
runs first, with float32 output, and our kernel adds bias and bypass and rounds once; wider dtypes
need no such scratch, and the GEMM accumulates onto the bypass.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neuroada_kernels._dtypes import FLOATING, NAMES
from neuroada_kernels._registry import Backend, Implementation, register
from neuroada_kernels.backends._dense import add_dense, bias_for_bypass, wide_product
from neuroada_kernels.backends._entries import chosen_entries
from neuroada_kernels.plan import make_plan, plan_parts

_OLDEST = (8, 0)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: install the extra 'triton'"
    if _interpreted() or torch.cuda.is_available():
        return None
    return (
        "no GPU is visible; to run its kernels in Triton's interpreter, on the CPU and slowly, "
        "set TRITON_INTERPRET=1 before Python starts"
    )


@functools.cache
def _kernels() -> Any:
    """The launchers, imported at the first call: Triton is optional, and slow to import."""
    if _interpreted():
        from neuroada_kernels.triton_kernels.interpreter import repair_bfloat16

        repair_bfloat16()
    import neuroada_kernels.triton_kernels as kernels

    return kernels


def _linear(x: Tensor, weight: Tensor, index: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    kernels = _kernels()
    index, delta, bias = index.contiguous(), delta.contiguous(), _contiguous(bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    early, late = bias_for_bypass(bias)
    fused = _prefer_fused(x, weight.shape[0])

    def add_bypass(x_t: Tensor, y: Tensor, onto: Tensor) -> None:
        kernels.bypass_fwd(x_t, index, delta, y, onto=onto, bias=bias)

    for part in _chunks(x.shape[0], x.shape[1] * x.element_size()):
        x_t = kernels.transpose(x[part])
        if fused:
            kernels.linear_fwd(x[part], weight, x_t, index, delta, bias, y[part])
        elif x.dtype.itemsize == 2:
            _product_first(x[part], weight.t(), add_bypass, x_t, y[part])
        else:
            kernels.bypass_fwd(x_t, index, delta, y[part], bias=early)
            _add_dense(y[part], x[part], weight.t(), late)
        del x_t  # free it before the next one is allocated
    return y


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    return _backward(grad, x, weight, index, delta, plan, output_mask, x.shape[1])


def _bypass_add(x: Tensor, y: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    kernels = _kernels()
    index, delta = index.contiguous(), delta.contiguous()
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    for part in _chunks(x.shape[0], x.shape[1] * x.element_size()):
        x_t = kernels.transpose(x[part])
        kernels.bypass_fwd(x_t, index, delta, out[part], onto=y[part])
        del x_t
    return out


def _bypass_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    return _backward(grad, x, None, index, delta, plan, output_mask, x.shape[1])


def _sddmm(grad: Tensor, x: Tensor, index: Tensor, delta: Tensor, d_in: int) -> Tensor:
    _, grad_delta = _backward(grad, x, None, index, delta, None, [False, True], d_in)
    assert grad_delta is not None
    return grad_delta


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
    d_in: int,
) -> tuple[Tensor | None, Tensor | None]:
    """dx, with the GEMM if ``weight`` is given, and ddelta, for which x may be its saved columns.

    Chunks depend only on ``d_in``, ``d_out``, dtype and ``output_mask``, and so do all sums.
    """
    kernels = _kernels()
    tokens, d_out = grad.shape
    need_x, need_delta = output_mask
    index, delta = index.contiguous(), delta.contiguous()
    grad_x = partial = None
    if need_x:
        grad_x = grad.new_empty(x.shape)
        fused = weight is not None and _prefer_fused(grad, d_in)
        plan = make_plan(index, d_in, ordered=False) if plan is None else plan.contiguous()
        columns = plan_parts(plan, d_in)
    if need_delta:
        partial = kernels.sddmm_partial(index, tokens, x.dtype)

    def add_bypass(grad_t: Tensor, grad_x: Tensor, onto: Tensor | None = None) -> None:
        kernels.bypass_bwd_input(grad_t, *columns, delta, grad_x, onto=onto)

    bytes_per_token = (d_out + d_in * need_delta) * grad.element_size()
    for part in _chunks(tokens, bytes_per_token):
        grad_t = kernels.transpose(grad[part])
        if grad_x is not None and fused:
            kernels.linear_bwd_input(
                grad[part], weight, grad_t, columns.column_start, columns.entry, delta, grad_x[part]
            )
        elif grad_x is not None and weight is not None and grad.dtype.itemsize == 2:
            _product_first(grad[part], weight, add_bypass, grad_t, grad_x[part])
        elif grad_x is not None:
            add_bypass(grad_t, grad_x[part])
            if weight is not None:
                _add_dense(grad_x[part], grad[part], weight)
        if partial is not None:
            kernels.sddmm(kernels.transpose(x[part]), grad_t, index, partial)
        del grad_t
    if partial is None:
        return grad_x, None
    return grad_x, partial.sum(0).view(delta.shape).to(delta.dtype)


def _merge(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    return _kernels().merge(weight, index.contiguous(), delta.contiguous())  # type: ignore[no-any-return]


def _unmerge(weight: Tensor, index: Tensor, original: Tensor) -> None:
    _kernels().unmerge(weight, index.contiguous(), original.contiguous())


def _patch(weight: Tensor, index: Tensor, delta: Tensor, original: Tensor) -> None:
    _kernels().patch(weight, index.contiguous(), delta.contiguous(), original.contiguous())


def _product_first(
    inputs: Tensor,
    weight: Tensor,
    add_bypass: Callable[[Tensor, Tensor, Tensor], None],
    inputs_t: Tensor,
    out: Tensor,
) -> None:
    """``out = inputs @ weight``, in float32, plus the terms of ``add_bypass(inputs_t, out, onto)``.

    By slices of tokens, so that the full float32 product is never held.
    """
    step = _kernels().configs.tokens_per_float32_gemm(out.shape[1])
    for first in range(0, out.shape[0], step):
        part = slice(first, first + step)  # the last one includes the padding of inputs_t
        add_bypass(inputs_t[:, part], out[part], wide_product(inputs[part], weight))


def _prefer_fused(inputs: Tensor, width: int) -> bool:
    """Whether the ``[tokens, width]`` output is computed fused, or by torch's GEMM and a kernel."""
    configs = _kernels().configs
    gpu = configs.gpu_of(inputs.device)
    return bool(configs.prefer_fused(*inputs.shape, width, inputs.dtype, gpu))


def _chunks(tokens: int, bytes_per_token: int) -> Iterator[slice]:
    """Slices of tokens whose transposed inputs fit into the workspace."""
    step = _kernels().configs.tokens_per_chunk(bytes_per_token)
    for first in range(0, tokens, step):
        yield slice(first, min(first + step, tokens))


def _add_dense(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    total = add_dense(y, x, weight, bias)
    if total.data_ptr() != y.data_ptr():
        y.copy_(total)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make the tensors' device current, since Triton launches on the current device."""

    @functools.wraps(run)
    def guarded(first: Tensor, *rest: Any) -> Any:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return run(first, *rest)
        with torch.cuda.device(first.device):
            return run(first, *rest)

    return guarded


def _unsupported(first: Tensor, *rest: object) -> list[str]:
    reasons = []
    if not first.is_cuda and not (first.is_cpu and _interpreted()):
        reasons.append(f"tensors on {first.device.type}, expected a GPU")
    elif first.is_cuda and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(first.device)
        if capability < _OLDEST:
            reasons.append(f"compute capability {capability}, expected {_OLDEST} or newer")
    if first.dtype not in FLOATING:
        reasons.append(f"dtype {first.dtype}, expected {NAMES}")
    return reasons


_OPS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "linear_backward": _linear_backward,
    "bypass_add": _bypass_add,
    "bypass_backward": _bypass_backward,
    "sddmm": _sddmm,
    "merge_": _merge,
    "unmerge_": _unmerge,
    "gather": chosen_entries,
    "patch_": _patch,
}

register(
    Backend(
        name="triton",
        priority={"cuda": 1},
        unavailable=_unavailable,
        experimental=True,
        implementations={
            op: Implementation(_on_its_device(run), _unsupported) for op, run in _OPS.items()
        },
    )
)
