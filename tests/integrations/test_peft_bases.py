"""Beside what kinds of modules adapters can be put, and which are refused before any change."""

from __future__ import annotations

from collections.abc import Callable

import foreign
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from small_llama import changed, give_values, llama, logits, trainable, values
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import neuroada_kernels as nk
from neuroada_kernels.integrations.peft import NeuroAdaPeftConfig, set_connections
from neuroada_kernels.integrations.peft import layer as layer_module
from neuroada_kernels.integrations.peft.model import adapted_layers


class Int8Linear(nn.Module):
    """A quantised linear: one byte a weight, a scale for each row, products in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.quantise(linear.weight.detach())

    def quantise(self, weight: Tensor) -> None:
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))

    def dequantised(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.dequantised(), self.bias).to(x.dtype)


class Int8Backend:
    """As PEFT has one for each of the libraries that quantise."""

    backend_name = "int8 of this test"
    supports_merge = True

    def get_base_weight(self, base: Int8Linear) -> Tensor:
        return base.dequantised()

    def set_base_weight(self, layer: nn.Module, weight: Tensor) -> None:
        layer.get_base_layer().quantise(weight)


@pytest.fixture
def backend(monkeypatch) -> Int8Backend:
    found = Int8Backend()
    resolve = layer_module.resolve_quantization_backend
    monkeypatch.setattr(
        layer_module,
        "resolve_quantization_backend",
        lambda base, **options: found if isinstance(base, Int8Linear) else resolve(base, **options),
    )
    return found


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 10)


def adapted(module: nn.Module, **fields: object) -> nn.Module:
    config = NeuroAdaPeftConfig(**{"k": 3, "target_modules": ["0"]} | fields)
    return give_values(get_peft_model(nn.Sequential(module), config), 1)


def x_and_gradients(model: nn.Module) -> list[Tensor]:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
    delta = adapted_layers(model)["0"].neuroada_delta["default"]
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, delta))]


def test_a_transposed_linear_is_the_linear():
    """Conv1D of GPT-2, whose weight is ``[d_in, d_out]``."""
    conv, plain = Conv1D(10, 12), linear()
    conv.weight.data.copy_(plain.weight.T)
    conv.bias.data.copy_(plain.bias)
    found, expected = adapted(conv), adapted(plain)
    index = [adapted_layers(m)["0"].neuroada_index["default"] for m in (found, expected)]
    assert index[0].equal(index[1])
    torch.testing.assert_close(x_and_gradients(found), x_and_gradients(expected))
    before = values(found)
    found.merge_adapter(safe_merge=True)
    expected.merge_adapter()
    assert conv.weight.equal(plain.weight.T)
    found.unmerge_adapter()
    assert not changed(found, before)


def test_a_quantised_linear_trains_and_merges(backend):
    quantised = Int8Linear(linear())
    plain = linear()
    plain.weight.data = quantised.dequantised()
    found, expected = adapted(quantised), adapted(plain)
    torch.testing.assert_close(x_and_gradients(found), x_and_gradients(expected))
    before = x_and_gradients(found)[0]
    found.merge_adapter(safe_merge=True)
    torch.testing.assert_close(x_and_gradients_of_merged(found), before, rtol=0, atol=0.05)
    found.unmerge_adapter()
    torch.testing.assert_close(x_and_gradients(found)[0], before, rtol=0, atol=0.05)


def x_and_gradients_of_merged(model: nn.Module) -> Tensor:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(x)


def test_a_quantised_linear_without_a_way_back_keeps_its_bypass(backend):
    backend.supports_merge = False
    quantised = Int8Linear(linear())
    with pytest.raises(ValueError, match="for 0, whose int8 of this test weight cannot be read"):
        adapted(quantised)
    model = adapted(quantised, selection="random")
    set_connections(model, {"0": nk.select(linear().weight, 3)})
    before = values(model)
    with pytest.raises(TypeError, match="int8 of this test weight, which cannot be merged into"):
        model.merge_adapter()
    assert not changed(model, before)


def test_a_module_of_anybody_s_is_called_and_added_to():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    doubled = Doubled(12, 10)
    doubled.load_state_dict(linear().state_dict())
    model = adapted(doubled)
    layer = adapted_layers(model)["0"]
    x = torch.randn(2, 3, 12)
    index, delta = layer.neuroada_index["default"], layer.neuroada_delta["default"]
    expected = nk.functional.neuroada_bypass(doubled(x), x, index, delta)
    assert model(x).equal(expected)


def test_hooks_of_the_base_are_called():
    """As those are with which accelerate brings offloaded weights into memory."""
    base, calls = linear(), []
    model = adapted(base)
    expected = x_and_gradients(model)
    base.register_forward_hook(lambda *_: calls.append("hook"))
    torch.testing.assert_close(x_and_gradients(model), expected)
    assert calls == ["hook"]

    offloaded = linear()
    weights = {name: p.detach().clone() for name, p in offloaded.named_parameters()}
    model = adapted(offloaded)
    add_hook_to_module(
        offloaded, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    )
    assert offloaded.weight.is_meta
    torch.testing.assert_close(x_and_gradients(model), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_an_adapter_goes_round_one_of_another_method():
    base = llama()
    give_values(get_peft_model(base, LoraConfig(target_modules=["q_proj"])))
    before = logits(base)
    model = get_peft_model(base, NeuroAdaPeftConfig(target_modules=["q_proj"]), "mine").eval()
    assert logits(model).equal(before)
    give_values(model)
    assert not logits(model).equal(before)
    layer = next(iter(adapted_layers(model).values()))
    assert isinstance(layer.base_layer, LoraLayer)
    assert layer.get_base_layer().weight.shape == layer.neuroada_delta["mine"].shape[:1] * 2


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.embedding = nn.Embedding(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_modules": ["first", "embedding"]}, TypeError, "Embedding is not supported"),
        ({"target_modules": ["first", "norm"]}, TypeError, "LayerNorm is not supported"),
        ({"target_modules": ["first", "attention"]}, TypeError, "MultiheadAttention is not"),
        ({"target_modules": ["first", "out_proj"]}, ValueError, "reads the weight without calling"),
        ({"target_modules": ["first"], "k": 9}, ValueError, "k: 9, expected 1 to 8 for first"),
        (
            {"target_modules": ["first"], "k_pattern": {"second": 2}},
            ValueError,
            "k_pattern: 'second' matches no module",
        ),
        ({"target_modules": ["absent"]}, ValueError, "not found in the base model"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_any_change(fields, error, message):
    model = Tower()
    modules = {name: id(module) for name, module in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        get_peft_model(model, NeuroAdaPeftConfig(**fields))
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_base_without_values_waits_for_its_adapter_to_be_loaded(tmp_path):
    connections = {"0": torch.arange(30, dtype=torch.int32).reshape(10, 3) % 12}
    model = adapted(linear())
    set_connections(model, connections)
    give_values(model)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(12, 10))
    config = NeuroAdaPeftConfig(k=3, target_modules=["0"])
    waiting = get_peft_model(empty, config)
    layer = adapted_layers(waiting)["0"]
    assert layer.neuroada_delta["default"].is_meta
    assert layer.neuroada_index["default"].is_meta
    state = model.state_dict()
    waiting.load_state_dict(state, assign=True)
    torch.testing.assert_close(x_and_gradients(waiting), x_and_gradients(model))


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_what_fails_to_be_written_back_leaves_the_layer_as_it_was(backend, monkeypatch):
    model = adapted(Int8Linear(linear()))
    model.add_adapter("other", NeuroAdaPeftConfig(k=2, target_modules=["0"]))
    layer, write = adapted_layers(model)["0"], backend.set_base_weight

    def fail(layer: nn.Module, weight: Tensor) -> None:
        raise OSError("no room")

    def attempt(step: Callable[[], None]) -> None:
        """``step``, which fails and changes nothing before it is let through."""
        before, merged = values(model), list(layer.merged_adapters)
        monkeypatch.setattr(backend, "set_base_weight", fail)
        with pytest.raises(OSError, match="no room"):
            step()
        assert not changed(model, before)
        assert layer.merged_adapters == merged
        monkeypatch.setattr(backend, "set_base_weight", write)
        step()

    expected = x_and_gradients(model)[0]
    attempt(lambda: model.merge_adapter(["default"]))
    attempt(lambda: model.merge_adapter(["default", "other"]))
    assert layer.merged_adapters == ["default", "other"]
    attempt(model.unmerge_adapter)
    assert not layer.merged
    torch.testing.assert_close(x_and_gradients(model)[0], expected, rtol=0, atol=0.05)


def four_bits() -> nn.Module:
    """A 4-bit linear that bitsandbytes would pack for inference, as on a CPU with AVX512-BF16."""
    base = foreign.make("nf4", 64, 64)
    base.support_avx512bf16_for_cpu = True
    return base


def test_evaluation_leaves_4_bit_weights_as_they_train():
    """Also one that is not adapted, but through which a gradient passes."""
    base = nn.Sequential(nn.Linear(64, 64), four_bits(), four_bits())
    config = NeuroAdaPeftConfig(k=2, target_modules=["0", "1"])
    model = give_values(get_peft_model(base, config), 1)
    x = torch.randn(3, 64)

    def gradients() -> list[Tensor]:
        return torch.autograd.grad(model(x).square().sum(), trainable(model).values())

    expected = gradients()
    assert all(gradient.any() for gradient in expected)
    model.eval()
    with torch.no_grad():
        model(x)
    assert all(found.equal(e) for found, e in zip(gradients(), expected, strict=True))


def test_4_bit_weights_that_were_packed_are_not_trained_beside():
    base = nn.Sequential(nn.Linear(64, 64), four_bits())
    base[1].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="1: Linear4bit was packed for inference by an evaluation"):
        get_peft_model(base, NeuroAdaPeftConfig(target_modules=["0"]))
    assert type(base[0]) is nn.Linear
    served = NeuroAdaPeftConfig(target_modules=["0"], inference_mode=True)
    get_peft_model(base, served)
