"""The candidates under pytest-benchmark: absolute times, grouped by case, to watch over commits.

Candidates run one after the other here. For ratios, ``neuroada bench`` interleaves them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from neuroada_kernels import BackendError
from neuroada_kernels.benchmarks.candidates import bench_inputs, prepare, table
from neuroada_kernels.benchmarks.exact import Exact
from neuroada_kernels.testing import BENCH_CASES, Case, Inputs

CANDIDATES = {name: row for name, row in table().items() if not row.peer}
CASES = [case for case in BENCH_CASES if case.k == 8 and case.d_in == case.d_out]


@lru_cache(maxsize=1)
def _checked_inputs(case: Case, dtype: torch.dtype) -> tuple[Inputs, Exact]:
    inputs = bench_inputs(case, dtype)
    return inputs, Exact(inputs)


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward_and_backward(benchmark: Any, name: str, case: Case, dtype: torch.dtype) -> None:
    inputs, exact = _checked_inputs(case, dtype)
    try:
        run = prepare(CANDIDATES[name], inputs, exact)
    except BackendError as error:
        pytest.skip(str(error))
    benchmark.group = f"{case.name} {str(dtype).removeprefix('torch.')}"
    with run.serving():
        benchmark.pedantic(lambda: run.backward(run.forward()), rounds=9, warmup_rounds=2)
