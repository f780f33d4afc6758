"""The life of adapters under PEFT: trained, saved, loaded, switched, mixed, deleted."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from small_llama import batch, changed, curve, give_values, layers, llama, logits, trainable, values
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels.convert import convert_adapter
from neuroada_kernels.integrations.peft import NeuroAdaPeftConfig, set_connections
from neuroada_kernels.integrations.peft.model import adapted_layers

QUERY = "model.layers.0.self_attn.q_proj"


def adapted(model: nn.Module | None = None, name: str = "default", **fields: object) -> PeftModel:
    model = llama() if model is None else model
    return get_peft_model(model, NeuroAdaPeftConfig(**{"k": 4} | fields), name).eval()


def second(model: PeftModel, name: str = "other", **fields: object) -> PeftModel:
    """With another adapter beside the first, both with values, the first one active."""
    give_values(model, 1)
    model.add_adapter(name, NeuroAdaPeftConfig(**{"k": 3, "selection": "random"} | fields))
    model.set_adapter(name)
    give_values(model, 2)
    model.set_adapter("default")
    return model.eval()


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 4},
        {"k": 3, "selection": "random", "seed": 5, "neuron_fraction": 0.5},
        {"k": 2, "target_modules": ["q_proj", "down_proj"], "k_pattern": {"down_proj": 5}},
        {"k": 1, "layers": 1, "exclude_modules": ["o_proj"], "delta_dtype": "bfloat16"},
        {"k": 1, "target_modules": r".*\.(up|gate)_proj"},
    ],
)
def test_it_is_the_package_s_own_adapter(fields):
    """The same connections, and every step of a training run the same bits."""
    own, theirs = llama(), adapted(**fields)
    nk.adapt(own, nk.NeuroAdaConfig(**fields))
    wrapped = adapted_layers(theirs)
    assert wrapped.keys() == layers(own).keys()
    for name, layer in layers(own).items():
        assert wrapped[name].neuroada_index["default"].equal(layer.index)
        assert wrapped[name].neuroada_delta["default"].dtype == layer.delta.dtype
    assert curve(theirs, 3) == curve(own, 3)


def test_only_adapter_parameters_change():
    model = adapted()
    before = values(model)
    curve(model, 2)
    assert changed(model, before) == {n for n in before if n.endswith("neuroada_delta.default")}
    assert all(name.endswith("neuroada_delta.default") for name in trainable(model))


@pytest.mark.parametrize("is_trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_what_was_saved_is_loaded(tmp_path, low_cpu_mem_usage, is_trainable):
    """Its connections too, which the base would not choose again."""
    model = give_values(adapted(selection="random", seed=3))
    connections = {QUERY: torch.arange(128, dtype=torch.int32).reshape(32, 4) % 32}
    set_connections(model, connections)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"neuroada_delta", "neuroada_index"}
    assert sum(t.nbytes for t in saved.values()) == 8 * sum(
        p.numel() for p in trainable(model).values()
    )

    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable}
    loaded = PeftModel.from_pretrained(llama(), tmp_path, **options)
    assert logits(loaded).equal(logits(model))
    assert bool(trainable(loaded)) == is_trainable
    if is_trainable:
        assert curve(loaded, 2) == curve(model, 2)


def test_a_frozen_adapter_chooses_nothing_before_it_is_loaded(tmp_path):
    adapted().save_pretrained(tmp_path)
    for is_trainable, refusal in (
        (False, nullcontext()),
        (True, pytest.raises(ValueError, match="NaN")),
    ):
        broken = llama()
        nn.init.constant_(broken.get_submodule(QUERY).weight, torch.nan)  # not to choose by
        with refusal:
            PeftModel.from_pretrained(broken, tmp_path, is_trainable=is_trainable)


def test_the_package_s_own_file_is_made_of_peft_s(tmp_path):
    """With its biases, and without the neurons that have no connections."""
    base = llama(attention_bias=True)
    base.save_pretrained(tmp_path / "base")
    model = give_values(adapted(base, neuron_fraction=0.5, bias="all", modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "base", tmp_path / "own.safetensors")
    own = llama(attention_bias=True)
    nk.load_adapter(own, tmp_path / "own.safetensors")
    torch.testing.assert_close(logits(own), logits(model))


def damaged(saved: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    name = f"base_model.model.{QUERY}.neuroada_index"
    index = saved.pop(name)
    if how == "out of range":
        return saved | {name: index + 30}
    if how == "repeated":
        return saved | {name: index[:, :1].repeat(1, 4)}
    if how == "narrow":
        return saved | {name: index[:, :3].contiguous()}
    return saved


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("out of range", "q_proj.*out of range for a weight with 32 inputs"),
        ("repeated", "q_proj.*stands twice in row 0"),
        ("narrow", "size mismatch"),
        ("missing", "q_proj.neuroada_index: missing beside"),
    ],
)
def test_a_wrong_index_in_a_file_is_refused(tmp_path, how, message):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(damaged(load_file(path), how), path)
    with pytest.raises((RuntimeError, ValueError), match=message):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_state_dict_goes_from_one_adapter_into_another():
    source = second(adapted())
    target = adapted(name="elsewhere", k=3, selection="smallest")
    set_peft_model_state_dict(
        target, get_peft_model_state_dict(source, adapter_name="other"), "elsewhere"
    )
    source.set_adapter("other")
    assert logits(target).equal(logits(source))


def test_copies_and_pickles_compute_the_same(tmp_path):
    model = give_values(adapted())
    torch.save(model, tmp_path / "whole.pt")
    model.save_pretrained(tmp_path, safe_serialization=False)
    expected = trained_once(model)
    for other in (
        copy.deepcopy(model),
        torch.load(tmp_path / "whole.pt", weights_only=False),
        PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True),
    ):
        assert trained_once(other) == expected


def test_a_model_whose_memory_was_emptied_is_loaded_again():
    model = adapted(nn.Sequential(nn.Linear(8, 6)), k=2, target_modules=["0"])
    give_values(model)
    x, state = torch.randn(3, 8), values(model)
    expected = model(x)
    model._apply(lambda tensor: torch.full_like(tensor, 99))  # what to_empty may find there
    with pytest.raises(ValueError, match="index: column 99 in row 0 is out of range"):
        model(x)
    model.load_state_dict(state)
    assert model(x).equal(expected)


def test_an_ensemble_runs_under_vmap():
    models = [adapted(nn.Sequential(nn.Linear(8, 6)), k=2, target_modules=["0"]) for _ in range(2)]
    for seed, model in enumerate(models):
        give_values(model, seed)
    stacked = torch.func.stack_module_state(models)
    x = torch.randn(3, 8)
    y = torch.func.vmap(lambda *state: torch.func.functional_call(models[0], state, x))(*stacked)
    torch.testing.assert_close(y, torch.stack([model(x) for model in models]))


def trained_once(model: nn.Module) -> list[float]:
    """The losses of two steps by the same adapter, which is then as it was."""
    before = values(model)
    losses = curve(model, 2)
    model.load_state_dict(before)
    return losses


def test_several_adapters_are_switched_and_summed():
    model = second(adapted())
    first = logits(model)
    model.set_adapter("other")
    other = logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    x = torch.randn(5, 32)
    layer = adapted_layers(model)[QUERY]
    weight = layer.base_layer.weight
    for name in ("default", "other"):
        index, delta = layer.neuroada_index[name], layer.neuroada_delta[name]
        weight = weight.scatter_add(1, index.long(), delta)
    torch.testing.assert_close(layer(x), x @ weight.T)
    model.set_adapter("default")
    assert logits(model).equal(first)
    assert not any(a.equal(b) for a, b in ((first, other), (first, both), (other, both)))


def test_an_adapter_of_other_modules_is_the_base_elsewhere():
    model = adapted(target_modules=["q_proj"])
    give_values(model)
    model.add_adapter("other", NeuroAdaPeftConfig(target_modules=["v_proj"]))
    model.set_adapter("other")
    assert logits(model).equal(logits(llama()))
    assert all("v_proj" in name for name in trainable(model))


def test_both_adapters_are_saved_each_by_itself(tmp_path):
    model = second(adapted())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert logits(loaded).equal(logits(model))


def test_disabled_and_deleted_adapters_leave_the_base():
    model = second(adapted())
    first = logits(model)
    with model.disable_adapter():
        assert logits(model).equal(logits(llama()))
    assert logits(model).equal(first)
    model.delete_adapter("other")
    assert logits(model).equal(first)
    layer = adapted_layers(model)[QUERY]
    assert [*layer.neuroada_delta] == [*layer.neuroada_index] == ["default"]
    with pytest.raises(ValueError, match="other"):
        model.set_adapter("other")
    model.delete_adapter("default")
    assert logits(model.base_model).equal(logits(llama()))
    assert logits(model.base_model.unload()).equal(logits(llama()))


def test_modules_to_save_and_biases_train_and_are_saved(tmp_path):
    base = llama(attention_bias=True)
    model = adapted(base, modules_to_save=["lm_head"], bias="all", target_modules=["q_proj"])
    ends = {name.rpartition(".")[2] for name in trainable(model)}
    assert ends == {"default", "bias", "weight"}
    curve(model, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(attention_bias=True), tmp_path)
    assert logits(loaded).equal(logits(model))
    assert not load_file(tmp_path / "adapter_model.safetensors")[
        f"base_model.model.{QUERY}.base_layer.bias"
    ].equal(torch.zeros(32))


def test_rows_of_a_batch_have_adapters_of_their_own():
    model = second(adapted(modules_to_save=["lm_head"]), modules_to_save=["lm_head"])
    names = ["other", "__base__", "default", "other"]
    tokens = batch(0)
    mixed = model(input_ids=tokens, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            expected = logits(llama(), tokens)
        else:
            model.set_adapter(name)
            expected = logits(model, tokens)
        torch.testing.assert_close(mixed[row], expected[row])
    assert logits(model).shape == mixed.shape, "no hook stays behind"


def test_beams_have_the_adapter_of_their_row():
    model = second(adapted())
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    tokens = batch(0, rows=2)
    mixed = model.generate(input_ids=tokens, adapter_names=["other", "default"], **options)
    assert mixed[1:].equal(model.generate(input_ids=tokens[1:], **options))
    model.set_adapter("other")
    assert mixed[:1].equal(model.generate(input_ids=tokens[:1], **options))


def test_wrong_names_for_rows_are_refused():
    model = second(adapted())
    tokens = batch(0)
    with pytest.raises(ValueError, match=r"non-existing adapter.*: absent"):
        model(input_ids=tokens, adapter_names=["absent"] * 4)
    with pytest.raises(ValueError, match="same as the number of inputs, but got 3 and 4"):
        model(input_ids=tokens, adapter_names=["other"] * 3)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(input_ids=tokens, adapter_names=["other"] * 4)
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(input_ids=tokens, adapter_names=["other"] * 4)


def test_transformers_adds_and_loads_adapters_by_itself(tmp_path):
    model = llama()
    model.add_adapter(NeuroAdaPeftConfig(k=4), "mine")
    give_values(model)
    assert all("neuroada_delta.mine" in name for name in trainable(model))
    expected = logits(model)
    set_connections(model, {QUERY: torch.full((32, 4), -1, dtype=torch.int32)}, "mine")
    assert not logits(model).equal(expected)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = llama()
    loaded.load_adapter(tmp_path)
    assert logits(loaded).equal(expected)
    loaded.disable_adapters()
    assert logits(loaded).equal(logits(llama()))
    loaded.enable_adapters()
    loaded.delete_adapter("default")
    assert logits(loaded).equal(logits(llama()))


def test_a_weighted_sum_of_adapters_is_one(tmp_path):
    model = second(adapted(), k=4, selection="magnitude")
    model.add_weighted_adapter(["default", "other"], [0.25, -2.0], "sum")
    model.set_adapter("sum")
    layer = adapted_layers(model)[QUERY]
    delta = layer.neuroada_delta
    torch.testing.assert_close(delta["sum"], 0.25 * delta["default"] - 2 * delta["other"])
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "sum")
    assert logits(loaded).equal(logits(model))


def test_an_adapter_that_a_sum_has_twice_counts_twice():
    model = adapted()
    give_values(model, 1)
    model.add_weighted_adapter(["default", "default"], [1.0, 3.0], "sum")
    delta = adapted_layers(model)[QUERY].neuroada_delta
    assert delta["default"].any()
    torch.testing.assert_close(delta["sum"], 4 * delta["default"])


@pytest.mark.parametrize("layers", [7, [0, 7]])
def test_layers_that_the_model_lacks_are_refused(layers):
    with pytest.raises(ValueError, match=r"layers: no module of target_modules is in \[7\]"):
        get_peft_model(llama(), NeuroAdaPeftConfig(k=1, layers=layers))


def test_a_sum_over_different_connections_is_refused():
    model = second(adapted())
    before = set(adapted_layers(model)[QUERY].neuroada_delta)
    with pytest.raises(ValueError, match=r"chose different connections in model\.layers\.0"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    with pytest.raises(ValueError, match="'absent' does not exist"):
        model.add_weighted_adapter(["default", "absent"], [1, 1], "sum")
    with pytest.raises(ValueError, match=r"weights: \[1\], expected 2, one for each adapter"):
        model.add_weighted_adapter(["default", "other"], [1], "sum")
    with pytest.raises(ValueError, match="weights: nan, expected a finite number"):
        model.add_weighted_adapter(["default"], [float("nan")], "sum")
    with pytest.raises(ValueError, match="there is an adapter 'other' already"):
        model.add_weighted_adapter(["default"], [1], "other")
    with pytest.raises(ValueError, match="combination_type: 'svd'"):
        model.add_weighted_adapter(["default"], [1], "sum", combination_type="svd")
    assert set(adapted_layers(model)[QUERY].neuroada_delta) == before
    assert "sum" not in model.peft_config


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("model.absent", torch.zeros(1, 1, dtype=torch.int32), "model.absent has no adapter"),
        (QUERY, torch.zeros(32, 3, dtype=torch.int32), r"shape \[32, 3\], expected \[32, 4\]"),
        (QUERY, torch.full((32, 4), 1, dtype=torch.int32), f"{QUERY}: index: .* stands twice"),
        (QUERY, torch.full((32, 4), 32, dtype=torch.int32), f"{QUERY}: index: column 32 in row 0"),
        (QUERY, torch.zeros(32, 4, dtype=torch.int64), f"{QUERY}: index: .* expected torch.int32"),
        (QUERY, None, f"connections: {QUERY}: index: NoneType, expected an int32 tensor"),
    ],
)
def test_connections_that_do_not_fit_are_refused(name, index, message):
    model = give_values(adapted())
    before = values(model)
    with pytest.raises((TypeError, ValueError), match=message):
        set_connections(model, {name: index})
    assert not changed(model, before)


def test_an_index_that_is_wrong_leaves_the_one_that_is_there():
    held = adapted_layers(adapted())[QUERY].neuroada_index
    before = held["default"].clone()
    with pytest.raises(ValueError, match="index: column 32 in row 0 is out of range"):
        held["default"] = torch.full_like(before, 32)
    assert held["default"].equal(before)


def test_a_weight_of_the_base_that_trains_gets_its_gradient():
    model = give_values(adapted(), 1)
    weight = adapted_layers(model)[QUERY].base_layer.weight.requires_grad_()
    model(input_ids=batch(0)).logits.sum().backward()
    assert weight.grad.any()


@pytest.mark.parametrize("how", ["copied", "written in place"])
def test_it_trains_after_a_forward_in_inference_mode(how):
    """Which is the first to see that the index is another one, and plans it."""
    model = adapted(target_modules=["q_proj"])
    if how == "copied":
        model = copy.deepcopy(model)
    else:
        for layer in adapted_layers(model).values():
            layer.neuroada_index["default"].add_(0)
    with torch.inference_mode():
        model(batch(0))
    model(batch(0)).logits.sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())
