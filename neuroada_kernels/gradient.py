"""Connections by gradient: the weights that the loss would change most, over some data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels._dtypes import accumulated_in
from neuroada_kernels._progress import progress_bar
from neuroada_kernels.functional import autocast_dtype
from neuroada_kernels.nn.foreign import base_weight

#: Bytes of gradients that are in memory at a time, where a caller says nothing else.
SCORE_BYTES = 1 << 30

Loss = Callable[[nn.Module, Any], Tensor]


def each_gradient(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    data: Iterable[Any],
    loss: Loss,
    *,
    score_bytes: int = SCORE_BYTES,
    show_progress: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """The magnitude of the gradient of each weight, summed over ``data``, one at a time.

    ``|sum_batches dy^T x|``, ``[d_out, d_in]``, in float32 (float64 for float64): what
    ``weight.grad`` would hold. Hooks gather it for as many weights as ``score_bytes`` has room
    for, at least one; then ``data`` is gone through again for the next ones. No parameter gets a
    gradient, and none needs one.

    Parameters
    ----------
    model : nn.Module
        Run as it is, in its training or its evaluation mode.
    linears : mapping
        Which of its modules, by name.
    data : iterable
        Batches; one that can be gone through more than once.
    loss : callable
        From the model and a batch to a scalar.
    score_bytes : int
        Memory for gradients, in bytes.
    show_progress : bool
        Show a progress bar.

    Raises
    ------
    TypeError
        If the loss is no tensor.
    ValueError
        If the loss is no scalar, does not depend on a weight, or has no batch; if what a module
        reads is written in place before its gradient is known; or if ``data`` can be gone through
        only once and has to be more often.
    """
    groups = _groups(linears, score_bytes)
    if len(groups) > 1 and iter(data) is data:
        raise ValueError(
            f"data: an iterator, which can be gone through once, expected one for {len(groups)} "
            "times, such as a DataLoader, or more score_bytes"
        )
    with progress_bar("gradients", len(groups), show_progress) as advance:
        for group in groups:
            sums = {name: _Sum(name, linear) for name, linear in group.items()}
            with _frozen(model), _hooked(group, sums):
                for batch in data:
                    _checked(loss(model, batch)).backward()
            advance(1)
            for name in list(sums):
                yield name, sums.pop(name).magnitude()


class _Sum:
    """``sum dy^T x`` of one linear, or what computes like one, over all its calls."""

    def __init__(self, name: str, linear: nn.Module) -> None:
        self.name = name
        weight = base_weight(linear)
        dtype = accumulated_in(weight.dtype)
        self.total = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        self.reached = False

    def hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if not output.requires_grad:  # nor does anything before it: the graph starts here
            output = output.detach().requires_grad_()
        dtype = autocast_dtype(x)
        if dtype is not None:  # the module read a copy in that dtype, unless x has it
            x = x.to(dtype)
        version = None if x.is_inference() else x._version

        def add(grad: Tensor) -> None:
            if version is not None and x._version != version:
                raise ValueError(
                    f"loss: what {self.name} reads is written in place before its gradient is "
                    "known, expected it to stay"
                )
            self.add(grad, x)

        output.register_hook(add)
        # A hook is lost where the tensor is a view, as a linear's output is, and written in place.
        return output.clone()

    @torch.no_grad()
    def add(self, grad: Tensor, x: Tensor) -> None:
        d_out, d_in = self.total.shape
        rows = grad.reshape(-1, d_out).to(self.total.dtype)
        self.total.addmm_(rows.t(), x.reshape(-1, d_in).to(self.total.dtype))
        self.reached = True

    def magnitude(self) -> Tensor:
        if not self.reached:
            raise ValueError(f"loss: does not depend on {self.name}, expected a gradient there")
        return self.total.abs_()


def _groups(linears: Mapping[str, nn.Module], score_bytes: int) -> list[dict[str, nn.Module]]:
    """The linears in order, as many together as there is memory for their gradients."""
    groups: list[dict[str, nn.Module]] = []
    room = 0
    for name, linear in linears.items():
        weight = base_weight(linear)
        size = math.prod(weight.shape) * max(4, weight.dtype.itemsize)
        if size > room or not groups:
            groups.append({})
            room = score_bytes
        groups[-1][name] = linear
        room -= size
    return groups


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter needs a gradient, so that none is computed."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _hooked(group: Mapping[str, nn.Module], sums: Mapping[str, _Sum]) -> Iterator[None]:
    handles = [
        linear.register_forward_hook(sums[name].hook, with_kwargs=True)
        for name, linear in group.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checked(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: gave {type(loss).__name__}, expected a tensor")
    if loss.numel() != 1:
        raise ValueError(f"loss: gave shape {list(loss.shape)}, expected a scalar")
    if not loss.requires_grad:
        raise ValueError("loss: does not depend on the modules that are adapted")
    return loss
