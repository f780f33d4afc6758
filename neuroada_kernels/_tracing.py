"""Whether calls are recorded by a tracer, and whether a tensor has values that can be read.

Imports no other module of this package.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode

jit_state: Callable[[], object] = torch._C._get_tracing_state
_set_jit_state: Callable[[object], None] = torch._C._set_tracing_state  # type: ignore[attr-defined]
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
#: Whether calls are traced before autograd, as by ``torch.export``. The dispatch key is included
#: while any such mode is active, and testing for it runs no Python.
is_pre_dispatched: Callable[[], bool] = functools.partial(
    torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch
)


def is_recorded() -> bool:
    """Whether calls are recorded, to be run again when ``delta`` has other values.

    By ``torch.compile``, ``torch.export``, ``torch.jit.trace`` or ``make_fx``. A Python branch on
    current values would be fixed for every later run.
    """
    return torch.compiler.is_compiling() or is_exported()


def is_exported() -> bool:
    """As :func:`is_recorded`, without ``torch.compile``: the program will run without the layer."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    if jit_state() is not None:
        return True
    if dispatch_modes() == 0 and not is_pre_dispatched():
        return False
    return get_proxy_mode() is not None


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Ops in this block run once, on the values there are, and are left out of a trace.

    For what a layer prepares before its forward: ``torch.jit.trace`` and ``make_fx`` would record
    an allocation, but not what a kernel writes into it by its address.
    """
    state = jit_state()
    _set_jit_state(None)
    try:
        with disable_proxy_modes_tracing():
            yield
    finally:
        _set_jit_state(state)


def has_no_values(tensor: Tensor) -> bool:
    """Whether ``tensor`` has no values: on the meta device, or a ``FakeTensor`` of any device.

    The data pointer of a fake tensor is null, so a kernel must not read it.
    """
    return tensor.is_meta or is_fake(tensor)
