"""A layer with several adapters: what it saves, moves, plans and refuses."""

from __future__ import annotations

import pytest
import torch
from layer_facts import effective_weight, other_index
from test_experts import STACKS, Mixture
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels.nn import _planned


@pytest.fixture
def layer(trained):
    """Adapters "default", which is active, and "other", with deltas that are not zero."""
    layer = trained(k=2)
    layer.park("other", other_index(layer), torch.randn(layer.out_features, 2) / 8)
    return layer


def test_a_layer_with_the_default_alone_knows_nothing_of_names(trained):
    layer = trained()
    assert layer.adapter_names == ("default",)
    assert not list(layer.children())
    assert layer.state_dict().keys() == {"weight", "bias", "index", "delta"}
    assert "adapters" not in repr(layer)


def test_adapters_change_places_and_stay_the_very_tensors(layer):
    other = layer.adapters["other"]
    facts = {"default": (layer.index, layer.delta), "other": (other.index, other.delta)}
    x = torch.randn(5, layer.in_features)
    for name in ("other", "default", "other"):
        layer.activate(name)
        for adapter, (index, delta) in facts.items():
            assert layer.holder_of(adapter).index is index
            assert layer.holder_of(adapter).delta is delta
        expected = x.double() @ effective_weight(layer).t() + layer.bias
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    layer.remove("default")
    assert layer.adapter_names == ("other",)
    assert "adapters.other.delta" in layer.state_dict()


def test_gradients_are_of_the_connections_that_are_in_use(layer_type):
    layer = layer_type(64, 8, 2)  # so few that x is kept as columns
    layer.park("other", other_index(layer), torch.zeros(8, 2))
    x, grad = torch.randn(5, 64), torch.randn(5, 8)
    for name in ("other", "default", "other"):
        layer.activate(name)
        layer.delta.requires_grad_()
        layer(x).backward(grad)
        expected = torch.einsum("tj,tjs->js", grad, x[:, layer.index.long()])
        torch.testing.assert_close(layer.delta.grad, expected, rtol=1e-5, atol=1e-5)
        layer.delta.grad = None


def test_a_plan_is_kept_while_its_adapter_is_parked(monkeypatch):
    layer = nk.NeuroAdaLinear(24, 16, 2)
    layer.park("other", other_index(layer), torch.zeros(16, 2))
    layer.activate("other")
    made = []
    plan = _planned.make_plan
    monkeypatch.setattr(_planned, "make_plan", lambda *given: made.append(given) or plan(*given))
    for name in ("default", "other", "default"):
        layer.activate(name)
        assert layer.plan.equal(plan(layer.index, 24))
    assert not made
    values = layer.state_dict()
    values["adapters.other.index"] = values["adapters.other.index"].flip(1)
    layer.load_state_dict(values)
    layer.activate("other")
    assert len(made) == 2  # of the index that was loaded, and of the other one, loaded too
    assert layer.plan.equal(plan(layer.index, 24))


def test_casting_leaves_every_delta_and_index(layer):
    layer.to(torch.float64).half()
    for holder in (layer, layer.adapters["other"]):
        assert holder.delta.dtype == torch.float32
        assert holder.index.dtype == torch.int32
    assert layer.weight.dtype == torch.float16
    layer.activate("other")
    assert layer(torch.randn(3, layer.in_features).half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("adapters.other.index", torch.full((16, 2), 3), r"adapters.other: index: dtype"),
        ("adapters.other.index", torch.full((16, 2), 24).int(), "column 24 in row 0"),
        ("adapters.other.delta", torch.zeros(16, 3), r"delta: shapes \[16, 2\] and \[16, 3\]"),
        ("adapters.default.index", torch.full((16, 2), 3).int(), "column 3 stands twice"),
        ("adapters.other.original", torch.zeros(16, 2), "merged by 'other', expected 'default'"),
        ("delta", torch.zeros(16, 2), 'Unexpected key.*"delta"'),
        ("adapters.default.scale", torch.zeros(1), 'Unexpected key.*"adapters.default.scale"'),
        ("adapters.other.scale", torch.zeros(1), 'Unexpected key.*"adapters.other.scale"'),
        ("adapters.other.delta", None, 'Missing key.*"adapters.other.delta"'),
        ("adapters.default.delta", None, 'Missing key.*"adapters.default.delta"'),
    ],
)
def test_what_does_not_fit_is_not_loaded(layer, key, value, words):
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    given = {**state, key: value}
    if value is None:
        del given[key]
    with pytest.raises(RuntimeError, match=words):
        layer.load_state_dict(given)
    assert all(tensor.equal(state[name]) for name, tensor in layer.state_dict().items())


def test_the_merged_state_is_saved_with_its_adapter(layer):
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.activate("other")
    layer.merge()
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert "adapters.other.original" in saved
    layer.unmerge()
    layer.load_state_dict(saved)
    assert layer.merged
    with pytest.raises(RuntimeError, match="cannot change while merged"):
        layer.activate("default")
    layer.unmerge()
    assert all(tensor.equal(state[name]) for name, tensor in layer.state_dict().items())


def test_experts_have_adapters_by_name_and_are_whole_again_without():
    model, alone, base = Mixture(), Mixture(), Mixture()
    x = torch.randn(9, 24)
    how = {"target_modules": ["experts"], "selection": "smallest"}
    nk.adapt(model, 1, ["router"])
    summary = nk.add_adapter(model, "second", 2, **how)
    nk.adapt(alone, 2, **how)
    nk.set_adapter(model, "second")
    for stack in STACKS:
        with torch.no_grad():
            getattr(alone.experts, stack).delta.normal_(std=0.1)
            getattr(model.experts, stack).delta.copy_(getattr(alone.experts, stack).delta)
    assert summary.modules == tuple(f"experts.{stack}" for stack in STACKS)
    assert model(x).equal(alone(x))
    with nk.disable_adapter(model):
        torch.testing.assert_close(model(x), base(x))
    with pytest.raises(ValueError, match="sees tokens instead of rows"):
        nk.rows_of(model, ["second"] * 9).__enter__()
    nk.add_weighted_adapter(model, ["second"], [1], "same")
    nk.set_adapter(model, "same")
    assert model(x).equal(alone(x))
    nk.set_adapter(model, "default")
    for name in ("second", "same"):
        nk.delete_adapter(model, name)
    assert type(model.experts) is type(base.experts)
    assert isinstance(model.experts.gate_up_proj, nn.Parameter)
    nk.unload(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert model(x).equal(base(x))
