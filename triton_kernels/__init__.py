"""Triton kernels and their launchers, one op per file; imported as neuroada_kernels.triton_kernels.

Imports only torch and triton. Letters: t token, j neuron (a row of W), c input column, s slot of
a neuron, e entry (``j * k + s``).
"""

from neuroada_kernels.triton_kernels import configs
from neuroada_kernels.triton_kernels.bypass_bwd_input import bypass_bwd_input
from neuroada_kernels.triton_kernels.bypass_fwd import bypass_fwd
from neuroada_kernels.triton_kernels.linear_bwd_input import linear_bwd_input
from neuroada_kernels.triton_kernels.linear_fwd import linear_fwd
from neuroada_kernels.triton_kernels.merge import merge, patch, unmerge
from neuroada_kernels.triton_kernels.sddmm import sddmm, sddmm_partial
from neuroada_kernels.triton_kernels.transpose import transpose

__all__ = [
    "bypass_bwd_input",
    "bypass_fwd",
    "configs",
    "linear_bwd_input",
    "linear_fwd",
    "merge",
    "patch",
    "sddmm",
    "sddmm_partial",
    "transpose",
    "unmerge",
]
