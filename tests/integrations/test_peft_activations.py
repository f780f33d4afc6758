"""What layers under PEFT keep of x: as ``nk.adapt``'s, for all adapters that are active."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from gated_block import (
    WIDTH,
    Block,
    assert_same_bits,
    block_of,
    gradients,
    kept_bytes,
    tokens,
    unadapted_block,
)
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuroada_kernels import NeuroAdaConfig
from neuroada_kernels.integrations.peft import NeuroAdaPeftConfig, NeuroAdaPeftLinear
from neuroada_kernels.integrations.peft import set_connections as put_connections

MODES = ("full", "compact", "auto")


def adapted(mode: str, base: Block | None = None, **options: object) -> PeftModel:
    """A block under PEFT, with the deltas that :func:`block_of` has."""
    config = NeuroAdaPeftConfig(**{"k": 2, "save_activations": mode} | options)
    model = get_peft_model(unadapted_block() if base is None else base, config)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.neuroada_delta["default"].normal_(std=0.1)
    return model


def layers_of(model: nn.Module) -> list[NeuroAdaPeftLinear]:
    return [m for m in model.modules() if isinstance(m, NeuroAdaPeftLinear)]


def qkv_of(model: nn.Module) -> list[NeuroAdaPeftLinear]:
    names = ("q_proj", "k_proj", "v_proj")
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, NeuroAdaPeftLinear)}
    return [layer for name, layer in adapted.items() if name.endswith(names)]


def columns_of(layer: NeuroAdaPeftLinear, adapter: str = "default") -> list[int] | None:
    """Those that a layer keeps for an adapter; None where it keeps x."""
    x = torch.randn(3, layer.in_features)
    layer.neuroada_index.plan(adapter)
    kept = layer.neuroada_index.keep(adapter, x, layer.neuroada_delta[adapter])
    if kept is None:
        return None
    return [int((x == column[:, None]).all(0).nonzero()) for column in kept[0].unbind(1)]


def chosen(*layers: NeuroAdaPeftLinear, adapters: tuple[str, ...] = ("default",)) -> list[int]:
    indices = [layer.neuroada_index[name].flatten() for layer in layers for name in adapters]
    return sorted(set(torch.cat(indices).tolist()))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_the_gradients_are_the_same_bits_and_the_bytes_those_of_adapt(autocast):
    results, x = {}, tokens().requires_grad_()
    for mode in MODES:
        own, model = block_of(save_activations=mode), adapted(mode)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept = kept_bytes(model, lambda: model(x))  # noqa: B023
            assert kept == kept_bytes(own, lambda: own(x))  # noqa: B023
            results[mode] = kept, gradients(model, x.detach())
    assert results["auto"][0] == results["compact"][0] < 0.9 * results["full"][0]
    for mode in ("compact", "auto"):
        assert_same_bits(results[mode][1], results["full"][1])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_changes_no_bit(reentrant):
    model, x = adapted("compact"), tokens()
    expected = gradients(model, x)
    again = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert_same_bits(again, expected)


def test_siblings_keep_the_columns_of_all_of_them():
    model = adapted("compact", k=1, selection="random", target_modules=["q_proj", "k_proj"])
    expected = chosen(*qkv_of(model))
    assert WIDTH > len(expected) > max(len(chosen(layer)) for layer in qkv_of(model))
    assert [columns_of(layer) for layer in qkv_of(model)] == [expected] * 2


def test_adapters_have_a_say_while_they_are_active():
    model = adapted("compact", target_modules=["q_proj", "k_proj"])
    q, k = qkv_of(model)[:2]
    other = NeuroAdaPeftConfig(
        k=2, target_modules=["q_proj"], selection="random", save_activations="compact"
    )
    model.add_adapter("other", other)
    alone, both = chosen(q, k), sorted({*chosen(q, k), *chosen(q, adapters=("other",))})
    assert len(alone) < len(both) < WIDTH
    assert columns_of(q) == columns_of(k) == alone
    model.base_model.set_adapter(["default", "other"])
    assert columns_of(q) == columns_of(k) == columns_of(q, "other") == both
    model.set_adapter("other")
    assert columns_of(q, "other") == chosen(q, adapters=("other",))
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert columns_of(q) == columns_of(k) == alone


def test_two_active_adapters_get_the_same_bits():
    results, x = [], tokens()
    for mode in ("full", "compact"):
        model = adapted(mode)
        other = NeuroAdaPeftConfig(
            k=1, target_modules=["q_proj", "down_proj"], save_activations=mode
        )
        model.add_adapter("other", other)
        model.base_model.set_adapter(["default", "other"])
        results.append((kept_bytes(model, lambda: model(x)), gradients(model, x)))  # noqa: B023
    assert_same_bits(results[1][1], results[0][1])
    assert results[1][0] < results[0][0]


def test_an_adapter_that_keeps_x_keeps_it_for_all():
    model = adapted("compact")
    model.add_adapter(
        "other", NeuroAdaPeftConfig(target_modules=["q_proj"], save_activations="full")
    )
    assert columns_of(qkv_of(model)[0]) is not None
    model.base_model.set_adapter(["default", "other"])
    assert [columns_of(layer) for layer in qkv_of(model)] == [None] * 3


def put(model: PeftModel, name: str, index: Tensor) -> None:
    put_connections(model, {name: index})


def write(model: PeftModel, name: str, index: Tensor) -> None:
    model.get_base_model().get_submodule(name).neuroada_index["default"].copy_(index)


def load(model: PeftModel, name: str, index: Tensor) -> None:
    key = f"base_model.model.{name}.neuroada_index.default"
    model.load_state_dict({key: index}, strict=False)


@pytest.mark.parametrize("change", [put, write, load])
def test_the_columns_follow_the_index(change):
    model = adapted("compact")
    q = qkv_of(model)[0]
    change(model, "self_attn.q_proj", (q.neuroada_index["default"] + 9) % WIDTH)
    assert columns_of(q) == columns_of(qkv_of(model)[2]) == chosen(*qkv_of(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_among_themselves(duplicate):
    model, x = adapted("compact").get_base_model(), tokens()
    twin = duplicate(model)
    assert kept_bytes(twin, lambda: twin(x)) == kept_bytes(model, lambda: model(x))
    assert_same_bits(gradients(twin, x), gradients(model, x))
    q = qkv_of(twin)[0]
    q.neuroada_index["default"] = (q.neuroada_index["default"] + 9) % WIDTH
    assert columns_of(qkv_of(twin)[1]) == chosen(*qkv_of(twin)) != chosen(*qkv_of(model))
    assert columns_of(qkv_of(model)[1]) == chosen(*qkv_of(model))


def test_it_compiles_to_one_graph_of_the_same_gradients():
    torch.compiler.reset()
    model, x = adapted("compact").get_base_model(), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradients(model, x, compiled), gradients(model, x), strict=True):
        torch.testing.assert_close(found, expected)
    torch.compiler.reset()


def test_the_mode_is_saved_and_loaded(tmp_path):
    adapted("compact").save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["save_activations"] == "compact"
    )
    for low in (False, True):
        loaded = PeftModel.from_pretrained(
            unadapted_block(), tmp_path, is_trainable=True, low_cpu_mem_usage=low
        )
        assert [columns_of(layer) for layer in qkv_of(loaded)] == [chosen(*qkv_of(loaded))] * 3


def test_a_weighted_sum_keeps_what_its_first_adapter_does():
    model = adapted("compact")
    model.base_model.add_weighted_adapter(["default"], [2.0], "twice")
    model.set_adapter("twice")
    q = qkv_of(model)[0]
    assert q.neuroada_index.save_activations("twice") == "compact"
    assert columns_of(q, "twice") == chosen(*qkv_of(model))


def test_it_has_the_default_of_the_package_and_refuses_the_rest():
    assert NeuroAdaPeftConfig().save_activations == NeuroAdaConfig().save_activations
    with pytest.raises(ValueError, match="save_activations: 'some', expected one of"):
        NeuroAdaPeftConfig(save_activations="some")
