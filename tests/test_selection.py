"""Which connections are chosen: the definition, ties, repeatability, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuroada_kernels import NeuroAdaLinear, _extension, select, selection

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(
    autouse=True,
    params=[
        pytest.param(
            "compiled",
            marks=pytest.mark.skipif(
                _extension.library_error is not None, reason=f"{_extension.library_error}"
            ),
        ),
        "plain",
    ],
)
def way(request, monkeypatch) -> str:
    """By the C++ kernel where it serves, and in plain PyTorch."""
    if request.param == "plain":
        monkeypatch.setattr(_extension, "library_error", "left out")
    return request.param


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(d_out: int, d_in: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=generator(), dtype=torch.float64).to(dtype)


def largest_by_sorting(scores: torch.Tensor, k: int) -> list[list[int]]:
    """A stable sort, largest first, of each row: the lower of two equal columns comes first."""
    return [
        sorted(sorted(range(len(row)), key=lambda c, row=row: -row[c])[:k])
        for row in scores.tolist()
    ]


@pytest.mark.parametrize("k", [1, 2, 7, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_is_the_largest_absolute_weights(dtype, k):
    weight = normal(21, 33, dtype)
    index = select(weight, k)
    assert index.dtype == torch.int32
    assert index.is_contiguous()
    assert index.tolist() == largest_by_sorting(weight.double().abs(), k)


@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_smallest_is_the_smallest_absolute_weights(dtype, k):
    weight = normal(21, 33, dtype)
    assert select(weight, k, "smallest").tolist() == largest_by_sorting(-weight.double().abs(), k)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int32, torch.uint8])
def test_scores_are_ranked_with_their_sign_and_in_full_precision(dtype):
    if dtype.is_floating_point:
        scores = normal(21, 33, dtype)
    else:
        scores = torch.randint(0, 5, (21, 33), generator=generator()).to(dtype)
    expected = largest_by_sorting(scores, 4)
    assert select(normal(21, 33), 4, "scores", scores).tolist() == expected
    assert select(normal(21, 33), 4, scores=scores).tolist() == expected


def test_scores_that_float32_cannot_tell_apart_are_told_apart():
    scores = torch.tensor([[2**53, 2**53 + 2, 2**53 + 1]])
    assert select(torch.ones(1, 3), 1, scores=scores).tolist() == [[1]]


@pytest.mark.parametrize("method", ["magnitude", "smallest"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_weights_choose_the_first_columns(dtype, method):
    index = select(torch.full((5, 9), -0.25, dtype=dtype), 4, method)
    assert index.tolist() == [[0, 1, 2, 3]] * 5


@pytest.mark.parametrize("k", [1, 3, 10, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lower_columns(dtype, k):
    weight = torch.randint(-2, 3, (50, 40), generator=generator()).to(dtype)
    magnitude = weight.double().abs()
    assert select(weight, k).tolist() == largest_by_sorting(magnitude, k)
    assert select(weight, k, "smallest").tolist() == largest_by_sorting(-magnitude, k)


def test_both_zeros_are_one_score(way):
    scores = torch.tensor([[-1.0, -0.0, 0.0]])
    assert select(torch.ones(1, 3), 1, scores=scores).tolist() == [[1]]


def test_infinities_are_largest():
    weight = torch.tensor([[1.0, -math.inf, 3.0, math.inf], [0.0, -0.0, 0.0, 0.0]])
    assert select(weight, 2).tolist() == [[1, 3], [0, 1]]
    assert select(weight, 2, "smallest").tolist() == [[0, 2], [0, 1]]
    scores = torch.full((1, 4), -math.inf)
    assert select(torch.ones(1, 4), 2, scores=scores).tolist() == [[0, 1]]


@pytest.mark.parametrize("method", ["magnitude", "smallest", "random"])
def test_columns_rise_within_a_row_and_all_are_chosen_at_the_limit(method):
    index = select(normal(21, 33), 9, method, generator=generator())
    assert (index[:, 1:] > index[:, :-1]).all()
    assert (index >= 0).all()
    assert (index < 33).all()
    everything = select(normal(21, 33), 33, method, generator=generator())
    assert everything.tolist() == [list(range(33))] * 21


def test_random_repeats_with_the_generator_and_differs_between_rows():
    weight = normal(64, 100)
    index = select(weight, 5, "random", generator=generator(3))
    assert torch.equal(index, select(weight, 5, "random", generator=generator(3)))
    assert not torch.equal(index, select(weight, 5, "random", generator=generator(4)))
    assert len({tuple(row) for row in index.tolist()}) > 60


def test_random_without_a_generator_follows_the_global_seed():
    weight = normal(8, 30)
    torch.manual_seed(5)
    index = select(weight, 5, "random")
    assert not torch.equal(index, select(weight, 5, "random"))
    torch.manual_seed(5)
    assert torch.equal(index, select(weight, 5, "random"))


def test_random_covers_columns_uniformly():
    """Pearson's statistic of 15 degrees of freedom: 99.99 % of uniform draws lie below 45."""
    d_out, d_in, k = 4096, 16, 4
    index = select(normal(d_out, d_in), k, "random", generator=generator())
    counts = index.flatten().long().bincount(minlength=d_in).double()
    expected = d_out * k / d_in
    assert ((counts - expected) ** 2 / expected).sum() < 45


@pytest.mark.parametrize("block", [1, 7 * 33, 10 * 33 + 5, 1 << 30])
@pytest.mark.parametrize("method", ["magnitude", "smallest", "random", "scores"])
def test_choice_does_not_depend_on_the_block_size(monkeypatch, method, block):
    weight = torch.randint(-3, 4, (21, 33), generator=generator()).float()
    scores = weight.square() if method == "scores" else None

    def choose() -> torch.Tensor:
        return select(weight, 4, method, scores, generator(2), neuron_fraction=0.7)

    expected = choose()
    monkeypatch.setattr(selection, "_BLOCK_ELEMENTS", block)
    assert torch.equal(choose(), expected)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layout_of_the_weight_does_not_matter(layout):
    weight = normal(21, 33)
    view = weight.t().contiguous().t() if layout == "transposed" else weight.repeat(1, 2)[:, :33]
    assert torch.equal(select(view, 4), select(weight, 4))


@pytest.mark.parametrize(("fraction", "rows"), [(0.5, 20), (0.25, 10), (0.01, 1), (1.0, 40)])
def test_fraction_of_the_neurons(fraction, rows):
    weight = normal(40, 12)
    index = select(weight, 3, generator=generator(1), neuron_fraction=fraction)
    again = select(weight, 3, generator=generator(1), neuron_fraction=fraction)
    drawn = (index >= 0).all(1)
    assert torch.equal(index, again)
    assert int(drawn.sum()) == rows
    assert torch.equal(index[drawn], select(weight, 3)[drawn])
    assert (index[~drawn] == -1).all()
    if 1 < rows < 40:
        other = select(weight, 3, generator=generator(2), neuron_fraction=fraction)
        assert not torch.equal(other, index)


def test_weight_is_neither_changed_nor_tracked():
    weight = normal(21, 33).requires_grad_()
    values = weight.detach().clone()
    index = select(weight, 3)
    assert not index.requires_grad
    assert torch.equal(weight, values)


def test_the_kernel_serves_where_it_can_and_says_what_is_wrong(way):
    def is_served(weight, method="magnitude", scores=None):
        return selection._compiled(selection._Matrix(weight), 1, method, scores) is not None

    if way == "plain":
        assert not is_served(W)
        return
    assert all(is_served(W.to(dtype)) for dtype in DTYPES)
    assert not any(is_served(weight) for weight in (W.t(), W.to("meta")))
    assert not is_served(W, "scores", W.int())
    largest = torch.ops.neuroada_C.largest
    for arguments, words in (
        ((W, 0, 1), "k: 0, expected 1 to 6"),
        ((W, 7, 1), "k: 7, expected 1 to 6"),
        ((W, 1, 3), "by: 3, expected 0, 1 or 2"),
        ((W.t(), 1, 1), "stride 6 along a row"),
        ((W[0], 1, 1), "expected a matrix"),
        ((W.int(), 1, 1), "dtype is not float32"),
    ):
        with pytest.raises(RuntimeError, match=words):
            largest(*arguments)


W = torch.ones(4, 6)
NAN = torch.tensor([[0.0] * 6] * 3 + [[math.nan] + [0.0] * 5])
WRONG = {
    "weight NaN": (lambda: select(NAN, 1), ValueError, "weight: has NaN"),
    "weight NaN smallest": (lambda: select(NAN, 1, "smallest"), ValueError, "weight: has NaN"),
    "weight half NaN": (lambda: select(NAN.half(), 1), ValueError, "weight: has NaN"),
    "scores NaN": (lambda: select(W, 1, scores=NAN), ValueError, "scores: has NaN"),
    "scores shape": (
        lambda: select(W, 1, scores=W.t()),
        ValueError,
        r"scores: shape \[6, 4\], expected \[4, 6\]",
    ),
    "scores bool": (lambda: select(W, 1, scores=W > 0), TypeError, "scores: dtype torch.bool"),
    "scores complex": (
        lambda: select(W, 1, scores=W.to(torch.complex64)),
        TypeError,
        "scores: dtype torch.complex64",
    ),
    "scores meta": (
        lambda: select(W, 1, scores=W.to("meta")),
        ValueError,
        "scores: is on the meta device",
    ),
    "scores missing": (lambda: select(W, 1, "scores"), ValueError, "scores: missing"),
    "scores unused": (lambda: select(W, 1, "random", W), ValueError, "scores: given"),
    "weight meta": (lambda: select(W.to("meta"), 1), ValueError, "weight: is on the meta device"),
    "weight int": (lambda: select(W.int(), 1), TypeError, "weight: dtype torch.int32"),
    "weight list": (lambda: select(W.tolist(), 1), TypeError, "weight: list"),
    "weight vector": (lambda: select(W[0], 1), ValueError, r"weight: shape \[6\]"),
    "weight empty": (lambda: select(W[:0], 1), ValueError, r"weight: shape \[0, 6\]"),
    "method": (lambda: select(W, 1, "largest"), ValueError, "method: 'largest', expected one of"),
    "k zero": (lambda: select(W, 0), ValueError, "k: 0, expected 1 to 6"),
    "k large": (lambda: select(W, 7), ValueError, "k: 7, expected 1 to 6"),
    "k float": (lambda: select(W, 1.0), TypeError, r"k: 1\.0, expected an integer"),
    "k bool": (lambda: select(W, True), TypeError, "k: True, expected an integer"),
    **{
        f"fraction {fraction}": (
            lambda fraction=fraction: select(W, 1, neuron_fraction=fraction),
            ValueError,
            "neuron_fraction: ",
        )
        for fraction in (0, -0.5, 1.5, math.nan)
    },
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_argument_is_named(wrong):
    call, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        call()


class LargestAllocation(TorchDispatchMode):
    """The bytes of the largest storage that an op returned and was not given."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(values):
            tensors = [v for v in tree_leaves(values) if isinstance(v, torch.Tensor)]
            return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

        given = storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        fresh = [size for key, size in storages(result).items() if key not in given]
        self.bytes = max([self.bytes, *fresh])
        return result


@pytest.mark.parametrize("method", ["magnitude", "smallest", "random", "scores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_weights_size_is_allocated(monkeypatch, dtype, method):
    block = 1 << 13
    monkeypatch.setattr(selection, "_BLOCK_ELEMENTS", block)
    weight = normal(1024, 256, dtype)
    scores = weight.abs() if method == "scores" else None
    with LargestAllocation() as largest:
        select(weight, 2, method, scores, generator())
    # The widest value of a block is the key that breaks ties, an int64.
    assert 0 < largest.bytes <= 8 * block < weight.nbytes / 4


def test_k_may_be_a_number_of_numpy():
    assert select(W, np.int64(2)).equal(select(W, 2))
    assert NeuroAdaLinear(6, 4, np.int64(2)).k == 2
    assert NeuroAdaLinear(8, 100, np.uint8(3), device="meta").connections == 300
