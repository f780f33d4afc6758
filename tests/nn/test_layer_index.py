"""A new index takes effect at once, forward and backward; a wrong one is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from layer_facts import assert_state, effective_weight, input_gradient, other_index, state_of

from neuroada_kernels import NeuroAdaLinear
from neuroada_kernels.testing import rms_error, tolerance

WRONG = {
    "out of range": (lambda index: index.clone().fill_diagonal_(24), ValueError),
    "below -1": (lambda index: index.clone().fill_diagonal_(-2), ValueError),
    "stands twice": (lambda index: torch.zeros_like(index), ValueError),
    "int64": (lambda index: index.long(), TypeError),
    "shape": (lambda index: index[:-1], ValueError),
}


def assert_follows_index(layer) -> None:
    """Output and input gradient are those of the index the layer holds now."""
    x = torch.randn(5, layer.in_features)
    expected = x.double() @ effective_weight(layer).t() + layer.bias.double()
    assert rms_error(layer(x), expected) <= tolerance(torch.float32, layer.in_features)
    assert rms_error(*input_gradient(layer)) <= tolerance(torch.float32, layer.out_features)


def test_given_index_is_used_and_copied(layer_type):
    index = other_index(layer_type(24, 16, 3))
    layer = layer_type.from_linear(torch.nn.Linear(24, 16), index=index)
    assert torch.equal(layer.index, index)
    index.zero_()
    assert layer.index.any()


def test_index_that_is_set_acts_at_once(trained):
    layer = trained()
    assert_follows_index(layer)
    layer.index = other_index(layer)
    assert_follows_index(layer)


def test_index_that_is_written_in_place_acts_at_once(trained):
    layer = trained()
    assert_follows_index(layer)
    layer.index.copy_(other_index(layer))
    assert_follows_index(layer)
    layer.index[3] = -1
    assert_follows_index(layer)


def replace_twice(index: torch.Tensor, values: torch.Tensor) -> None:
    """Through ``.data``, which counts no versions; in the end at the first address if possible."""
    address = index.data_ptr()
    index.data = values.clone()
    others = [values.clone() for _ in range(64)]
    index.data = next((other for other in others if other.data_ptr() == address), others[0])


def test_index_whose_data_is_replaced_twice_acts_at_once(trained):
    layer = trained()
    for _ in range(4):
        assert_follows_index(layer)
        replace_twice(layer.index, other_index(layer))
    assert_follows_index(layer)


def test_index_with_other_strides_works(trained):
    layer = trained()
    layer.index = other_index(layer).t().contiguous().t()
    assert_follows_index(layer)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_index_is_refused_and_the_old_one_stays(trained, wrong):
    make, error = WRONG[wrong]
    layer = trained()
    before = state_of(layer)
    with pytest.raises(error, match="index: "):
        layer.index = make(layer.index)
    assert_state(layer, before)
    assert_follows_index(layer)


@pytest.mark.parametrize("value", [24, -2])
def test_wrong_column_written_in_place_raises_at_every_call(value):
    layer = NeuroAdaLinear(24, 16, 3)
    kept = int(layer.index[2, 1])
    layer.index[2, 1] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=f"index: column {value} in row 2 is out of range"):
            layer(torch.randn(5, 24))
    layer.index[2, 1] = kept
    assert_follows_index(layer)


def test_index_written_before_the_backward_makes_it_raise():
    layer = NeuroAdaLinear(24, 16, 3)
    y = layer(torch.randn(5, 24, requires_grad=True))
    layer.index.copy_(other_index(layer))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_index_set_while_merged_does_not_spoil_the_weight(trained):
    layer = trained()
    weight = layer.weight.clone()
    layer.merge()
    with contextlib.suppress(RuntimeError, ValueError):
        layer.index = other_index(layer)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
