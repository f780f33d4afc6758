"""Models adapted on the meta device: counted there, and selected when values have come."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapted import NAMES, TARGETS, Model, Unchanged, adapted, inputs
from torch import nn

import neuroada_kernels as nk


def llama(hidden: int, intermediate: int, key_value: int, layers: int) -> nn.Module:
    """The linears of a Llama, without values."""
    with torch.device("meta"):
        return nn.ModuleList(
            nn.ModuleDict(
                {
                    "q_proj": nn.Linear(hidden, hidden, bias=False),
                    "k_proj": nn.Linear(hidden, key_value, bias=False),
                    "v_proj": nn.Linear(hidden, key_value, bias=False),
                    "o_proj": nn.Linear(hidden, hidden, bias=False),
                    "gate_proj": nn.Linear(hidden, intermediate, bias=False),
                    "up_proj": nn.Linear(hidden, intermediate, bias=False),
                    "down_proj": nn.Linear(intermediate, hidden, bias=False),
                }
            )
            for _ in range(layers)
        )


@pytest.mark.parametrize(
    ("shape", "k", "trainable"),
    [
        ((4096, 11008, 4096, 32), 1, 1_359_872),
        ((4096, 11008, 4096, 32), 20, 27_197_440),
        ((5120, 13824, 5120, 40), 1, 2_129_920),
        ((5120, 13824, 5120, 40), 20, 42_598_400),
        ((4096, 14336, 1024, 32), 1, 1_376_256),
        ((4096, 14336, 1024, 32), 20, 27_525_120),
    ],
    ids=[
        "Llama-7B-1",
        "Llama-7B-20",
        "Llama-13B-1",
        "Llama-13B-20",
        "Llama-3-8B-1",
        "Llama-3-8B-20",
    ],
)
def test_the_trainable_counts_of_the_paper(shape, k, trainable):
    """Of Llama-7B, Llama-13B and Llama-3-8B; of the first it reports 0.020 % and 0.404 %."""
    model = llama(*shape)
    dense = sum(p.numel() for p in model.parameters())
    summary = nk.adapt(model, nk.NeuroAdaConfig(k=k))
    assert summary.trainable == trainable
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert summary.total == dense + trainable
    assert summary.adapter_bytes == 8 * trainable
    assert summary.optimizer_bytes == 8 * trainable
    assert len(summary.modules) == 7 * shape[-1]


def empty(**options: object) -> Model:
    with torch.device("meta"):
        model = Model()
    nk.adapt(model, 2, TARGETS, **options)
    return model


def assert_as_if_at_once(model: nn.Module, **options: object) -> None:
    expected = Model()
    nk.adapt(expected, 2, TARGETS, **options)
    for name in NAMES:
        layer, other = model.get_submodule(name), expected.get_submodule(name)
        assert torch.equal(layer.index, other.index), name
        assert torch.equal(layer.delta, torch.zeros_like(other.delta)), name
        assert layer.delta.requires_grad
        assert not layer.weight.requires_grad
    assert torch.equal(model(inputs()), expected(inputs()))
    model(inputs()).sum().backward()
    assert all(model.get_submodule(name).delta.grad.any() for name in NAMES)


OPTIONS = [
    {},
    {"selection": "smallest", "neuron_fraction": 0.5},
    {"selection": "random", "seed": 4},
    {"layer_type": nk.ReferenceNeuroAdaLinear},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("how", ["assigned", "copied"])
def test_connections_are_chosen_when_values_have_come(how, options):
    model = empty(**options)
    if how == "copied":
        model.to_empty(device="cpu")
    model.load_state_dict(Model().state_dict(), strict=False, assign=how == "assigned")
    assert nk.select_connections(model) == []
    assert_as_if_at_once(model, **options)


@pytest.mark.parametrize("how", ["assigned", "copied", "moved twice"])
def test_a_state_dict_completed_by_the_models_own_is_no_choice(how):
    """As torch completes it in set_model_state_dict, for keys that the base lacks."""
    model = empty()
    if how != "assigned":
        model.to_empty(device="cpu")
    if how == "moved twice":
        model._apply(lambda tensor: torch.full_like(tensor, 1))  # what to_empty may find there
    state = {**model.state_dict(), **Model().state_dict()}
    loaded = model.load_state_dict(state, assign=how == "assigned")
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    assert all(model.get_submodule(name).deferred for name in NAMES)
    assert nk.select_connections(model) == []
    assert_as_if_at_once(model)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shards_may_come_one_after_the_other_in_any_order(options):
    model = empty(**options)
    state = Model().state_dict()
    waiting = set(NAMES)
    for name in reversed(NAMES):
        part = {key: state.pop(key) for key in list(state) if key.startswith(name)}
        model.load_state_dict(part, strict=False, assign=True)
        waiting.remove(name)
        assert set(nk.select_connections(model)) == waiting
    model.load_state_dict(state, strict=False, assign=True)
    assert_as_if_at_once(model, **options)


def test_a_copy_waits_as_well():
    model = copy.deepcopy(empty(selection="random", seed=4))
    model.load_state_dict(Model().state_dict(), strict=False, assign=True)
    assert nk.select_connections(model) == []
    assert_as_if_at_once(model, selection="random", seed=4)


@pytest.mark.parametrize("strategy", ["resident", "auto"])
def test_the_strategy_is_taken_up_with_the_values(strategy):
    model = empty(strategy=strategy)
    model.load_state_dict(Model().state_dict(), strict=False, assign=True)
    assert {model.get_submodule(name).strategy for name in NAMES} == {"bypass"}
    nk.select_connections(model)
    assert {model.get_submodule(name).strategy for name in NAMES} == {"resident"}
    assert_as_if_at_once(model, strategy=strategy)


@pytest.mark.parametrize("strategy", ["resident", "auto"])
def test_a_weight_that_turns_out_to_be_shared_is_not_resident(strategy):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    nk.adapt(model, 2, ["0"], strategy=strategy)
    weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    model[0].weight = model[1].weight = weight
    if strategy == "resident":
        with pytest.raises(ValueError, match=r"0: strategy: 'resident' .* shared with 1"):
            nk.select_connections(model)
    else:
        assert nk.select_connections(model) == []
        assert "shared with 1.weight" in model[0].strategy_reason
    assert model[0].strategy == "bypass"


@pytest.mark.parametrize("layer_type", [nk.NeuroAdaLinear, nk.ReferenceNeuroAdaLinear])
def test_a_layer_made_without_values(layer_type):
    layer = layer_type(6, 4, 2, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.zero_()
    assert layer.connections == 8
    assert layer.select_connections()
    assert torch.equal(layer.index, nk.order_slots(nk.select(layer.weight, 2)))
    expected = nn.functional.linear(inputs(), layer.weight, layer.bias)
    torch.testing.assert_close(layer(inputs()), expected)


def test_selecting_again_changes_nothing():
    model = adapted()
    with Unchanged(model):
        assert nk.select_connections(model) == []


def test_before_that_the_layer_refuses_to_run(tmp_path: Path):
    """With what memory held, the index could pass for one."""
    model = empty()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    for name in NAMES:
        model.get_submodule(name)._buffers["index"].zero_()
    for call in (lambda: model(inputs()), lambda: nk.merge(model)):
        with pytest.raises(RuntimeError, match=r"not chosen yet.*select_connections"):
            call()
    with pytest.raises(ValueError, match=r"blocks\.0\.up: index: not chosen yet"):
        nk.save_adapter(model, tmp_path / "adapter")


def test_without_values_the_shapes_can_be_run():
    model = empty()
    y = model(inputs().to("meta"))
    assert (y.shape, y.device.type) == ((5, 4), "meta")


@pytest.mark.parametrize("start", ["meta", "empty"])
def test_an_adapter_or_a_state_dict_brings_its_connections(tmp_path, start):
    saved = adapted(selection="smallest")
    nk.save_adapter(saved, tmp_path / "adapter")

    def filled() -> nn.Module:
        model = empty()
        if start == "empty":
            model.to_empty(device="cpu")
        model.load_state_dict(Model().state_dict(), strict=False, assign=start == "meta")
        return model

    model = filled()
    nk.load_adapter(model, tmp_path / "adapter")
    assert nk.select_connections(model) == []
    assert torch.equal(model(inputs()), saved(inputs()))

    model = filled()
    model.load_state_dict(saved.state_dict(), assign=start == "meta")
    assert nk.select_connections(model) == []
    assert torch.equal(model(inputs()), saved(inputs()))


@pytest.mark.parametrize("strategy", ["bypass", "auto", "resident"])
@pytest.mark.parametrize("by", ["adapter", "state dict"])
def test_loaded_connections_say_that_the_strategy_is_not_taken_up(tmp_path, strategy, by):
    saved = adapted(selection="smallest")
    model = empty(strategy=strategy)
    model.load_state_dict(Model().state_dict(), strict=False, assign=True)
    if by == "adapter":
        nk.save_adapter(saved, tmp_path / "adapter")
        nk.load_adapter(model, tmp_path / "adapter")
    else:  # of tensors that are the model's own from then on
        model.load_state_dict(copy.deepcopy(saved.state_dict()), assign=True)
    for name in NAMES:
        layer = model.get_submodule(name)
        assert layer.strategy == "bypass"
        assert (layer.strategy_reason is None) == (strategy == "bypass")
        assert ("its connections were loaded" in repr(layer)) == (strategy != "bypass")
    assert nk.set_strategy(model, strategy) == {}
    assert model.get_submodule(NAMES[0]).strategy == (
        "bypass" if strategy == "bypass" else "resident"
    )
    torch.testing.assert_close(model(inputs()), saved(inputs()))


def test_the_strategy_of_a_model_without_values_waits_as_well():
    model = empty()
    assert nk.set_strategy(model, "resident") == {}
    model.load_state_dict(Model().state_dict(), strict=False, assign=True)
    nk.select_connections(model)
    assert all(model.get_submodule(name).strategy == "resident" for name in NAMES)


def test_a_failed_load_leaves_it_waiting(tmp_path, monkeypatch):
    nk.save_adapter(adapted(), tmp_path / "adapter")
    model = empty()
    model.load_state_dict(Model().state_dict(), strict=False, assign=True)

    def failing(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(nk.NeuroAdaLinear, "_make_plan", failing)
        with pytest.raises(MemoryError):
            nk.load_adapter(model, tmp_path / "adapter")
    assert nk.select_connections(model) == []
    assert_as_if_at_once(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 7}, "k: 7, expected 1 to 6"),
        ({"selection": "scores", "scores": {"0": torch.zeros(1, 1)}}, r"0: scores: shape \[1, 1\]"),
        ({"neuron_fraction": 0.0}, "neuron_fraction: 0.0, expected a share"),
    ],
    ids=str,
)
def test_what_can_be_refused_without_values_is(options, message):
    model = nn.Sequential(nn.Linear(6, 4, device="meta"))
    with pytest.raises(ValueError, match=message):
        nk.adapt(model, **options)
    assert type(model[0]) is nn.Linear


def test_nan_is_found_when_values_have_come():
    model = empty()
    state = Model().state_dict()
    state["blocks.1.up.weight"][0, 0] = float("nan")
    model.load_state_dict(state, strict=False, assign=True)
    with pytest.raises(ValueError, match=r"blocks\.1\.up: weight: has NaN"):
        nk.select_connections(model)


def test_a_share_may_be_any_real_number():
    share = torch.tensor(0.5, dtype=torch.float32).numpy()[()]
    assert (nk.NeuroAdaLinear(6, 4, neuron_fraction=share).index >= 0).sum() == 2


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_scores_with_another_method_are_refused(device):
    options = {"selection": "random", "scores": torch.zeros(4, 6), "device": device}
    with pytest.raises(ValueError, match="scores: given with method 'random'"):
        nk.NeuroAdaLinear(6, 4, **options)
