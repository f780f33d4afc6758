"""What one layer keeps of x: x itself, or the columns that it chose, with the same gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuroada_kernels import NeuroAdaLinear, ReferenceNeuroAdaLinear, select_connections
from neuroada_kernels.nn import NeuroAdaBypass

D_IN, D_OUT, TOKENS = 24, 16, 9
STRATEGIES = pytest.mark.parametrize("strategy", ["bypass", "resident"])


def layer_of(columns: int, k: int = 2, **options: object) -> NeuroAdaLinear:
    """A layer whose neurons choose among so many columns, every other one of x, and reach all."""
    torch.manual_seed(0)
    linear = nn.Linear(D_IN, D_OUT)
    rows = torch.arange(D_OUT)[:, None]
    index = (1 + 2 * ((rows + torch.arange(k)) % columns)) % (D_IN + 1)
    layer = NeuroAdaLinear.from_linear(linear, index=index.int(), **options)
    nn.init.normal_(layer.delta, std=0.1)
    return layer


def input_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(layer: NeuroAdaLinear, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, layer.delta.grad.clone()]


def widths(layer: nn.Module, x: Tensor) -> list[int]:
    """The last dimension of what is kept beside the layer's own tensors."""
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    return [t.shape[-1] for t in saved if t.data_ptr() not in own]


def assert_columns_fit(layer: NeuroAdaLinear) -> None:
    """The columns are those that the index names, and ``kept_index`` leads to them."""
    named = layer.index[layer.index >= 0]
    assert layer.columns.dtype == layer.kept_index.dtype == torch.int32
    assert layer.columns.tolist() == sorted(set(named.tolist()))
    empty = layer.index < 0
    assert layer.kept_index[empty].eq(-1).all()
    assert layer.columns[layer.kept_index.clamp(min=0).long()][~empty].equal(named)


@pytest.mark.parametrize(
    ("mode", "columns", "width"),
    [
        ("auto", 12, 12),
        ("auto", 13, D_IN),
        ("compact", 13, 13),
        ("compact", 23, 23),
        ("compact", 24, D_IN),
        ("full", 4, D_IN),
    ],
)
@STRATEGIES
def test_each_mode_keeps_what_it_says(mode, columns, width, strategy):
    layer = NeuroAdaLinear(D_IN, 48, strategy=strategy, save_activations=mode)
    layer.index = (torch.arange(48)[:, None] % columns).int()
    x = input_of().requires_grad_()
    assert widths(layer, x) == [width]
    assert (layer.columns is None) == (width == D_IN)
    if layer.columns is not None:
        assert_columns_fit(layer)


@STRATEGIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_are_the_same_bits(strategy, dtype):
    x = input_of(dtype)
    results = [
        step(layer_of(5, save_activations=mode, strategy=strategy).to(dtype), x)
        for mode in ("full", "compact")
    ]
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@STRATEGIES
def test_autocast_keeps_the_columns_in_its_dtype(strategy):
    x, results = input_of(), []
    for mode in ("full", "compact"):
        layer = layer_of(5, save_activations=mode, strategy=strategy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(step(layer, x))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    assert results[0][0].dtype == torch.bfloat16
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert [t.dtype for t in kept if t.shape == (TOKENS, 5)] == [torch.bfloat16]
    assert not any(t.shape == x.shape and t.is_floating_point() for t in kept)


def test_nothing_is_kept_where_nothing_trains():
    layer, x = layer_of(5), input_of()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert layer(x).grad_fn is None
    layer.delta.requires_grad_(False)
    assert widths(layer, x.requires_grad_()) == []
    layer(x).sum().backward()
    assert x.grad is not None


MAKERS = {
    "relu": (torch.relu, True),
    "sigmoid, seen through views": (lambda x: x.t().sigmoid().t().unflatten(0, (3, 3)), True),
    "softmax": (lambda x: x.softmax(-1), True),
    "attention": (
        lambda x: nn.functional.scaled_dot_product_attention(*[x.view(1, 1, TOKENS, D_IN)] * 3),
        True,
    ),
    "gelu": (nn.functional.gelu, False),
    "a copy of relu's": (lambda x: torch.relu(x).clone(), False),
    "layer_norm": (lambda x: nn.functional.layer_norm(x, (D_IN,)), False),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("mode", ["auto", "compact"])
def test_what_its_maker_keeps_anyway_is_kept_by_reference(maker, mode):
    """Which functions keep their result is found out by asking them, not from the same list."""
    make, expected = MAKERS[maker]
    layer = layer_of(5, save_activations=mode)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        saved: list[Tensor] = []
        x = make(input_of().requires_grad_())
        by_maker = {t.untyped_storage().data_ptr() for t in saved}
        assert (x.untyped_storage().data_ptr() in by_maker) == expected
        saved.clear()
        layer(x)
        by_both = by_maker & {t.untyped_storage().data_ptr() for t in saved}
    assert bool(by_both) == expected


@pytest.mark.parametrize("reentrant", [True, False])
@STRATEGIES
def test_checkpointing_decides_alike_both_times(strategy, reentrant):
    """Also where the layer reads what was made outside, whose maker it sees or does not."""
    for make in (torch.relu, nn.functional.gelu):
        results = []
        for mode, recompute in (("full", False), ("compact", False), ("compact", True)):
            layer = layer_of(5, save_activations=mode, strategy=strategy)
            x = input_of().requires_grad_()
            given = make(x)
            y = checkpoint(layer, given, use_reentrant=reentrant) if recompute else layer(given)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, layer.delta.grad])
        for other in results[1:]:
            assert all(a.equal(b) for a, b in zip(other, results[0], strict=True))


def test_x_written_after_the_forward_is_refused_or_of_no_matter():
    """Refused where x itself is kept, as autograd does; a copy has the values of the forward."""
    x = input_of()
    layer = layer_of(5, save_activations="full")
    expected = step(layer, x)
    given = x.clone()
    y = layer(given)
    given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.square().sum().backward()
    layer.save_activations, layer.delta.grad, given = "compact", None, x.clone()
    y = layer(given)
    given.add_(1)
    y.square().sum().backward()
    assert layer.delta.grad.equal(expected[-1])


def test_delta_written_after_the_forward_is_refused():
    layer = layer_of(5, save_activations="compact")
    y = layer(input_of())
    with torch.no_grad():
        layer.delta.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def replaced(layer: NeuroAdaLinear, index: Tensor) -> None:
    layer.index = index


def written(layer: NeuroAdaLinear, index: Tensor) -> None:
    layer.index.copy_(index)


def loaded(layer: NeuroAdaLinear, index: Tensor) -> None:
    layer.load_state_dict({**layer.state_dict(), "index": index})


@pytest.mark.parametrize("change", [replaced, written, loaded])
@STRATEGIES
def test_the_columns_follow_the_index(change, strategy):
    layer, x = layer_of(5, strategy=strategy, save_activations="compact"), input_of()
    step(layer, x)
    index = (layer.index + 3) % D_IN
    index[0] = -1
    change(layer, index)
    twin = layer_of(5, strategy=strategy, save_activations="full")
    twin.index = index.clone()
    assert all(a.equal(b) for a, b in zip(step(layer, x), step(twin, x), strict=True))
    assert_columns_fit(layer)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_copies_keep_what_they_kept(duplicate):
    layer, x = layer_of(5, save_activations="compact"), input_of()
    twin = duplicate(layer)
    assert twin.save_activations == "compact"
    assert all(a.equal(b) for a, b in zip(step(twin, x), step(layer, x), strict=True))
    twin = copy.deepcopy(layer)
    twin.index = (layer.index + 3) % D_IN
    assert_columns_fit(twin)
    assert_columns_fit(layer)


def test_moving_casts_neither_columns_nor_index():
    layer = layer_of(5).type(torch.float64)
    assert_columns_fit(layer)
    layer(input_of(torch.float64))
    assert widths(layer, input_of(torch.float64)) == [5]


def test_nothing_of_it_is_in_the_state():
    layer = layer_of(5, save_activations="compact")
    assert set(layer.state_dict()) == {"weight", "bias", "index", "delta"}
    other = layer_of(13, save_activations="full")
    other.load_state_dict(layer.state_dict())
    assert other.save_activations == "full"
    assert other.columns is None
    other.save_activations = "auto"
    assert_columns_fit(other)


def test_a_merged_layer_keeps_nothing():
    layer = layer_of(5)
    layer.merge()
    assert widths(layer, input_of().requires_grad_()) == []
    layer.unmerge()
    assert widths(layer, input_of()) == [5]


def test_connections_chosen_later_are_looked_at_then():
    layer = NeuroAdaLinear(D_IN, 2, device="meta", save_activations="compact")
    assert layer.columns is None
    layer.to_empty(device="cpu")
    nn.init.normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    select_connections(nn.Sequential(layer))
    assert_columns_fit(layer)


def test_no_connection_at_all():
    layer, x = layer_of(5, save_activations="compact"), input_of()
    layer.index = torch.full_like(layer.index, -1)
    assert not step(layer, x)[-1].any()
    assert widths(layer, x) == [1]


def test_transforms_of_torch_func_see_the_formula():
    layer, x = layer_of(5, save_activations="compact"), input_of()

    def loss(delta: Tensor, row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"delta": delta}, (row,)).square().sum()

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(layer.delta.detach(), x)
    torch.testing.assert_close(rows.sum(0), step(layer, x)[-1])


def test_what_is_none_of_them_is_refused_and_changes_nothing():
    linear = nn.Linear(D_IN, D_OUT)
    words = "save_activations: 'some', expected one of"
    with pytest.raises(ValueError, match=words):
        NeuroAdaLinear(D_IN, D_OUT, save_activations="some")
    with pytest.raises(ValueError, match=words):
        NeuroAdaLinear.from_linear(linear, save_activations="some")
    assert linear.weight.requires_grad
    layer = layer_of(5, save_activations="full")
    with pytest.raises(ValueError, match=words):
        layer.save_activations = "some"
    assert layer.save_activations == "full"


class Frozen(nn.Linear):
    """A base whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def test_a_layer_round_a_base_keeps_the_columns_too():
    x, results = input_of(), []
    for mode in ("full", "compact"):
        torch.manual_seed(0)
        layer = NeuroAdaBypass(Frozen(D_IN, D_OUT), index=layer_of(5).index, save_activations=mode)
        nn.init.normal_(layer.delta, std=0.1)
        results.append(step(layer, x))
        assert (layer.columns is None) == (mode == "full")
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    assert_columns_fit(layer)
    kept = widths(layer, x)
    assert kept.count(5) == 1
    assert D_IN not in kept
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compact, layer.save_activations = step(layer, x), "full"
        assert all(a.equal(b) for a, b in zip(compact, step(layer, x), strict=True))


def test_the_reference_takes_it_and_computes_as_before():
    layer = ReferenceNeuroAdaLinear(D_IN, D_OUT, save_activations="compact")
    assert layer.save_activations == "compact"
    assert layer.columns is None


def test_the_repr_says_what_is_kept():
    assert "save_activations=compact, keeps 5 columns of x" in repr(
        layer_of(5, save_activations="compact")
    )
    assert "keeps" not in repr(layer_of(13))
