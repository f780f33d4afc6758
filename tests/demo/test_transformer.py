"""The model sees the past and its order, never the future."""

from __future__ import annotations

import math

import pytest
import torch

from neuroada_kernels.demo.training import Schedule
from neuroada_kernels.demo.transformer import Config, Transformer, generate, loss_of, rotate

CONFIG = Config(d_model=32, layers=2, heads=2, d_hidden=48, context=16)


@pytest.fixture
def model() -> Transformer:
    return Transformer(CONFIG, seed=0)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))


def test_a_byte_changes_no_prediction_before_it(model: Transformer, tokens: torch.Tensor) -> None:
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert (after[:, 9:] != before[:, 9:]).any(-1).all()


def test_the_order_of_the_past_matters(model: Transformer, tokens: torch.Tensor) -> None:
    # In one layer without positions, attention is a weighted mean in no order.
    swapped = tokens.clone()
    swapped[:, [2, 3]] = tokens[:, [3, 2]]
    assert (model(swapped)[:, -1] - model(tokens)[:, -1]).abs().max() > 1e-6


def test_rotary_products_depend_on_the_distance_alone() -> None:
    angles = torch.arange(12)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    query, key = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()
    queries, keys = (rotate(v.expand(12, 4), angles.cos(), angles.sin()) for v in (query, key))
    products = queries @ keys.t()  # [t, s]
    for distance in range(-3, 4):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.isclose(products[0, 0], products[1, 0])


def test_an_untrained_model_knows_nothing(model: Transformer, tokens: torch.Tensor) -> None:
    assert loss_of(model, tokens).item() == pytest.approx(math.log(256), rel=0.03)


def test_the_same_seed_gives_the_same_model_and_the_same_text(model: Transformer) -> None:
    again, other = Transformer(CONFIG, seed=0), Transformer(CONFIG, seed=1)
    assert generate(model, b"def ", 20, seed=0) == generate(again, b"def ", 20, seed=0)
    assert not torch.equal(model.embedding.weight, other.embedding.weight)


def test_a_sequence_beyond_the_context_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="tokens: 17 positions, expected at most 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_the_learning_rate_rises_then_falls_to_a_tenth() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0)
    rates = [schedule.rate(step) for step in range(101)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == 1.0
    assert rates[100] == pytest.approx(0.1)
