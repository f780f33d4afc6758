"""Several adapters of a model: each is what it would be alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from adapted import TARGETS, Model, adapted, inputs, layers, trained
from torch import Tensor, nn
from two_adapters import FIRST, ROWS, SECOND, STRATEGIES, Transposed, alone, assert_same, both, step

import neuroada_kernels as nk


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_adapter_is_what_it_would_be_alone(strategy, dtype):
    model, x = both(strategy, dtype), inputs(dtype)
    for name in ("default", "second", "default"):
        nk.set_adapter(model, name)
        assert nk.active_adapter(model) == name
        assert_same(step(model, x), step(alone(name, strategy, dtype), x))


def test_an_adapter_that_is_added_changes_nothing_until_it_is_active():
    model = adapted()
    before = step(model, inputs())
    summary = nk.add_adapter(model, "second", nk.NeuroAdaConfig(**SECOND))
    assert nk.adapter_names(model) == ("default", "second")
    assert_same(step(model, inputs()), before)
    assert summary.modules == ("blocks.0.up", "blocks.1.up", "head")
    assert summary.trainable == (12 + 12 + 4) * 3
    assert summary.optimizer_bytes == 2 * 4 * summary.trainable


def test_connections_are_chosen_by_the_base_whatever_is_active():
    model = both("resident")
    nk.add_adapter(model, "third", **SECOND)
    for layer in layers(model).values():
        if "third" in layer.adapter_names:
            assert layer.holder_of("third").index.equal(layer.holder_of("second").index)


def test_connections_go_by_the_gradient_of_the_base():
    how = {"selection": "gradient", "data": [inputs()], "loss": lambda m, x: m(x).square().sum()}
    model, expected = both("resident"), Model()
    nk.adapt(expected, 2, TARGETS, **how)
    nk.add_adapter(model, "third", 2, TARGETS, **how)
    for name, layer in layers(expected).items():
        assert layers(model)[name].holder_of("third").index.equal(layer.index)


class Attention(nn.Module):
    """Three layers that read the same x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)


def test_layers_keep_the_columns_of_x_that_the_active_adapter_chose():
    configs = {
        "default": {"k": 1, "target_modules": ["q_proj", "k_proj"]},
        "second": {"k": 2, "target_modules": ["q_proj", "v_proj"]},
    }
    model, x = Attention(), torch.randn(5, 64)
    nk.adapt(model, **configs["default"])
    nk.add_adapter(model, "second", **configs["second"])
    for name in ("second", "default", "second"):
        expected = Attention()
        nk.adapt(expected, **configs[name])
        nk.set_adapter(model, name)
        for active, layer in layers(expected).items():
            assert layers(model)[active].columns.equal(layer.columns)
        assert_same(step(model, x), step(expected, x))
        with nk.disable_adapter(model), nk.rows_of(model, ["second", *["default"] * 4]):
            model(x)
        assert_same(step(model, x), step(expected, x))


def test_all_linear_means_the_modules_that_are_adapted_too():
    model, expected = Transposed(), Transposed()
    nk.adapt(model, 1, ["down"])
    summary = nk.add_adapter(model, "second", 3)
    nk.adapt(expected, 3)
    nk.set_adapter(model, "second")
    assert summary.modules == ("up", "down", "head")
    assert_same(step(trained(model, 0), inputs()), step(trained(expected, 0), inputs()))


def test_an_optimizer_goes_on_with_an_adapter_as_if_there_had_been_no_other():
    model, expected = both(), alone("default")
    deltas = [layer.delta for layer in layers(model).values() if layer.active_adapter]
    optimizers = [
        torch.optim.AdamW(deltas, lr=0.1),
        torch.optim.AdamW([layer.delta for layer in layers(expected).values()], lr=0.1),
    ]
    for name in ("default", "second", "default"):
        nk.set_adapter(model, name)
        model(inputs()).square().sum().backward()
        if name == "second":
            model.zero_grad()
            continue
        expected(inputs()).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(any(delta is layer.delta for layer in layers(model).values()) for delta in deltas)
    assert_same(step(model, inputs()), step(expected, inputs()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_disabled_adapter_leaves_the_base(strategy):
    model, base = both(strategy), Model()
    before = step(model, inputs())
    held = {name: layer.weight.clone() for name, layer in layers(model).items()}
    with nk.disable_adapter(model):
        assert nk.active_adapter(model) is None
        assert model(inputs()).equal(base(inputs()))
        for name, layer in layers(model).items():
            assert layer.weight.equal(base.get_submodule(name).weight)
        with nk.disable_adapter(model):
            nk.set_adapter(model, "second")
        assert model(inputs()).equal(base(inputs()))
    assert all(layer.weight.equal(held[name]) for name, layer in layers(model).items())
    assert_same(step(model, inputs()), before)


def test_an_error_ends_a_block_as_well():
    model = both()
    before = step(model, inputs())
    for block in (nk.disable_adapter(model), nk.rows_of(model, ROWS)):
        with pytest.raises(ZeroDivisionError), block:
            raise ZeroDivisionError
        assert_same(step(model, inputs()), before)


@pytest.mark.parametrize("kind", [Model, Transposed])
@pytest.mark.parametrize("names", [ROWS, sorted(ROWS)], ids=["mixed", "sorted"])
def test_each_row_goes_through_its_own_adapter(kind, names):
    model = kind().double()
    nk.adapt(model, **FIRST)
    nk.add_adapter(model, "second", **SECOND)
    nk.set_requires_grad(model, ["default", "second"])
    trained(model, 0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 6, generator=generator, dtype=torch.float64)

    with nk.rows_of(model, names):
        y, x_grad, *_ = step(model, x)
    gradients = {p: p.grad for p in model.parameters() if p.requires_grad}
    assert len(gradients) == {Model: 7, Transposed: 4}[kind]
    seen = set()
    for name in ("default", "second", "__base__"):
        rows = [row for row, its_name in enumerate(names) if its_name == name]
        if name == "__base__":
            with nk.disable_adapter(model):
                expected = step(model, x[rows])[:2]
        else:
            nk.set_adapter(model, name)
            expected = step(model, x[rows])
        deltas = [p for p in model.parameters() if p.requires_grad]
        found = [y[rows], x_grad[rows], *(gradients[delta] for delta in deltas)]
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-13, atol=1e-13)
        seen |= {*deltas}
    assert seen == gradients.keys()


def test_rows_are_the_same_bits_as_in_a_batch_of_their_own():
    model, x = both(), inputs()
    with nk.rows_of(model, ROWS):
        y = model(x)
    for name in ("default", "second"):
        rows = [row for row, its_name in enumerate(ROWS) if its_name == name]
        assert y[rows].equal(alone(name)(x[rows]))
    assert model(x).equal(alone("default")(x))


def test_a_sum_of_adapters_is_the_sum_of_their_updates():
    model = both(dtype=torch.float64)
    weights = {"default": 0.7, "second": -1.3}
    nk.add_weighted_adapter(model, [*weights], [*weights.values()], "sum")
    nk.set_adapter(model, "sum")
    for name, layer in layers(model).items():
        dense = torch.zeros_like(layer.weight)
        for adapter, weight in weights.items():
            if adapter in layer.adapter_names:
                held = layer.holder_of(adapter)
                dense.scatter_add_(1, held.index.long(), weight * held.delta.double())
        merged = nk.reference.merged_weight(torch.zeros_like(dense), layer.index, layer.delta)
        assert layer.delta.dtype == torch.float32
        assert merged.equal(dense.float().double()), name
        assert layer.k == (layer.index >= 0).sum(1).max() == (dense != 0).sum(1).max()


def test_rows_of_a_sum_may_have_different_numbers_of_connections():
    linear = nn.Linear(4, 3)
    model = nn.Sequential(linear)
    nk.adapt(model, 2)
    nk.add_adapter(model, "second", 2)
    model[0].index = torch.tensor([[0, 1], [0, 1], [-1, -1]], dtype=torch.int32)
    second = model[0].holder_of("second")
    second.index.copy_(torch.tensor([[1, 0], [2, 1], [-1, -1]]))
    with torch.no_grad():
        model[0].delta.copy_(torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
        second.delta.copy_(torch.tensor([[10.0, 20], [30, 40], [50, 60]]))
    nk.add_weighted_adapter(model, ["default", "second"], [1, 0.5], "sum")
    nk.set_adapter(model, "sum")
    nk.check_index(model[0].index, 4)
    found = [
        {c: d for c, d in zip(*row, strict=True) if c >= 0}
        for row in zip(model[0].index.tolist(), model[0].delta.tolist(), strict=True)
    ]
    assert found == [{0: 11, 1: 7}, {0: 3, 1: 24, 2: 15}, {}]
    x = torch.randn(5, 4)
    expected = nk.reference.merged_weight(linear.weight, model[0].index, model[0].delta)
    torch.testing.assert_close(model(x), x @ expected.t() + linear.bias)


def test_a_sum_of_single_connections_is_contiguous():
    model = adapted(k=1)
    nk.add_weighted_adapter(model, ["default"], [2], "sum")
    for layer in layers(model).values():
        assert layer.holder_of("sum").index.is_contiguous()


def test_what_is_saved_has_its_name_whichever_adapter_is_active():
    model, others = both(), [both(), copy.deepcopy(both()), pickle.loads(pickle.dumps(both()))]
    nk.set_adapter(model, "second")
    expected = step(model, inputs())
    nk.set_adapter(others[0], "second")
    saved = copy.deepcopy(model.state_dict())
    assert "blocks.0.up.adapters.second.delta" in saved
    for other in others:
        assert sorted(other.state_dict()) == sorted(saved)
        for parameter in other.parameters():
            parameter.data.zero_()
        other.load_state_dict(saved)
        nk.set_adapter(other, "default")
        assert_same(step(other, inputs()), step(alone("default"), inputs()))
        nk.set_adapter(other, "second")
        assert_same(step(other, inputs()), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_adapter_by_name_is_saved_and_loaded_beside_others(tmp_path, strategy):
    nk.save_adapter(both(strategy), tmp_path / "file", adapter_name="second")
    model = alone("default", strategy)
    summary = nk.load_adapter(model, tmp_path / "file", adapter_name="loaded")
    assert summary.modules == ("blocks.0.up", "blocks.1.up", "head")
    assert_same(step(model, inputs()), step(alone("default", strategy), inputs()))
    nk.set_adapter(model, "loaded")
    nk.set_strategy(model, "bypass")
    assert_same(step(model, inputs()), step(alone("second"), inputs()))
    fresh = Model()
    nk.load_adapter(fresh, tmp_path / "file", adapter_name="loaded")
    assert nk.active_adapter(fresh) == "loaded"
    assert_same(step(fresh, inputs()), step(alone("second"), inputs()))
    assert fresh.neuroada_config == nk.NeuroAdaConfig(**SECOND)


def test_every_adapter_has_its_config(tmp_path):
    first, second = nk.NeuroAdaConfig(**FIRST), nk.NeuroAdaConfig(**SECOND)
    nk.save_adapter(alone("second"), tmp_path / "file")
    model = adapted()
    with nk.disable_adapter(model):
        nk.load_adapter(model, tmp_path / "file", adapter_name="second")
    nk.add_weighted_adapter(model, ["second"], [2], "twice")
    for name, config in {"second": second, "twice": None, "default": first}.items():
        nk.set_adapter(model, name)
        assert model.neuroada_config == config


def test_a_file_takes_the_place_of_the_active_adapter_alone(tmp_path):
    model = both()
    nk.set_adapter(model, "second")
    nk.save_adapter(model, tmp_path / "file")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    nk.load_adapter(model, tmp_path / "file")
    for name in ("second", "default"):
        nk.set_adapter(model, name)
        assert_same(step(model, inputs()), step(alone(name), inputs()))


@pytest.mark.filterwarnings("ignore:delta. new parameters")
def test_a_file_may_bring_the_active_adapter_into_layers_that_lack_it(tmp_path):
    nk.save_adapter(alone("default"), tmp_path / "file")
    model = Model()
    nk.adapt(model, 1, ["up"])
    nk.add_adapter(model, "second", 1, ["down"])
    nk.load_adapter(model, tmp_path / "file")
    assert nk.adapter_names(model) == ("default", "second")
    assert_same(step(model, inputs()), step(alone("default"), inputs()))


def test_merging_is_of_the_active_adapter():
    model = both()
    nk.set_adapter(model, "second")
    expected = alone("second")
    for m in (model, expected):
        nk.merge(m)
    assert model(inputs()).equal(expected(inputs()))
    nk.unmerge(model)
    assert_same(step(model, inputs()), step(alone("second"), inputs()))
    with nk.disable_adapter(model), pytest.raises(RuntimeError, match="is disabled"):
        nk.merge(model)


def test_compiled_it_takes_up_another_adapter_without_compiling_again():
    torch.compiler.reset()
    model = Model()
    nk.adapt(model, 2, TARGETS)
    trained(model, 0)
    nk.add_adapter(model, "second", 2, TARGETS, selection="smallest")
    nk.set_adapter(model, "second")
    trained(model, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def both_ways() -> None:
        expected, found = step(model, inputs()), step(compiled, inputs())
        torch.testing.assert_close(found, expected)

    both_ways()
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("default", "second"):
            nk.set_adapter(compiled, name)
            both_ways()
    with nk.disable_adapter(compiled):
        torch.testing.assert_close(compiled(inputs()), model(inputs()))
    with nk.rows_of(compiled, ROWS):
        both_ways()
    torch.compiler.reset()


def test_a_parked_adapter_follows_a_model_through_memory_without_values():
    model = both()
    nk.set_adapter(model, "second")
    expected = model(inputs())  # so that it has a plan, which is parked then
    nk.set_adapter(model, "default")
    state = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    nk.set_adapter(model, "second")
    assert model(inputs()).equal(expected)
