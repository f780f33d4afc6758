"""Adapters that go, and models that are plain again."""

from __future__ import annotations

import copy

import pytest
from adapted import Model, Unchanged, adapted, inputs, layers, trained
from torch import nn
from two_adapters import FIRST, STRATEGIES, Transposed, alone, assert_same, both, step

import neuroada_kernels as nk


def test_a_deleted_adapter_leaves_what_was_there_before():
    expected = list(adapted().state_dict())
    model, head = both(), Model().head
    nk.delete_adapter(model, "second")
    assert nk.adapter_names(model) == ("default",)
    assert sorted(model.state_dict()) == sorted(expected)
    assert type(model.head) is nn.Linear
    assert model.head.weight.equal(head.weight)
    assert_same(step(model, inputs()), step(alone("default"), inputs()))


def test_the_first_adapter_can_be_deleted_as_well():
    model = both()
    nk.set_adapter(model, "second")
    nk.delete_adapter(model, "default")
    assert nk.adapter_names(model) == ("second",)
    assert_same(step(model, inputs()), step(alone("second"), inputs()))
    nk.add_adapter(model, "default", **FIRST)
    nk.set_adapter(model, "default")
    assert_same(step(trained(model, 0), inputs()), step(alone("default"), inputs()))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("merge", [False, True])
def test_unloading_leaves_plain_modules_with_the_very_weights(strategy, merge):
    model = both(strategy)
    nk.set_save_activations(model, "compact")
    model(inputs())
    weights = {name: layer.weight for name, layer in layers(model).items()}
    old = list(layers(model).values())
    expected = alone("default")
    if merge:
        nk.merge(expected)
    assert nk.unload(model, merge=merge) is model
    base = Model()
    assert list(model.state_dict()) == list(base.state_dict())
    assert not hasattr(model, "neuroada_config")
    for name, weight in weights.items():
        module = model.get_submodule(name)
        assert type(module) is nn.Linear
        assert module.weight is weight
    assert model(inputs()).equal((expected if merge else base)(inputs()))
    assert not any(layer.strategy == "resident" or layer in layer._siblings.layers for layer in old)
    before = model.state_dict()
    del old
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())
    nk.adapt(model, **FIRST)


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "saving": lambda module: module.register_state_dict_pre_hook(lambda *_: None),
    "loading": lambda module: module.register_load_state_dict_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_not_lost_in_silence(kind):
    model = Model()
    refused = pytest.raises(ValueError, match="head: has hooks, which its replacement would lose")
    hook = HOOKS[kind](model.head)
    with Unchanged(model), refused:
        nk.adapt(model, target_modules=["head"])
    hook.remove()
    nk.adapt(model, target_modules=["head"])
    nk.add_adapter(trained(model, 0), "other", target_modules=["up"])
    hook = HOOKS[kind](model.head)
    with Unchanged(model), refused:
        nk.unload(model, merge=True)
    nk.set_adapter(model, "other")
    with Unchanged(model), refused:
        nk.delete_adapter(model, "default")
    hook.remove()
    nk.delete_adapter(model, "default")
    assert type(nk.unload(model).head) is nn.Linear


def test_nor_is_a_forward_that_was_put_into_a_layer():
    model = adapted()
    model.blocks[0].down.forward = lambda x: x
    with Unchanged(model), pytest.raises(ValueError, match=r"0\.down: has a forward of its own"):
        nk.unload(model)


def test_attributes_go_along_both_ways():
    model = Model()
    model.head.before = "set on the linear"
    nk.adapt(model, target_modules=["head"])
    assert model.head.before == "set on the linear"
    model.head.after = "set on the layer"
    nk.unload(model)
    assert model.head.before == "set on the linear"
    assert model.head.after == "set on the layer"
    assert vars(model.head).keys() == {*vars(nn.Linear(1, 1)), "before", "after"}


def test_unloading_gives_back_what_a_layer_is_round():
    base = Transposed()
    down, expected = base.down, copy.deepcopy(base)
    nk.adapt(base, **FIRST)
    nk.unload(base)
    assert base.down is down
    assert base(inputs()).equal(expected(inputs()))
    layer = nk.NeuroAdaLinear(4, 3)
    assert type(nk.unload(layer)) is nn.Linear
    assert not list(layer.children())
