"""Blocks in which a model is its base, or its rows take different adapters: what they end."""

from __future__ import annotations

import pytest
import torch
from adapted import Model, adapted, inputs, layers
from two_adapters import ROWS, SECOND, STRATEGIES, Transposed, alone, assert_same, both, step

import neuroada_kernels as nk


def test_a_disabled_adapter_leaves_the_base_among_rows_too():
    model, base = both(), Model()
    with nk.rows_of(model, ROWS):
        y = model(inputs())
        with nk.disable_adapter(model):
            assert model(inputs()).equal(base(inputs()))
        assert model(inputs()).equal(y)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_becomes_active_in_a_disabled_block_ends_with_it(strategy):
    model = adapted(strategy=strategy)
    expected = step(model, inputs())
    with nk.disable_adapter(model):
        nk.add_adapter(model, "second", **SECOND)  # in a new layer as well
        nk.set_adapter(model, "second")
        nk.merge(model)
    assert nk.active_adapter(model) == "default"
    assert not any(layer.merged for layer in layers(model).values())
    assert model.head.active_adapter is None
    assert_same(step(model, inputs()), expected)


def test_a_model_may_be_unloaded_in_a_disabled_block():
    model, expected = both("resident"), alone("second")
    nk.merge(expected)
    with nk.disable_adapter(model):
        nk.set_adapter(model, "second")
        nk.unload(model, merge=True)
    assert not hasattr(model, "neuroada_config")
    assert model(inputs()).equal(expected(inputs()))


@pytest.mark.parametrize("kind", [Model, Transposed])
def test_rows_follow_an_index_that_is_loaded_meanwhile(kind):
    model = kind().double()
    nk.adapt(model, 1, ["head"])
    nk.add_adapter(model, "second", 2, ["up", "down"])
    nk.set_adapter(model, "second")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith("second.index"):
            tensor.add_(1).remainder_(12 if "down" in name else 6)
        elif name.endswith("second.delta"):
            tensor.fill_(0.5)
    x = inputs(torch.float64)
    with nk.rows_of(model, ["second"] * len(x)):
        model.load_state_dict(state)
        found = step(model, x)
    torch.testing.assert_close(found, step(model, x))


def test_blocks_leave_what_was_compiled():
    torch.compiler.reset()
    model = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = step(compiled, inputs())
    with nk.disable_adapter(compiled), nk.rows_of(compiled, ["default", "__base__"]):
        compiled(inputs()[:2])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(step(compiled, inputs()), expected)
    torch.compiler.reset()
