"""Models that an adapter is not for, or that cannot be saved: refused, and left as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted import (
    TARGETS,
    Model,
    Unchanged,
    adapted,
    assert_same_adapter,
    inputs,
    layers,
    trained,
)
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels import NeuroAdaLinear
from neuroada_kernels.model import adapt


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


def scaled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.blocks[1].down.weight *= 2
    return model


def wider() -> nn.Module:
    model = Model()
    model.blocks[0].up = nn.Linear(7, 12)
    return model


def without_a_block() -> nn.Module:
    model = Model()
    del model.blocks[1]
    return model


def other_kind() -> nn.Module:
    model = Model()
    model.blocks[0].up = nn.Identity()
    return model


def hooked() -> nn.Module:
    model = Model()
    model.blocks[0].down.register_forward_hook(print)
    return model


def more_adapted() -> nn.Module:
    model = adapted()
    adapt(model, 1, ["head"])
    return model


def merged() -> nn.Module:
    model = adapted()
    nk.merge(model)
    return model


def twice() -> nn.Module:
    model = Model()
    model.blocks[1] = model.blocks[0]
    return model


REFUSED = {
    "other values": (lambda: scaled(Model()), ValueError, "blocks.1.down: other values at the ch"),
    "other values, adapted": (lambda: scaled(adapted()), ValueError, "blocks.1.down: other values"),
    "another model": (lambda: Model(seed=1), ValueError, "and 1 more; allow_mismatch=True loads"),
    "another dtype": (
        lambda: Model(dtype=torch.float64),
        ValueError,
        "blocks.0.up: dtype float64, expected float32",
    ),
    "another shape": (wider, ValueError, r"blocks.0.up: shape \[12, 7\], expected \[12, 6\]$"),
    "a module less": (without_a_block, ValueError, "has no blocks.1.down, blocks.1.up, which"),
    "no linear": (other_kind, TypeError, "blocks.0.up: Identity, expected torch.nn.Linear"),
    "hooks": (hooked, ValueError, "blocks.0.down: has hooks"),
    "adapted elsewhere too": (more_adapted, ValueError, "adapted at head, which the adapter does"),
    "merged": (merged, ValueError, "blocks.0.up: is merged, unmerge first"),
    "one module twice": (twice, ValueError, "one module where the adapter has two"),
    "no values": (lambda: Model().to("meta"), ValueError, "on the meta device"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_wrong_model_is_refused_and_stays_as_it_was(path, wrong):
    make, error, message = REFUSED[wrong]
    nk.save_adapter(adapted(), path)
    model = make()
    if wrong == "no values":
        with pytest.raises(error, match=message):
            nk.load_adapter(model, path)
        return
    with Unchanged(model), pytest.raises(error, match=message):
        nk.load_adapter(model, path)


@pytest.mark.parametrize("make", [lambda: scaled(Model()), lambda: Model(dtype=torch.float64)])
def test_a_mismatch_of_values_or_dtype_can_be_insisted_on(path, make):
    saved = adapted()
    nk.save_adapter(saved, path)
    model = make()
    nk.load_adapter(model, path, allow_mismatch=True)
    assert_same_adapter(saved, model)


def test_a_mismatch_of_shapes_cannot(path):
    nk.save_adapter(adapted(), path)
    model = wider()
    with Unchanged(model), pytest.raises(ValueError, match=r"shape \[12, 7\], expected \[12, 6\]"):
        nk.load_adapter(model, path, allow_mismatch=True)


@pytest.mark.parametrize("k", [2, 3])
def test_an_interrupted_load_leaves_the_model_as_it_was(path, k, monkeypatch):
    nk.save_adapter(adapted(k=k), path)
    model = adapted(seed=1)
    model(inputs()).sum().backward()
    last, put = list(layers(model).values())[-1], NeuroAdaLinear.part_of_connections

    def interrupted(layer, *connections):
        if layer is last:
            raise KeyboardInterrupt
        return put(layer, *connections)

    monkeypatch.setattr(NeuroAdaLinear, "part_of_connections", interrupted)
    gradients = [layer.delta.grad for layer in layers(model).values()]
    with Unchanged(model), pytest.raises(KeyboardInterrupt):
        nk.load_adapter(model, path)
    for layer, gradient in zip(layers(model).values(), gradients, strict=True):
        assert layer.delta.grad is gradient


def test_other_values_beside_the_chosen_connections_do_not_matter(path):
    saved = adapted()
    nk.save_adapter(saved, path)
    model = Model()
    layer = saved.blocks[0].up
    with torch.no_grad():
        chosen = torch.zeros_like(layer.weight).scatter(1, layer.index.long(), 1).bool()
        model.blocks[0].up.weight[~chosen] += 1
    nk.load_adapter(model, path)


@pytest.mark.parametrize("wrong", ["missing", "shape", "dtype"])
def test_wrong_parameters_are_refused(path, wrong):
    saved = Model()
    nk.adapt(saved, 2, TARGETS)
    saved.head.requires_grad_()
    nk.save_adapter(saved, path)
    model = Model()
    model.head = {
        "missing": nn.Identity(),
        "shape": nn.Linear(6, 5),
        "dtype": nn.Linear(6, 4, dtype=torch.float64),
    }[wrong]
    message = {
        "missing": "has no head.bias, head.weight, which",
        "shape": r"head.bias: shape \[5\], expected \[4\]",
        "dtype": "head.bias: dtype float64, expected float32",
    }[wrong]
    with Unchanged(model), pytest.raises(ValueError, match=message):
        nk.load_adapter(model, path)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("k", [2, 3], ids=["same shapes", "other shapes"])
def test_an_error_midway_leaves_the_model_as_it_was(path, monkeypatch, k, fails_at):
    """Also one that no check foresees, such as memory running out."""
    saved = Model()
    nk.adapt(saved, 2, TARGETS)
    saved.head.bias.requires_grad_()
    nk.save_adapter(trained(saved, 1), path)
    model = adapted(k=k, seed=2)
    calls = 0
    plan = nk.NeuroAdaLinear._make_plan

    def failing(layer: nk.NeuroAdaLinear) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise MemoryError
        plan(layer)

    with Unchanged(model), monkeypatch.context() as patch:
        patch.setattr(nk.NeuroAdaLinear, "_make_plan", failing)
        with pytest.raises(MemoryError):
            nk.load_adapter(model, path)
    assert torch.equal(model(inputs()), adapted(k=k, seed=2)(inputs()))


def test_a_model_without_layers_cannot_be_saved(path):
    with pytest.raises(ValueError, match="no NeuroAda layer"):
        nk.save_adapter(Model(), path)
    with pytest.raises(TypeError, match="model: str, expected"):
        nk.save_adapter("model", path)
    assert not path.exists()


def test_an_invalid_index_cannot_be_saved(path):
    model = adapted()
    model.blocks[0].up.index[0] = 99
    with pytest.raises(ValueError, match="up: index: column 99 in row 0 is out of range"):
        nk.save_adapter(model, path)
    assert not path.exists()


def test_merged_layers_over_one_weight_cannot_be_saved(path):
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    nk.adapt(model, 2)
    trained(model, 0)
    nk.save_adapter(model, path)
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=r"its weight is shared with \d\.weight"):
        nk.merge(model)
    with pytest.raises(ValueError, match="1: is merged and shares its weight with 0"):
        nk.save_adapter(model, path)
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder, expected one for"):
        nk.save_adapter(adapted(), tmp_path / "nowhere" / "adapter.safetensors")
