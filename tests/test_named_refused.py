"""What adapters by name cannot be, cannot have and cannot do: refused before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted import TARGETS, Model, Unchanged, adapted, inputs, layers
from two_adapters import SECOND, STRATEGIES, alone, assert_same, both, step

import neuroada_kernels as nk


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("default", ValueError, "is there already"),
        ("a.b", ValueError, "without dots"),
        ("", ValueError, "without dots"),
        ("__base__", ValueError, "means something else"),
        ("keys", ValueError, "means something else"),
        (3, TypeError, "int, expected a name"),
    ],
)
def test_names_that_would_not_do_are_refused(name, error, words, tmp_path):
    model = adapted()
    nk.save_adapter(model, tmp_path / "file")
    with Unchanged(model):
        with pytest.raises(error, match=f"adapter_name: .*{words}"):
            nk.add_adapter(model, name, **SECOND)
        with pytest.raises(error, match=f"adapter_name: .*{words}"):
            nk.add_weighted_adapter(model, ["default"], [1], name)
        if name != "default":
            with pytest.raises(error, match=f"adapter_name: .*{words}"):
                nk.load_adapter(model, tmp_path / "file", adapter_name=name)


REFUSED = {
    "unknown": (lambda m: nk.set_adapter(m, "third"), "'third', expected one of .*'second'"),
    "several": (lambda m: nk.set_adapter(m, ["default", "second"]), "expected one name"),
    "active": (lambda m: nk.delete_adapter(m, "default"), "activate another one first"),
    "gone": (lambda m: nk.delete_adapter(m, "third"), "'third', expected one of"),
    "row": (lambda m: nk.rows_of(m, ["third"]).__enter__(), "adapter_names: 'third', expected one"),
    "trains": (lambda m: nk.set_requires_grad(m, "third"), "adapter_names: 'third', expected one"),
    "summand": (
        lambda m: nk.add_weighted_adapter(m, ["third"], [1], "sum"),
        "adapters: 'third', expected one",
    ),
    "no list": (lambda m: nk.rows_of(m, "second").__enter__(), "expected a sequence of names"),
    "k": (lambda m: nk.add_adapter(m, "third", 9), "blocks.0.up: k: 9"),
    "target": (lambda m: nk.add_adapter(m, "third", 1, ["left"]), "'left' matches nothing"),
    "places": (lambda m: nk.add_adapter(m, "third", 1, ["up"], "all"), "config: 3 arguments by"),
    "data": (lambda m: nk.add_adapter(m, "third", data=[0]), "data: given with selection 'magn"),
    "scores": (
        lambda m: nk.add_adapter(m, "third", scores={"up": torch.ones(12, 6)}),
        "scores: missing for targets .* given for others",
    ),
    "bias": (lambda m: nk.add_adapter(m, "third", bias="all"), "bias: 'all'"),
    "strategy": (lambda m: nk.add_adapter(m, "third", strategy="auto"), "strategy: 'auto'"),
    "siblings": (lambda m: nk.add_adapter(m, "third", siblings=[]), "siblings: are the layers'"),
    "again": (lambda m: nk.adapt(m, 1, ["head"]), r"by name, \['second'\], expected add_adapter"),
    "weights": (
        lambda m: nk.add_weighted_adapter(m, ["default"], [1, 2], "third"),
        "weights: .*expected 1",
    ),
    "tensor": (
        lambda m: nk.add_weighted_adapter(m, ["default"], torch.ones(1), "third"),
        "weights: Tensor, expected a sequence of numbers",
    ),
    "infinite": (
        lambda m: nk.add_weighted_adapter(m, ["default"], [float("inf")], "third"),
        "expected a finite number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_is_refused(case):
    act, words = REFUSED[case]
    model = both()
    with Unchanged(model), pytest.raises((TypeError, ValueError), match=words):
        act(model)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_index_that_is_not_valid_leaves_the_model_as_it_was(strategy):
    model = both(strategy)
    model.head.index.fill_(3)  # of "second", as that of the last layer
    before = {name: layer.active_adapter for name, layer in layers(model).items()}
    expected = step(model, inputs())
    with pytest.raises(ValueError, match="head: index: column 3 stands twice"):
        nk.set_adapter(model, "second")
    assert {name: layer.active_adapter for name, layer in layers(model).items()} == before
    assert_same(step(model, inputs()), expected)
    nk.set_strategy(model, "bypass")
    with Unchanged(model), pytest.raises(ValueError, match="head: index: column 3 stands twice"):
        nk.rows_of(model, ["second"]).__enter__()


def test_nothing_is_deleted_where_one_layer_cannot_do_without():
    model = both()
    nk.add_adapter(model, "third", 2, ["down"])
    nk.set_adapter(model, "second")
    model.blocks[1].down.holder_of("third").index.fill_(3)
    with pytest.raises(ValueError, match=r"blocks.1.down: index: column 3 stands twice"):
        nk.delete_adapter(model, "default")
    assert all("default" in block.up.adapter_names for block in model.blocks)
    nk.set_adapter(model, "default")
    assert model(inputs()).equal(alone("default")(inputs()))


def test_what_is_active_in_a_part_of_a_model_is_not_deleted():
    model = both("resident")
    nk.set_adapter(model.blocks[1], "second")
    with Unchanged(model), pytest.raises(ValueError, match="'second' is active"):
        nk.delete_adapter(model, "second")


@pytest.mark.parametrize(
    "act",
    [
        lambda m: nk.set_adapter(m, "second"),
        lambda m: nk.add_adapter(m, "third", **SECOND),
        lambda m: nk.add_weighted_adapter(m, ["second"], [1], "third"),
        lambda m: nk.delete_adapter(m, "second"),
        lambda m: nk.disable_adapter(m).__enter__(),
        lambda m: nk.rows_of(m, ["second"]).__enter__(),
        lambda m: nk.unload(m),
    ],
)
def test_a_merged_model_is_left_alone(act):
    model = both()
    nk.merge(model)
    with Unchanged(model), pytest.raises(RuntimeError, match="is merged, unmerge first"):
        act(model)


def test_a_block_of_rows_refuses_what_it_cannot_have():
    model = both()
    with nk.rows_of(model, ["second", "default"]):
        for act in (nk.merge, nk.unload, lambda m: nk.delete_adapter(m, "second")):
            with pytest.raises(RuntimeError, match="row"):
                act(model)
        with pytest.raises(ValueError, match="rows of a batch take different adapters"):
            nk.set_strategy(model, "resident")
        for x in (torch.zeros(3, 6), torch.zeros(6)):
            with pytest.raises(ValueError, match="adapter_names: 2 for x of shape"):
                model.blocks[0].up(x)
        assert copy.deepcopy(model)(inputs()).equal(alone("default")(inputs()))
    nk.set_strategy(model, "resident")
    with pytest.raises(ValueError, match="is resident, so that its weight holds one adapter"):
        nk.rows_of(model, ["second"]).__enter__()


def test_parameters_that_all_adapters_share_are_not_loaded(tmp_path):
    model = Model()
    nk.adapt(model, 2, TARGETS, bias="all")
    nk.save_adapter(model, tmp_path / "file")
    nk.save_adapter(adapted(), tmp_path / "plain")
    for act in (
        lambda: nk.add_adapter(model, "second", **SECOND),
        lambda: nk.add_weighted_adapter(model, ["default"], [2], "second"),
        lambda: nk.load_adapter(model, tmp_path / "plain", adapter_name="second"),
    ):
        with Unchanged(model), pytest.raises(ValueError, match="bias: 'all'"):
            act()
    other = adapted()
    with Unchanged(other), pytest.raises(ValueError, match=r"bias.*which other adapters share"):
        nk.load_adapter(other, tmp_path / "file", adapter_name="second")
