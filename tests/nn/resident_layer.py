"""The resident layer as a type of its own; not in conftest, whose name pickle cannot resolve."""

from __future__ import annotations

from neuroada_kernels import NeuroAdaLinear


class ResidentNeuroAdaLinear(NeuroAdaLinear):
    """A layer that by default is resident where that is allowed."""

    def __init__(self, *args, strategy="auto", **options):
        super().__init__(*args, strategy=strategy, **options)

    @classmethod
    def from_linear(cls, *args, strategy="auto", **options):
        return super().from_linear(*args, strategy=strategy, **options)
