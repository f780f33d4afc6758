"""``neuroada::merge_`` and ``neuroada::unmerge_``: the bypass folded into W, and out of it again.

    merge:   original[j, s] = W[j, index[j, s]], then W[j, index[j, s]] += delta[j, s]
    unmerge: W[j, index[j, s]] = original[j, s]

Both touch the chosen entries alone, so merging costs no copy of W and unmerging is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuroada_kernels import _registry
from neuroada_kernels.ops._library import define


def merge_(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """Add ``delta`` into ``weight [d_out, d_in]`` in place; the values it had, ``[d_out, k]``."""
    return torch.ops.neuroada.merge_.default(weight, index, delta)  # type: ignore[no-any-return]


def unmerge_(weight: Tensor, index: Tensor, original: Tensor) -> None:
    """Write ``original [d_out, k]`` back into ``weight``, bit for bit."""
    torch.ops.neuroada.unmerge_.default(weight, index, original)


def _merge(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    run = _registry.resolve("merge_", weight, index, delta)
    original: Tensor = run(weight, index, delta)
    # A kernel writes behind autograd's back; a backward that saved the weight must notice.
    torch.autograd.graph.increment_version(weight)
    return original


def _unmerge(weight: Tensor, index: Tensor, original: Tensor) -> None:
    run = _registry.resolve("unmerge_", weight, index, original)
    run(weight, index, original)
    torch.autograd.graph.increment_version(weight)


def _fake_merge(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    return weight.new_empty(index.shape)


def _fake_unmerge(weight: Tensor, index: Tensor, original: Tensor) -> None:
    return None


define("merge_(Tensor(a!) weight, Tensor index, Tensor delta) -> Tensor", _merge, _fake_merge)
define("unmerge_(Tensor(a!) weight, Tensor index, Tensor original) -> ()", _unmerge, _fake_unmerge)
