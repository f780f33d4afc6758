"""The public ops of ``torch.library`` namespace ``neuroada``: schema, fake and autograd of each.

An op dispatches through :mod:`neuroada_kernels._registry`; it never imports a backend.
"""

from neuroada_kernels.ops._library import is_plain_eager
from neuroada_kernels.ops.bypass_add import bypass_add
from neuroada_kernels.ops.linear import linear
from neuroada_kernels.ops.merge import gather, merge_, patch_, unmerge_
from neuroada_kernels.ops.resident import resident_linear

__all__ = [
    "bypass_add",
    "gather",
    "is_plain_eager",
    "linear",
    "merge_",
    "patch_",
    "resident_linear",
    "unmerge_",
]
