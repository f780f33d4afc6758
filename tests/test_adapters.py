"""Adapters on disk: what comes back, what is refused, and what a file holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from adapted import NAMES, TARGETS, Model, Unchanged, adapted, inputs, trained
from safetensors import safe_open
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels.adapter_file import read_adapter
from neuroada_kernels.model import adapt


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


def layers(model: nn.Module) -> dict[str, nk.NeuroAdaLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nk.NeuroAdaLinear)}


def assert_same_adapter(first: nn.Module, second: nn.Module) -> None:
    assert layers(first).keys() == layers(second).keys()
    for name, layer in layers(first).items():
        other = layers(second)[name]
        assert torch.equal(layer.index, other.index), name
        assert layer.delta.dtype == other.delta.dtype, name
        assert torch.equal(layer.delta, other.delta), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_an_unadapted_model_becomes_the_one_that_was_saved(path, dtype, delta_dtype):
    model = adapted(dtype=dtype, delta_dtype=delta_dtype)
    nk.save_adapter(model, path)
    other = Model(dtype=dtype)
    summary = nk.load_adapter(other, path)
    assert summary.modules == tuple(NAMES)
    assert_same_adapter(model, other)
    assert torch.equal(other(inputs(dtype)), model(inputs(dtype)))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in other.named_parameters()} == flags


@pytest.mark.parametrize("state", ["as it was", "merged", "resident"])
def test_what_is_saved_does_not_depend_on_what_the_weight_holds(path, state):
    model = adapted(dtype=torch.bfloat16)
    nk.save_adapter(model, path)
    before = path.read_bytes()
    if state == "merged":
        nk.merge(model)
    elif state == "resident":
        nk.set_strategy(model, "resident")
        model(inputs(torch.bfloat16))
    nk.save_adapter(model, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("k", [1, 3], ids=["of other connections", "of more connections"])
def test_resident_layers_load_an_adapter(path, k):
    saved = adapted(dtype=torch.bfloat16, k=k, selection="smallest")
    nk.save_adapter(saved, path)
    model = adapted(dtype=torch.bfloat16)
    base = {name: layer.weight.clone() for name, layer in layers(model).items()}
    nk.set_strategy(model, "resident")
    model(inputs(torch.bfloat16))
    nk.load_adapter(model, path)
    assert_same_adapter(model, saved)
    nk.set_strategy(saved, "resident")
    assert torch.equal(model(inputs(torch.bfloat16)), saved(inputs(torch.bfloat16)))
    nk.set_strategy(model, "bypass")
    for name, layer in layers(model).items():
        assert torch.equal(layer.weight, base[name]), name


def test_a_refused_adapter_leaves_resident_layers_as_they_were(path):
    other = Model(seed=1)
    nk.adapt(other, 2, TARGETS)
    nk.save_adapter(other, path)
    model = adapted()
    nk.set_strategy(model, "resident")
    model(inputs())
    held = {name: layer.weight.clone() for name, layer in layers(model).items()}
    with pytest.raises(ValueError, match="not what the adapter is for"):
        nk.load_adapter(model, path)
    for name, layer in layers(model).items():
        assert layer.strategy == "resident"
        assert torch.equal(layer.weight, held[name]), name


def test_an_adapted_model_keeps_the_parameters_that_an_optimizer_holds(path):
    nk.save_adapter(adapted(seed=1), path)
    model = adapted(seed=2)
    deltas = {name: layer.delta for name, layer in layers(model).items()}
    nk.load_adapter(model, path)
    assert all(layer.delta is deltas[name] for name, layer in layers(model).items())
    assert_same_adapter(adapted(seed=1), model)


@pytest.mark.parametrize("options", [{"k": 3}, {"delta_dtype": torch.float64}], ids=str)
def test_an_adapted_model_takes_another_k_and_another_delta_dtype(path, options):
    saved = adapted(**options)
    nk.save_adapter(saved, path)
    model = adapted(k=1)
    nk.load_adapter(model, path)
    assert_same_adapter(saved, model)
    assert torch.equal(model(inputs()), saved(inputs()))
    model(inputs()).sum().backward()
    assert all(layer.delta.grad is not None for layer in layers(model).values())


def test_an_index_of_other_columns_is_followed_by_forward_and_backward(path):
    saved = adapted(selection="smallest")
    nk.save_adapter(saved, path)
    model = adapted()
    model(inputs()).sum().backward()
    model.zero_grad()
    nk.load_adapter(model, path)
    assert torch.equal(model(inputs()), saved(inputs()))
    for m in (model, saved):
        m(inputs()).sum().backward()
    for name, layer in layers(model).items():
        assert torch.equal(layer.delta.grad, layers(saved)[name].delta.grad)


def test_slots_without_a_connection_come_back(path):
    model = adapted(neuron_fraction=0.5)
    nk.save_adapter(model, path)
    other = Model()
    nk.load_adapter(other, path)
    assert_same_adapter(model, other)
    assert any((layer.index < 0).any() for layer in layers(other).values())


@pytest.mark.parametrize(
    ("d_in", "dtype"), [(255, "U16"), (65535, "U16"), (65536, "I32"), (70000, "I32")]
)
def test_the_index_takes_16_bits_where_every_column_fits(path, d_in, dtype):
    linear = nn.Linear(d_in, 2)
    with torch.no_grad():
        linear.weight[0, -1] = 2
    model = nn.Sequential(linear)
    nk.adapt(model, 2)
    model[0].index = torch.tensor([[0, d_in - 1], [-1, 3]], dtype=torch.int32)
    nk.save_adapter(model, path)
    with safe_open(path, "pt") as file:
        assert file.get_slice("0.index").get_dtype() == dtype
    other = nn.Sequential(nn.Linear(d_in, 2))
    other[0].weight = linear.weight
    nk.load_adapter(other, path)
    assert torch.equal(other[0].index, model[0].index)


def test_biases_and_a_head_that_train_are_saved_too(path):
    model = Model()
    nk.adapt(model, 2, TARGETS)
    model.blocks[1].up.bias.requires_grad_()
    model.head.requires_grad_()
    trained(model, seed=3)
    nk.save_adapter(model, path)
    assert sorted(read_adapter(path).parameters) == ["blocks.1.up.bias", "head.bias", "head.weight"]
    other = Model()
    nk.load_adapter(other, path)
    assert torch.equal(other(inputs()), model(inputs()))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in other.named_parameters()} == flags


def test_training_goes_on_as_without_saving(path):
    def step(model: nn.Module) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = adapted()
    nk.save_adapter(model, path)
    other = Model()
    nk.load_adapter(other, path)
    for m in (model, other):
        step(m)
    assert_same_adapter(model, other)


def test_the_config_comes_back(path):
    config = nk.NeuroAdaConfig(k=2, target_modules=["up", "down"], k_pattern={"up": 1}, layers=[1])
    model = Model()
    nk.adapt(model, config)
    nk.save_adapter(model, path)
    other = Model()
    nk.load_adapter(other, path)
    assert other.neuroada_config == config == model.neuroada_config
    another = nk.NeuroAdaConfig(target_modules=["ё"])
    nk.save_adapter(model, path, config=another)
    nk.load_adapter(model, path)
    assert model.neuroada_config == another


def test_the_same_adapter_is_the_same_file(path, tmp_path):
    nk.save_adapter(adapted(), path)
    nk.save_adapter(adapted(), tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_a_file_takes_few_bytes_a_connection(path):
    model = nn.Sequential(nn.Linear(512, 512))
    nk.adapt(model, 8)
    nk.save_adapter(model, path)
    assert path.stat().st_size < 512 * 8 * (2 + 4) + 1024


def test_the_loaded_tensors_do_not_depend_on_the_file(path):
    model = adapted(k=1)
    for k in (3, 3):
        nk.save_adapter(adapted(k=k), path)
        nk.load_adapter(model, path)
        os.truncate(path, 0)  # a mapping of it would be a bus error now
        assert torch.equal(model(inputs()), adapted(k=k)(inputs()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("compiled", ["model", "block"])
def test_compiled_models_save_and_load_under_plain_names(path, compiled):
    def compile_of(model: Model) -> nn.Module:
        if compiled == "model":
            return torch.compile(model)
        model.blocks[0] = torch.compile(model.blocks[0])
        return model

    nk.save_adapter(compile_of(adapted()), path)
    assert sorted(read_adapter(path).modules) == sorted(NAMES)
    other = Model()
    nk.load_adapter(compile_of(other), path)
    found = [m for m in other.modules() if isinstance(m, nk.NeuroAdaLinear)]
    saved = layers(adapted()).values()
    assert all(torch.equal(a.delta, b.delta) for a, b in zip(found, saved, strict=True))


def test_a_module_under_two_names_is_one(path):
    def shared() -> nn.Module:
        torch.manual_seed(0)
        linear = nn.Linear(6, 6)
        return nn.Sequential(linear, nn.ReLU(), linear)

    model = shared()
    nk.adapt(model, 2)
    trained(model, 0)
    nk.save_adapter(model, path)
    assert list(read_adapter(path).modules) == ["0"]
    other = shared()
    nk.load_adapter(other, path)
    assert other[0] is other[2]
    assert torch.equal(other(inputs()), model(inputs()))


def test_a_layer_by_itself_saves_and_loads(path):
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    layer = trained(nk.NeuroAdaLinear.from_linear(linear, 2), 0)
    nk.save_adapter(layer, path)
    other = nk.NeuroAdaLinear.from_linear(linear, 2)
    nk.load_adapter(other, path)
    assert torch.equal(other.delta, layer.delta)
    with pytest.raises(ValueError, match="a single layer, expected a NeuroAda layer"):
        nk.load_adapter(linear, path)


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
    "adapted elsewhere too": (more_adapted, ValueError, "head adapted, which the adapter does not"),
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
    nk.merge(model)
    with pytest.raises(ValueError, match="1: is merged and shares its weight with 0"):
        nk.save_adapter(model, path)
    assert path.read_bytes() == before


def test_a_folder_is_no_place_for_the_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        nk.save_adapter(adapted(), tmp_path)
    with pytest.raises(FileNotFoundError):
        nk.save_adapter(adapted(), tmp_path / "missing" / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_link_keeps_pointing_to_the_file(path, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(path.name)
    nk.save_adapter(adapted(), link)
    assert link.is_symlink()
    assert read_adapter(path).modules


def test_a_file_can_be_read_by_whom_the_umask_lets(path):
    umask = os.umask(0o027)
    try:
        nk.save_adapter(adapted(), path)
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_failing_save_leaves_the_old_file_and_nothing_else(path, tmp_path, monkeypatch):
    nk.save_adapter(adapted(), path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        nk.save_adapter(adapted(seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
