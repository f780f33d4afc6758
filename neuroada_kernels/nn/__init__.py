"""The layers."""

from neuroada_kernels.nn.bypass import NeuroAdaBypass, Requantization
from neuroada_kernels.nn.experts import NeuroAdaExperts
from neuroada_kernels.nn.linear import NeuroAdaLinear
from neuroada_kernels.nn.reference import ReferenceNeuroAdaLinear

__all__ = [
    "NeuroAdaBypass",
    "NeuroAdaExperts",
    "NeuroAdaLinear",
    "ReferenceNeuroAdaLinear",
    "Requantization",
]
