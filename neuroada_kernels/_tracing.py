"""Whether calls are written down to be run again, and whether a tensor has values to be read.

A leaf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode

jit_state: Callable[[], object] = torch._C._get_tracing_state
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
#: Whether calls are written down before autograd sees them, as for ``torch.export``. The key is
#: there while any such mode is, and asking for it runs no Python.
is_pre_dispatched: Callable[[], bool] = functools.partial(
    torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch
)


def is_recorded() -> bool:
    """Whether what runs is written down, to be run again when ``delta`` has other values.

    By ``torch.compile``, ``torch.export``, ``torch.jit.trace`` or ``make_fx``. What Python decides
    by the values of now would hold for every later run.
    """
    return torch.compiler.is_compiling() or is_exported()


def is_exported() -> bool:
    """The same but for ``torch.compile``: what is written down is to run without the layer."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    if jit_state() is not None:
        return True
    if dispatch_modes() == 0 and not is_pre_dispatched():
        return False
    return get_proxy_mode() is not None


def has_no_values(tensor: Tensor) -> bool:
    """Whether ``tensor`` has a shape alone: on the meta device, or a ``FakeTensor`` of any other.

    The memory of a fake one is at address zero, where a kernel must not look.
    """
    return tensor.is_meta or is_fake(tensor)
