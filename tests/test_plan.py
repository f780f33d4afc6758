"""The index's checks and its plan: the C++ form and the torch form say the same, and the truth."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from neuroada_kernels import _extension, check_index, make_plan, order_slots
from neuroada_kernels._dtypes import FLOATING
from neuroada_kernels.plan import SPLITS, columns_of, is_plan_of, plan_parts, plan_size

needs_extension = pytest.mark.skipif(
    _extension.module is None, reason=f"no C++ planner: {_extension.module_error}"
)


def in_torch(function, *args):
    """The function's result where the extension is missing."""
    with mock.patch.object(_extension, "module", None):
        return function(*args)


def outcome(function, *args):
    """The result, or the error and its text."""
    try:
        return function(*args)
    except (TypeError, ValueError) as error:
        return type(error), str(error)


def random_index(d_out: int, d_in: int, k: int, empty: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(d_out, d_in, generator=generator).argsort(dim=1)[:, :k].int()
    return order.where(torch.rand(d_out, k, generator=generator) >= empty, -1)


def unpack(plan: Tensor, d_in: int) -> tuple[list[int], list[int], list[int]]:
    """``column_start, split, entry``; on a CPU ``order``, between the last two, is zero."""
    order = 4 + -(-d_in // 64) * 64
    sizes = [d_in + 1, SPLITS + 1, order, len(plan) - d_in - 1 - SPLITS - 1 - order]
    start, split, unordered, entry = plan.split(sizes)
    assert not unordered.any()
    assert len(plan) == plan_size(d_in, len(entry))
    return start.tolist(), split.tolist(), entry.tolist()


INDICES = {
    "one row": (random_index(1, 5, 2), 5),
    "one column": (torch.zeros(300, 1, dtype=torch.int32), 7),
    "last column": (torch.full((300, 1), 6, dtype=torch.int32), 7),
    "single input": (torch.zeros(4, 1, dtype=torch.int32), 1),
    "random": (random_index(90, 72, 8), 72),
    "wide": (random_index(20, 1000, 3), 1000),
    "every column": (random_index(9, 12, 12), 12),
    "ragged": (random_index(90, 72, 8, empty=0.3), 72),
    "empty": (torch.full((6, 3), -1, dtype=torch.int32), 10),
    "no rows": (torch.empty(0, 3, dtype=torch.int32), 10),
    "strided": (random_index(30, 40, 6)[::2, ::3], 40),
    "expanded": (torch.arange(3, dtype=torch.int32).expand(50, 3), 40),
}


@pytest.fixture(params=INDICES)
def index_and_width(request):
    return INDICES[request.param]


@needs_extension
def test_planners_agree(index_and_width):
    assert torch.equal(make_plan(*index_and_width), in_torch(make_plan, *index_and_width))


@needs_extension
def test_checks_agree(index_and_width):
    live = check_index(*index_and_width)
    assert live == in_torch(check_index, *index_and_width)
    assert live == int((index_and_width[0] >= 0).sum())


@pytest.fixture(params=["extension", "torch"])
def plan(request, index_and_width):
    if request.param == "torch":
        return in_torch(make_plan, *index_and_width)
    if _extension.module is None:
        pytest.skip(f"no C++ planner: {_extension.module_error}")
    return make_plan(*index_and_width)


def test_entries_are_the_stable_sort_by_column(plan, index_and_width):
    index, d_in = index_and_width
    columns = index.flatten().tolist()
    expected = sorted((c, e) for e, c in enumerate(columns) if c >= 0)
    start, split, entry = unpack(plan, d_in)
    assert [part.tolist() for part in plan_parts(plan, d_in)] == [start, split, entry]
    assert plan.dtype == torch.int32
    assert entry == [e for _, e in expected]
    for c in range(d_in):
        assert entry[start[c] : start[c + 1]] == [e for column, e in expected if column == c]


def test_splits_rise_and_share_the_work_evenly(plan, index_and_width):
    """No part exceeds its share by more than one column, which is never divided."""
    d_in = index_and_width[1]
    start, split, _ = unpack(plan, d_in)
    assert split[0] == 0
    assert split[-1] == d_in
    assert split == sorted(split)
    work = [start[c] + c for c in range(d_in + 1)]
    widest = max(b - a for a, b in pairwise(work))
    parts = [work[b] - work[a] for a, b in pairwise(split)]
    assert sum(parts) == work[-1]
    assert max(parts) <= work[-1] / SPLITS + widest


def in_another_order(plan: Tensor, d_in: int) -> Tensor:
    """The plan with the entries of each column turned round, and a trace of it in its order."""
    other = plan.clone()
    parts = plan_parts(other, d_in)
    for begin, end in pairwise(parts.column_start.tolist()):
        parts.entry[begin:end] = parts.entry[begin:end].flip(0).clone()
    other[d_in + 1 + SPLITS + 1] = 64
    return other


def test_a_plan_in_another_order_is_one_of_the_same_index(plan, index_and_width):
    index, d_in = index_and_width
    other = in_another_order(plan, d_in)
    assert is_plan_of(plan, index, d_in)
    assert is_plan_of(other, index, d_in)
    if len(plan_parts(plan, d_in).entry):
        assert not is_plan_of(plan[:-1], index, d_in)
        other[-1] += 1
        assert not is_plan_of(other, index, d_in)


def test_the_plan_of_another_index_is_none_of_this_one():
    index, other = random_index(30, 40, 4, seed=1), random_index(30, 40, 4, seed=2)
    assert not is_plan_of(make_plan(other, 40), index, 40)
    swapped = make_plan(index, 40)
    parts = plan_parts(swapped, 40)
    first, second = (int(c) for c in parts.column_start.diff().nonzero()[:2, 0])
    at = parts.column_start[[first, second]].tolist()
    parts.entry[at] = parts.entry[at[::-1]].clone()
    assert not is_plan_of(swapped, index, 40)


@st.composite
def valid_indices(draw):
    d_in = draw(st.integers(1, 12))
    k = draw(st.integers(1, d_in))
    rows = draw(st.lists(st.permutations(range(d_in)), max_size=8))
    keep = draw(st.lists(st.booleans(), min_size=len(rows) * k, max_size=len(rows) * k))
    index = torch.tensor([row[:k] for row in rows], dtype=torch.int32).reshape(len(rows), k)
    return index.where(torch.tensor(keep, dtype=torch.bool).reshape(index.shape), -1), d_in


@st.composite
def any_indices(draw):
    d_in = draw(st.integers(1, 6))
    k = draw(st.integers(1, d_in))
    value = st.integers(-2, d_in) | st.sampled_from([-(2**31), 2**31 - 1])
    rows = draw(st.lists(st.lists(value, min_size=k, max_size=k), max_size=5))
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), k), d_in


@needs_extension
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(valid_indices())
def test_planners_agree_on_made_up_indices(case):
    assert torch.equal(make_plan(*case), in_torch(make_plan, *case))
    assert check_index(*case) == in_torch(check_index, *case)


def is_valid(index: Tensor, d_in: int) -> bool:
    rows = [[c for c in row if c != -1] for row in index.tolist()]
    return all(len(set(row)) == len(row) and all(0 <= c < d_in for c in row) for row in rows)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(any_indices())
def test_check_accepts_exactly_the_valid_indices(case):
    for result in (outcome(check_index, *case), in_torch(outcome, check_index, *case)):
        assert isinstance(result, int) == is_valid(*case)


@needs_extension
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(any_indices())
def test_checks_say_the_same_of_made_up_indices(case):
    assert outcome(check_index, *case) == in_torch(outcome, check_index, *case)


def int32(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


WRONG = {
    "out of range": (
        int32([0, 1], [2, 4]),
        ValueError,
        "index: column 4 in row 1 is out of range for a weight with 4 inputs",
    ),
    "negative": (int32([0, -2]), ValueError, "index: column -2 in row 0 is out of range"),
    "largest": (int32([0, 2**31 - 1]), ValueError, "index: column 2147483647 in row 0"),
    "lowest": (int32([0, -(2**31)]), ValueError, "index: column -2147483648 in row 0"),
    "twice": (int32([0, 1], [3, 3]), ValueError, "index: column 3 stands twice in row 1"),
    "twice apart": (int32([3, 0, -1, 3]), ValueError, "index: column 3 stands twice in row 0"),
    "first of two rows": (
        int32([1, 1], [0, 9]),
        ValueError,
        "index: column 1 stands twice in row 0",
    ),
    "first of two pairs": (
        int32([3, 3, 1, 1]),
        ValueError,
        "index: column 3 stands twice in row 0",
    ),
    "int64": (int32([0, 1]).long(), TypeError, "index: dtype torch.int64, expected torch.int32"),
    "vector": (int32([0, 1])[0], ValueError, r"index: shape \[2\], expected \[d_out, k\]"),
    "too many": (int32([0, 1, 2, 3, -1]), ValueError, "index: 5 connections per neuron"),
    "none": (torch.empty(3, 0, dtype=torch.int32), ValueError, "index: 0 connections per neuron"),
    "too large for int32": (
        int32([0]).expand(2**30, 2),
        ValueError,
        "index: 2147483648 connections, expected fewer than",
    ),
    "meta": (int32([0, 1]).to("meta"), ValueError, "index: is on the meta device"),
}


@pytest.mark.parametrize("form", [pytest.param("extension", marks=needs_extension), "torch"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_index_is_named(wrong, form):
    index, error, message = WRONG[wrong]
    module = _extension.module if form == "extension" else None
    with mock.patch.object(_extension, "module", module), pytest.raises(error, match=message):
        check_index(index, 4)


@pytest.mark.parametrize(("index", "d_in"), INDICES.values(), ids=INDICES)
def test_ordering_the_slots_permutes_each_row(index, d_in):
    given = index.clone()
    ordered = order_slots(index)
    assert index.equal(given)
    assert ordered.sort(1).values.equal(index.sort(1).values)
    assert order_slots(index).equal(ordered)
    assert in_torch(order_slots, index).equal(index)


@needs_extension
def test_every_second_neuron_reads_a_slot_from_another_bank():
    """Sixteen neurons with one column of each bank, all in the same order."""
    index = torch.arange(8, dtype=torch.int32).repeat(16, 1) + 64 * torch.arange(16).view(16, 1)
    ordered = order_slots(index.int())
    for octet in (ordered[::2], ordered[1::2]):
        for slot in octet.T.tolist():
            assert len({column % 8 for column in slot}) == 8


@pytest.mark.parametrize("function", [check_index, make_plan])
def test_what_waits_for_a_gpu_is_refused_in_words_while_a_graph_is_captured(function, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        function(torch.zeros(4, 2, dtype=torch.int32, device="cuda"), 6)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", ["plain", "leading", "strided", "empty"])
def test_columns_are_copied_as_they_are(layout, dtype):
    x = torch.randn(6, 4, 9).to(dtype).requires_grad_()
    x = {"plain": x[0], "leading": x, "strided": x.transpose(0, 2), "empty": x[:0]}[layout]
    columns = int32([0, 2, 3])[0]
    copied = columns_of(x, columns, dtype)
    assert not copied.requires_grad
    assert copied.equal(x[..., columns])


@pytest.mark.skipif(_extension.library_error is not None, reason="no compiled ops")
@pytest.mark.parametrize(
    ("columns", "message"),
    {
        "beyond": (int32([0, 9])[0], "columns: 9 is out of range for an x with 9 columns"),
        "no column": (int32([-1])[0], "columns: -1 is out of range"),
        "int64": (torch.tensor([0]), "columns: dtype is not the expected int32"),
        "matrix": (int32([0]), "columns: shape \\[1, 1\\], expected one dimension"),
        "strided": (int32([0, 1, 2])[0, ::2], "columns: not contiguous"),
    }.values(),
)
def test_columns_that_x_lacks_are_refused(columns, message):
    with pytest.raises(RuntimeError, match=message):
        columns_of(torch.zeros(4, 9), columns, torch.float32)


@pytest.mark.parametrize("case", ["int64", "vector", "meta"])
def test_slots_of_what_is_no_index_are_not_ordered(case):
    index, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        order_slots(index)


def test_slots_of_narrower_numbers_are_not_ordered():
    with pytest.raises(TypeError, match=r"index: dtype torch\.int16, expected torch\.int32"):
        order_slots(torch.zeros(64, 8, dtype=torch.int16))
