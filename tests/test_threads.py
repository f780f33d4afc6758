"""The same bits for any number of threads, and every element of a result written."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from gradients import (
    bypass,
    differentiate,
    differentiate_in_float64,
    linear,
    linear_tensors,
    reference_linear,
)
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels.plan import columns_of
from neuroada_kernels.testing import CASES, Case, Inputs, make_inputs, rms_error, tolerance

# Few tokens are cut by rows, many by blocks and chunks; column 0 chosen by all is the hardest to
# balance. All are large enough that the kernels take more than one thread.
SHAPES = [
    Case(1, 96, 9000, 8),
    Case(17, 96, 900, 8, bias=True, index="one_column"),
    Case(129, 64, 72, 20, index="ragged"),
    Case(700, 96, 257, 2, bias=True),
    Case(2100, 40, 24, 8),
]
THREADS = sorted({2, min(4, os.cpu_count() or 1)})

every_shape = pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
cpu_backend = pytest.mark.skipif(
    nk.available_backends()["cpu"] is not None, reason="the C++ kernels are not built"
)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bypass_results(inputs: Inputs) -> tuple[Tensor, ...]:
    """The bypass added to y, its dx and its ddelta: all of it from our kernels."""
    y = inputs.grad_output.flip(0)
    return differentiate(bypass(inputs), [y, inputs.x, inputs.delta], inputs.grad_output)


@cpu_backend
@every_shape
@pytest.mark.usefixtures("restore_threads")
def test_the_number_of_threads_changes_no_bit(case, dtype):
    inputs = make_inputs(case, dtype)

    def run(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        with nk.use_backend("cpu"):
            _, _, grad_delta = differentiate(
                lambda x, delta: linear(inputs)(x, delta, inputs.bias),
                [inputs.x, inputs.delta],
                inputs.grad_output,
            )
            return *bypass_results(inputs), grad_delta

    alone = run(1)
    for threads in THREADS:
        assert all(a.equal(b) for a, b in zip(alone, run(threads), strict=True))


@pytest.mark.parametrize("case", SHAPES[:3], ids=lambda case: case.name)
def test_the_same_call_gives_the_same_bits(case, dtype, backend, device):
    inputs = make_inputs(case, dtype, device=device)
    first = bypass_results(inputs)
    assert all(a.equal(b) for a, b in zip(first, bypass_results(inputs), strict=True))


@pytest.mark.usefixtures("restore_threads")
def test_the_fallback_gives_the_same_bits_where_torch_shares_out_its_sums():
    """Some of torch's ways to add rows use atomics, from tens of thousands of elements on."""
    inputs = make_inputs(Case(512, 256, 1024, 4), torch.float32)
    torch.set_num_threads(2)
    with nk.use_backend("eager"):
        first = bypass_results(inputs)
        for _ in range(5):
            assert all(a.equal(b) for a, b in zip(first, bypass_results(inputs), strict=True))


@cpu_backend
@every_shape
@pytest.mark.usefixtures("restore_threads")
def test_merging_does_not_depend_on_the_threads(case, dtype):
    inputs = make_inputs(case, dtype)
    outcomes = []
    for threads in (1, *THREADS):
        torch.set_num_threads(threads)
        weight = inputs.weight.clone()
        with nk.use_backend("cpu"):
            original = torch.ops.neuroada.merge_(weight, inputs.index, inputs.delta)
        outcomes.append((weight, original))
    for weight, original in outcomes[1:]:
        assert weight.equal(outcomes[0][0])
        assert original.equal(outcomes[0][1])


@cpu_backend
@pytest.mark.usefixtures("restore_threads")
def test_threads_copy_all_columns(dtype):
    x = torch.randn(513, 300).to(dtype)  # as much as three threads are worth
    columns = torch.arange(1, 300, 2, dtype=torch.int32)
    for threads in (1, *THREADS):
        torch.set_num_threads(threads)
        assert columns_of(x, columns, dtype).equal(x[:, 1::2])


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """``torch.empty`` is filled with NaN, and torch's own operations are deterministic or raise."""
    filling = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filling


@pytest.mark.usefixtures("unwritten_is_nan")
def test_what_the_backends_allocate_is_nan_until_written(dtype, backend, device):
    x = torch.zeros(3, dtype=dtype, device=device)
    assert x.new_empty(4, 5).isnan().all()
    assert torch.empty(4, dtype=dtype, device=device).isnan().all()


@pytest.mark.parametrize("case", [*SHAPES[:3], *CASES[:10]], ids=lambda case: case.name)
@pytest.mark.usefixtures("unwritten_is_nan")
def test_every_element_of_a_result_is_written(case, dtype, backend, device):
    inputs = make_inputs(case, dtype, device=device)
    results = differentiate(linear(inputs), linear_tensors(inputs), inputs.grad_output)
    assert all(result.isfinite().all() for result in (*results, *bypass_results(inputs)))
    expected = differentiate_in_float64(
        reference_linear(inputs), linear_tensors(inputs), inputs.grad_output
    )
    reductions = (case.d_in + case.k, case.d_out * (1 + case.k), case.tokens, case.tokens)
    for result, truth, reduction in zip(results, expected, reductions, strict=False):
        assert rms_error(result, truth) <= tolerance(dtype, reduction, result.dtype)
    weight = inputs.weight.clone()
    original = torch.ops.neuroada.merge_(weight, inputs.index, inputs.delta)
    assert original.isfinite().all()
    assert (original[inputs.index < 0] == 0).all()
