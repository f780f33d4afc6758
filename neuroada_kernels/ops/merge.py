"""The chosen entries of W: ``neuroada::merge_``, ``unmerge_``, ``gather`` and ``patch_``.

    merge_:   original[j, s] = W[j, index[j, s]], then W[j, index[j, s]] += delta[j, s]
    unmerge_: W[j, index[j, s]] = original[j, s]
    gather:   original[j, s] = W[j, index[j, s]]
    patch_:   W[j, index[j, s]] = original[j, s] + delta[j, s]

No op touches another entry, so merging costs no copy of W. Sums are rounded once. ``unmerge_`` and
``patch_`` assign, so they are idempotent, and repeated patching does not accumulate error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuroada_kernels import _registry
from neuroada_kernels.ops._library import define, is_plain_eager


def merge_(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """Add ``delta`` into ``weight [d_out, d_in]`` in place; returns old values, ``[d_out, k]``."""
    return torch.ops.neuroada.merge_.default(weight, index, delta)  # type: ignore[no-any-return]


def unmerge_(weight: Tensor, index: Tensor, original: Tensor) -> None:
    """Write ``original [d_out, k]`` back into ``weight``, bit for bit."""
    torch.ops.neuroada.unmerge_.default(weight, index, original)


def gather(weight: Tensor, index: Tensor) -> Tensor:
    """The chosen entries of ``weight``, ``[d_out, k]``; zero in a slot without a connection."""
    return torch.ops.neuroada.gather.default(weight, index)  # type: ignore[no-any-return]


def patch_(weight: Tensor, index: Tensor, delta: Tensor, original: Tensor) -> None:
    """Write ``original + delta``, each ``[d_out, k]``, into ``weight`` in place."""
    if is_plain_eager(weight):
        return _patch(weight, index, delta.detach(), original)
    torch.ops.neuroada.patch_.default(weight, index, delta, original)


def _merge(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    original: Tensor = _registry.run("merge_", weight, index, delta)
    # Autograd does not see the kernel's write; a backward that saved the weight must detect it.
    torch.autograd.graph.increment_version(weight)
    return original


def _unmerge(weight: Tensor, index: Tensor, original: Tensor) -> None:
    _registry.run("unmerge_", weight, index, original)
    torch.autograd.graph.increment_version(weight)


def _gather(weight: Tensor, index: Tensor) -> Tensor:
    original: Tensor = _registry.run("gather", weight, index)
    return original


def _patch(weight: Tensor, index: Tensor, delta: Tensor, original: Tensor) -> None:
    _registry.run("patch_", weight, index, delta, original)
    torch.autograd.graph.increment_version(weight)


def _fake_entries(weight: Tensor, index: Tensor, *delta: Tensor) -> Tensor:
    return weight.new_empty(index.shape)


def _fake_write(weight: Tensor, *rest: Tensor) -> None:
    return None


define("merge_(Tensor(a!) weight, Tensor index, Tensor delta) -> Tensor", _merge, _fake_entries)
define("unmerge_(Tensor(a!) weight, Tensor index, Tensor original) -> ()", _unmerge, _fake_write)
define("gather(Tensor weight, Tensor index) -> Tensor", _gather, _fake_entries)
define(
    "patch_(Tensor(a!) weight, Tensor index, Tensor delta, Tensor original) -> ()",
    _patch,
    _fake_write,
)
