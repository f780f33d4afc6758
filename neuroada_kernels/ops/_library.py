"""The op library of namespace ``neuroada``, and what its ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("neuroada", "DEF")

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``neuroada::<schema>`` with one implementation for every device."""
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neuroada::{name}", fake, lib=LIBRARY)


def is_plain_eager(x: Tensor) -> bool:
    """Whether a call can skip torch's dispatcher: nobody is tracing or intercepting.

    The dispatcher's way through a Python op with autograd costs 20 microseconds more than an
    ``autograd.Function``, which at one token is more than the kernel.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN_TYPES
        and _dispatch_modes() == 0
        and not x.is_meta
    )


def as_matrix(x: Tensor) -> Tensor:
    """``x [..., d]`` as ``[tokens, d]`` with unit stride along a row, a view where one can be."""
    matrix = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def unflattened(y: Tensor, *shape: int) -> Tensor:
    """``y``, which nobody else has yet, in another shape, and no view.

    Autograd refuses to write into a view that an ``autograd.Function`` made, as in
    ``layer(x).add_(residual)``, and FSDP2 loses its hook there.
    """
    return y.view(shape).data


def refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    """The backward of a backward op."""
    raise RuntimeError(
        "neuroada: double backward is not supported; neuroada_kernels.reference holds a form that "
        "autograd differentiates to any order"
    )
