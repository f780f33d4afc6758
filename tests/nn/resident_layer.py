"""The resident layer as a type of its own; in no conftest, whose name pickle could not resolve."""

from __future__ import annotations

from neuroada_kernels import NeuroAdaLinear


class ResidentNeuroAdaLinear(NeuroAdaLinear):
    """One that is resident where it may be, unless it is told otherwise."""

    def __init__(self, *args, strategy="auto", **options):
        super().__init__(*args, strategy=strategy, **options)

    @classmethod
    def from_linear(cls, *args, strategy="auto", **options):
        return super().from_linear(*args, strategy=strategy, **options)
