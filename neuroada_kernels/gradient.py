"""Selection by gradient: the weights with the largest gradients of a loss over given data."""

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

#: Default limit on bytes of gradients in memory at a time.
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
    """Yields the magnitude of each weight's gradient, summed over ``data``, one at a time.

    ``|sum_batches dy^T x|``, ``[d_out, d_in]``, in float32 (float64 for float64): the magnitude of
    ``weight.grad``. Hooks accumulate the sums of as many weights as fit into ``score_bytes``, at
    least one; each further group takes another pass over ``data``. No parameter gets a gradient,
    and none has to require one.

    Parameters
    ----------
    model : nn.Module
        Run in its current mode, training or evaluation.
    linears : mapping
        The modules of ``model`` whose weights are scored, by name.
    data : iterable
        Batches; iterable more than once if several passes are needed.
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
        If the loss is no scalar or does not depend on a weight, or ``data`` is empty; if the input
        of a module is written in place before its gradient is computed; or if ``data`` is an
        iterator and several passes are needed.
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
    """``sum dy^T x`` of one linear, or of a module that computes one, over all its calls."""

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
        if not output.requires_grad:  # nothing upstream requires grad: the graph starts here
            output = output.detach().requires_grad_()
        dtype = autocast_dtype(x)
        if dtype is not None:  # the module read x cast to that dtype
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
        # A hook on a view, such as a linear's output, is lost if the view is written in place.
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
    """The linears in order, in groups whose gradients fit into ``score_bytes``."""
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
    """Within the block no parameter requires grad, so that no weight gradient is computed."""
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
