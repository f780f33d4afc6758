"""The op library of namespace ``neuroada``, and helpers that its ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from neuroada_kernels import _registry
from neuroada_kernels._tracing import dispatch_modes, is_pre_dispatched, jit_state

LIBRARY = torch.library.Library("neuroada", "DEF")

_Result = TypeVar("_Result")
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active
_is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``neuroada::<schema>`` with one implementation for every device."""
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neuroada::{name}", fake, lib=LIBRARY)


def why_not_served(op: str, *args: Any) -> str | None:
    """Why no backend serves this call of an op, or None if one does."""
    try:
        _registry.serving(op, *args)
    except _registry.BackendError as error:
        return str(error)
    return None


def reverse_mode_only(implementation: Callable[..., _Result]) -> Callable[..., _Result]:
    """``implementation``, but raising in forward mode, where torch would silently drop the tangent.

    Torch calls an op's autograd formula only if an input requires grad, and under
    ``torch.func.jvp`` inputs have lost their tangents here already. So every call raises there.
    """

    @functools.wraps(implementation)
    def run(*args: Any, **options: Any) -> _Result:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                "neuroada: the ops have no forward mode; neuroada_kernels.functional computes the "
                "formula in plain PyTorch there"
            )
        return implementation(*args, **options)

    return run


def is_plain_eager(x: Tensor) -> bool:
    """Whether a call can skip torch's dispatcher: no tracer, mode or transform is active.

    Dispatching a Python op with autograd costs 20 microseconds more than an ``autograd.Function``,
    which at one token is more than the kernel takes.
    """
    return (
        not torch.compiler.is_dynamo_compiling()  # other tracers use tensor subclasses
        and type(x) in PLAIN_TYPES
        and dispatch_modes() == 0
        and not is_pre_dispatched()
        and not x.is_meta
        and jit_state() is None
        and not _transforms()
        and not _is_wrapped(x)  # by a transform that has ended
        and forward_ad._current_level < 0
    )


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` where :func:`is_plain_eager` holds.

    Skips torch's Python loop over the arguments that unwraps dead ``torch.func`` wrappers: a tenth
    of the dispatch overhead of a call.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc,no-any-return]


def as_matrix(x: Tensor) -> Tensor:
    """``x [..., d]`` as ``[tokens, d]`` with unit stride along a row, a view if possible.

    Callers that run between two GEMMs on the CPU inline the check whether x is such a matrix
    already: with cold caches a call takes microseconds.
    """
    matrix = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def saved_of(
    x: Tensor, kept: Tensor | None, kept_index: Tensor | None, needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The tensor to save for ddelta, x or ``kept``, and the index into ``kept`` or None.

    Raises
    ------
    ValueError
        If only one of ``kept`` and ``kept_index`` is given, or ``kept`` does not fit x.
    """
    if kept is None and kept_index is None:
        return x if needed else None, None
    if kept is None or kept_index is None:
        name = "kept_index" if kept_index is None else "kept"
        raise ValueError(f"{name}: missing, expected kept and kept_index together")
    if kept.shape[:-1] != x.shape[:-1] or kept.dtype != x.dtype:
        raise ValueError(
            f"kept: {kept.dtype} of shape {list(kept.shape)}, expected {x.dtype} of shape "
            f"{[*x.shape[:-1], 'columns']}, as x"
        )
    return (kept, kept_index) if needed else (None, None)


def delta_gradient(grad: Tensor, kept: Tensor, index: Tensor, delta: Tensor, d_in: int) -> Tensor:
    """ddelta from the saved columns of x, bitwise the same as from x itself with ``d_in`` columns.

    ``grad [tokens, d_out]`` and ``kept [tokens, columns]`` are from :func:`as_matrix`;
    ``index [d_out, k]`` is into the saved columns.
    """
    return _registry.run("sddmm", grad, kept, index, delta, d_in)  # type: ignore[no-any-return]


def _x_or_shape(x: Tensor | None, grad: Tensor, d_in: int, need_delta: bool) -> Tensor:
    """x by :func:`as_matrix`; if ddelta is not needed, a meta tensor of the shape of x.

    Raises
    ------
    ValueError
        If ddelta is needed and ``x`` is None.
    """
    if not need_delta:
        return torch.empty(grad.shape[0], d_in, dtype=grad.dtype, device="meta")
    if x is None:
        raise ValueError("x: missing, expected it where the gradient of delta is wanted")
    return as_matrix(x)


def run_backward(
    op: str,
    grad_output: Tensor,
    x: Tensor | None,
    weight: tuple[Tensor, ...],
    index: Tensor,
    delta: Tensor,
    plan: Tensor | None,
    output_mask: list[bool],
    kept_index: Tensor | None,
    d_in: int,
) -> tuple[Tensor, Tensor]:
    """dx and ddelta by the backward ``op``; a gradient that is not needed is an empty tensor.

    ``weight`` is a tuple of one tensor or none. With a ``kept_index``, ``x`` is the saved columns.
    """
    is_matrix = grad_output.dim() == 2 and grad_output.stride(1) == 1
    grad = grad_output if is_matrix else as_matrix(grad_output)
    need_x, need_delta = output_mask
    grad_x = grad_delta = None
    if kept_index is not None and need_delta:
        kept = _x_or_shape(x, grad, d_in, need_delta)
        grad_delta = delta_gradient(grad, kept, kept_index, delta, d_in)
        need_delta = False
    if need_x or need_delta:
        is_matrix = x is not None and need_delta and x.dim() == 2 and x.stride(1) == 1
        matrix = x if is_matrix else _x_or_shape(x, grad, d_in, need_delta)
        args = (grad, matrix, *weight, index, delta, plan, [need_x, need_delta])
        grad_x, from_whole = _registry.run(op, *args)
        grad_delta = from_whole if need_delta else grad_delta
    if grad_x is not None and grad_output.dim() != 2:
        grad_x = grad_x.view(*grad_output.shape[:-1], d_in)
    return (
        grad.new_empty(0) if grad_x is None else grad_x,
        delta.new_empty(0) if grad_delta is None else grad_delta,
    )


def fake_backward(
    grad_output: Tensor, delta: Tensor, output_mask: list[bool], d_in: int
) -> tuple[Tensor, Tensor]:
    """The fake of :func:`run_backward`."""
    shape = [*grad_output.shape[:-1], d_in]
    return (
        grad_output.new_empty(shape if output_mask[0] else [0]),
        delta.new_empty(delta.shape if output_mask[1] else [0]),
    )


def unflattened(y: Tensor, *shape: int) -> Tensor:
    """A freshly computed ``y`` in another shape, as a tensor that is not a view.

    Autograd does not allow in-place writes into a view that an ``autograd.Function`` returned, as
    in ``layer(x).add_(residual)``, and FSDP2 loses its hook there.
    """
    return y.view(shape).data


def refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    """The backward of a backward op: raises."""
    raise RuntimeError(
        "neuroada: double backward is not supported; neuroada_kernels.reference holds a form that "
        "autograd differentiates to any order"
    )
