"""The table of shapes that tests and benchmarks share, and the error tolerances."""

from neuroada_kernels.testing.cases import (
    BENCH_CASES,
    CASES,
    GPU_BENCH_CASES,
    MODEL_SHAPES,
    Case,
    Inputs,
    Shape,
    make_inputs,
)
from neuroada_kernels.testing.tolerances import rms_error, tolerance

__all__ = [
    "BENCH_CASES",
    "CASES",
    "GPU_BENCH_CASES",
    "MODEL_SHAPES",
    "Case",
    "Inputs",
    "Shape",
    "make_inputs",
    "rms_error",
    "tolerance",
]
